"""Export a predictor's network to a file for other programs, checked against the network."""

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastroute._errors import in_a_line
from fastroute._extras import extra
from fastroute._files import check_writable, digest_path
from fastroute._version import __version__
from fastroute.inference.predictor import Predictor
from fastroute.nn.router import without_temperatures

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
TOLERANCE = 1e-3
"""The largest allowed difference from eager PyTorch, relative to the largest logit or 1; rounding is below it."""

Run = Callable[[Tensor], Tensor]


def export(
    predictor: Predictor, to: str, output: str | Path, *, dynamic_batch: bool = False
) -> dict[str, float | int | str]:
    """Write a predictor's network to a file, and check that the file computes the same logits.

    The program maps normalised "images" (N, C, H, W) to "logits" (N, K). The file also has four texts in JSON, as ONNX
    `metadata_props`, safetensors metadata, or `extra_files` of torch.export: "classes", the K names; "preprocessing",
    with img_size, in_chans, crop_pct, interpolation, and mean and std in units of 0 to 1; "specification", how the
    network is built; and "fastroute", the version.

    Args:
        predictor: from `load`.
        to: "onnx"; "torch-export", a program for `torch.export.load` that needs only PyTorch; or "safetensors", the
            weights, which `fastroute.load` reads.
        output: the path of the file.
        dynamic_batch: whether the program takes any number of images, or one at a time; ignored for "safetensors".

    Returns:
        "difference", the largest absolute difference from eager PyTorch, over "images" random images; and "bytes", the
        size of the file. The weights of an ONNX program of more than 1.5 GB are in a second file beside it, whose name
        ends in ".onnx.data", and they count too.

    Raises:
        ValueError: the network cannot be exported so, or the file computes other logits; no file is then left.
        ModuleNotFoundError: a package is not installed.
        OSError: the file cannot be written.
    """
    if to not in SUFFIXES:
        raise ValueError(f"to is {to!r}; it must be one of {', '.join(map(repr, SUFFIXES))}")
    if getattr(predictor.model, "IS_CLUSTERING", False):
        raise ValueError(
            "predictor is of a clustering, which cannot be exported; fastroute.load and `fastroute predict` take its "
            "checkpoint"
        )
    output = Path(output)
    check_writable(output, "output")
    try:
        return _export(predictor, predictor.model.cpu().eval(), to, output, dynamic_batch)
    finally:
        predictor.model.to(predictor.device)


def _export(predictor: Predictor, model: nn.Module, to: str, output: Path, dynamic_batch: bool) -> dict:
    transform = predictor.transform
    shape = transform.in_chans, transform.img_size, transform.img_size
    metadata = {
        "classes": json.dumps(list(predictor.classes)),
        "preprocessing": json.dumps(transform.to_dict()),
        "specification": json.dumps(None if predictor.specification is None else predictor.specification.to_dict()),
        "fastroute": json.dumps(__version__),
    }
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3 if dynamic_batch or to == "safetensors" else 1, *shape, generator=generator)
    with _atomic_files(output) as path:
        try:
            with _quiet():
                run = _WRITERS[to](model, images[:2], path, metadata, dynamic_batch)
        except (ModuleNotFoundError, OSError):
            raise
        except Exception as error:  # PyTorch's exporters raise errors of many types
            raise ValueError(
                f"to is {to!r}; the network cannot be exported so: {in_a_line(error.__cause__ or error)}"
            ) from error
        with torch.no_grad():
            expected, found = model(images), run(images)
        largest = max(1.0, expected.abs().max().item())
        difference = (found - expected).abs().max().item()
        if not difference <= TOLERANCE * largest:
            raise ValueError(
                f"to is {to!r}; the file's logits differ from the network's by {difference:.2e}, and at most "
                f"{TOLERANCE * largest:.2e} is rounding: it is not written"
            )
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        digest_path(output).unlink(missing_ok=True)  # of a file that this one replaces
    return {"difference": difference, "images": len(images), "bytes": size}


@contextmanager
def _atomic_files(path: Path):
    """Yield a path of the same name in a temporary folder, and at the end of the block move all files out of it.

    The weights of large networks are in a file of their own, which an ONNX program finds by its name. After an error,
    nothing is left.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the program is the last
            os.replace(file, path.with_name(file.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet():
    """Silence the exporters' messages within the block."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch", "torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_onnx(model: nn.Module, images: Tensor, path: Path, metadata: dict[str, str], dynamic: bool) -> Run:
    with extra("export", "export to onnx"):
        import onnxruntime
        import onnxscript  # noqa: F401 (PyTorch's exporter needs it)
    shapes = ({0: "batch"},) if dynamic else None
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    program.model.metadata_props.update(metadata)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def _write_program(model: nn.Module, images: Tensor, path: Path, metadata: dict[str, str], dynamic: bool) -> Run:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    table = torch._decomp.decomposition_table  # decompose fastroute's operators, so that the file needs only PyTorch
    own = {operator: rule for operator, rule in table.items() if operator.namespace == "fastroute"}
    torch.export.save(program.run_decompositions(own), path, extra_files=metadata)
    return torch.export.load(path).module()


def _write_weights(model: nn.Module, images: Tensor, path: Path, metadata: dict[str, str], dynamic: bool) -> Run:
    with extra("export", "export to safetensors"):
        from safetensors.torch import load_file, save_file
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt", **metadata})
    read = without_temperatures(load_file(path), model)  # which are no tensors of the network
    return lambda x: torch.func.functional_call(model, read, (x,))


_WRITERS = {"onnx": _write_onnx, "torch-export": _write_program, "safetensors": _write_weights}
