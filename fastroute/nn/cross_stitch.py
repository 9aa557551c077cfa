"""Cross-stitch units: cross-connections with learned weights that are the same for every sample."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute.nn._lists import TakesLists
from fastroute.ops import mix
from fastroute.ops._paths import MAX_PATHS, check_integers, check_numbers, path_list


class CrossStitch(TakesLists, nn.Module):
    """Mix m parallel tensors into n by learned weights (Misra et al., 2016): the static form of `CrossConnection`.

        Y_j = Σ_i g_ij X_i                              (Eq. 3.8, with G a parameter)

    If m = n, G is initialised near the identity: each output takes its own input with weight `same`, and the others
    share the rest evenly; 0.9 and 0.1 for two paths, as Misra et al. found best. Otherwise each output starts as the
    mean of the inputs; a one-to-many unit starts as copies of its input.

    Args:
        in_paths: m, 1 to 8.
        out_paths: n, 1 to 8; None for n = m.
        same: initial weight of each path for itself, 0 to 1. Ignored if m ≠ n or m = 1.
        device, dtype: of the parameter.

    Parameters: gates (m, n); `gates[i, j]` is the weight of input i in output j.

    Shape:
        xs: list of m tensors (N, C, *S) of one dtype and memory format, with up to three spatial sizes.
        output: list of n tensors (N, C, *S), in the dtype and memory format of the inputs.

    Example:
        >>> stitch = CrossStitch(2)
        >>> left, right = stitch([torch.randn(8, 64, 16, 16) for _ in range(2)])
        >>> left.shape
        torch.Size([8, 64, 16, 16])

    Raises:
        TypeError: a number of paths is no integer, `same` is no number, or xs is not a list of floating-point tensors.
        ValueError: an argument is out of range, or xs has another number of paths than the unit.
    """

    def __init__(
        self,
        in_paths: int,
        out_paths: int | None = None,
        same: float = 0.9,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        out_paths = in_paths if out_paths is None else out_paths
        check_integers(in_paths=in_paths, out_paths=out_paths)
        check_numbers(same=same)
        for name, paths in (("in_paths", in_paths), ("out_paths", out_paths)):
            if not 1 <= paths <= MAX_PATHS:
                raise ValueError(f"{name} is {paths}; it must be 1 to {MAX_PATHS}")
        if not 0 <= same <= 1:
            raise ValueError(f"same is {same}; it must be 0 to 1")
        self.in_paths, self.out_paths, self.same = in_paths, out_paths, same
        self.gates = nn.Parameter(torch.empty(in_paths, out_paths, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise near the identity if m = n, else to means of the inputs; columns sum to 1."""
        m, n = self.gates.shape
        if m == n > 1:
            self.gates.fill_((1 - self.same) / (m - 1)).fill_diagonal_(self.same)
        else:
            self.gates.fill_(1 / m)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        xs = path_list("xs", xs)
        if len(xs) != self.in_paths:
            raise ValueError(f"xs has {len(xs)} paths; this unit takes in_paths={self.in_paths}")
        return mix(xs, self.gates)

    def extra_repr(self) -> str:
        same = f", same={self.same}" if self.in_paths == self.out_paths > 1 else ""
        return f"in_paths={self.in_paths}, out_paths={self.out_paths}{same}"
