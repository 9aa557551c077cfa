"""ConvNet-AIG (Veit and Belongie, 2018): each image uses or skips each residual block (Table 3.3)."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.registry import register_model
from fastroute.models.skippable_resnet import SkippableBlock, SkippableResNet
from fastroute.nn import Routing


class GatedBlock(SkippableBlock):
    """A block that computes its own gate, from the channels' means.

    Training mode draws g by the Gumbel-max trick, with the softmax's gradient (straight-through). Evaluation mode takes
    the likelier choice. Gates start at 0.87 for the residual.

    Args:
        gate_channels: the width of the gate's hidden layer.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, gate_channels: int = 20):
        super().__init__(in_channels, out_channels, stride)
        choose = nn.Linear(gate_channels, 2)
        nn.init.normal_(choose.weight, std=0.001)
        choose.bias.data.copy_(choose.bias.new_tensor([0.1, 2.0]))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(in_channels, gate_channels),
            nn.BatchNorm1d(gate_channels),
            nn.ReLU(inplace=True),
            choose,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Return the output, and a `Routing` of shape (N, 1, 2): the weights of skipping and of computing."""
        scores = self.gate(x)
        gates = F.gumbel_softmax(scores, hard=True) if self.training else F.one_hot(scores.argmax(1), 2).to(x.dtype)
        return super().forward(x, gates[:, 1]), Routing(gates.unsqueeze(1), scores.unsqueeze(1))


class ConvNetAIG(SkippableResNet):
    """A `SkippableResNet` of `GatedBlock`s.

    The loss that holds each block to a target rate is a function of the gates, which `return_routing=True` returns.
    """

    block = GatedBlock

    def _body(self, x: Tensor, maps: list[list[Tensor]] | None = None) -> tuple[list[Tensor], dict[str, Routing]]:
        x, routing = self.stem(x), {}
        for name, block in self._blocks():
            x, routing[name] = block(x)
            if maps is not None:
                maps.append([x])
        return [x], routing


@register_model(table="3.3", params="1.78")
def convnet_aig110(**options) -> nn.Module:
    """Build ConvNet-AIG-110.

    Gates with a hidden layer of 20 come to Table 3.3's 1.78 million parameters; those with 16 to 1.77.
    """
    return ConvNetAIG(110, **options)
