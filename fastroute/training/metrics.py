"""Loss and errors over an epoch."""

import torch
from torch import Tensor
from torchmetrics import Metric


class Totals(Metric):
    """Loss, top-1 and top-5 error over an epoch, from integer counts: exact for any batches and processes.

    torchmetrics' accuracies put new tensors in the place of their counts, where a CUDA graph needs fixed ones.
    """

    SUMS = ("loss", "samples", "wrong", "wrong5")
    full_state_update = False

    def __init__(self):
        super().__init__()
        for name in self.SUMS:
            dtype = torch.float32 if name == "loss" else torch.long
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, loss: Tensor | None = None, logits: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Add a batch to the sums, in place; without arguments, count an update that a CUDA graph has made.

        Args:
            loss: (), the mean over the batch.
            logits: (N, K).
            labels: (N,), or (N, K) shares of a mixture, of which the largest counts.
        """
        if loss is None:
            return
        labels = labels.argmax(1) if labels.dim() == 2 else labels
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [N, 5]
        self.loss += loss.detach().float() * len(labels)
        self.samples += len(labels)
        self.wrong += len(labels) - hits[:, 0].sum()
        self.wrong5 += len(labels) - hits.sum()

    def reset(self) -> None:
        """Set the sums to 0 in place: a CUDA graph may add to these tensors."""
        sums = {name: getattr(self, name) for name in self.SUMS}
        super().reset()
        for name, total in sums.items():
            setattr(self, name, total.zero_())

    def compute(self) -> dict[str, Tensor]:
        """Return "loss", the mean over the samples, and "error" and "error5", in percent."""
        return {
            "loss": self.loss / self.samples,
            "error": 100 * self.wrong / self.samples,
            "error5": 100 * self.wrong5 / self.samples,
        }
