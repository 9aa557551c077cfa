"""A stand-in on the CPU for a CUDA graph, with the same restrictions.

It records operators with their arguments, not Python. A replay runs no Python of the step, keeps the numbers of the
recording, and reads and writes the same memory. Reading a tensor on the host raises.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


class Recorder(TorchDispatchMode):
    device_type = "cpu"
    made: list["Recorder"] = []  # noqa: RUF012 - all there are

    def __init__(self):
        super().__init__()
        self.calls, self.replays, self.warmups, self._fresh = [], 0, 0, False
        Recorder.made.append(self)

    @contextlib.contextmanager
    def warmup(self):
        self.warmups += 1
        yield

    def record(self, step):
        """Record a step. A CPU can record only by running it, so the first replay does nothing."""
        with self:
            outputs = step()
        self._fresh = True
        return outputs

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        # Detached views keep the memory, and not autograd's graph of the recording.
        self.calls.append((function, *(tree_map(_kept, part) for part in (args, kwargs, result))))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self._fresh:
            self._fresh = False
            return
        for function, args, kwargs, recorded in self.calls:
            result = function(*args, **kwargs)
            inputs = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            for old, new in zip(_tensors(recorded), _tensors(result), strict=True):
                if old.untyped_storage().data_ptr() not in inputs:  # else it is a view, or written in place
                    old.copy_(new)


def _kept(value):
    return value.detach() if isinstance(value, Tensor) else value


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
