import json

import pytest
import torch

import fastroute
from fastroute.inference import export
from fastroute.inference.export import _WRITERS
from fastroute.training import save_weights


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return fastroute.load(checkpoint, device="cpu")


def logits(predictor, x):
    with torch.no_grad():
        return predictor.model(x)


def check_metadata(metadata, predictor):
    assert json.loads(metadata["classes"]) == ["ant", "bee", "cat"]
    preprocessing = json.loads(metadata["preprocessing"])
    assert preprocessing["img_size"] == 8 and preprocessing["interpolation"] == "bilinear"
    assert preprocessing["mean"] == pytest.approx((predictor.transform.mean / 255).tolist())
    assert json.loads(metadata["specification"])["name"] == "tiny_cc2"


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_runs_with_its_classes_and_preprocessing(predictor, tmp_path, dynamic):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "x.onnx"
    found = export(predictor, "onnx", path, dynamic_batch=dynamic)
    assert found["difference"] < 1e-4 and found["bytes"] == path.stat().st_size
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(5 if dynamic else 1, 3, 8, 8)
    (found,) = session.run(["logits"], {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(predictor, x), rtol=1e-3, atol=1e-3)
    if not dynamic:
        assert session.get_inputs()[0].shape == [1, 3, 8, 8]
    check_metadata(session.get_modelmeta().custom_metadata_map, predictor)


def test_weights_of_large_networks_lie_beside_the_program(predictor, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    found, folder = export(predictor, "onnx", tmp_path / "x.onnx"), tmp_path / "moved"
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["x.onnx", "x.onnx.data"]
    assert found["bytes"] == sum(file.stat().st_size for file in files)
    folder.mkdir()
    for file in files:
        file.rename(folder / file.name)
    onnxruntime.InferenceSession(folder / "x.onnx")


def test_a_failed_export_names_the_cause_and_leaves_nothing(predictor, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")

    def fail(x):
        raise KeyError("this network cannot be traced")

    monkeypatch.setattr(predictor.model, "forward", fail)
    with pytest.raises(ValueError, match=r"the network cannot be exported so: .*this network cannot be traced"):
        export(predictor, "onnx", tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dynamic", [False, True])
def test_programs_need_only_pytorch_s_operators(predictor, tmp_path, dynamic):
    export(predictor, "torch-export", tmp_path / "x.pt2", dynamic_batch=dynamic)
    metadata = dict.fromkeys(("classes", "preprocessing", "specification"), "")
    program = torch.export.load(tmp_path / "x.pt2", extra_files=metadata)
    x = torch.randn(5 if dynamic else 1, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), logits(predictor, x), rtol=1e-3, atol=1e-3)
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {target.namespace for target in targets} == {"aten"}
    check_metadata(metadata, predictor)


def test_safetensors_load_again(predictor, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    assert export(predictor, "safetensors", path)["difference"] == 0
    with safetensors.safe_open(path, "pt") as file:
        check_metadata(file.metadata(), predictor)
    again, x = fastroute.load(path, device="cpu"), torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x).probabilities, predictor(x).probabilities)
    assert list(again.classes) == list(predictor.classes)
    torch.testing.assert_close(again.transform.mean, predictor.transform.mean.float())
    other = fastroute.load(path, device="cpu", img_size=6, crop_pct=0.5, mean=[1.0], std=[2.0]).transform
    assert (other.img_size, other.crop_pct, other.mean.tolist(), other.std.tolist()) == (6, 0.5, [1.0], [2.0])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("preprocessing", "{}", "its metadata is not that of `fastroute export`"),
        ("preprocessing", '{"img_size": 1e9, "mean": null, "std": null}', "img_size"),
        ("classes", "[3]", "classes"),
        ("specification", '{"source": "function", "name": "os:system"}', "own code is imported only where you name it"),
        ("specification", "3", "its specification is a int"),
    ],
)
def test_metadata_of_others_is_checked(predictor, tmp_path, name, value, message):
    safetensors = pytest.importorskip("safetensors.torch")
    export(predictor, "safetensors", tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata() | {name: value}
    weights = safetensors.load_file(tmp_path / "x.safetensors")
    safetensors.save_file(weights, tmp_path / "y.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"checkpoint is .*y\.safetensors; .*{message}"):
        fastroute.load(tmp_path / "y.safetensors")


def test_a_file_with_other_logits_is_not_written(predictor, tmp_path, monkeypatch):
    def wrong(model, images, path, metadata, dynamic):
        path.write_bytes(b"x")
        return lambda x: model(x) + 0.01 * model(x).abs().max() + 0.01

    monkeypatch.setitem(_WRITERS, "onnx", wrong)
    (tmp_path / "x.onnx").write_text("before")
    with pytest.raises(ValueError, match=r"the file.s logits differ from the network's by .*: it is not written"):
        export(predictor, "onnx", tmp_path / "x.onnx")
    assert (tmp_path / "x.onnx").read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="to is 'tflite'; it must be one of 'onnx'"):
        export(predictor, "tflite", tmp_path / "x")


def test_the_network_returns_to_its_device_after_an_error(predictor, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    moves = []
    monkeypatch.setitem(_WRITERS, "onnx", fail)
    monkeypatch.setattr(type(predictor.model), "to", lambda model, device: moves.append(device))
    with pytest.raises(ValueError, match="the network cannot be exported so: RuntimeError: no"):
        export(predictor, "onnx", tmp_path / "x.onnx")
    assert moves == [predictor.device]


def test_a_digest_of_an_earlier_file_goes_with_it(predictor, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    save_weights(predictor.model, path)
    export(predictor, "safetensors", path)
    assert fastroute.load(path, device="cpu").classes == predictor.classes
