"""Common code of layers that take and return lists of tensors."""

import warnings


class TakesLists:
    """Mixin that warns about full backward hooks, which PyTorch does not run for tensors in a list."""

    def register_full_backward_hook(self, hook, prepend: bool = False):
        self._warn("register_full_backward_hook")
        return super().register_full_backward_hook(hook, prepend)

    def register_full_backward_pre_hook(self, hook, prepend: bool = False):
        self._warn("register_full_backward_pre_hook")
        return super().register_full_backward_pre_hook(hook, prepend)

    def _warn(self, name: str) -> None:
        warnings.warn(
            f"{name}: the hook will not run, because {type(self).__name__} takes and returns lists of tensors; "
            "call register_hook on the tensors of its output instead",
            stacklevel=3,
        )
