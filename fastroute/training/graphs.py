"""Training steps as CUDA graphs: recorded once, then replayed without Python and without a launch for each kernel."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fastroute._errors import in_a_line
from fastroute.nn import SparseRouter

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPHS_OF_THEIR_OWN = ("reduce-overhead", "max-autotune")
"""The modes of `torch.compile` that record CUDA graphs themselves; one within another cannot be."""

Outputs = tuple[Tensor | None, ...]


class NotRecordable(RuntimeError):
    """A step does what a CUDA graph cannot hold."""


class Graph(Protocol):
    """What records a step: CUDA's, or what tests put in its place."""

    device_type: str

    def warmup(self) -> contextlib.AbstractContextManager:
        """Around each step before the one that is recorded."""

    def record(self, step: Callable[[], Outputs]) -> Outputs:
        """Record what a step does, without doing it. Returns its outputs, which each replay fills."""

    def replay(self) -> None:
        """Do what was recorded, on the same memory."""


class CUDAGraph:
    """A `torch.cuda.CUDAGraph`, on a stream of its own as recording demands.

    PyTorch registers the device's generator with it: each replay draws anew, from where the generator was seeded.
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
        # A loader's thread may pin memory meanwhile, which the default mode, "global", forbids to all threads.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return step()

    def replay(self) -> None:
        self.graph.replay()


class RecordedStep:
    """A training step that runs plainly a few times, is recorded, and is replayed from then on.

    A step is a function of a batch and of memory that stays where it is: weights, the optimiser's state, statistics.
    The plain steps count as any other: they let libraries choose their kernels and make what lives on, such as
    momentum. Batches of another size than the recorded one, such as the last of an epoch, run plainly for good.

    Args:
        step: the whole of it, from a batch's tensors to outputs. It must not wait for the device.
        graph: makes what it is recorded in.
        warmup: plain steps of a size before a batch of that size is recorded, at least 1.

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
        """None: what is recorded is of the memory of one network, not of its copy."""

    def takes(self, batch: Sequence[Tensor]) -> bool:
        """Whether this batch is for the recorded step; asked once for each batch.

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
        """Around a step that is not taken."""
        return self.graph.warmup() if self.inputs is None else contextlib.nullcontext()

    def __call__(self, batch: Sequence[Tensor]) -> Outputs:
        """Do the whole step for a batch that is taken. The outputs hold until the next step.

        Raises:
            NotRecordable: the step waits for the device, or does something else that cannot be recorded.
        """
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in batch]
            try:
                self.outputs = self.graph.record(lambda: self.step(*self.inputs))
            except RuntimeError as error:
                cause = error.__context__ or error  # the end of a recording that failed fails too
                raise NotRecordable(
                    "the training step cannot be recorded in a CUDA graph, since it must not read a tensor on the host "
                    f"or copy one there; train without cuda_graphs: {in_a_line(cause)}"
                ) from error
        else:
            for kept, tensor in zip(self.inputs, batch, strict=True):
                kept.copy_(tensor)
        self.graph.replay()
        return self.outputs


def _signature(batch: Sequence[Tensor]) -> tuple:
    if not isinstance(batch, (tuple, list)) or not all(isinstance(tensor, Tensor) for tensor in batch):
        raise TypeError(f"a batch is a {type(batch).__name__}; with cuda_graphs it must be a tuple of tensors")
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
    """Raise where the steps of a run cannot be recorded.

    Args:
        device_type: "cuda" or "cpu", that of the run.
        needed: what it must be.
        processes: that train together.
        grad_accum_steps, amp_dtype: of the run.
        compile_mode: of the network.
        varying: whether batches that workers decode may lack the images that cannot be read.
        anomaly: whether autograd looks for NaN in every operation.
        model: the network.

    Raises:
        ValueError: in one sentence, why they cannot, and what to do.
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
    elif model is not None and any(isinstance(layer, SparseRouter) for layer in model.modules()):
        reason = "a SparseRouter reads on the host how many samples each path gets; train its network without"
    else:
        return
    raise ValueError(f"cuda_graphs is True; {reason}")
