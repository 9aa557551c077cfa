"""Images clustered without labels, by the mixture-EM loss in a loop of your own (Eq. 4.23)."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastroute.clustering import cluster_accuracy
from fastroute.nn import MixtureEMLoss, RelevanceNorm


def augment(images: Tensor) -> Tensor:
    """Shift each batch by up to a pixel, and add a little noise."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(images, (down, right), dims=(2, 3)) + 0.1 * torch.randn_like(images)


def main() -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
        nn.Linear(64 * 4 * 4, 10),
    )
    norm = RelevanceNorm(num_clusters=10)  # the running statistics that make clusters comparable (Eq. 4.11)
    criterion = MixtureEMLoss(norm=norm)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    for epoch in range(5):
        for batch in torch.randperm(len(images)).split(128)[:-1]:
            loss, _ = criterion(network(images[batch]), network(augment(images[batch])))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval(), criterion.eval()
        with torch.no_grad():
            clusters = norm(network(images)).argmax(1)
        network.train(), criterion.train()
        accuracy = cluster_accuracy(digits.target, clusters.numpy())
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
