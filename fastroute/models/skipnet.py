"""SkipNet (Wang et al., 2018): a recurrent gate decides block by block what an image skips."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.cifar_resnet import WIDTHS
from fastroute.models.registry import register_model
from fastroute.models.skippable_resnet import SkippableResNet, check_share, decision
from fastroute.nn import Routing


class SkipNet(SkippableResNet):
    """A `SkippableResNet` with recurrent gates: an LSTM, shared by the blocks, reads the channels' means of each input.

    A block is computed if its log-odds are above 0. In training, these gates pass the gradient of the probability on
    (straight-through), which is the paper's supervised pre-training. In the last part of a run, blocks are drawn, and
    the gates learn by the paper's hybrid of both gradients: that of the cross-entropy, and REINFORCE with the reward of
    what follows a gate, `alpha` times the share of blocks skipped less the cross-entropy. Here the batch's mean is
    subtracted from the rewards, to lower their variance, and the first block has a gate like all others.

    Args:
        depth: the number of layers, 6k + 2.
        gate_channels: the width of the LSTM.
        reinforce: the last share of a run, in which blocks are drawn.
        alpha: the reward of skipping all blocks.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        depth: int,
        *,
        gate_channels: int = 10,
        reinforce: float = 0.15,
        alpha: float = 0.1,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
    ):
        check_share("reinforce", reinforce)
        if gate_channels < 1:
            raise ValueError(f"gate_channels is {gate_channels}; it must be at least 1")
        if alpha < 0:
            raise ValueError(f"alpha is {alpha}; it must be at least 0")
        super().__init__(depth, num_classes=num_classes, in_chans=in_chans)
        self.reinforce, self.alpha = reinforce, alpha
        widths = [WIDTHS[0], *(block.residual[0].out_channels for _, block in self._blocks())][:-1]
        self.embed = nn.ModuleList(nn.Linear(width, gate_channels) for width in widths)
        self.recur = nn.LSTMCell(gate_channels, gate_channels)
        self.choose = nn.Linear(gate_channels, 1)
        nn.init.normal_(self.choose.weight, std=0.001)
        nn.init.constant_(self.choose.bias, 2.0)  # probabilities start at 0.88

    def forward(
        self, x: Tensor, return_routing: bool = False, draw: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Routing]]:
        """Return logits, as every network does.

        Args:
            x: (N, in_chans, H, W).
            return_routing: whether to return the routing too.
            draw: whether to draw the gates, which then pass no gradient on.
        """
        return self._classify(x, return_routing, draw=draw)

    def _body(
        self, x: Tensor, maps: list[list[Tensor]] | None = None, draw: bool = False
    ) -> tuple[list[Tensor], dict[str, Routing]]:
        x, routing, state = self.stem(x), {}, None
        for (name, block), embed in zip(self._blocks(), self.embed, strict=True):
            state = self.recur(embed(x.mean((2, 3))), state)
            score = self.choose(state[0]).squeeze(1).float()
            gate = self._gate(score, draw)
            x, routing[name] = block(x, gate), decision(score, gate)
            if maps is not None:
                maps.append([x])
        return [x], routing

    def _gate(self, score: Tensor, draw: bool) -> Tensor:
        probability = score.sigmoid()
        if draw:
            return torch.bernoulli(probability.detach())
        gate = (score > 0).to(score.dtype)
        return gate + (probability - probability.detach()) if self.training else gate

    def training_loss(self, images: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and its logits.

        Args:
            images: (N, in_chans, H, W).
            targets: (N, num_classes), shares of the classes.
            progress: the share of the run that is done.
        """
        draw = progress >= 1 - self.reinforce
        logits, routing = self(images, return_routing=True, draw=draw)
        losses = F.cross_entropy(logits, targets, reduction="none")
        if not draw:
            return losses.mean(), logits
        gates = torch.cat([gates for gates, _ in routing.values()], 1)  # (N, blocks, 2)
        chances = (gates * torch.cat([scores for _, scores in routing.values()], 1).log_softmax(-1)).sum(-1)
        skipped = self.alpha * gates[..., 0] / len(routing)
        returns = skipped.flip(1).cumsum(1).flip(1) - losses.detach()[:, None]  # of each gate and all that follow
        return losses.mean() - ((returns - returns.mean(0)) * chances).sum(1).mean(), logits


@register_model
def skipnet110(**options) -> nn.Module:
    """Build SkipNet on ResNet-110, with recurrent gates."""
    return SkipNet(110, **options)
