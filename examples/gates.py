"""The gates of each image, without and with the gates' clustering loss beside that of the task (§5.1)."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastroute.nn import CrossConnection, GateClusteringLoss, MultiPathNetwork, ParallelPaths


def conv(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU())


def network() -> MultiPathNetwork:
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
    return MultiPathNetwork(
        {
            "stem": ParallelPaths([conv(1, 16)]),
            "open": CrossConnection(16, in_paths=1, out_paths=2),
            "stage": ParallelPaths([conv(16, 16) for _ in range(2)]),
            "mix": CrossConnection(16, in_paths=2, out_paths=2),
            "heads": ParallelPaths([nn.Sequential(conv(16, 16), head) for head in heads]),
        }
    )


def train(images: Tensor, labels: Tensor, weight: float) -> MultiPathNetwork:
    torch.manual_seed(0)
    model, gate_clustering = network(), GateClusteringLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(4):
        for batch in torch.randperm(len(labels)).split(64):
            logits, routing = model(images[batch], return_routing=True)
            loss = cross_entropy(logits, labels[batch]) + weight * gate_clustering(routing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> dict[float, float]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    spread = {}
    for weight in (0.0, 0.01):
        model = train(images[:1000], labels[:1000], weight)
        with torch.no_grad():
            logits, routing = model(images[1000:], return_routing=True)
        accuracy = (logits.argmax(1) == labels[1000:]).double().mean().item()
        print(f"gate clustering with weight {weight}: accuracy {accuracy:.3f}")
        for name, router in routing.items():
            gates = router.gates  # (N, m, n): image s sends the share gates[s, i, j] of path i to path j
            print(f"  {name}: mean {gates.mean(0).tolist()}, deviation over the images {gates.std(0).tolist()}")
        spread[weight] = torch.cat([router.gates.std(0).flatten() for router in routing.values()]).mean().item()
    return spread


if __name__ == "__main__":
    main()
