"""Folders of small random images, as class folders under train/ and val/."""

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def write_tree(folder, classes=CLASSES, sizes=((8, 8),), counts=(("train", 8), ("val", 4))):
    """train/ and val/ of random images, each class brighter in a channel of its own; the sizes take turns."""
    generator = np.random.default_rng(0)
    for split, count in counts:
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (*sizes[i % len(sizes)], 3), dtype=np.uint8)
                pixels[..., label % 3] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """Three classes of 8×8 images, 8 and 4 of each."""
    return write_tree(tmp_path / "images")


@pytest.fixture
def large_folder(tmp_path):
    """Three classes of images of several sizes, 8 and 4 of each."""
    return write_tree(tmp_path / "large", sizes=((40, 30), (24, 50), (32, 32)))
