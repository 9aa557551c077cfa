"""Random numbers as a function of where a run is, so that a resumed run needs no saved generator."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


def derived_seed(*entropy: int) -> int:
    """A seed of 64 bits from several numbers, such as (seed, epoch, batch): other numbers give an unrelated one.

    A sum would give run 0's second epoch to run 1 as its first. NumPy takes missing numbers for zeros, so how many
    there are is one of them.
    """
    return int(np.random.SeedSequence((len(entropy), *entropy)).generate_state(1, np.uint64)[0])


def generator(*entropy: int) -> torch.Generator:
    """A generator on the CPU of its own, seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*entropy))


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """PyTorch's generator on the CPU starts from `derived_seed` in the block and is as it was after it."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(derived_seed(*entropy))
        yield
