"""Clustering by the code of an autoencoder that clusters reshape: DEC, IDEC and DCN, as Lightning modules."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.centers import k_means
from fastroute.clustering.module import ClusteringModule, check_positive
from fastroute.clustering.networks import perceptron
from fastroute.ops._library import without_autocast

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting


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


class DEC(ClusteringModule):
    """Deep embedded clustering (Xie et al. 2016): the code of an autoencoder is pulled to the centres near it.

    For `pretrain_epochs`, the autoencoder learns to reproduce the pixels, and k-means of the codes at each validation
    gives the clusters. From the last centres, the second part minimises KL(p ‖ q). The target p takes the cluster sizes
    from the batch: with those of the previous epoch, growing clusters were not held back, and on MNIST one took nearly
    all images.

    Args:
        features: C·H·W of the images.
        num_clusters: K.
        pretrain_epochs: epochs of the autoencoder alone, at least 1.
        widths: of the encoder's layers, the last being the code's; the decoder has them in reverse.
        lr: the learning rate of Adam for the autoencoder; the second part has `SECOND` times it.
        seed: of k-means.

    Raises:
        ValueError: an argument is out of range.
    """

    EVEN = math.inf  # the kernel has long tails: well-separated clusters have a high entropy too
    NETWORK = "dense autoencoder"
    UNTRAINED_CLUSTERS = False
    SCHEDULE = ("pretrain_epochs",)  # a longer run only lengthens the second part
    SECOND = 0.1
    """The learning rate of the second part, as a share of the autoencoder's."""

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
        check_positive(lr=lr)
        self.encoder = perceptron(features, widths[:-1], widths[-1])
        self.decoder = perceptron(widths[-1], widths[-2::-1], features)
        self.centers = nn.Parameter(torch.zeros(num_clusters, widths[-1]))
        self.pretrain_epochs, self.lr, self.seed = pretrain_epochs, lr, seed

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.pretrain_epochs], self.SECOND)
        return [optimizer], [schedule]

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        x = _vectors(images)
        z = self.encoder(x).float()
        return F.mse_loss(self.decoder(z), x) if self.pretraining else self.cluster_loss(x, z, index)

    @property
    def pretraining(self) -> bool:
        """Whether the epoch is of the first part."""
        return self.current_epoch < self.pretrain_epochs

    def cluster_loss(self, x: Tensor, z: Tensor, index: Tensor | None) -> Tensor:
        """Return the loss of the second part.

        Args:
            x: vectors (N, D).
            z: their codes.
            index: (N,), their places among all images.
        """
        q = student_t(z, self.centers)
        return F.kl_div(q.log(), target_distribution(q.detach()), reduction="batchmean")

    def on_validation_epoch_start(self) -> None:
        if self.pretraining:
            self.place_centers(self._codes())

    def place_centers(self, codes: Tensor) -> None:
        """Take the centres from k-means of all codes (N, D)."""
        self.centers.data.copy_(k_means(codes, self.num_clusters, self.seed)[0])

    def _codes(self) -> Tensor:
        return self.over_images(lambda images: self.encoder(_vectors(images)))

    def responses(self, images: Tensor) -> Tensor:
        """Return −log(1 + ‖z − μ‖²) (N, K) of images (N, C, H, W); its softmax is q."""
        return -torch.cdist(self.encoder(_vectors(images)), self.centers).square().log1p()

    def forward(self, images: Tensor) -> Tensor:
        """Return soft assignments q (N, K) of images (N, C, H, W)."""
        return student_t(self.encoder(_vectors(images)), self.centers)


class IDEC(DEC):
    """Improved DEC (Guo et al. 2017): the second part goes on to reproduce the pixels, beside 0.1 · KL(p ‖ q).

    The targets p are of all images, and are updated at the start of each epoch. Arguments are those of `DEC`; as in the
    paper, the learning rate stays the same.
    """

    SECOND = 1.0
    WEIGHT = 0.1
    """γ of the paper, the weight of the clustering loss."""

    def on_train_epoch_start(self) -> None:
        if not self.pretraining:
            self.kept["targets"] = target_distribution(student_t(self._codes(), self.centers.detach()))

    def cluster_loss(self, x: Tensor, z: Tensor, index: Tensor) -> Tensor:
        divergence = F.kl_div(student_t(z, self.centers).log(), self.kept["targets"][index], reduction="batchmean")
        return F.mse_loss(self.decoder(z), x) + self.WEIGHT * divergence


class DCN(DEC):
    """Deep clustering network (Yang et al. 2017): the autoencoder's codes are pulled to their k-means centres.

    The second part minimises ‖x − x̂‖² + λ/2 ‖z − μ_k‖² with the nearest centre μ_k. Each code then moves its centre by
    1/c_k of their difference, c_k being the number of codes that the centre has had. Arguments are those of `DEC`.
    """

    WEIGHT = 0.05
    """λ of the paper."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.centers.requires_grad_(False)  # they move as in k-means
        self.register_buffer("counts", torch.zeros(self.num_clusters))

    def place_centers(self, codes: Tensor) -> None:
        super().place_centers(codes)
        nearest = torch.cdist(codes, self.centers).argmin(1)
        self.counts.copy_(torch.bincount(nearest, minlength=self.num_clusters))

    def cluster_loss(self, x: Tensor, z: Tensor, index: Tensor | None) -> Tensor:
        nearest = torch.cdist(z.detach(), self.centers).argmin(1)
        distance = (z - self.centers[nearest]).square().sum(1).mean()
        self._move(z.detach(), nearest)
        return (self.decoder(z) - x).square().sum(1).mean() + self.WEIGHT / 2 * distance

    def _move(self, z: Tensor, nearest: Tensor) -> None:
        """Move each centre to the mean of all codes it has had, as the paper's updates by single codes do."""
        members = F.one_hot(nearest, self.num_clusters).to(z.dtype)
        found = members.sum(0)
        self.counts += found
        with without_autocast(z.device.type):  # keep the small moves of centres with many codes
            moved = members.T @ z - found[:, None] * self.centers
        self.centers.data += moved / self.counts.clamp(min=1)[:, None]


KINDS = {"dec": DEC, "idec": IDEC, "dcn": DCN}


def build(setting: "Setting") -> DEC:
    """Build the module of a run of DEC, IDEC or DCN; the first half of the epochs trains the autoencoder."""
    run = setting.run
    pretrain_epochs = (setting.epochs + 1) // 2
    return KINDS[run.method](setting.shape.numel(), run.clusters, pretrain_epochs=pretrain_epochs, seed=setting.seed)
