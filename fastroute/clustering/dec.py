"""Deep embedded clustering (DEC; Xie et al. 2016), as a Lightning module."""

import itertools
import math

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.module import ClusteringModule


def student_t(z: Tensor, centers: Tensor) -> Tensor:
    """Return soft assignments q_ij ∝ 1 / (1 + ‖z_i − μ_j‖²) of points to centres (DEC's Eq. 1).

    Args:
        z: points (N, D).
        centers: (K, D).

    Returns:
        q (N, K), with rows of sum 1.
    """
    q = 1 / (1 + (z[:, None] - centers).square().sum(-1))
    return q / q.sum(1, keepdim=True)


def target_distribution(q: Tensor) -> Tensor:
    """Return the target p_ij ∝ q_ij² / f_j with soft cluster sizes f_j = Σ_i q_ij (DEC's Eq. 3).

    Args:
        q: soft assignments (N, K).

    Returns:
        p (N, K), with rows of sum 1.
    """
    p = q.square() / q.sum(0)
    return p / p.sum(1, keepdim=True)


def _vectors(images: Tensor) -> Tensor:
    """Return images as (N, D) with ‖x‖² = D, DEC's scale: codes then lie far enough apart for the kernel of width 1."""
    return F.normalize(images.flatten(1)) * math.sqrt(images[0].numel())


def _perceptron(widths: list[int]) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class DEC(ClusteringModule):
    """Cluster images by the code of an autoencoder, which is pulled to the centres near it.

    For `pretrain_epochs`, the autoencoder learns to reproduce the pixels, and k-means of the codes at each validation
    gives the clusters. From the last centres, the second part minimises KL(p ‖ q). The target p takes the cluster sizes
    from the batch: with those of the previous epoch, growing clusters were not held back, and on MNIST one took nearly
    all images.

    Args:
        features: C·H·W of the images.
        num_clusters: K.
        pretrain_epochs: epochs of the autoencoder alone, at least 1.
        widths: of the encoder's layers, the last being the code's; the decoder has them in reverse.
        lr: the learning rate of Adam for the autoencoder; the second part has a tenth of it.
        seed: of k-means.

    Raises:
        ValueError: an argument is out of range.
    """

    EVEN = math.inf  # the kernel has long tails: well-separated clusters have a high entropy too

    def __init__(
        self,
        features: int,
        num_clusters: int,
        *,
        pretrain_epochs: int,
        widths: tuple[int, ...] = (500, 500, 2000, 10),
        lr: float = 1e-3,
        seed: int = 0,
    ):
        super().__init__(num_clusters)
        if pretrain_epochs < 1:
            raise ValueError(f"pretrain_epochs is {pretrain_epochs}; it must be at least 1")
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be greater than 0")
        self.encoder, self.decoder = _perceptron([features, *widths]), _perceptron([*widths[::-1], features])
        self.centers = nn.Parameter(torch.zeros(num_clusters, widths[-1]))
        self.pretrain_epochs, self.lr, self.seed = pretrain_epochs, lr, seed

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.pretrain_epochs])
        return [optimizer], [schedule]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["pretrain_epochs"] = self.pretrain_epochs

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.pretrain_epochs = checkpoint["pretrain_epochs"]  # a longer run only lengthens the second part

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = _vectors(batch[0])
        z = self.encoder(x)
        if self.current_epoch < self.pretrain_epochs:
            loss = F.mse_loss(self.decoder(z), x)
        else:
            q = student_t(z, self.centers)
            p = target_distribution(q.detach())
            loss = F.kl_div(q.log(), p, reduction="batchmean")
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def on_validation_epoch_start(self) -> None:
        if self.current_epoch < self.pretrain_epochs:
            kmeans = KMeans(self.num_clusters, n_init=5, random_state=self.seed).fit(self._codes().cpu().numpy())
            self.centers.data.copy_(torch.from_numpy(kmeans.cluster_centers_))

    @torch.no_grad()
    def _codes(self) -> Tensor:
        return torch.cat([self.encoder(_vectors(images)).float() for images, _ in self.trainer.val_dataloaders])

    def forward(self, images: Tensor) -> Tensor:
        """Return soft assignments q (N, K) of images (N, C, H, W)."""
        return student_t(self.encoder(_vectors(images)), self.centers)
