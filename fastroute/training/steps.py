"""Callbacks that act on a run: random seeds, moving average, non-finite losses and weights, means over an epoch, lost
processes, and batch norm across processes."""

import itertools
import math
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastroute.data.seeding import derived_seed
from fastroute.nn.router import Tempered
from fastroute.training.distributed import gather_to_rank_zero, raise_if_process_lost
from fastroute.training.optim import learning_rate


class StepSeed(pl.Callback):
    """Seed PyTorch's generators at every step by (seed, rank, epoch, batch).

    Random draws of a network, such as dropout's, then depend on the step alone. Bit-exact resuming needs this: a
    resumed run draws the same numbers as an uninterrupted one, and no generator's state must be saved. Processes draw
    different numbers.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch, batch_idx: int) -> None:
        torch.manual_seed(derived_seed(self.seed, trainer.global_rank, trainer.current_epoch, batch_idx))


class MovingAverage(WeightAveraging):
    """Lightning's moving average of weights and buffers, on the run's device, and recordable in a CUDA graph.

    Integers and buffers with infinities, such as the masks of attention, are copied: their average would be rounded
    down, or NaN.

    Args:
        decay: the share that the average keeps of itself at each step.
    """

    def __init__(self, decay: float):
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._exact: dict[str, Tensor] | None = None  # while swapped: averages that the network's types would round

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning would take the network's device, which is still the CPU.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        numbers = {name: t for name, t in _tensors(pl_module).items() if t.is_floating_point() or t.is_complex()}
        masks = {name for name, t in pl_module.named_buffers() if name in numbers and not t.isfinite().all()}
        self._averaged = numbers.keys() - masks

    @property
    def average_network(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._average_model.module

    def average(self, pl_module: pl.LightningModule, first: bool = False) -> None:
        """Update the average as `AveragedModel` does, without reading the number of updates.

        Reading it would make the host wait for the device, which a CUDA graph cannot record.

        Args:
            pl_module: the module with the latest weights.
            first: whether it is the first update, which copies all.
        """
        averages, values = self._average_model, _tensors(pl_module)
        groups = {"float": [], "complex": [], "copied": []}
        for name, average in _tensors(averages.module).items():
            kind = "complex" if average.is_complex() else "float"
            kind = "copied" if first or name not in self._averaged else kind
            groups[kind].append((average.detach(), values[name].detach().to(average.dtype)))
        for kind, pairs in groups.items():
            if not pairs:
                continue
            group = map(list, zip(*pairs, strict=True))
            if kind == "copied":
                torch._foreach_copy_(*group)
            else:
                averages.multi_avg_fn(*group, averages.n_averaged)
        averages.n_averaged += 1

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        """Swap as Lightning does, and restore the averages exactly where the types of the network have rounded them."""
        averages, values = _tensors(self.average_network), _tensors(pl_module)
        kept, self._exact = self._exact, None
        if kept is None:
            rounded = (name for name, average in averages.items() if average.dtype != values[name].dtype)
            self._exact = {name: averages[name].detach().clone() for name in rounded}
        super()._swap_models(pl_module)
        for name, average in (kept or {}).items():
            averages[name].data.copy_(average)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        for average, module in zip(self.average_network.modules(), pl_module.modules(), strict=True):
            if isinstance(module, Tempered) and module.temperature != average.temperature:
                average.temperature = module.temperature
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        replayed = getattr(pl_module, "replayed", None) is not None  # the graph has updated the average
        if not replayed and trainer.global_step > self._latest_update_step:
            self.average(pl_module, first=bool(self._average_model.n_averaged == 0))
        self._latest_update_step = trainer.global_step


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


class NonFiniteStop(pl.Callback):
    """Stop at a non-finite loss before it reaches a checkpoint, and report its step and learning rate.

    Args:
        interval: on a GPU, steps between readings of the losses, each of which makes the host wait. On a CPU, they are
            read at every step.

    Raises:
        FloatingPointError: a loss is NaN or infinite.
    """

    def __init__(self, interval: int):
        self.interval = interval
        self._unseen: list[tuple[int, int, float, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch, batch_idx: int) -> None:
        self._rate = learning_rate(trainer.optimizers[0])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        loss = outputs["loss"].detach()
        self._unseen.append((trainer.current_epoch + 1, batch_idx + 1, self._rate, loss))
        if loss.device.type == "cpu" or len(self._unseen) >= self.interval or trainer.is_last_batch:
            self._look()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._look()

    def _look(self) -> None:
        unseen, self._unseen = self._unseen, []
        losses = torch.stack([loss for *_, loss in unseen]).tolist() if unseen else []
        for (epoch, step, rate, _), loss in zip(unseen, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at epoch {epoch}, step {step}, with learning rate {rate:g}: "
                    "lower it, or set warmup_epochs or clip_grad; earlier checkpoints are intact"
                )


class FiniteWeights(pl.Callback):
    """Stop before non-finite weights are saved: no run could be resumed from them.

    Parameters, running statistics, and the moving average of both are checked before each checkpoint.

    Args:
        last: the run's last checkpoint.
        advice: what to do about the learning rate, for the message.

    Raises:
        FloatingPointError: weights of any process are NaN or infinite.
    """

    def __init__(self, last: Path, advice: str = "lower it, or set warmup_epochs or clip_grad"):
        self.last, self.advice, self._saved = last, advice, None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        networks = [pl_module, *(c.average_network for c in trainer.callbacks if isinstance(c, MovingAverage))]
        weights = [tensor for network in networks for tensor in named_weights(network).values()]
        wrong = ~get_total_norm(weights, math.inf).isfinite()  # the largest weight: a sum of squares could overflow
        if trainer.world_size > 1:
            wrong = wrong.to(trainer.strategy.root_device, torch.int)
            dist.all_reduce(wrong, dist.ReduceOp.MAX)
        place = f"epoch {trainer.current_epoch + 1}, step {trainer.fit_loop.batch_idx + 1}"
        if wrong:
            rate = learning_rate(trainer.optimizers[0])
            raise FloatingPointError(
                f"weights are NaN or infinite at {place}, with learning rate {rate:g}, and are not saved: "
                f"{self.advice}; {self._kept(trainer)}"
            )
        self._saved = place

    def _kept(self, trainer: pl.Trainer) -> str:
        if self._saved is not None:
            return f"the previous checkpoint, {self.last}, is of {self._saved}"
        if trainer.ckpt_path is not None:
            return f"the previous checkpoint is the one that this run was resumed from, {trainer.ckpt_path}"
        return "there is no previous checkpoint, so start again"


def named_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return non-empty parameters and running statistics, by name; other buffers may be infinite, as masks are."""
    buffers = {name: b for name, b in network.named_buffers() if name.rpartition(".")[2].startswith("running_")}
    tensors = dict(network.named_parameters()) | buffers
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel()}


class EpochMeans(pl.Callback):
    """Save the sums of logged epoch means, so that a run resumed within an epoch continues them.

    Lightning drops them, and bit-exact resuming needs them. Each process has its own sums; if the number of processes
    has changed, rank 0 continues the sums of all.
    """

    def __init__(self):
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        sums = {}
        if not trainer.is_last_batch:  # a completed epoch leaves nothing to continue
            logged = trainer.fit_loop.epoch_loop._results.items()
            sums = {name: (m.value.cpu(), m.cumulated_batch_size.cpu()) for name, m in logged if _is_mean(m)}
        checkpoint["epoch_means"] = gather_to_rank_zero(sums)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        saved = checkpoint.get("epoch_means", [])
        if len(saved) == trainer.world_size:
            self._before = dict(saved[trainer.global_rank])
        elif trainer.global_rank == 0:
            names = dict.fromkeys(name for sums in saved for name in sums)
            parts = {name: zip(*(sums[name] for sums in saved if name in sums), strict=True) for name in names}
            self._before = {name: tuple(map(sum, part)) for name, part in parts.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if not self._before:
            return
        # The first batch is counted by now. Adding the earlier sum to it rounds as adding it to the earlier sum did.
        logged = trainer.fit_loop.epoch_loop._results
        for name in self._before.keys() & logged.keys():
            value, samples = self._before.pop(name)
            mean = logged[name]
            mean.value = mean.value + value.to(mean.value.device)
            mean.cumulated_batch_size = mean.cumulated_batch_size + samples.to(mean.cumulated_batch_size.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = {}


def _is_mean(metric) -> bool:
    return metric.is_tensor and metric.meta.is_mean_reduction and metric.meta.on_epoch


class LostProcess(pl.Callback):
    """Replace PyTorch's socket errors by a message that another process of the run is gone.

    It raises at once, before Lightning restores the default handler of SIGTERM: `torchrun` sends SIGTERM as soon as a
    process exits, which would end this one without a message.

    Raises:
        ProcessLost: communication with another process failed.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        raise_if_process_lost(exception, advice="; the last checkpoint, if there is one, is intact: resume from it")


class BatchNormSync(pl.Callback):
    """Synchronise the running statistics of batch norm before each validation, as timm's --dist-bn does.

    Args:
        how: "reduce" averages them over the processes, and "broadcast" copies those of rank 0.
    """

    def __init__(self, how: str):
        self.how = how

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sync(pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sync(pl_module)  # the averaged weights, if any, are in place by now

    @torch.no_grad()
    def _sync(self, pl_module: pl.LightningModule) -> None:
        buffers = [b for name, b in pl_module.named_buffers() if name.endswith(("running_mean", "running_var"))]
        if not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        if self.how == "broadcast":
            dist.broadcast(flat, src=0)
        else:
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))
