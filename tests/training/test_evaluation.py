import pytest
import torch
from torch import nn

from fastroute.data.decode import UnreadableImage
from fastroute.data.module import ImageDataModule
from fastroute.training.evaluation import evaluate, validation_loader


class Corner(nn.Module):
    """Classify by the colour of one pixel, in which crops differ: means of probabilities are not those of logits."""

    def forward(self, x):
        return 3 * x[:, :, 0, 0]


def loader(folder, **options):
    options = {"dataset": "imagefolder", "data_dir": folder, "img_size": 16, "crop_pct": 0.8, "batch_size": 5} | options
    return validation_loader(**options, num_workers=0)[0]


def test_single_crop_error_is_over_every_image(large_folder):
    batches = list(loader(large_folder))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = Corner()(images)
    result = evaluate(Corner(), loader(large_folder))
    assert (result["images"], result["skipped"]) == (12, 0)
    assert result["error"] == pytest.approx(100 * (logits.argmax(1) != labels).float().mean().item())
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_classifies_ten_crops_by_their_mean_probability(large_folder):
    batches = list(loader(large_folder, ten_crop=True))
    crops, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    shares = Corner()(crops.flatten(0, 1)).double().softmax(1).unflatten(0, (12, 10)).mean(1)
    result = evaluate(Corner(), loader(large_folder, ten_crop=True))
    assert result["loss"] == pytest.approx(-shares[range(12), labels].log().mean().item(), rel=1e-5)
    assert result["error"] == pytest.approx(100 * (shares.argmax(1) != labels).float().mean().item())
    single = evaluate(Corner(), loader(large_folder))
    assert single["loss"] != pytest.approx(result["loss"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*it is skipped")
def test_images_that_cannot_be_read_are_counted(large_folder):
    (large_folder / "val" / "bee" / "0.png").write_bytes(b"")
    result = evaluate(Corner(), loader(large_folder, on_bad_image="skip"))
    assert (result["images"], result["skipped"]) == (11, 1)


def test_refuses_an_empty_set(large_folder):
    with pytest.raises(UnreadableImage, match="there are no images"):
        evaluate(Corner(), [])
    for path in large_folder.glob("val/*/*"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="it is skipped"),
        pytest.raises(UnreadableImage, match="none of the 12 images can be read"),
    ):
        evaluate(Corner(), loader(large_folder, on_bad_image="skip"))


def test_each_class_has_a_logit(large_folder):
    with pytest.raises(ValueError, match="there are images of class 2, but the network has 2 logits"):
        evaluate(nn.Sequential(Corner(), nn.Linear(3, 2)), loader(large_folder))


@pytest.mark.parametrize("options", [{"crop_pct": float("nan")}, {"crop_pct": 1e-9}, {"img_size": 100_000}])
def test_sizes_out_of_range_are_refused(large_folder, options):
    with pytest.raises(ValueError, match=r"crop_pct is nan; it must|img_size / crop_pct is the side of a scaled image"):
        loader(large_folder, **options)


def test_a_set_in_memory_is_normalised_by_the_given_statistics():
    mean, std = torch.tensor([10.0]), torch.tensor([2.0])
    ours, classes, in_chans = validation_loader("digits", None, mean=mean, std=std)
    own, _, _ = validation_loader("digits", None)
    assert len(classes) == 10 and in_chans == 1
    images, plain = next(iter(ours))[0], next(iter(own))[0]
    torch.testing.assert_close(images * 2 + 10, plain * own.std + own.mean, atol=1e-3, rtol=0)


def test_an_unknown_dataset_is_refused():
    with pytest.raises(ValueError, match="dataset is 'text'; it must be one of 'digits'"):
        validation_loader("text", None)


def test_ten_crops_need_larger_images(large_folder):
    with pytest.raises(
        ValueError, match="ten_crop is True; crop_pct is 1, and must be below 1 for crops to differ, such as 0"
    ):
        loader(large_folder, ten_crop=True, crop_pct=1)
    with pytest.raises(ValueError, match="ten_crop is True; it is for imagefolder and webdataset"):
        validation_loader("digits", None, ten_crop=True)


def test_warns_of_emulated_mixed_precision(large_folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    with pytest.warns(UserWarning, match="no bfloat16 instructions"):
        evaluate(Corner(), loader(large_folder), amp_dtype=torch.bfloat16)


def test_large_logits_have_a_finite_loss(large_folder):
    class Sure(nn.Module):
        def forward(self, x):
            return torch.tensor([[300.0, 150, 140, 130, 120, 110, 100]]).expand(len(x), -1)

    labels = torch.cat([labels for _, labels in loader(large_folder)])
    result = evaluate(Sure(), loader(large_folder))
    assert result["loss"] == pytest.approx((300 - Sure()(labels)[range(12), labels]).mean().item())
    assert result["error5"] == 0


def test_a_set_in_memory_is_normalised_as_in_training():
    data = ImageDataModule("digits")
    data.setup()
    ours, _, _ = validation_loader("digits", None)
    torch.testing.assert_close((ours.mean.flatten(), ours.std.flatten()), (data.mean, data.std))


def test_images_in_memory_are_those_that_a_run_sets_aside():
    data = ImageDataModule("digits", val_split=0.1, seed=3)
    data.setup()
    loader, *_ = validation_loader("digits", None, val_split=0.1, split_seed=3)
    assert torch.equal(loader.images, data.images.val.images)
