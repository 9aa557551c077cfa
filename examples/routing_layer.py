"""A routing layer in a network of your own: two paths that exchange features, trained in a plain PyTorch loop."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastroute.nn import CrossConnection, ParallelPaths


def conv(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2)
    )


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = ParallelPaths([conv(1, 16) for _ in range(2)])
        self.router = CrossConnection(16, in_paths=2, out_paths=2)
        self.second = ParallelPaths([conv(16, 32) for _ in range(2)])
        self.heads = ParallelPaths([nn.Sequential(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        xs = self.first([x])  # one tensor, which both paths share
        xs = self.router(xs)
        xs = self.heads(self.second(xs))
        return (xs[0] + xs[1]) / 2


def main() -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(labels)).split([1437, 360])
    model = TwoPaths()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(4):
        for batch in train[torch.randperm(len(train))].split(64):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(images[test]).argmax(1) == labels[test]).double().mean().item()
        model.train()
        print(f"epoch {epoch + 1}: accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
