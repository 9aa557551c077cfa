"""Make a trained torchvision network multi-path, so that it at first computes nearly the same, and fine-tune it."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models.resnet import BasicBlock, ResNet

import fastroute


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def main() -> tuple[float, float, float]:
    torch.manual_seed(0)
    digits = load_digits()
    images = interpolate(torch.tensor(digits.images, dtype=torch.float32)[:600, None] / 8 - 1, size=24).repeat(
        1, 3, 1, 1
    )
    labels = torch.tensor(digits.target)[:600]
    training, test = (images[:400], labels[:400]), (images[400:], labels[400:])

    resnet = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)  # stands for a pretrained one
    train(resnet, *training, epochs=2, lr=0.02)
    before = accuracy(resnet, *test)

    model = fastroute.multipath(resnet, 2, ["maxpool", "layer1", "layer2"], init="copy", input_size=(3, 24, 24))
    converted = accuracy(model, *test)
    train(model, *training, epochs=1, lr=0.01)
    after = accuracy(model, *test)
    print(f"accuracy: one path {before:.3f}, two paths at the start {converted:.3f}, fine-tuned {after:.3f}")
    return before, converted, after


if __name__ == "__main__":
    main()
