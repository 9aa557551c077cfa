"""BlockDrop (Wu et al., 2018): a policy network picks the blocks of a ResNet for each image (Table 3.3)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models._modes import modes_kept
from fastroute.models.cifar_resnet import cifar_resnet
from fastroute.models.registry import register_model
from fastroute.models.skippable_resnet import SkippableResNet, check_share, decision
from fastroute.nn import Routing


class BlockDrop(SkippableResNet):
    """A `SkippableResNet` and a policy, a ResNet-8 that sees the image and chooses all blocks to compute at once.

    Evaluation mode computes the blocks of log-odds above 0, and training mode draws them. A run has three parts:

    1. `pretrain`: all blocks are computed, and learn by cross-entropy.
    2. `curriculum`: the blocks are frozen, and the policy learns by REINFORCE, at first about the last block only, in
       the end about all.
    3. The rest: both learn together, by REINFORCE and cross-entropy.

    The reward of a policy is 1 - (share of blocks computed)² for a right class and -`penalty` for a wrong one; that of
    the blocks that evaluation mode would compute is its baseline (self-critical).

    Args:
        depth: the number of layers of the ResNet, 6k + 2.
        pretrain, curriculum: shares of the run. With pretrain=0, start from weights of a run that has been through it.
        penalty: for a wrong class; the higher, the more blocks are computed.
        bound: draws have probabilities from 1 - bound to bound, so that the policy explores.
        entropy: the weight of the policy's entropy in the curriculum, which explores too.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        depth: int,
        *,
        pretrain: float = 0.5,
        curriculum: float = 0.2,
        penalty: float = 5.0,
        bound: float = 0.8,
        entropy: float = 0.1,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
    ):
        check_share("pretrain", pretrain)
        check_share("curriculum", curriculum)
        if pretrain + curriculum > 1:
            raise ValueError(f"pretrain is {pretrain}, and curriculum {curriculum}; together they must be at most 1")
        for name, value in (("penalty", penalty), ("entropy", entropy)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if not 0.5 < bound < 1:
            raise ValueError(f"bound is {bound}; it must be above 0.5 and below 1")
        super().__init__(depth, num_classes=num_classes, in_chans=in_chans)
        self.pretrain, self.curriculum, self.penalty = pretrain, curriculum, penalty
        self.bound, self.entropy = bound, entropy
        self.count = sum(1 for _ in self._blocks())
        self.policy = cifar_resnet(8, num_classes=self.count, in_chans=in_chans)
        choose = self.policy.get_classifier()
        nn.init.normal_(choose.weight, std=0.001)
        nn.init.ones_(choose.bias)  # evaluation computes all blocks until the policy has learned

    def forward(
        self, x: Tensor, return_routing: bool = False, gates: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Routing]]:
        """Return logits, as every network does.

        Args:
            x: (N, in_chans, H, W).
            return_routing: whether to return the routing too.
            gates: (N, blocks), 1 for each block to compute and 0 for each to skip; None asks the policy.
        """
        return self._classify(x, return_routing, gates=gates)

    def _body(
        self, x: Tensor, maps: list[list[Tensor]] | None = None, gates: Tensor | None = None
    ) -> tuple[list[Tensor], dict[str, Routing]]:
        scores = None
        if gates is None:
            scores = self.policy(x).float()
            gates = torch.bernoulli(self._probabilities(scores)) if self.training else (scores > 0).float()
        x, routing = self.stem(x), {}
        for i, (name, block) in enumerate(self._blocks()):
            x = block(x, gates[:, i])
            if scores is not None:
                routing[name] = decision(scores[:, i], gates[:, i])
            if maps is not None:
                maps.append([x])
        return [x], routing

    def _probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities, from 1 - bound to bound, of computing each block."""
        return 1 - self.bound + (2 * self.bound - 1) * scores.sigmoid()

    def training_loss(self, images: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and the logits of the blocks that were drawn.

        Args:
            images: (N, in_chans, H, W).
            targets: (N, num_classes), shares of the classes.
            progress: the share of the run that is done.
        """
        if progress < self.pretrain:
            logits = self(images, gates=images.new_ones(len(images), self.count))
            return F.cross_entropy(logits, targets), logits
        joint = progress >= self.pretrain + self.curriculum
        share = 1.0 if joint else (progress - self.pretrain) / self.curriculum
        first = self.count - min(int(share * self.count) + 1, self.count)  # of the blocks that the policy decides on
        scores = self.policy(images).float()
        probabilities = self._probabilities(scores)
        drawn, likelier = torch.bernoulli(probabilities.detach()), (scores > 0).float()
        drawn[:, :first] = likelier[:, :first] = 1
        with contextlib.nullcontext() if joint else self._frozen():
            logits = self(images, gates=drawn)
            with torch.no_grad():
                baseline = self(images, gates=likelier)
        labels = targets.argmax(1)
        advantage = self._reward(logits, labels, drawn) - self._reward(baseline, labels, likelier)
        chances = torch.where(drawn > 0, probabilities, 1 - probabilities)[:, first:]
        loss = -(advantage[:, None] * chances.log()).sum(1).mean()
        if joint:
            return loss + F.cross_entropy(logits, targets), logits
        decided = probabilities[:, first:]
        entropy = -(decided * decided.log() + (1 - decided) * (1 - decided).log()).sum(1).mean()
        return loss - self.entropy * entropy, logits

    def _reward(self, logits: Tensor, labels: Tensor, gates: Tensor) -> Tensor:
        """Return the reward (N,) of computing some blocks."""
        return torch.where(logits.argmax(1) == labels, 1 - gates.mean(1).square(), -self.penalty)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Compute as in evaluation, without gradients."""
        with torch.no_grad(), modes_kept(self):
            self.eval()
            yield


@register_model(table="3.3", params="1.7")
def blockdrop110(**options) -> nn.Module:
    """Build BlockDrop on ResNet-110.

    The thesis's 1.7 million parameters are those of ResNet-110; the policy, a ResNet-8, has 0.08 million more.
    """
    return BlockDrop(110, **options)
