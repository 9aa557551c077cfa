"""From networks, loaders and data modules of the user's own to predictions."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastroute
from fastroute.inference.preprocessing import Preprocessing
from fastroute.models import create_model, multipath
from fastroute.models.specification import CONVERSION, check_conversion, conversion_of, specification_of
from fastroute.nn import CrossConnection, set_gate_norm
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from fastroute.training.checkpoints import read_checkpoint
from fastroute.training.evaluation import evaluate
from fastroute.training.targets import checked_labels
from tests.inference.conftest import tiny_cc2

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec)")  # Lightning's own
QUIET = {"accelerator": "cpu", "epochs": 1, "logger": False}


def network(channels=1, classes=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def loader(labels=None, size=12, channels=1, **options):
    labels = torch.arange(12) % 3 if labels is None else labels
    return DataLoader(TensorDataset(torch.randn(12, channels, size, size), labels), **{"batch_size": 6} | options)


def levels(predictor):
    return predictor.transform.img_size, predictor.transform.in_chans, predictor.transform.crop_pct


@pytest.mark.parametrize("val_size", [None, 16])
def test_a_run_on_a_loader_keeps_the_size_of_its_images(tmp_path, val_size):
    val = None if val_size is None else loader(size=val_size)
    fit(RoutingClassifier(network(), 3), loader(), val, output=tmp_path, **QUIET)
    predictor = fastroute.load(tmp_path / "last.ckpt", model=network(), mean=127.5, std=64.0, device="cpu")
    assert levels(predictor) == (val_size or 12, 1, 1.0)
    assert "mean=[0.5]" in repr(predictor)


def test_a_run_on_a_data_module_keeps_the_size_of_its_images(tmp_path):
    data = ImageDataModule("digits", batch_size=512, img_size=9)
    module = RoutingClassifier(network(classes=10), 10)
    fit(module, data, output=tmp_path, **QUIET)
    assert (module.hparams.in_chans, module.hparams.img_size) == (1, 9)


def test_a_subclass_of_the_data_module_keeps_what_it_is_trained_on(images, tmp_path):
    class Own(ImageDataModule):
        pass

    fit(
        RoutingClassifier(tiny_cc2(num_classes=3), 3),
        Own("imagefolder", images, batch_size=12, img_size=8, num_workers=1),
        output=tmp_path,
        **QUIET,
    )
    predictor = fastroute.load(tmp_path / "last.ckpt", model=tiny_cc2(num_classes=3), device="cpu")
    assert list(predictor.classes) == ["ant", "bee", "cat"] and levels(predictor) == (8, 3, 1.0)
    assert predictor.transform.mean is not None


def test_a_head_that_was_replaced_by_hand_gives_its_own_number_of_classes(tmp_path):
    model = create_model("resnet20")
    model.head[2] = nn.Linear(64, 3)
    fit(RoutingClassifier(model, num_classes=3), loader(channels=3), output=tmp_path, **QUIET)
    predictor = fastroute.load(tmp_path / "last.ckpt", model=copy.deepcopy(model), device="cpu")
    assert list(predictor.classes) == ["0", "1", "2"] and predictor.specification is None


def test_labels_are_integers_or_shares():
    for labels in (torch.tensor([0, 2], dtype=torch.int32), torch.tensor([False, True]), torch.tensor([0, 2]).byte()):
        assert checked_labels(labels).dtype == torch.int64
    shares = torch.rand(2, 3)
    assert checked_labels(shares) is shares
    for labels in (torch.rand(2, 1), torch.zeros(2, 1).long(), torch.zeros(2, 3).long(), torch.rand(2)):
        with pytest.raises(
            ValueError, match=r"labels are \w+ of the shape \(2.*they must be integers \(N,\), or float"
        ):
            checked_labels(labels)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.rand(12, 1), {}, r"labels are float32 of the shape \(6, 1\)"),
        (torch.arange(12) % 4, {}, "the images have 4 classes; the network has 3 logits"),
        (None, {"batch_size": 20, "drop_last": True}, "the data have no batch to train on"),
    ],
)
def test_wrong_data_are_refused_before_the_first_step(labels, options, message, tmp_path):
    for val in (None, loader(labels)) if not options else (None,):
        with pytest.raises(ValueError, match=message):
            fit(
                RoutingClassifier(network(), 3),
                loader(labels, **options),
                val,
                output=tmp_path,
                **QUIET,
            )


def test_networks_of_double_precision_predict_and_are_evaluated(tmp_path):
    model = network().double()
    fit(RoutingClassifier(model, 3), loader(), output=tmp_path, **QUIET)
    predictor = fastroute.load(tmp_path / "last.ckpt", model=network().double(), device="cpu")
    assert predictor(torch.randn(2, 1, 12, 12)).probabilities.shape == (2, 3)
    assert evaluate(model, loader())["images"] == 12


def test_mistakes_in_loading_end_in_a_sentence(checkpoint, tmp_path):
    for name, value in (("std", [0.229, 0.224, 0.225]), ("mean", 0.5)):
        with pytest.raises(ValueError, match=rf"{name} is \[.*units of 0 to 255: multiply it by 255"):
            fastroute.load(checkpoint, device="cpu", **{name: value})
    torch.save(network().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="If it has weights alone, evaluate them by fastroute validate --model"):
        fastroute.load(tmp_path / "weights.pth", model=network())
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    fit(RoutingClassifier(fixed, 3), loader(), output=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="img_size is 20; Sequential cannot take images of 1 × 20 × 20: mat1 and mat2"):
        fastroute.load(tmp_path / "last.ckpt", model=fixed, img_size=20, device="cpu")
    with pytest.raises(ValueError, match=r"own code is not imported here: give create_model\('a:b'"):
        RoutingClassifier("a:b")


def test_data_in_memory_are_scaled_as_a_predictor_scales():
    from fastroute.data.in_memory import Options, _scaled, digits

    for mode, rounding in (("nearest", 0), ("bilinear", 1), ("bicubic", 0)):
        images = torch.randint(256, (2, 24, 24, 3), dtype=torch.uint8)
        for size in (8, 13):
            prepare = Preprocessing(size, 3, 1.0, mode)
            for image, scaled in zip(images, _scaled(images, Options(img_size=size, interpolation=mode)), strict=True):
                assert (
                    torch.from_numpy(prepare.cut(image.numpy()).copy()).int() - scaled.int()
                ).abs().max() <= rounding
        small, large = (digits(Options(img_size=s, interpolation=mode)).train.images[:4] for s in (8, 20))
        prepare = Preprocessing(20, 1, 1.0, mode)
        for image, scaled in zip(small, large, strict=True):
            cut = torch.from_numpy(prepare.cut(image[..., 0].numpy()).copy())
            assert (cut.int() - scaled[..., 0].int()).abs().max() <= rounding


@pytest.mark.parametrize("own_loader", [False, True])
def test_a_run_on_grey_images_is_resumed(own_loader, tmp_path):
    def data():
        return loader(size=8) if own_loader else ImageDataModule("digits", batch_size=512, num_workers=1)

    def module():
        return RoutingClassifier(network(classes=10), 10, sched="step")

    fit(module(), data(), output=tmp_path, **QUIET)
    resumed = fit(module(), data(), output=tmp_path, resume=tmp_path / "last.ckpt", **QUIET | {"epochs": 2})
    assert len(resumed) == 2


def test_data_modules_with_a_state_of_their_own_leave_readable_checkpoints(images, tmp_path):
    class Own(ImageDataModule):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    data = Own("imagefolder", images, batch_size=12, img_size=8, num_workers=1)
    fit(RoutingClassifier(tiny_cc2(num_classes=3), 3), data, output=tmp_path, **QUIET)
    predictor = fastroute.load(tmp_path / "last.ckpt", model=tiny_cc2(num_classes=3), device="cpu")
    assert list(predictor.classes) == ["ant", "bee", "cat"]


def test_sizes_that_no_checkpoint_holds_are_not_kept(tmp_path):
    module = RoutingClassifier(network(5000), 3)
    fit(module, loader(channels=5000, size=3), output=tmp_path, **QUIET)
    assert module.hparams.in_chans == 3
    read_checkpoint(tmp_path / "last.ckpt")


def test_other_data_modules_may_count_other_classes(tmp_path):
    class Data(pl.LightningDataModule):
        num_classes = 100

        def train_dataloader(self):
            return loader()

    module = RoutingClassifier(network(), 3)
    fit(module, Data(), output=tmp_path, **QUIET)
    assert module.hparams.img_size == 12


def test_values_of_0_to_255_may_be_used_as_they_are(checkpoint):
    predictor = fastroute.load(checkpoint, mean=[0, 0, 0], std=[1, 1, 1], device="cpu")
    assert predictor.transform.std.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="units of 0 to 255"):
        fastroute.load(checkpoint, mean=[0, 0, 0], std=[0.5, 1, 1], device="cpu")


def test_a_known_network_is_not_asked_for_images_of_the_run_s_size(tmp_path):
    model = create_model("capsnet", 3, 1, 17)
    fit(RoutingClassifier(model), loader(size=17), output=tmp_path, **QUIET)
    saved = torch.load(tmp_path / "last.ckpt")
    saved["hyper_parameters"]["img_size"] = 32  # as earlier versions kept it
    torch.save(saved, tmp_path / "early.ckpt")
    predictor = fastroute.load(tmp_path / "early.ckpt", device="cpu")
    assert predictor(torch.randn(1, 1, 17, 17)).probabilities.shape == (1, 3)


def test_a_converted_network_of_one_s_own_is_built_by_the_name_of_its_function(own, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    import own_nets

    converted = multipath(own_nets.build(3), 2, ["1"], init="copy", input_size=(3, 12, 12), gate_norm="center")
    fit(RoutingClassifier(converted, 3), loader(channels=3), output=tmp_path, **QUIET)
    levels = {"mean": 127.5, "std": 64.0, "device": "cpu"}
    predictor = fastroute.load(tmp_path / "last.ckpt", model=own, classes=["a", "b", "c"], **levels)
    images = torch.randn(4, 3, 12, 12)
    assert torch.equal(predictor(images).probabilities, converted.eval()(images).softmax(1))
    assert list(predictor.classes) == ["a", "b", "c"] and predictor(images).labels[0] in "abc"
    twice = "own_nets:twice"
    own_nets.twice = lambda num_classes: multipath(
        own_nets.build(num_classes), 2, ["1"], init="copy", input_size=(3, 12, 12), gate_norm="center"
    )
    again = fastroute.load(tmp_path / "last.ckpt", model=twice, **levels)  # which is converted already
    assert torch.equal(again(images).probabilities, predictor(images).probabilities)
    with pytest.raises(ValueError, match=r"they are of a multi-path network: convert yours by multipath"):
        fastroute.load(tmp_path / "last.ckpt", model=own_nets.build(3), **levels)
    saved = torch.load(tmp_path / "last.ckpt")
    saved["conversion"]["paths"] = 99
    torch.save(saved, tmp_path / "wrong.ckpt")
    with pytest.raises(ValueError, match=r"its conversion\['paths'\] is 99, expected an int from 1 to 8"):
        fastroute.load(tmp_path / "wrong.ckpt", model=own, **levels)


def test_routers_that_a_function_makes_are_not_kept(tmp_path):
    converted = multipath(network(3), 2, ["0"], lambda c, m, n: CrossConnection(c, m, n), input_size=(3, 12, 12))
    fit(RoutingClassifier(converted, 3), loader(channels=3), output=tmp_path, **QUIET)
    assert "conversion" not in torch.load(tmp_path / "last.ckpt")


def test_names_of_classes_are_as_many_as_logits(checkpoint):
    named = fastroute.load(checkpoint, classes=["a", "b", "c"], device="cpu")
    assert list(named.classes) == ["a", "b", "c"] != list(fastroute.load(checkpoint, device="cpu").classes)
    with pytest.raises(ValueError, match="classes has 2 names; it must have one for each of 3 logits"):
        fastroute.load(checkpoint, classes=["a", "b"], device="cpu")
    for classes in ("abc", [1, 2, 3], 3):
        with pytest.raises(TypeError, match="it must be a list of names"):
            fastroute.load(checkpoint, classes=classes, device="cpu")


class OfSequences(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3)
        self.fc = nn.Linear(4, num_classes)
        self.conversion = nn.Identity()  # a name like any other

    def forward(self, x):
        return self.fc(self.conversion(self.b(self.a(x))).mean(2))


def test_runs_on_sequences_are_resumed(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(12, 2, 32), torch.arange(12) % 3), batch_size=6)
    converted = multipath(OfSequences(), 2, ["a", "conversion"], input_size=(2, 32))
    for epochs, resume in ((1, None), (2, tmp_path / "last.ckpt")):
        module = RoutingClassifier(converted, 3, sched="step")
        rows = fit(module, data, output=tmp_path, resume=resume, **QUIET | {"epochs": epochs})
    assert len(rows) == 2
    fit(RoutingClassifier(OfSequences(), 3), data, output=tmp_path / "alone", **QUIET)
    saved = torch.load(tmp_path / "last.ckpt"), torch.load(tmp_path / "alone" / "last.ckpt")
    assert saved[0]["conversion"]["input_size"] == [2, 32] and "conversion" not in saved[1]


@pytest.mark.parametrize("named", [True, False])
def test_the_gates_normalisation_may_be_changed_after_the_conversion(own, tmp_path, monkeypatch, named):
    monkeypatch.syspath_prepend(tmp_path)
    import own_nets

    base = create_model(own, 3) if named else own_nets.build(3)
    converted = multipath(base, 2, ["1"], input_size=(3, 12, 12), gate_norm="center")
    set_gate_norm(converted, "standardize", "learned")
    fit(RoutingClassifier(converted, 3), loader(channels=3), output=tmp_path, **QUIET)
    levels = {"mean": 127.5, "std": 64.0, "device": "cpu"}
    images = torch.randn(4, 3, 12, 12)
    predictor = fastroute.load(tmp_path / "last.ckpt", model=own, **levels)
    assert torch.equal(predictor(images).probabilities, converted.eval()(images).softmax(1))
    set_gate_norm(next(m for m in converted.modules() if isinstance(m, CrossConnection)), "center", "learned")
    assert specification_of(converted) is None and conversion_of(converted) is None


def test_sizes_of_images_in_a_file_of_unknown_origin_are_bounded():
    values = dict(zip(CONVERSION, (2, ["a"], "cc", "fresh", [3, 2**15, 2**15], None, None), strict=True))
    with pytest.raises(ValueError, match=r"conversion\['input_size'\] is a list, expected a list of two to four sizes"):
        check_conversion(values)
    check_conversion(values | {"input_size": [3, 224, 224]})
    with pytest.raises(ValueError, match="its conversion is a dict, expected a dict of paths"):
        check_conversion(values | {"more": 1})


def test_levels_are_copied(checkpoint):
    mean = torch.full((3,), 127.0)
    predictor = fastroute.load(checkpoint, mean=mean, device="cpu")
    mean.zero_()
    assert predictor.transform.mean.tolist() == [127.0] * 3
