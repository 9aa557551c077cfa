"""Random numbers as a function of the place in a run, so that a resumed run needs no saved generator."""

import contextlib

import numpy as np
import torch

from fastroute._random import generators_seeded


def derived_seed(*entropy: int) -> int:
    """Return a seed of 64 bits for several numbers, such as (seed, epoch, batch).

    Other numbers give an unrelated seed; a sum would make the second epoch of run 0 the first of run 1. NumPy takes
    missing numbers for zeros, so their count is one of the numbers.
    """
    return int(np.random.SeedSequence((len(entropy), *entropy)).generate_state(1, np.uint64)[0])


def generator(*entropy: int) -> torch.Generator:
    """Return a new generator on the CPU, seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*entropy))


def seeded(*entropy: int) -> contextlib.AbstractContextManager[None]:
    """Seed PyTorch's generator on the CPU by `derived_seed` within the block, and restore it afterwards."""
    return generators_seeded(derived_seed(*entropy))
