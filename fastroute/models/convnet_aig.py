"""ConvNet-AIG (Veit and Belongie, 2018): each image uses or skips each residual block (Table 3.3)."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.cifar_resnet import WIDTHS, BasicBlock, blocks_per_stack, stack
from fastroute.models.layers import conv_bn, pool_and_classify
from fastroute.models.registry import register_model
from fastroute.nn import Routing
from fastroute.nn._classifier import Classifies


class GatedBlock(BasicBlock):
    """relu(shortcut(x) + g·residual(x)), where g is 0 or 1 for each sample, decided from the channels' means.

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
        y = self.relu(self.shortcut(x) + gates[:, 1].reshape(-1, 1, 1, 1) * self.residual(x))
        return y, Routing(gates.unsqueeze(1), scores.unsqueeze(1))


class ConvNetAIG(Classifies, nn.Module):
    """ResNet-depth for small images with a gate for each block.

    Every block is computed and weighted by its gate; only a sparse implementation would save the skipped blocks. The
    loss that holds each block to a target rate is a function of the gates, which `return_routing=True` returns.

    Args:
        depth: the number of layers, 6k + 2.
        num_classes, in_chans: as in `create_model`.
        img_size: not used: any size works.

    Shape:
        x: (N, in_chans, H, W).
        output: logits (N, num_classes); with `return_routing=True` also {block's name: Routing of shape (N, 1, 2)}.
    """

    def __init__(self, depth: int, *, num_classes: int = 10, in_chans: int = 3, img_size: int = 32):
        super().__init__()
        blocks, width = blocks_per_stack(depth), WIDTHS[0]
        self.stem = nn.Sequential(*conv_bn(in_chans, width), nn.ReLU(inplace=True))
        for i, out_width in enumerate(WIDTHS, start=1):
            self.add_module(f"stack{i}", stack(GatedBlock, width, out_width, blocks, stride=1 if i == 1 else 2))
            width = out_width
        self.head = pool_and_classify(width, num_classes)

    def _body(self, x: Tensor, maps: list[list[Tensor]] | None = None) -> tuple[list[Tensor], dict[str, Routing]]:
        x, routing = self.stem(x), {}
        for name in ("stack1", "stack2", "stack3"):
            for i, block in enumerate(self.get_submodule(name)):
                x, routing[f"{name}.{i}"] = block(x)
            if maps is not None:
                maps.append([x])
        return [x], routing

    def _head(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.head(xs[0])]

    def _heads(self) -> list[str]:
        return ["head"]


@register_model(table="3.3", params="1.78")
def convnet_aig110(**options) -> nn.Module:
    """Build ConvNet-AIG-110.

    Gates with a hidden layer of 20 come to Table 3.3's 1.78 million parameters; those with 16 to 1.77.
    """
    return ConvNetAIG(110, **options)
