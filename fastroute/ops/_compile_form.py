"""The form of the operators in graphs that `torch.compile` traces."""

import sys
from typing import Literal

import torch
from torch import Tensor

from fastroute._scoped import Scoped

FORMS = ("auto", "fused", "operator")

# (device type, operator, dtype, whether gradients are enabled) → the form that was measured to be faster in whole
# networks; else "operator". In those of docs/benchmarks.md, in two layouts, the operator form took 1.02 to 1.07 times
# as long for cross-connection on 32×32 images, 1.00 in resnet18_cc2, and 1.04 to 1.06 for cross-prediction and gate.
MEASURED: dict = {
    ("cpu", operator, "torch.float32", False): "fused" for operator in ("cross_connect", "cross_predict", "gate")
}

_form = "auto"
_backend_named = False
_cpu_kernels = False  # whether the compiled kernels are those of a CPU; set by the backends


class compile_form(Scoped):
    """Set the form of the operators in graphs that `torch.compile` traces from here on, or inside a `with` block.

    "operator": one node each, computed by the library's kernels. "fused": plain operations, forward and hand-derived
    backward (Eq. 3.10 to 3.15), which Inductor fuses with the layers around; other compilers keep the node. "auto", the
    default, is the form that was measured to be faster: the fused form for `cross_connect`, `cross_predict` and `gate`
    in float32 on a CPU where gradients are disabled, else the operator. If a backend is named, as by `use_backend`,
    "auto" means "operator". "fused" also leaves to the compiler the layers that `fastroute.nn.block_end` takes
    together. Where gradients are enabled, `cross_predict`, whose time is that of its convolutions, is always one node.
    `torch.export` keeps the operators, except for dense cross-prediction, which is plain PyTorch there. A compiled
    function is compiled anew at its next call after a change.

    Example:
        >>> with fastroute.compile_form("fused"):
        ...     y = torch.compile(model)(x)

    Raises:
        ValueError: the form is unknown.
    """

    def __init__(self, form: Literal["auto", "fused", "operator"]):
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; it must be 'auto', 'fused' or 'operator'")
        super().__init__(form)

    def _get(self) -> str:
        return _form

    def _set(self, value: str) -> None:
        global _form
        _form = value


def fuses(operator: str, x: Tensor) -> bool:
    """Return whether a compiled graph fuses the operator for tensors like x."""
    if operator == "cross_predict" and torch.is_grad_enabled():
        return False
    if _form != "auto":
        return _form == "fused"
    case = (x.device.type, operator, str(x.dtype), torch.is_grad_enabled())
    return not _backend_named and MEASURED.get(case) == "fused"


def is_exporting() -> bool:
    """Return whether `torch.export` traces; Dynamo of torch 2.11 takes its own `is_exporting` for true in any graph."""
    return torch.compiler._is_exporting_flag


def keeps_cpu_kernels() -> bool:
    """Return whether compiled graphs keep what has compiled kernels for a CPU alone, in place of PyTorch's layers."""
    return _cpu_kernels and _form != "fused" and not _is_freezing()


def _is_freezing() -> bool:
    """Return whether Inductor folds weights, such as those of a normalisation into its convolution's."""
    config = sys.modules.get("torch._inductor.config")
    return bool(config and config.freezing)


# What torch.compiler.assume_constant_result does, which imports the compiler.
_is_freezing._dynamo_marked_constant = True
