"""Networks that `multipath` takes as they come, and those that it asks to prepare."""

import sys

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from fastroute.models import create_model, multipath


@pytest.mark.parametrize(
    ("name", "options", "cuts", "size"),
    [
        ("resnet10t", {"in_chans": 1}, "auto", (1, 176, 176)),
        ("vit_tiny_patch16_224", {"img_size": 96}, ["blocks.3"], (3, 96, 96)),
        ("mixer_s32_224", {"img_size": 64}, ["blocks.1"], (3, 64, 64)),
        ("vit_tiny_patch16_224", {"img_size": (96, 64), "in_chans": 2}, ["blocks.3"], (2, 96, 64)),
    ],
)
def test_timms_networks_for_other_images_than_their_configurations(name, options, cuts, size):
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, num_classes=7, **options)
    model = multipath(network, 2, cuts, init="copy", noise=0).eval()
    images = torch.randn(1, *size)
    torch.testing.assert_close(model(images), network.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (torch.jit.script, "convert the module that it was made of"),
        (torch.compile, r"convert model\._orig_mod, and compile the result"),
        (nn.DataParallel, r"convert model\.module"),
    ],
)
def test_wrapped_networks_are_refused(wrap, advice):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(TypeError, match=advice):
        multipath(wrap(plain), 2, ["0"], input_size=(3, 5, 5))


def test_networks_without_weights_of_their_own_are_refused():
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="lazy layers that have no weights yet; call it once with images"):
        multipath(lazy, 2, ["0"], input_size=(3, 5, 5))
    lazy(torch.zeros(1, 3, 5, 5))
    assert multipath(lazy, 2, ["0"], input_size=(3, 5, 5))(torch.zeros(1, 3, 5, 5)).shape == (1, 2)
    nn.utils.prune.random_unstructured(lazy[0], "weight", 0.5)
    lazy(torch.zeros(1, 3, 5, 5))
    with pytest.raises(ValueError, match=r"a Sequential that cannot be copied: .* \(torch.nn.utils.prune.remove"):
        multipath(lazy, 2, ["0"], input_size=(3, 5, 5))
    nn.utils.prune.remove(lazy[0], "weight")
    multipath(lazy, 2, ["0"], input_size=(3, 5, 5))


def test_own_functions_import_what_lies_beside_them_and_raise_plainly(tmp_path, monkeypatch):
    (tmp_path / "beside_nets.py").write_text("from torch import nn\nlayer = nn.Linear\n")
    (tmp_path / "late_nets.py").write_text(
        "from torch import nn\n"
        "def late(): from beside_nets import layer; return layer(2, 3)\n"
        "def broken(): return nn.Linear(2, 3).not_there\n"
        "def lazy(): return nn.LazyLinear(3)\n"
        "def named(num_classes=2, checkpoints=None): return nn.Linear(2, num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    try:
        assert create_model("late_nets:late").out_features == 3
        assert create_model("late_nets:named", 5, checkpoints="x").out_features == 5
        with pytest.raises(ValueError, match=r"'late_nets:broken'; it raised AttributeError: .*late_nets.py:3\)"):
            create_model("late_nets:broken")
        with pytest.raises(ValueError, match="'late_nets:lazy'; it has lazy layers, whose shapes are not known"):
            create_model("late_nets:lazy")
    finally:
        for name in ("late_nets", "beside_nets"):
            sys.modules.pop(name, None)


def test_a_function_that_needs_another_argument_says_so(own, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    import own_nets

    own_nets.counted = lambda classes: own_nets.build(classes)
    with pytest.raises(ValueError, match="its builder needs 'classes': give it by --model-kwargs NAME=VALUE, or name"):
        create_model("own_nets:counted", 3)
    assert create_model("own_nets:counted", classes=3)(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
