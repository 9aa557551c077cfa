import contextlib
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastroute.data.decode import UnreadableImage
from fastroute.data.loaders import Draws, MemoryLoader, StreamLoader, shares
from fastroute.data.sources import FolderSource
from fastroute.data.transforms import eval_transform, train_transform

MEAN, STD = torch.tensor([120.0, 110, 100]), torch.tensor([60.0, 50, 40])


def memory(count=50, batch_size=8, seed=3, epoch=0, rank=0, world_size=1, finish=None, **options):
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 4, 4, 3).contiguous()
    arguments = (batch_size, seed, lambda: epoch, rank, world_size, finish)
    return MemoryLoader(images, torch.arange(count), MEAN, STD, *arguments, **options)


def stream(folder, batch_size=4, seed=None, epoch=0, rank=0, world_size=1, transform=None, **options):
    arguments = (batch_size, seed, lambda: epoch, rank, world_size, None)
    transform = transform or eval_transform(16, 0.8)
    return StreamLoader(FolderSource(folder), transform, MEAN, STD, *arguments, **options)


def labels(loader):
    return [batch.tolist() for _, batch in loader]


@pytest.mark.parametrize("count, batch_size, world_size", [(50, 8, 2), (48, 8, 3), (17, 4, 4), (3, 2, 4), (1, 5, 1)])
def test_shares_of_a_global_batch_are_disjoint_equal_and_complete(count, batch_size, world_size):
    order = torch.randperm(count)
    parts = [shares(order, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    for step, batch in enumerate(zip(*parts, strict=True)):
        whole = order[step * batch_size * world_size : (step + 1) * batch_size * world_size]
        assert torch.cat(batch).tolist() == whole.tolist()
        assert max(map(len, batch)) - min(map(len, batch)) <= 1 and max(map(len, batch)) <= batch_size


@pytest.mark.parametrize("count, batch_size, world_size", [(9, 4, 1), (18, 4, 2), (18, 8, 1), (3, 1, 1), (2, 1, 2)])
def test_no_process_trains_on_a_last_batch_of_one_image(count, batch_size, world_size):
    loaders = [memory(count, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [labels(loader) for loader in loaders]
    assert [len(part) for part in batches] == [len(loader) for loader in loaders]
    assert sorted(label for part in batches for batch in part for label in batch) == list(range(count))
    sizes = [[len(batch) for batch in part] for part in batches]
    expected = {(9, 4, 1): [4, 5], (18, 4, 2): [4, 5], (18, 8, 1): [8, 8, 2], (3, 1, 1): [1, 1, 1], (2, 1, 2): [1]}
    assert sizes == [expected[count, batch_size, world_size]] * world_size
    assert len(memory(count, batch_size, seed=None, world_size=world_size)) == -(-count // (batch_size * world_size))


def test_a_streamed_last_batch_of_one_image_joins_the_one_before_and_is_resumed(image_folder):
    (image_folder / "train" / "ant" / "0.png").unlink()  # 23 images
    crop = train_transform(8, "rrc", (0.3, 1), (0.7, 1.4), 0.875, None)
    whole = list(stream(image_folder / "train", 11, seed=5, transform=crop))
    assert [len(batch) for _, batch in whole] == [11, 12]
    resumed = stream(image_folder / "train", 11, seed=5, transform=crop)
    resumed.load_state_dict({"done": 1, "batches": 2})
    (last,) = resumed
    assert torch.equal(last[0], whole[1][0]) and torch.equal(last[1], whole[1][1])


@pytest.mark.parametrize("source", ["memory", "stream"])
def test_two_processes_see_the_batches_of_one_with_twice_the_size(image_folder, source):
    def loader(**options):
        crop = train_transform(8, "rrc", (0.3, 1), (0.7, 1.4), 0.875, None)
        if source == "memory":
            return memory(24, seed=5, epoch=2, pad=1, flip=True, **options)
        return stream(image_folder / "train", seed=5, epoch=2, transform=crop, **options)

    one = list(loader(batch_size=8))
    two = [list(loader(batch_size=4, rank=rank, world_size=2)) for rank in range(2)]
    assert len(one) == 3
    for (images, labels), *halves in zip(one, *two, strict=True):
        assert torch.equal(torch.cat([half[0] for half in halves]), images)
        assert torch.equal(torch.cat([half[1] for half in halves]), labels)


def test_deferred_batches_are_made_of_their_draws():
    options = {"seed": 5, "epoch": 2, "pad": 1, "flip": True}
    expected, loader = memory(24, **options), memory(24, deferred=True, **options)
    for batch, draws in zip(expected, loader, strict=True):
        assert isinstance(draws, Draws) and all(len(values) == len(batch[1]) for values in draws)
        assert all(map(torch.equal, loader.batch(draws), batch))
    for host in ({"augment": lambda image: image}, {"finish": lambda *batch: batch}):  # made before the step
        assert not any(isinstance(batch, Draws) for batch in memory(24, deferred=True, **host, **options))


def test_shares_are_equal_in_training_and_complete_in_evaluation():
    training = [labels(memory(50, 8, rank=rank, world_size=3)) for rank in range(3)]
    assert [[len(batch) for batch in part] for part in training] == [[8, 8]] * 3
    for world_size in (1, 2, 3, 7):
        parts = [labels(memory(50, 4, seed=None, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert sorted(label for part in parts for batch in part for label in batch) == list(range(50))


def test_a_loader_resumes_at_its_saved_place():
    whole = list(memory(50, 8, pad=1, flip=True))
    first = memory(50, 8, pad=1, flip=True)
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = first.state_dict()
    resumed = memory(50, 8, pad=1, flip=True)
    resumed.load_state_dict(state)
    for expected, actual in zip(whole[3:], resumed, strict=True):
        assert torch.equal(expected[0], actual[0]) and torch.equal(expected[1], actual[1])
    assert len(list(resumed)) == 7  # the next epoch is a whole one
    list(first := memory(50, 8))
    resumed.load_state_dict(first.state_dict())
    assert len(list(resumed)) == 7  # so is the one after a whole one
    with pytest.raises(ValueError, match="stopped at batch 3 of 7 of an epoch, but now an epoch has 13: go on with"):
        memory(50, 4).load_state_dict(state)


def test_the_finish_of_a_batch_depends_only_on_its_place():
    def finish(images, labels):
        return images + torch.rand(1), labels

    images = [batch[0] for batch in memory(finish=finish)]
    torch.rand(1)
    again = [batch[0] for batch in memory(finish=finish)]
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    plain = [batch[0] for batch in memory()]
    shifts = {(a - b).flatten()[0].item() for a, b in zip(images, plain, strict=True)}
    assert len(shifts) == len(images)


def test_streamed_validation_is_torchvisions(large_folder):
    reference = v2.Compose(
        [v2.Resize(20), v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize(MEAN, STD)]
    )
    expected = DataLoader(ImageFolder(large_folder / "val", reference), batch_size=4)
    for ours, theirs in zip(stream(large_folder / "val", num_workers=1), expected, strict=True):
        torch.testing.assert_close(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1]) and ours[0].is_contiguous(memory_format=torch.channels_last)


def test_streamed_training_images_do_not_depend_on_the_number_of_workers(large_folder):
    transform = train_transform(16, "rrc", (0.3, 1), (0.7, 1.4), 0.875, "rand-m5-n2")
    epochs = []
    for workers in (0, 2):
        loader = stream(large_folder / "train", seed=1, transform=transform, num_workers=workers)
        first = list(loader)
        loader.epoch = lambda: 1
        epochs.append((first, list(loader)))
    for one, other in zip(*epochs, strict=True):
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))
    (first, second), _ = epochs
    assert not torch.equal(first[0][0], second[0][0])


def test_ten_crops_are_normalised_as_one_is(large_folder):
    one, ten = stream(large_folder / "val"), stream(large_folder / "val", transform=eval_transform(16, 0.8, True))
    for (centre, _), (crops, _) in zip(one, ten, strict=True):
        assert crops.shape == (4, 10, 3, 16, 16) and torch.equal(crops[:, 4], centre)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_or_is_named_skipped_and_counted(image_folder, workers):
    broken = image_folder / "train" / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (image_folder / "train" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"bee/3.png cannot be read as an image"):
        list(stream(image_folder / "train", num_workers=workers))
    loader = stream(image_folder / "train", num_workers=workers, on_bad_image="skip")
    with pytest.warns(UserWarning, match=r"(bee/3|cat/0).png cannot be read as an image: .*; it is skipped") as found:
        assert sum(len(batch) for batch in labels(loader)) == 22
    assert loader.skipped == 2 and len(found) == 2
    next(iter(loader))  # an evaluation that is broken off
    normalised = torch.cat([images for images, _ in loader])  # a second evaluation, which finds the same
    shown = loader.pixels(torch.arange(len(normalised)))
    torch.testing.assert_close(((shown - MEAN) / STD).movedim(-1, 1), normalised)


@pytest.mark.filterwarnings("ignore:.*it is skipped")
def test_a_batch_with_no_readable_image_stops_training_and_is_left_out_of_validation(image_folder):
    for path in (image_folder / "val" / "bee").iterdir():
        path.write_bytes(b"no image")
    loader = stream(image_folder / "val", on_bad_image="skip")  # bees are the second batch of three
    assert labels(loader) == [[0] * 4, [2] * 4] and loader.skipped == 4
    for path in image_folder.glob("val/*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="none of the 4 images of a batch can be read"):
        list(stream(image_folder / "val", on_bad_image="skip", seed=0))
    with pytest.raises(UnreadableImage, match=r"none of the 12 images can be read: .*ant/0.png cannot be read"):
        list(stream(image_folder / "val", on_bad_image="skip"))
    parts = [stream(image_folder / "val", on_bad_image="skip", rank=rank, world_size=2) for rank in range(2)]
    assert [labels(part) for part in parts] == [[], []]  # another process may have readable ones


def test_a_worker_that_does_not_answer_ends_the_epoch(large_folder, monkeypatch):
    monkeypatch.setenv("FASTROUTE_TIMEOUT", "2")

    def stopped(image):
        os.kill(os.getpid(), signal.SIGSTOP)
        return image

    loader = stream(large_folder / "val", num_workers=1, transform=stopped)
    with pytest.raises(RuntimeError, match="DataLoader timed out after 2"):
        try:
            list(loader)
        finally:
            with contextlib.suppress(RuntimeError):  # PyTorch's, of a worker that is killed
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGKILL)
                    worker.join()


def test_an_image_that_cannot_be_transformed_is_named(tmp_path):
    (tmp_path / "ant").mkdir()
    Image.new("1", (1, 400_000)).save(tmp_path / "ant" / "0.png")
    with pytest.raises(
        UnreadableImage, match=r"ant/0.png: 1 × 400,000 scaled to 256 are 256 × 102,400,000 pixels, and"
    ):
        list(stream(tmp_path, transform=eval_transform(224, 0.875)))


def test_each_process_needs_a_training_image():
    with pytest.raises(ValueError, match="there are 3 images to train on; there must be one for each of 4 processes"):
        memory(3, world_size=4)
    assert len(memory(4, world_size=4)) == 1 and len(memory(3, seed=None, world_size=4)) == 1


def test_grey_images_become_colour(image_folder):
    Image.fromarray(np.full((20, 20), 120, np.uint8)).save(image_folder / "val" / "ant" / "0.png")
    images, _ = next(iter(stream(image_folder / "val")))
    assert images[0, 0].unique().item() == 0 and images.shape[1] == 3


def test_processes_draw_differently_for_their_batches():
    def finish(images, labels):
        return torch.rand(1), labels

    one, other = (list(memory(48, 8, rank=rank, world_size=2, finish=finish)) for rank in range(2))
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))
