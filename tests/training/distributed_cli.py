"""The command line for `test_distributed.py`: seeded, and with "kill" first, process 1 dies in the second epoch."""

import os
import sys

import torch

from fastroute.cli import main
from fastroute.training.steps import StepSeed

torch.manual_seed(0)
torch.set_num_threads(1)
if sys.argv[1] == "kill":
    del sys.argv[1]
    seed = StepSeed.on_train_batch_start

    def die(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            os._exit(9)
        seed(self, trainer, pl_module, batch, batch_idx)

    StepSeed.on_train_batch_start = die
main()
