"""Networks that several tests train."""

from torch import nn

from fastroute.models.cifar_resnet import cifar_resnet


class Noisy(nn.Module):
    """A routed network that draws random numbers in training."""

    def __init__(self):
        super().__init__()
        self.network = cifar_resnet(8, paths=2, num_classes=3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x, return_routing=False):
        return self.network(self.dropout(x), return_routing=return_routing)
