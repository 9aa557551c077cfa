"""Numerical checks for routing operators."""

from collections.abc import Iterable

import torch
from torch import Tensor


def assert_as_good_as_eager(
    actual: Iterable[Tensor], eager: Iterable[Tensor], exact: Iterable[Tensor], times: float = 2
) -> None:
    """Assert that the error of results against float64 is at most `times` that of eager PyTorch in the same dtype.

    A tiny absolute term is added: a few roundings of the sums, and one of the result itself, since with few elements
    eager may be exact by luck.

    Args:
        actual: results to check.
        eager: the same results from plain PyTorch, in the dtypes of `actual`.
        exact: the same results from plain PyTorch in float64.
        times: allowed multiple of eager's error.

    Raises:
        AssertionError: a shape differs or an error is too large; the message has the position of the result.

    Example:
        >>> x = torch.randn(8, 16)
        >>> assert_as_good_as_eager([x.softmax(1)], [x.exp() / x.exp().sum(1, True)], [x.double().softmax(1)])
    """
    for position, (ours, theirs, truth) in enumerate(zip(actual, eager, exact, strict=True)):
        assert ours.shape == truth.shape, f"result {position} has shape {ours.shape}; it must have {truth.shape}"
        if truth.numel() == 0:
            continue
        ours_off = (ours.double() - truth).abs().max()
        theirs_off = (theirs.double() - truth).abs().max()
        sums = 16 * torch.finfo(torch.float32).eps if ours.dtype != torch.float64 else 1e-12
        result = torch.finfo(ours.dtype).eps / 2
        allowed = times * theirs_off + sums * (1 + truth.abs().max()) + result * truth.abs().max()
        assert ours_off <= allowed, f"result {position} is off by {ours_off}, eager by {theirs_off}"
