"""Optimisers whose step a CUDA graph can record; see `fastroute.training.graphs`.

A recorded step runs without Python, so a learning rate that is a Python number would stay that of the recorded step.
Some of PyTorch's optimisers read it from a tensor (`capturable=True`), but SGD reads such a tensor on the host, and
none reads its momentum from one, which a one-cycle schedule changes at every step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Capturable(torch.optim.Optimizer):
    """A mixin for PyTorch's optimisers that keeps learning rates and momentums in a float32 tensor on the device.

    Groups and state are those of PyTorch's optimiser, so either continues from the other's checkpoint. A parameter
    without a gradient in the recorded step stays unchanged; all others of a group must have made the same number of
    steps.
    """

    state_tensors: tuple[str, ...]
    """The state of each parameter: "step" is a number, all others have the parameter's shape."""
    _rates: list[list[float]] = []  # noqa: RUF012 - replaced, never mutated
    _rates_on_device: Tensor | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._set_up()
        self.refresh()
        self.update()
        return loss

    @torch.no_grad()
    def _set_up(self) -> None:
        """Make missing state, and move step counts to the device: a checkpoint restores them on the CPU."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            for name in self.state_tensors:
                if state.get(name) is None:
                    like = parameter.new_zeros((), dtype=torch.float32) if name == "step" else parameter
                    state[name] = torch.zeros_like(like)
                elif name == "step" and state[name].device != parameter.device:
                    state[name] = state[name].to(parameter.device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the rates to the device if they have changed; call it before each replay of a recorded step."""
        momentum = [group["betas"][0] if "betas" in group else group["momentum"] for group in self.param_groups]
        rates = [[group["lr"], value] for group, value in zip(self.param_groups, momentum, strict=True)]
        if rates == self._rates:
            return
        self._rates, values = rates, torch.tensor(rates, dtype=torch.float32)
        if self._rates_on_device is None:
            self._rates_on_device = values.to(self.param_groups[0]["params"][0].device)
            return
        if self._rates_on_device.is_cuda:  # PyTorch keeps pinned memory until the copy has ended
            values = values.pin_memory()
        self._rates_on_device.copy_(values, non_blocking=True)

    @torch.no_grad()
    def update(self) -> None:
        """Update the parameters by their gradients, without waiting for the device: the part that is recorded."""
        for group, (lr, momentum) in zip(self.param_groups, self._rates_on_device, strict=True):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            states = [[self.state[parameter][name] for parameter in parameters] for name in self.state_tensors]
            self._update(group, lr, momentum, parameters, gradients, *states)

    def _update(self, group: dict, lr: Tensor, momentum: Tensor, parameters, gradients, *states) -> None:
        raise NotImplementedError


def _with_decay(group: dict, parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    decay = group["weight_decay"]
    return torch._foreach_add(gradients, parameters, alpha=decay) if decay else gradients


class SGD(Capturable, torch.optim.SGD):
    """PyTorch's SGD, with or without Nesterov momentum, and without dampening."""

    state_tensors = ("momentum_buffer",)

    def _update(self, group, lr, momentum, parameters, gradients, buffers) -> None:
        gradients = _with_decay(group, parameters, gradients)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        if group["nesterov"]:
            changes = torch._foreach_mul(buffers, momentum)
            torch._foreach_add_(changes, gradients)
            torch._foreach_mul_(changes, -lr)
        else:
            changes = torch._foreach_mul(buffers, -lr)
        torch._foreach_add_(parameters, changes)


class RMSprop(Capturable, torch.optim.RMSprop):
    """PyTorch's RMSprop, not centred."""

    state_tensors = ("step", "square_avg", "momentum_buffer")

    def _update(self, group, lr, momentum, parameters, gradients, steps, squares, buffers) -> None:
        torch._foreach_add_(steps, 1)
        gradients = _with_decay(group, parameters, gradients)
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - group["alpha"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_addcdiv_(buffers, gradients, roots)
        torch._foreach_add_(parameters, torch._foreach_mul(buffers, -lr))


class Adam(Capturable, torch.optim.Adam):
    """PyTorch's Adam; its weight decay is AdamW's in groups with `decoupled_weight_decay`."""

    state_tensors = ("step", "exp_avg", "exp_avg_sq")

    def _update(self, group, lr, momentum, parameters, gradients, steps, means, squares) -> None:
        torch._foreach_add_(steps, 1)
        beta2, steps = group["betas"][1], steps[0].double()  # in float32, 1 - 0.999 would lose four digits
        if group["decoupled_weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        else:
            gradients = _with_decay(group, parameters, gradients)
        torch._foreach_mul_(means, momentum)
        torch._foreach_add_(means, torch._foreach_mul(gradients, 1 - momentum))
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2**steps).sqrt().float())
        torch._foreach_add_(roots, group["eps"])
        changes = torch._foreach_div(means, roots)
        torch._foreach_mul_(changes, (-lr / (1 - momentum.double() ** steps)).float())
        torch._foreach_add_(parameters, changes)


class AdamW(Adam):
    """PyTorch's AdamW: weight decay apart from the gradient."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, decoupled_weight_decay=True, **options)


CAPTURABLE: dict[str, Callable[..., Capturable]] = {
    "sgd": lambda groups, momentum: SGD(groups, momentum=momentum),
    "nesterov": lambda groups, momentum: SGD(groups, momentum=momentum, nesterov=True),
    "rmsprop": lambda groups, momentum: RMSprop(groups, momentum=momentum),
    "adam": lambda groups, momentum: Adam(groups),
    "adamw": lambda groups, momentum: AdamW(groups),
}
"""Capturable counterparts of `OPTIMIZERS`, by the same names."""
