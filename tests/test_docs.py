"""The Python blocks of the guides run, in order, with what each leaves to the reader."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastroute.models import create_model

torchvision = pytest.importorskip("torchvision")
REPOSITORY = Path(__file__).parents[1]


class Classifier(nn.Module):
    """A network whose forward returns an object, as those of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.embedder, self.stage1 = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)

    def forward(self, images):
        return SimpleNamespace(logits=self.stage1(self.embedder(images)).mean((2, 3)))


def of_routing() -> dict:
    return {
        "pretrained": torchvision.models.resnet18(num_classes=10),
        "classifier": Classifier(),
        "x": torch.randn(8, 64, 8, 8),
        "task_loss": lambda y: y.square().mean(),
        "labels": torch.arange(4),
        "bn": nn.BatchNorm2d(64),
        "conv": nn.Conv2d(64, 64, 3, padding=1),
        "shortcut": torch.randn(8, 64, 8, 8),
        "relu": nn.ReLU(),
    }


def of_clustering() -> dict:
    X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    network = nn.Linear(4, 10)
    return {"X": X, "parts": [X[:30], X[30:]], "network": network, "augment": torch.clone, "x": torch.from_numpy(X)}


def of_a_network() -> dict:
    model = create_model("resnet20_cc2", 2).eval()
    return {"model": model, "batches": [(torch.randn(16, 3, 32, 32), torch.arange(16) % 2)]}


# Page → what its blocks take as given, and which of them run; others read files, or need processes or minutes.
PAGES = {
    "README.md": (dict, (0,)),
    "docs/quickstart.md": (dict, (0,)),
    "docs/add-routing-to-your-resnet.md": (of_routing, (0, 2, 7, 3, 4, 6, 1)),
    "docs/cluster-images.md": (of_clustering, (0, 1, 2)),
    "docs/data.md": (dict, (0,)),
    "docs/fine-tune-and-predict.md": (of_a_network, (4,)),
    "docs/reading-the-report.md": (of_a_network, (0,)),
}


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    for package in ("sklearn", "matplotlib", "onnxruntime"):
        pytest.importorskip(package)
    image.new("RGB", (40, 30)).save(tmp_path / "rose.jpg")
    (tmp_path / "labels.csv").write_text("path,label\nrose.jpg,flower\n")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    given, chosen = PAGES[page]
    blocks = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / page).read_text(), re.MULTILINE | re.DOTALL)
    names = given()
    for i in chosen:
        exec(compile(blocks[i], f"{page}, block {i}", "exec"), names)
    if page == "docs/data.md":
        assert (tmp_path / "linked" / "flower" / "000000-rose.jpg").resolve() == tmp_path / "rose.jpg"
