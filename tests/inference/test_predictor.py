import copy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastroute
from fastroute.data.decode import UnreadableImage
from fastroute.data.module import ImageDataModule
from fastroute.inference import Predictor
from fastroute.inference.preprocessing import Preprocessing
from fastroute.models import create_model, multipath
from fastroute.training import RoutingClassifier
from fastroute.training.evaluation import validation_loader
from tests.inference.conftest import trained


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return fastroute.load(checkpoint, device="cpu")


def paths(images):
    return sorted(str(path) for path in (images / "val").glob("*/*.png"))


def test_knows_what_it_was_trained_on(predictor):
    assert list(predictor.classes) == ["ant", "bee", "cat"]
    assert (predictor.transform.img_size, predictor.transform.in_chans) == (8, 3)
    assert not predictor.model.training and predictor.routed
    assert str(predictor.specification) == "tiny_cc2"
    assert len(repr(predictor)) < 400


def test_predicts_what_validation_sees(predictor, images):
    transform = predictor.transform
    loader, _, _ = validation_loader(
        "imagefolder",
        images,
        batch_size=5,
        img_size=8,
        crop_pct=transform.crop_pct,
        mean=transform.mean,
        std=transform.std,
    )
    with torch.no_grad():
        expected = torch.cat([predictor.model(batch).softmax(1) for batch, _ in loader])
    prediction = predictor(paths(images), batch_size=5)
    torch.testing.assert_close(prediction.probabilities, expected)
    torch.testing.assert_close(prediction.probabilities.sum(1), torch.ones(12))


def test_takes_images_in_every_form(predictor, images):
    path = paths(images)[1]
    expected = predictor(path).probabilities
    assert expected.shape == (1, 3)
    pixels = np.asarray(Image.open(path))
    forms = [
        images / path,
        Path(path).read_bytes(),
        Image.open(path),
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        predictor.transform(path),
        predictor.transform(path)[None],
        pixels[None],
        [path],
    ]
    for form in forms:
        torch.testing.assert_close(predictor(form).probabilities, expected)
    assert len(predictor([])) == 0
    grey = predictor(pixels[..., 0]).probabilities
    torch.testing.assert_close(grey, predictor(np.repeat(pixels[..., :1], 3, 2)).probabilities)


def test_images_of_pillow_are_turned_upright_as_files_are(predictor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    expected = predictor.transform(np.rot90(pixels, 3).copy())
    for form in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert torch.equal(predictor.transform(form), expected)


def test_a_prediction_tells_the_most_probable_classes_and_gates(predictor, images):
    prediction = predictor(paths(images), gates=True)
    rows = prediction.top(2)
    assert [len(row) for row in rows] == [2] * 12
    assert all(row[0][1] >= row[1][1] for row in rows) and [row[0][0] for row in rows] == prediction.labels
    assert len(prediction.top(9)[0]) == 3
    assert {name: tuple(gates.shape) for name, gates in prediction.gates.items()} == {
        "stem_router": (12, 1, 2),
        "stack1_router": (12, 2, 2),
    }
    assert torch.equal(prediction[3].gates["stack1_router"][0], prediction.gates["stack1_router"][3])
    assert prediction[np.int64(3)].labels == prediction[3].labels == [prediction.labels[3]]
    assert torch.equal(prediction[-1].probabilities[0], prediction.probabilities[-1]) and len(list(prediction)) == 12
    assert np.asarray(prediction).shape == (12, 3) and len(repr(prediction)) < 200
    assert predictor(paths(images)[:1]).gates is None


def test_averaged_weights_are_preferred(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    name = "head.0.2.weight"
    for ema, key in ((True, "state_dict"), (False, "current_model_state")):
        network = fastroute.load(checkpoint, ema=ema, device="cpu").model
        assert torch.equal(network.state_dict()[name], saved[key][f"model.{name}"])
    assert not torch.equal(saved["state_dict"][f"model.{name}"], saved["current_model_state"][f"model.{name}"])


def test_converted_networks_load_again(tmp_path, images):
    timm = pytest.importorskip("timm")
    data = ImageDataModule("imagefolder", images, batch_size=24, img_size=16, num_workers=1)
    network = multipath(timm.create_model("test_resnet", num_classes=3), 2, ["layer1", "layer2"], init="copy")
    path = trained(network, data, tmp_path / "run")
    predictor = fastroute.load(path, device="cpu")
    assert str(predictor.specification).startswith("timm:test_resnet") and predictor.specification.paths == 2
    averaged = torch.load(path, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("model."): value for name, value in averaged.items()})
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(predictor(x).probabilities, network.eval()(x).softmax(1))
    module = RoutingClassifier.load_from_checkpoint(path)
    assert module.hparams.num_classes == 3 and torch.equal(module.eval()(x), network(x))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def build(num_classes):
    return Own()


def test_own_code_runs_only_if_it_is_named(tmp_path, images, monkeypatch):
    data = ImageDataModule("imagefolder", images, batch_size=24, img_size=8, num_workers=1)
    by_hand = trained(Own(), data, tmp_path / "hand")
    named = trained(create_model(f"{__name__}:build", 3), data, tmp_path / "named")
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"is .*last\.ckpt; it does not say how its network, a Own, is built"):
        fastroute.load(by_hand)
    given = [fastroute.load(by_hand, model=model)(x).probabilities for model in (Own(), f"{__name__}:build")]
    assert torch.equal(*given)
    with pytest.raises(ValueError, match="own code is imported only where you name it: add --model"):
        fastroute.load(named)
    with pytest.raises(ValueError, match="own code is imported only where you name it"):
        RoutingClassifier.load_from_checkpoint(named)
    predictor = fastroute.load(named, model=f"{__name__}:build")
    assert predictor(x).probabilities.shape == (2, 3) and predictor.specification.name == f"{__name__}:build"


@pytest.mark.parametrize(
    "field, value, message",
    [
        (("hyper_parameters", "specification", "paths"), 10**9, r"\['paths'\] is 1000000000, expected an int from 1"),
        (("hyper_parameters", "specification"), [1], "its specification is a list, expected a dict"),
        (("hyper_parameters", "specification", "name"), "resnet32", "its weights are of another network"),
        (("ImageDataModule", "mean"), "0", r"its ImageDataModule\['mean'\] is '0'"),
        (("ImageDataModule", "classes"), [], "is empty"),
    ],
)
def test_damaged_checkpoints_end_in_a_sentence(checkpoint, tmp_path, field, value, message):
    saved = place = copy.deepcopy(torch.load(checkpoint, weights_only=True))
    for name in field[:-1]:
        place = place[name]
    place[field[-1]] = value
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=rf"checkpoint is .*x\.ckpt; .*{message}"):
        fastroute.load(tmp_path / "x.ckpt")


def test_errors_in_predicting_are_one_sentence(predictor, checkpoint, images, tmp_path):
    (tmp_path / "bad.png").write_text("bad")
    with pytest.raises(UnreadableImage, match=r"bad\.png cannot be read as an image"):
        predictor(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=r"a tensor of the shape \(1, 8, 8\); .* with C=3"):
        predictor(torch.zeros(1, 8, 8))
    with pytest.raises(TypeError, match="image is a int; it must be a path"):
        predictor(3)
    with pytest.raises(TypeError, match=r"image is a ndarray of float64 and the shape \(8, 8\)"):
        predictor(np.zeros((8, 8)))
    with pytest.raises(ValueError, match="tensors of several shapes"):
        predictor([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)])
    with pytest.raises(ValueError, match="k is 0"):
        predictor(paths(images)[0]).top(0)
    with pytest.raises(FileNotFoundError, match=r"checkpoint is none\.ckpt; there is no such file"):
        fastroute.load("none.ckpt")
    with pytest.raises(ValueError, match="mean has 2 numbers; give one, or one for each of 3 channels, in units of 0"):
        fastroute.load(checkpoint, mean=(100, 120))
    for options, error, message in (
        ({"std": 0.0}, ValueError, r"std is \[0.0\]; it must be finite and above 0, in units of 0 to 255"),
        ({"std": [60, 0, 60]}, ValueError, r"std is \[60.0, 0.0, 60.0\]; it must be finite and above 0"),
        ({"mean": float("nan")}, ValueError, r"mean is \[nan\]; it must be finite"),
        ({"crop_pct": 0.0}, ValueError, "crop_pct is 0.0; it must be above 0 and at most 1"),
        ({"img_size": 0}, ValueError, "img_size is 0; it must be at least 1"),
        ({"img_size": 24.0}, TypeError, "img_size is 24.0; it must be an integer"),
    ):
        with pytest.raises(error, match=message):
            fastroute.load(checkpoint, device="cpu", **options)
    with pytest.raises(TypeError, match=r"image is a Tensor of torch.uint8 and the shape \(20, 24, 3\); it must be"):
        predictor(torch.zeros(20, 24, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="it is no checkpoint of a training run"):
        fastroute.load(tmp_path / "bad.png")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is 'cuda'; this machine has no GPU"):
            fastroute.load(checkpoint, device="cuda")
    with pytest.raises(ValueError, match=r"model is .a\.b:c., but checkpoint is .* of 'tiny_cc2'; leave model out"):
        fastroute.load(checkpoint, model="a.b:c")
    for model, name in ((torch.relu, "relu"), (Own, "Own"), (3, 3)):
        with pytest.raises(TypeError, match=rf"model is {name!r}; it must be a torch\.nn\.Module, or 'package"):
            fastroute.load(checkpoint, model=model)


def test_without_statistics_images_are_refused_and_tensors_taken(checkpoint, tmp_path, images):
    saved = torch.load(checkpoint, weights_only=True)
    del saved["ImageDataModule"]
    torch.save(saved, tmp_path / "x.ckpt")
    predictor = fastroute.load(tmp_path / "x.ckpt", device="cpu")
    assert list(predictor.classes) == ["0", "1", "2"] and predictor(torch.zeros(1, 3, 8, 8)).probabilities.shape == (
        1,
        3,
    )
    with pytest.raises(ValueError, match="does not say how its images were normalised; load it with mean"):
        predictor(paths(images)[0])
    given = fastroute.load(tmp_path / "x.ckpt", mean=[127.5], std=[50.0], img_size=8, crop_pct=1.0, device="cpu")
    assert given(paths(images)[0]).probabilities.shape == (1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastroute.load(tmp_path / "x.ckpt", mean=given.transform.mean, std=given.transform.std, device="cpu")
    assert again.transform.mean.tolist() == [127.5] and again.transform.std.tolist() == [50.0]


def test_importing_the_package_needs_torch_alone():
    code = (
        "import sys, fastroute; fastroute.load\n"
        "print([name for name in ('pytorch_lightning', 'torchvision', 'PIL', 'timm') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_gates_are_of_all_images_in_batches_of_any_size(predictor, images):
    together, apart = (predictor(paths(images), gates=True, batch_size=size).gates for size in (12, 5))
    for name, gates in together.items():
        torch.testing.assert_close(apart[name], gates)


def test_probabilities_of_networks_in_bfloat16_sum_to_1():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 50)).bfloat16()
    predictor = Predictor(network, [str(i) for i in range(50)], Preprocessing(2), torch.device("cpu"))
    torch.testing.assert_close(predictor(torch.randn(4, 3, 2, 2)).probabilities.sum(1), torch.ones(4))
