"""Optimisers whose step a CUDA graph can record, as `fastroute.training.graphs` does.

A recorded step runs without Python: it would keep the learning rate of the step that was recorded. PyTorch's own
optimisers take it from a tensor in part (`capturable=True`), but SGD reads such a tensor on the host, and none takes
its momentum from one, which a one-cycle schedule changes at every step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Capturable(torch.optim.Optimizer):
    """Mixed into an optimiser of PyTorch's: the rates that schedules change lie in a tensor on the device.

    Groups and state are those of PyTorch's optimiser, so either goes on from the other's checkpoint. Rates are float32.
    A parameter that gets no gradient in the recorded step is left as it is; within a group, all others must have been
    stepped equally often.
    """

    state_tensors: tuple[str, ...]
    """What is kept for each parameter: "step", a number, and others of its shape."""
    _rates: list[list[float]] = []  # noqa: RUF012 - replaced, never changed
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
        """Make the state that is missing, and bring the numbers of steps to the device, which a checkpoint has not."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            for name in self.state_tensors:
                if state.get(name) is None:
                    like = (
                        parameter.new_zeros((), dtype=torch.float32) if name == "step" else torch.zeros_like(parameter)
                    )
                    state[name] = like
                elif name == "step" and state[name].device != parameter.device:
                    state[name] = state[name].to(parameter.device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the rates to the device where they have changed: before a recorded step is replayed."""
        momentum = [group["betas"][0] if "betas" in group else group["momentum"] for group in self.param_groups]
        rates = [[group["lr"], value] for group, value in zip(self.param_groups, momentum, strict=True)]
        if rates == self._rates:
            return
        self._rates, values = rates, torch.tensor(rates, dtype=torch.float32)
        if self._rates_on_device is None:
            self._rates_on_device = values.to(self.param_groups[0]["params"][0].device)
        else:
            self._rates_on_device.copy_(values, non_blocking=True)  # CUDA has taken `values` when this returns

    @torch.no_grad()
    def update(self) -> None:
        """Take the step by the gradients there are: what is recorded. It waits for nothing from the device."""
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
    """PyTorch's, with or without Nesterov's look-ahead; without dampening."""

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
    """PyTorch's, not centred."""

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
    """PyTorch's; its weight decay is AdamW's where a group has `decoupled_weight_decay`."""

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
    """PyTorch's: weight decay apart from the gradient."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, decoupled_weight_decay=True, **options)


CAPTURABLE: dict[str, Callable[..., Capturable]] = {
    "sgd": lambda groups, momentum: SGD(groups, momentum=momentum),
    "nesterov": lambda groups, momentum: SGD(groups, momentum=momentum, nesterov=True),
    "rmsprop": lambda groups, momentum: RMSprop(groups, momentum=momentum),
    "adam": lambda groups, momentum: Adam(groups),
    "adamw": lambda groups, momentum: AdamW(groups),
}
"""The optimisers of `OPTIMIZERS` by the same names."""
