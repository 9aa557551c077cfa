"""A run of `test_distributed.py`, for one process or for `torchrun`: arguments as JSON."""

import contextlib
import json
import os
import sys

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from fastroute.nn import CrossConnection, SparseRouter
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from fastroute.training.distributed import process_group


class Network(nn.Module):
    """Two routed paths without batch norm, whose outputs do not depend on how a batch is divided."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.split = CrossConnection(8, 1, 2)
        self.paths = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.router = CrossConnection(8, 2, 2)
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x, return_routing=False):
        xs, split = self.split([self.stem(x).relu()], return_routing=True)
        xs, router = self.router([path(x).relu() for path, x in zip(self.paths, xs, strict=True)], return_routing=True)
        logits = sum(head(x.mean((2, 3))) for head, x in zip(self.heads, xs, strict=True)) / 2
        return (logits, {"split": split, "router": router}) if return_routing else logits


class Normed(Network):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(self.stem, nn.BatchNorm2d(8))


class Phased(Network):
    """Its own loss leaves most layers out, and in the first half of a run a head too."""

    def training_loss(self, images, targets, progress):
        x = self.stem(images).relu().mean((2, 3))
        logits = sum(head(x) for head in (self.heads if progress >= 0.5 else self.heads[:1]))
        return F.cross_entropy(logits, targets), logits


class Sparse(nn.Module):
    """More paths than a process has samples, so that some are idle in each step, and others in the other process."""

    routing = "topk"

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.router = SparseRouter(8, [nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)], routing=self.routing)
        self.head = nn.Linear(8, 3)
        nn.init.normal_(self.router.w2)

    def forward(self, x, return_routing=False):
        x, routing = self.router(self.stem(x).relu(), return_routing=True)
        logits = self.head(x.mean((2, 3)))
        return (logits, {"router": routing}) if return_routing else logits


class Clustered(Sparse):
    routing = "cluster"


class Idle(Network):
    """A layer that no step needs."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(8, 3)


def scores_squared(routing):
    return sum(r.scores.square().mean() for r in routing.values())


class Stopped(Exception):
    pass


class StopAt(pl.Callback):
    """End the run before a batch of an epoch."""

    def __init__(self, epoch, batch):
        self.place = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            raise Stopped


def run(folder, output, batch_size, network="Network", save_ranks=False, stop=None, **options):
    class Classifier(RoutingClassifier):
        def configure_callbacks(self):
            return [StopAt(*stop)] if stop else []

    data = ImageDataModule("imagefolder", folder, batch_size, 8, 1, seed=1)
    pl.seed_everything(0, verbose=False)
    model = globals()[network]()
    aux_loss = None if hasattr(model, "training_loss") else scores_squared
    module = Classifier(model, 3, aux_loss=aux_loss, sched="cosine")
    fit(module, data, epochs=3, output=output, accelerator="cpu", console=Console(quiet=True), **options)
    if save_ranks:
        torch.save(module.state_dict(), f"{output}/rank{os.environ['RANK']}.pt")


def main(folder, output, batch_size, networks=None, stop=None, **options):
    """One run, or one of each of `networks` with their options.

    With `stop`, one uninterrupted run in "whole", and one that is stopped and resumed in "halves".
    """
    torch.set_num_threads(1)
    with process_group():
        if networks:
            for network, own in networks.items():
                run(folder, f"{output}/{network}", batch_size, network=network, **own, **options)
            return
        if stop is None:
            run(folder, output, batch_size, **options)
            return
        run(folder, f"{output}/whole", batch_size, **options)
        with contextlib.suppress(Stopped):
            run(folder, f"{output}/halves", batch_size, stop=stop, **options)
        run(folder, f"{output}/halves", batch_size, resume=f"{output}/halves/last.ckpt", **options)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
