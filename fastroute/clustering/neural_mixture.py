"""The neural mixture model as a scikit-learn estimator (§4.4)."""

import contextlib
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import reduce

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from fastroute._devices import check_gpu, is_there
from fastroute.clustering._densities import DENSITIES
from fastroute.clustering._mixture_model import INFERENCE_BATCH
from fastroute.clustering._mixture_model import Model as _Model  # by this name in files of early versions
from fastroute.ops.mixture_em import MAX_CLUSTERS


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class NeuralMixture(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Cluster samples by a network that models the clusters' distributions, trained by mixture EM (§4.4, Eq. 4.22).

    What a Gaussian mixture does with Gaussians, a network does here with whatever it can express: its outputs, one for
    each cluster and normalised over the data, are the samples' relevance scores. Clusters are regions of space that are
    dense or far apart. It cannot separate shapes that differ only in connectivity, such as nested rings. Without a
    learned prior, clusters come out of about equal size.

    Args:
        n_clusters: K, 1 to 1024; or "auto": `max_clusters` to begin with, with a learned prior. Empty clusters are
            dropped, and neighbours are merged while there is no valley of density at their border: a little noise
            carries more than 1.5 % of the smaller one's samples across it. So a cluster can have the shape of a chain
            of them. In spaces of many dimensions, where training keeps borders away from noisy samples, more clusters
            are left than there are groups.
        network: a module from samples (N, …) to scores (N, K), which is copied, never changed. The first run starts
            from its weights; further ones draw them anew where a layer has `reset_parameters`. None is a perceptron.
        hidden: widths of the perceptron's hidden layers.
        prior: "even": clusters weigh 1/K each; "learned": by the samples they get, for clusters of uneven size; or K
            numbers with sum 1 (Eq. 4.18).
        max_clusters: the K that "auto" begins with.
        init: "random": the random network's first posteriors; "k-means++": the network first learns the regions around
            seeds that lie far apart; "auto": k-means++ with a learned prior, which random posteriors, all even, would
            leave even, else random.
        n_init: runs from different starts. The one with the lowest EM loss is kept; no label is needed for that.
        epochs: passes over the data of each run.
        batch_size: samples in an EM step. Batches are of equal size, up to twice as large.
        learning_rate: of Adam.
        gamma: γ of Eq. 4.12.
        density: the clusters' distributions h of a normalised score a*: "sigmoid", sigmoid(a* / γ), as in the thesis
            (Eq. 4.12), or "gaussian", exp(-(a* / γ - 2)² / 2), which is as accurate. Posteriors are the softmax of
            Eq. 4.18 and 4.20 with both.
        exclusive_layers: L, how many of the perceptron's last layers each cluster has for itself, 1 to all. With L = 1
            the clusters share all but the layer of their scores, as in the thesis. Exclusive layers have the widths of
            `hidden` for each cluster, so time grows with K; two of them were less accurate on the digits.
        emerging: whether `partial_fit` adds a cluster for samples that lie together and fit none, and drops clusters
            that run dry; with a learned prior.
        noise: standard deviation of the Gaussian noise, after standardisation, that makes augmented samples (Eq. 4.23).
            Borders then keep away from samples. 0 trains on the samples alone.
        standardize: whether each feature is centred and brought to spread 1 before the network, whatever its unit.
            With q = (mean absolute / standard deviation) of a feature by the root mean square of that ratio over all
            features, the spread is q² where q < 1: a feature that has nearly always one value, unlike the others, stays
            small.
        warm_start: whether `fit` goes on from the network of the last one, for `epochs` more in one run, and leaves
            standardisation and merged clusters as they are. As with `partial_fit`, network, hidden, exclusive_layers,
            prior, standardize, device and the number of clusters must then be those of the first fit.
        verbose: 1 prints a line for each run, 2 also one for each pass over the data.
        random_state: int, RandomState or None: weights, order and seeds.
        device: where the network lives. Samples go there a batch at a time, so the data need not fit into its memory.

    Attributes:
        n_clusters_: K, as found by "auto" or `emerging`.
        labels_: (N,), the cluster of each sample of `fit`, or of the last `partial_fit`.
        priors_: (K,), the weight of each cluster.
        loss_: the mean EM loss of the samples of `fit`.
        n_iter_: passes over the data of the run that was kept, by `partial_fit` too.
        network_: the trained network.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    `X` is an array, a memory map or a tensor: float32 or float64, in which everything is computed, (n_samples,
    n_features), or with a network of your own (n_samples, …), such as images. An array on disk is read by the batch.

    Example:
        >>> labels = NeuralMixture(n_clusters=10, random_state=0).fit_predict(X)
    """

    def __init__(
        self,
        n_clusters: int | str = 8,
        *,
        max_clusters: int = 20,
        network: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128),
        prior: str | Sequence[float] = "even",
        init: str = "auto",
        n_init: int = 3,
        epochs: int = 30,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        gamma: float = 5.0,
        density: str = "sigmoid",
        exclusive_layers: int = 1,
        emerging: bool = False,
        noise: float = 0.3,
        standardize: bool = True,
        random_state=None,
        device: torch.device | str = "cpu",
        warm_start: bool = False,
        verbose: int = 0,
    ):
        self.n_clusters = n_clusters
        self.max_clusters = max_clusters
        self.network = network
        self.hidden = hidden
        self.prior = prior
        self.init = init
        self.n_init = n_init
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.gamma = gamma
        self.density = density
        self.exclusive_layers = exclusive_layers
        self.emerging = emerging
        self.noise = noise
        self.standardize = standardize
        self.random_state = random_state
        self.device = device
        self.warm_start = warm_start
        self.verbose = verbose

    def __setstate__(self, state):
        super().__setstate__({"density": "sigmoid", "exclusive_layers": 1, "emerging": False, **state})  # older files

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.non_deterministic = False
        return tags

    @torch.inference_mode(False)
    def fit(self, X, y=None, sample_weight=None):
        """Train on X; y is ignored.

        Args:
            sample_weight: (n_samples,), at least 0: each pass visits a sample in proportion to its weight, twice as
                often for a weight of 2 as for 1. None is 1 for all.

        Raises:
            ValueError: X has NaN, infinity or fewer samples than clusters, a parameter is out of its range, or
                training diverges: no run ends with a finite loss. With `warm_start`, the estimator stays as it was,
                unless its network cannot be copied.
        """
        going_on = self.warm_start and hasattr(self, "_model")
        X = self._validate(X, reset=not going_on)
        self._check_samples(X)
        self._check_parameters(len(X))
        weights = self._weights(sample_weight, X)
        if going_on:
            self._model.check_unchanged(self)
            with self._restored() as model:
                model.take_options(self)
                model.fit(X, weights, 1)
                return self._finish(X, model, model.loss(X, weights), self.n_iter_ + self.epochs)
        random = check_random_state(self.random_state)
        frame, best = self._frame(X, weights), None
        for run in range(self.n_init):
            seed = random.randint(2**31 - 1)
            model = _Model(self, X, frame, seed, fresh=run > 0)
            if self._init() == "k-means++":
                model.learn_seeds(X, weights)
            model.fit(X, weights, run + 1)
            loss = model.loss(X, weights)
            if best is None or loss < best[0] or math.isnan(best[0]):
                best = loss, model
        loss, model = best
        self._check_loss(loss)
        if self.n_clusters == "auto":
            model.merge(X)
        return self._finish(X, model, loss, self.epochs)

    @torch.inference_mode(False)
    def partial_fit(self, X, y=None, sample_weight=None):
        """One pass of EM steps over X, which may be one of many parts of the data; y is ignored.

        The first part sets the standardisation, the seeds and the network; there is one run, whatever n_init. With
        n_clusters="auto", only `fit` merges clusters; they stay merged as it left them. For sample_weight, see `fit`.

        With `emerging`, `n_clusters_` follows the parts. A cluster is added for at least 10 samples, with 2 % of a
        part's weight, that lie together and are out of the reach of all clusters; one is dropped after three parts in a
        row without a sample in its reach. Clusters keep their order, and new ones come last. Groups must lie apart: a
        new one that overlaps an old one is taken for a part of it.

        Raises:
            ValueError: as `fit` does; a part has one sample, which has no spread; or training has diverged. The
                estimator stays as it was, unless its network cannot be copied.
        """
        first = not hasattr(self, "_model")
        X = self._validate(X, reset=first)
        self._check_samples(X)
        weights = self._weights(sample_weight, X)
        if first:
            self._check_parameters(len(X))
            seed = check_random_state(self.random_state).randint(2**31 - 1)
            model = _Model(self, X, self._frame(X, weights), seed, fresh=False)
            if self._init() == "k-means++":
                model.learn_seeds(X, weights)
            self._learn_part(X, weights, model)
            return self._finish(X, model, model.loss(X, weights), 1)
        self._check_parameters()
        self._model.check_unchanged(self)
        with self._restored() as model:
            model.take_options(self)
            if self.emerging and model.places is not None:
                model.renew(X, weights)
            self._learn_part(X, weights, model)
            return self._finish(X, model, model.loss(X, weights), self.n_iter_ + 1)

    def _learn_part(self, X, weights, model: _Model) -> None:
        if self.emerging and self.network is not None and model.places is None:  # before the first part
            model.check_can_grow(X)
        model.train_epoch(X, weights, track=True)
        if self.emerging:
            model.settle(X, weights)

    @contextlib.contextmanager
    def _restored(self) -> Iterator[_Model]:
        """Yield the trained model to train on. If that fails, the estimator has a copy from before, if it can have one.

        A network that keeps a tensor of its forward, or a lock, cannot be copied.
        """
        attributes, before = dict(vars(self)), None
        with contextlib.suppress(RuntimeError, TypeError):
            before = self._model.copy()
        try:
            yield self._model
        except BaseException:
            if before is not None:
                vars(self).clear()
                vars(self).update(attributes | {"_model": before, "network_": before.network})
            raise

    def predict(self, X) -> np.ndarray:
        """The most probable cluster of each sample: (n_samples,)."""
        return self.predict_proba(X).argmax(1)

    def predict_proba(self, X) -> np.ndarray:
        """The posteriors: (n_samples, K), rows with sum 1 (Eq. 4.18, 4.20)."""
        return self._infer(X)[0]

    def transform(self, X) -> np.ndarray:
        """The normalised relevance scores a*: (n_samples, K) (Eq. 4.11).

        That of a cluster merged from several is log Σ_j π_j exp(a*_j) - log Σ_j π_j, which leaves Eq. 4.18 as it is.
        """
        return self._infer(X)[1]

    def score_samples(self, X) -> np.ndarray:
        """The EM objective of each sample, Σ_j p_j (log π_j + log h(a*_j)) of Eq. 4.21: (n_samples,).

        h is the `density`. `score` is their mean.
        """
        check_is_fitted(self)
        return self._model.objective(self._validate(X, reset=False))

    def score(self, X, y=None, sample_weight=None) -> float:
        """The mean EM objective of X, the negative of the loss of Eq. 4.22: greater is better; y is ignored."""
        check_is_fitted(self)
        X = self._validate(X, reset=False)
        return -self._model.loss(X, self._weights(sample_weight, X))

    @property
    def _n_features_out(self) -> int:
        return self.n_clusters_

    @staticmethod
    def _check_samples(X: np.ndarray) -> None:
        if len(X) < 2:
            raise ValueError(f"X has {len(X)} sample; there must be at least 2, since scores are normalised over them")

    @staticmethod
    def _check_loss(loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(f"training diverged: the loss is {loss}; lower learning_rate, or scale the features")

    def _infer(self, X) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self)
        return self._model.infer(self._validate(X, reset=False))

    def _finish(self, X, model: _Model, loss: float, passes: int):
        """Take a trained model, unless it has diverged; until then the estimator is as it was."""
        self._check_loss(loss)
        priors, labels = model.cluster_prior().cpu().numpy(), model.infer(X)[0].argmax(1)
        self._model, self.network_, self.loss_, self.n_iter_ = model, model.network, loss, passes
        self.priors_, self.n_clusters_, self.labels_ = priors, len(priors), labels
        empty = self.n_clusters_ - len(np.unique(self.labels_))
        if empty:
            warnings.warn(
                f"{empty} of {self.n_clusters_} clusters are empty: there may be fewer groups in the data, or training "
                "has not found them (another learning_rate, more epochs or a greater n_init may)",
                ConvergenceWarning,
                stacklevel=4,  # the caller of `fit`, beyond its decorator
            )
        return self

    def _validate(self, X, reset: bool) -> np.ndarray:
        if isinstance(X, Tensor):
            X = (X if X.dtype in (torch.float32, torch.float64) else X.float()).detach().cpu().numpy()
        X = validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            allow_nd=self.network is not None,
            ensure_min_samples=2 if reset else 1,
        )
        standardized = () if reset else np.shape(self._model.center)  # without, a network may take any size
        if standardized and X.shape[1:] != standardized:
            raise ValueError(f"X has samples of the shape {X.shape[1:]}; fit had {standardized}")
        return X

    def _check_parameters(self, n_samples: int | None = None) -> None:
        """Check the options, and whether there are enough samples to begin with."""
        clusters = "max_clusters" if self.n_clusters == "auto" else "n_clusters"
        for name, least in ((clusters, 1), ("n_init", 1), ("epochs", 0), ("batch_size", 2)):
            value = getattr(self, name)
            if not _is_integer(value) or value < least:
                also = " or 'auto'" if name == "n_clusters" else ""
                raise ValueError(f"{name} is {value!r}; it must be an integer from {least} on{also}")
        components = getattr(self, clusters)
        if components > MAX_CLUSTERS:
            raise ValueError(f"{clusters} is {components}; it must be 1 to {MAX_CLUSTERS}")
        sized = isinstance(self.hidden, Sized) and isinstance(self.hidden, Iterable)
        if not sized or not all(_is_integer(width) and width >= 1 for width in self.hidden):
            raise ValueError(f"hidden is {self.hidden!r}; it must be the widths of layers, each at least 1")
        for name in ("learning_rate", "gamma"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and 0 < value < math.inf):
                raise ValueError(f"{name} is {value!r}; it must be greater than 0")
        if not (isinstance(self.noise, numbers.Real) and 0 <= self.noise < math.inf):
            raise ValueError(f"noise is {self.noise!r}; it must be 0 or greater")
        if self.n_clusters == "auto" and (self.noise == 0 or not isinstance(self.prior, str)):
            name, needed = ("noise", "greater than 0") if self.noise == 0 else ("prior", "'even' or 'learned'")
            raise ValueError(f"{name} is {getattr(self, name)!r}; with n_clusters='auto' it must be {needed}")
        try:
            kind = torch.device(self.device).type
        except (RuntimeError, TypeError):
            kind = None
        if kind in (None, "meta"):
            raise ValueError(f"device is {str(self.device)!r}; it must be one of PyTorch's, such as 'cpu' or 'cuda'")
        check_gpu(torch.device(self.device))
        if kind not in ("cpu", "cuda") and not is_there(torch.device(self.device)):
            raise ValueError(f"device is {str(self.device)!r}; PyTorch cannot use it here")
        if self.network is not None and not isinstance(self.network, nn.Module):
            raise ValueError(f"network is {self.network!r}; it must be a torch.nn.Module or None")
        if self.density not in DENSITIES:
            raise ValueError(f"density is {self.density!r}; it must be one of {', '.join(map(repr, DENSITIES))}")
        own, layers = self.exclusive_layers, len(self.hidden) + 1
        if not _is_integer(own) or not 1 <= own <= layers:
            raise ValueError(f"exclusive_layers is {own!r}; it must be 1 to {layers}, the layers of the perceptron")
        if own > 1 and self.network is not None:
            raise ValueError(f"exclusive_layers is {own} with a network of your own; it must be 1, or network None")
        if self.init not in ("auto", "random", "k-means++"):
            raise ValueError(f"init is {self.init!r}; it must be 'auto', 'random' or 'k-means++'")
        if self.emerging and not self._learns_prior:
            raise ValueError(f"emerging is True with prior {self.prior!r}; it needs prior='learned'")
        if isinstance(self.prior, str):
            if self.prior not in ("even", "learned"):
                numbers_too = "" if self.n_clusters == "auto" else f", or {components} numbers"
                raise ValueError(f"prior is {self.prior!r}; it must be 'even' or 'learned'{numbers_too}")
        else:
            prior = np.asarray(self.prior, dtype=float)
            if prior.shape != (components,) or not (prior >= 0).all() or abs(prior.sum() - 1) > 1e-3:
                raise ValueError(
                    f"prior is {self.prior!r}; "
                    f"it must be {components} numbers, one for each cluster, from 0 on with sum 1"
                )
        # The perceptron of "auto" has no more outputs than there are samples; another network has those that it has.
        if n_samples is not None and n_samples < components and (self.n_clusters != "auto" or self.network is not None):
            raise ValueError(f"n_samples={n_samples} should be >= {clusters}={components}")

    def _init(self) -> str:
        if self.init == "auto":
            return "k-means++" if self._learns_prior else "random"
        return self.init

    @property
    def _learns_prior(self) -> bool:
        return self.n_clusters == "auto" or (isinstance(self.prior, str) and self.prior == "learned")

    def _weights(self, sample_weight, X: np.ndarray) -> np.ndarray | None:
        """The weights, with a mean of 1; None if all are the same."""
        if sample_weight is None:
            return None
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if weights[0] > 0 and (weights == weights[0]).all():
            return None
        weights = weights / weights.max()  # the sum of larger ones may overflow
        return weights / weights.mean()

    def _frame(self, X: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The centre and the scale of each feature, by batches: X may lie on disk."""
        if not self.standardize:
            return X.dtype.type(0), X.dtype.type(1)
        parts = [slice(i, i + INFERENCE_BATCH) for i in range(0, len(X), INFERENCE_BATCH)]

        def mean(values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            if weights is None:
                return sum(values(X[part]).sum(0, dtype=np.float64) for part in parts) / len(X)
            return sum(np.tensordot(weights[part], values(X[part]), 1) for part in parts) / len(X)

        center = mean(lambda part: part)
        seen = [X[part] if weights is None else X[part][weights[part] > 0] for part in parts]
        seen = [part for part in seen if len(part)]
        high, low = (reduce(f, (f.reduce(part, 0) for part in seen)) for f in (np.maximum, np.minimum))
        # A range within the rounding of the values is that of a constant.
        extent = (high - low).astype(np.float64)
        constant = extent <= 4 * np.finfo(X.dtype).eps * np.abs(center)
        extent[constant] = 1
        # Shares of the range: squares of values as they come may over- or underflow.
        deviation = np.sqrt(mean(lambda part: np.square((part - center) / extent)))
        deviation[constant] = 1
        # A feature of nearly one value, such as a border pixel of digits, is noise: do not blow it up to spread 1. The
        # mean absolute deviation tells it: unlike the range, one outlier hardly moves it.
        evenness = mean(lambda part: np.abs((part - center) / extent)) / deviation
        typical = np.sqrt(np.square(evenness[~constant]).mean()) if not constant.all() else 1.0
        evenness[constant] = typical
        spread = extent * deviation / np.minimum(evenness / typical, 1) ** 2
        scale = np.where(constant, 0, 1 / spread)
        return center.astype(X.dtype), scale.astype(X.dtype)
