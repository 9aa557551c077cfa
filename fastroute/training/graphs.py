"""Training steps as CUDA graphs: recorded once, then replayed without Python and with one launch for all kernels."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fastroute._errors import in_a_line
from fastroute.nn import SparseRouter
from fastroute.nn.router import Tempered

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPHS_OF_THEIR_OWN = ("reduce-overhead", "max-autotune")
"""The modes of `torch.compile` that record CUDA graphs themselves: a graph cannot be recorded within another."""

Outputs = tuple[Tensor | None, ...]


class NotRecordable(RuntimeError):
    """Raised when a step does what a CUDA graph cannot record."""


class Graph(Protocol):
    """A recording of a step: CUDA's, or a stand-in for tests."""

    device_type: str

    def warmup(self) -> contextlib.AbstractContextManager:
        """Return the context of each step before the recorded one."""

    def record(self, step: Callable[[], Outputs]) -> Outputs:
        """Record a step without running it; return its outputs, which each replay overwrites."""

    def replay(self) -> None:
        """Run the recorded step on the same memory."""


class CUDAGraph:
    """A `torch.cuda.CUDAGraph`, on its own stream, as recording requires.

    PyTorch registers the device's generator with it, so each replay draws new random numbers from the generator's seed.
    """

    device_type = "cuda"

    def __init__(self):
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    @contextlib.contextmanager
    def warmup(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, step: Callable[[], Outputs]) -> Outputs:
        # A loader's thread may pin memory meanwhile. The default mode, "global", forbids that to all threads.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return step()

    def replay(self) -> None:
        self.graph.replay()


class RecordedStep:
    """A training step that runs eagerly a few times, is recorded, and is replayed from then on.

    A step is a function of a batch and of memory with fixed addresses: weights, optimiser state, statistics. The eager
    steps train as any other; in them, libraries choose their kernels, and lasting state such as momentum is made.
    Batches of another size than the recorded one, such as the last of an epoch, always run eagerly.

    Args:
        step: the whole step, from a batch's tensors to outputs. It must not wait for the device.
        graph: makes the recording.
        warmup: eager steps of a batch size before a batch of that size is recorded, at least 1.

    Example:
        >>> recorded = RecordedStep(step)
        >>> for batch in loader:
        ...     if recorded.takes(batch):
        ...         loss, _ = recorded(batch)
        ...     else:
        ...         with recorded.plainly():
        ...             loss, _ = step(*batch)
    """

    def __init__(self, step: Callable[..., Outputs], graph: Callable[[], Graph] = CUDAGraph, warmup: int = 3):
        if warmup < 1:
            raise ValueError(f"warmup is {warmup}; it must be at least 1")
        self.step, self.graph, self.warmup = step, graph(), warmup
        self.inputs: list[Tensor] | None = None
        self.outputs: Outputs = ()
        self._plain_steps: dict[tuple, int] = {}

    def __deepcopy__(self, memo: dict) -> None:
        """Return None: a recording belongs to the memory of one network, not of its copy."""

    def takes(self, batch: Sequence[Tensor]) -> bool:
        """Return whether the recorded step takes this batch; call it once for each batch.

        Args:
            batch: its tensors.

        Raises:
            TypeError: the batch is no tuple of tensors.
        """
        signature = _signature(batch)
        if self.inputs is not None:
            return signature == _signature(self.inputs)
        done = self._plain_steps.get(signature, 0)
        self._plain_steps[signature] = done + 1
        return done >= self.warmup

    def plainly(self) -> contextlib.AbstractContextManager:
        """Return the context of an eager step."""
        return self.graph.warmup() if self.inputs is None else contextlib.nullcontext()

    def __call__(self, batch: Sequence[Tensor]) -> Outputs:
        """Run the whole step for a batch that `takes` accepts.

        Args:
            batch: its tensors.

        Returns:
            the outputs of the step, which the next step overwrites.

        Raises:
            NotRecordable: the step waits for the device, or does something else that cannot be recorded.
        """
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in batch]
            try:
                self.outputs = self.graph.record(lambda: self.step(*self.inputs))
            except RuntimeError as error:
                cause = error.__context__ or error  # ending a failed recording fails too
                raise NotRecordable(
                    "the training step cannot be recorded in a CUDA graph: it must not read a tensor on the host or "
                    f"copy one there; train without cuda_graphs: {in_a_line(cause)}"
                ) from error
        else:
            for kept, tensor in zip(self.inputs, batch, strict=True):
                kept.copy_(tensor)
        self.graph.replay()
        return self.outputs


RATES = ("params", "lr", "momentum", "betas")
"""Entries of a parameter group that a recorded step does not fix: `Capturable` copies rates to the device, and of the
betas the first."""


def settings(modules: Sequence[nn.Module], parameters: Sequence[Tensor], groups: Sequence[dict]) -> list:
    """Return the Python values that a recorded step fixes: if one changes, the step must be recorded anew.

    Args:
        modules: of the network: their modes, and the temperatures of routers.
        parameters: of the network: whether they are frozen.
        groups: of the optimiser: their options but for `RATES` and tensors, and betas after the first.
    """
    options = [{name: value for name, value in group.items() if not isinstance(value, Tensor)} for group in groups]
    return [
        [module.training for module in modules],
        [module.temperature for module in modules if isinstance(module, Tempered)],
        [parameter.requires_grad for parameter in parameters],
        [{name: value for name, value in group.items() if name not in RATES} for group in options],
        [group["betas"][1:] for group in options if "betas" in group],
    ]


def _signature(batch: Sequence[Tensor]) -> tuple:
    if not isinstance(batch, (tuple, list)) or not all(isinstance(tensor, Tensor) for tensor in batch):
        raise TypeError(f"a batch is a {type(batch).__name__}; with cuda_graphs, expected a tuple of tensors")
    return tuple((tensor.shape, tensor.dtype) for tensor in batch)


def check_recording(
    *,
    device_type: str,
    needed: str = "cuda",
    processes: int = 1,
    grad_accum_steps: int = 1,
    amp_dtype: str | None = None,
    compile_mode: str | None = None,
    varying: bool = False,
    anomaly: bool = False,
    model: nn.Module | None = None,
) -> None:
    """Check that the steps of a run can be recorded.

    Args:
        device_type: the type of the run's device, "cuda" or "cpu".
        needed: the type that recording needs.
        processes: the number of processes that train together.
        grad_accum_steps: batches of a step.
        amp_dtype: the autocast type, or None.
        compile_mode: the mode of `torch.compile`, or None.
        varying: whether the size of batches varies, because unreadable images are left out of them.
        anomaly: whether autograd's anomaly detection is on.
        model: the network; None leaves it out of the check.

    Raises:
        ValueError: the steps cannot be recorded; the message says why, and what to do.
    """
    if device_type != needed:
        there = "there is none" if not torch.cuda.is_available() else f"the run is on the {device_type.upper()}"
        reason = f"it needs a CUDA device, and {there}"
    elif processes > 1:
        reason = f"it trains in one process, and this run has {processes}"
    elif grad_accum_steps > 1:
        reason = f"a recorded step takes one batch, so grad_accum_steps must be 1, not {grad_accum_steps}"
    elif amp_dtype == "float16":
        reason = "float16's loss scaling reads the gradients on the host; use amp_dtype 'bfloat16'"
    elif compile_mode in GRAPHS_OF_THEIR_OWN:
        others = " or ".join(repr(mode) for mode in COMPILE_MODES if mode not in GRAPHS_OF_THEIR_OWN)
        reason = f"compile_mode {compile_mode!r} records CUDA graphs of its own; use {others}"
    elif varying:
        reason = "batches must be of one size, but on_bad_image 'skip' leaves streamed images out; use 'stop'"
    elif anomaly:
        reason = "anomaly detection looks at every gradient on the host; turn it off"
    elif model is not None and hasattr(model, "training_loss"):
        reason = f"{type(model).__name__} has its own loss, which may change during a run; train without cuda_graphs"
    elif model is not None and any(isinstance(layer, SparseRouter) for layer in model.modules()):
        reason = "a SparseRouter reads on the host how many samples each path gets; train without cuda_graphs"
    else:
        return
    raise ValueError(f"cuda_graphs is True; {reason}")


def check_compile_mode(compile: bool, compile_mode: str | None) -> None:
    """Check a mode of `torch.compile`.

    Args:
        compile: whether the network is compiled.
        compile_mode: the mode; None is the default.

    Raises:
        ValueError: there is no such mode, or the network is not compiled.
    """
    if compile_mode is None:
        return
    if compile_mode not in COMPILE_MODES:
        raise ValueError(
            f"compile_mode is {compile_mode!r}; it must be None or one of {', '.join(map(repr, COMPILE_MODES))}"
        )
    if not compile:
        raise ValueError(f"compile_mode is {compile_mode!r}, but compile is False; set compile")
