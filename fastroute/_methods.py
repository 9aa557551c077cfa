"""The methods of `fastroute cluster` by name, in a module that a command's `--help` can import at no cost."""

from typing import NamedTuple


class Method(NamedTuple):
    """A method of clustering images.

    To add one, write a module with a builder in `fastroute/clustering`, and its entry in `METHODS`.

    Attributes:
        about: one line for the documentation.
        builder: "module:function" in `fastroute.clustering`, from a `Setting` to a `ClusteringModule`; None for a
            method of scikit-learn, which `fastroute.clustering.run` has.
        starts: whether it takes several heads, or several networks at once.
        scores: whether a network gives the clusters' scores, so that they can label the images for a last step.
        most: the most images that it takes; None is any number.
        batch_size: images in a batch, by default.
    """

    about: str
    builder: str | None = None
    starts: bool = False
    scores: bool = False
    most: int | None = None
    batch_size: int = 128


METHODS = {
    "two-fold": Method(
        "mixture-EM and consistency steps in turn (Algorithm 3); the default",
        "two_fold:build",
        starts=True,
        scores=True,
    ),
    "em": Method("the mixture-EM loss alone (Eq. 4.23)", "two_fold:build", starts=True, scores=True),
    "consistency": Method("the consistency loss alone (Eq. 4.24)", "two_fold:build", starts=True, scores=True),
    "iic": Method(
        "invariant information clustering (Ji et al. 2019), in the thesis's setting", "iic:build", scores=True
    ),
    "iic-own": Method(
        "IIC in its own setting: five augmented copies of an image, several heads, and over-clustering ones",
        "iic:build",
        scores=True,
    ),
    "dec": Method(
        "deep embedded clustering (Xie et al. 2016): the code of an autoencoder, pulled to the centres near it",
        "dec:build",
    ),
    "idec": Method("improved DEC (Guo et al. 2017), whose autoencoder goes on to reproduce the pixels", "dec:build"),
    "dcn": Method(
        "deep clustering network (Yang et al. 2017): DEC's autoencoder beside k-means of its code", "dec:build"
    ),
    "dac": Method(
        "deep adaptive clustering (Chang et al. 2017): ever more pairs of a batch count as one cluster",
        "dac:build",
        scores=True,
    ),
    "deepcluster": Method(
        "DeepCluster (Caron et al. 2018): k-means of the features labels the images for the next epoch",
        "deep_cluster:build",
    ),
    "ae": Method("k-means of the code of an autoencoder on the networks of Table 4.2", "autoencoder:build"),
    "sparse-ae": Method("the same with a sparse code (Ng 2011)", "autoencoder:build"),
    "denoising-ae": Method(
        "the same from images with a quarter of their values at 0 (Vincent et al. 2010)", "autoencoder:build"
    ),
    "vae": Method(
        "the same of a variational autoencoder (Kingma & Welling 2014)",
        "autoencoder:build",
        batch_size=32,  # small sets have few steps of 128
    ),
    "swwae": Method(
        "the same of a stacked what-where autoencoder (Zhao et al. 2016): the decoder knows where each maximum was",
        "swwae:build",
    ),
    "kmeansnet": Method(
        "k-meansNet (Peng et al. 2018): k-means as a layer, on the code of an autoencoder that learns with it",
        "kmeans_net:build",
        scores=True,
    ),
    "jule": Method(
        "joint unsupervised learning (Yang et al. 2016): clusters of a neighbour graph merge, and teach by triplets",
        "jule:build",
        most=20_000,
    ),
    "adc": Method(
        "associative deep clustering (Haeusser et al. 2018): walks from centroids to images and back",
        "adc:build",
        scores=True,
    ),
    "triplet": Method(
        "k-means of an embedding, in which an image is closer to its augmented copy than to another", "triplet:build"
    ),
    "gan": Method("k-means of the features of a DCGAN's discriminator (Radford et al. 2016)", "gan:build"),
    "kmeans": Method("k-means of the pixels, by scikit-learn"),
    "gmm": Method("a Gaussian mixture of the pixels, by scikit-learn"),
    "spectral": Method("spectral clustering of the pixels, by scikit-learn"),
}
"""Every method by its name for `--method`."""


def check_self_label(method: str, self_label: int) -> None:
    """Check that a method has scores to label images by.

    Raises:
        ValueError: it has none, and `self_label` is not 0.
    """
    if self_label and not METHODS[method].scores:
        able = ", ".join(name for name, other in METHODS.items() if other.scores)
        raise ValueError(
            f"self_label is {self_label}; the method {method!r} has no scores to label by: choose one of {able}"
        )


def check_starts(method: str, **counts: int) -> None:
    """Check how many heads and networks a run has at once.

    Args:
        method: a key of `METHODS`.
        counts: `heads` and `n_init`.

    Raises:
        ValueError: one of them is above 1, and the method has one alone.
    """
    for name, count in counts.items():
        if count > 1 and not METHODS[method].starts:
            raise ValueError(f"{name} is {count}; with the method {method!r} it must be 1")


def check_count(method: str, count: int) -> None:
    """Check how many images a run has.

    Args:
        method: a key of `METHODS`.
        count: of the images.

    Raises:
        ValueError: the method does not take as many.
    """
    most = METHODS[method].most
    if most is not None and count > most:
        raise ValueError(
            f"images are {count:,}; the method {method!r} takes at most {most:,}: choose another, or add --limit {most}"
        )
