"""PyTorch's generators, seeded for a while."""

import contextlib
from collections.abc import Iterator, Sequence

import torch


@contextlib.contextmanager
def generators_seeded(seed: int, gpus: Sequence[int] = ()) -> Iterator[None]:
    """Seed the generators of the CPU and of some GPUs within the block, and restore them afterwards."""
    with torch.random.fork_rng(list(gpus)):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
