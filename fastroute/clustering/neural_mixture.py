"""The neural mixture model as a scikit-learn estimator (§4.4)."""

import copy
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from fastroute.nn import MixtureEMLoss, RelevanceNorm
from fastroute.ops.mixture_em import MAX_CLUSTERS

INFERENCE_BATCH = 4096
# The priors are a moving average of the posteriors' means, over some 20 batches.
PRIOR_MOMENTUM = 0.05
# The seeds of k-means++ are only where EM begins: a few passes teach them to the network.
SEEDING_EPOCHS = 3
# Two clusters are one where this share of the training's noise carries more than that share of the smaller one's
# samples across their border: over a valley between groups it carries 0 to 0.01 of them, through a group 0.02 and more.
MERGING_NOISE = 0.3
CROSSING = 0.015
# Samples to be moved by noise at least, where X is passed over several times for it.
LEAST_MOVED = 10_000


class NeuralMixture(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Cluster samples by a network that models the clusters' distributions, trained by mixture EM (§4.4, Eq. 4.22).

    What a Gaussian mixture does with Gaussians, a network does here with whatever it can express: its outputs, one for
    each cluster and normalised over the data, are the samples' relevance scores. Clusters are regions of space that are
    dense or far apart. Shapes that only connectivity tells from each other, such as rings in each other, are out of its
    reach. Without a learned prior, clusters come out of about equal size.

    Args:
        n_clusters: K, 1 to 1024; or "auto": `max_clusters` to begin with, with a learned prior. Those that end up empty
            go, and neighbours are merged as long as their border lies in no valley: a little noise carries more than
            1.5 % of the smaller one's samples across it. Clusters can so take the shape of any chain of them. In spaces
            of many dimensions, where training keeps borders away from noisy samples, more are left than groups.
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
        batch_size: samples in an EM step. Batches are of equal size, up to half as large again.
        learning_rate: of Adam.
        gamma: γ of Eq. 4.12.
        noise: standard deviation of the Gaussian noise, after standardisation, that makes augmented samples (Eq. 4.23).
            Borders then keep away from samples. 0 trains on the samples alone.
        standardize: whether each feature is centred and brought to spread 1 before the network, whatever its unit.
            With q = (mean absolute / standard deviation) of a feature by the root mean square of that ratio over all
            features, the spread is q² where q < 1: a feature that has nearly always one value, unlike the others, stays
            small.
        warm_start: whether `fit` goes on from the network of the last one, for `epochs` more in one run, and leaves
            standardisation and merged clusters as they are.
        verbose: 1 prints a line for each run, 2 for each pass over the data, too.
        random_state: int, RandomState or None: weights, order and seeds.
        device: where the network lives. Samples go there a batch at a time, so data need not fit.

    Attributes:
        n_clusters_: K.
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
        self.noise = noise
        self.standardize = standardize
        self.random_state = random_state
        self.device = device
        self.warm_start = warm_start
        self.verbose = verbose

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.non_deterministic = False
        return tags

    def fit(self, X, y=None, sample_weight=None):
        """Train on X; y is ignored.

        Args:
            sample_weight: (n_samples,), from 0 on: each pass visits a sample in proportion to its weight, of 2 twice as
                often as of 1. None is 1 for all.

        Raises:
            ValueError: X has NaN, infinity or fewer samples than clusters, or a parameter is out of its range.
        """
        going_on = self.warm_start and hasattr(self, "_model")
        X = self._validate(X, reset=not going_on)
        self._check_parameters(len(X))
        weights = self._weights(sample_weight, X)
        if going_on:
            model = self._model
            if self.n_clusters != "auto" and self.n_clusters != len(model.clusters):
                raise ValueError(f"n_clusters is {self.n_clusters}; with warm_start it must stay {len(model.clusters)}")
            model.fit(X, weights, 1)
            self.n_iter_ += self.epochs
            self.loss_ = model.loss(X, weights)
            return self._finish(X)
        random = check_random_state(self.random_state)
        frame, best = self._frame(X, weights), None
        for run in range(self.n_init):
            seed = random.randint(2**31 - 1)
            model = _Model(self, X, frame, seed, fresh=run > 0)
            if self._init() == "k-means++":
                model.learn_seeds(X, weights)
            model.fit(X, weights, run + 1)
            loss = model.loss(X, weights)
            if best is None or loss < best[0]:
                best = loss, model
        self.loss_, self._model = best
        self.n_iter_ = self.epochs
        if self.n_clusters == "auto":
            self._model.merge(X)
        return self._finish(X)

    def partial_fit(self, X, y=None, sample_weight=None):
        """One pass of EM steps over X, which may be one of many parts of the data; y is ignored.

        The first part sets the standardisation, the seeds and the network; there is one run, whatever n_init. With
        n_clusters="auto", only `fit` merges clusters; they stay merged as it left them. For sample_weight, see `fit`.
        """
        first = not hasattr(self, "_model")
        X = self._validate(X, reset=first)
        weights = self._weights(sample_weight, X)
        if first:
            self._check_parameters(len(X))
            seed = check_random_state(self.random_state).randint(2**31 - 1)
            self._model, self.n_iter_ = _Model(self, X, self._frame(X, weights), seed, fresh=False), 0
            if self._init() == "k-means++":
                self._model.learn_seeds(X, weights)
        self._model.train_epoch(X, weights, track=True)
        self.n_iter_ += 1
        self.loss_ = self._model.loss(X, weights)
        return self._finish(X)

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
        """The EM objective of each sample, Σ_j p_j (log π_j + log sigmoid(a*_j / γ)) of Eq. 4.21: (n_samples,).

        `score` is their mean.
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

    def _infer(self, X) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self)
        return self._model.infer(self._validate(X, reset=False))

    def _finish(self, X):
        self.network_ = self._model.network
        self.priors_ = self._model.cluster_prior().cpu().numpy()
        self.n_clusters_ = len(self.priors_)
        self.labels_ = self._model.infer(X)[0].argmax(1)
        empty = self.n_clusters_ - len(np.unique(self.labels_))
        if empty:
            warnings.warn(
                f"{empty} of {self.n_clusters_} clusters are empty: there may be fewer groups in the data, or training "
                "has not found them (another learning_rate, more epochs or a greater n_init may)",
                ConvergenceWarning,
                stacklevel=3,
            )
        return self

    def _validate(self, X, reset: bool) -> np.ndarray:
        if isinstance(X, Tensor):
            X = (X if X.dtype in (torch.float32, torch.float64) else X.float()).detach().cpu().numpy()
        return validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            allow_nd=self.network is not None,
            ensure_min_samples=2 if reset else 1,
        )

    def _check_parameters(self, n_samples: int) -> None:
        clusters = "max_clusters" if self.n_clusters == "auto" else "n_clusters"
        for name, least in ((clusters, 1), ("n_init", 1), ("epochs", 0), ("batch_size", 2)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < least:
                also = " or 'auto'" if name == "n_clusters" else ""
                raise ValueError(f"{name} is {value!r}; it must be an integer from {least} on{also}")
        components = getattr(self, clusters)
        if components > MAX_CLUSTERS:
            raise ValueError(f"{clusters} is {components}; it must be 1 to {MAX_CLUSTERS}")
        sized = isinstance(self.hidden, Iterable)
        if not sized or not all(isinstance(width, numbers.Integral) and width >= 1 for width in self.hidden):
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
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {str(self.device)!r}; PyTorch finds no GPU here")
        if self.network is not None and not isinstance(self.network, nn.Module):
            raise ValueError(f"network is {self.network!r}; it must be a torch.nn.Module or None")
        if self.init not in ("auto", "random", "k-means++"):
            raise ValueError(f"init is {self.init!r}; it must be 'auto', 'random' or 'k-means++'")
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
        if n_samples < components and (self.n_clusters != "auto" or self.network is not None):
            raise ValueError(f"n_samples={n_samples} should be >= {clusters}={components}")

    def _init(self) -> str:
        if self.init == "auto":
            return "k-means++" if self._learns_prior else "random"
        return self.init

    @property
    def _learns_prior(self) -> bool:
        return self.n_clusters == "auto" or (isinstance(self.prior, str) and self.prior == "learned")

    def _weights(self, sample_weight, X: np.ndarray) -> np.ndarray | None:
        """The weights, with a mean of 1."""
        if sample_weight is None:
            return None
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
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


class _Model:
    """One run: the network, its statistics and priors, and how they are trained."""

    def __init__(self, estimator: NeuralMixture, X: np.ndarray, frame: tuple, seed: int, fresh: bool):
        self.options, self.device = estimator, torch.device(estimator.device)
        self.center, self.scale = frame
        self.generator, self.seed = torch.Generator().manual_seed(seed), seed
        dtype = torch.float64 if X.dtype == np.float64 else torch.float32
        auto = estimator.n_clusters == "auto"
        clusters = min(estimator.max_clusters, len(X)) if auto else estimator.n_clusters
        self.clusters = torch.arange(clusters)  # which cluster each component is part of
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if estimator.network is None:
                network = perceptron(X.shape[1], estimator.hidden, clusters)
            else:
                network = copy.deepcopy(estimator.network)
                for module in network.modules() if fresh else ():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
        self.network = network.to(self.device, dtype)
        self.norm = RelevanceNorm(clusters, device=self.device, dtype=dtype)
        self.criterion = MixtureEMLoss(estimator.gamma)
        self.learns_prior = estimator._learns_prior
        self.uses_prior = not isinstance(estimator.prior, str) or self.learns_prior
        prior = np.full(clusters, 1 / clusters) if isinstance(estimator.prior, str) else np.asarray(estimator.prior)
        self.prior = torch.as_tensor(prior, dtype=dtype, device=self.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=estimator.learning_rate, fused=True)

    def _load(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy((X - self.center) * self.scale).to(self.device, self.prior.dtype)

    def in_order(self, X: np.ndarray) -> Iterator[Tensor]:
        for first in range(0, len(X), INFERENCE_BATCH):
            yield self._load(X[first : first + INFERENCE_BATCH])

    def infer(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Posteriors and normalised scores of the clusters, for all samples."""
        parts = [self.posterior(x) for x in self.in_order(X)]
        return tuple(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))

    def batches(self, X: np.ndarray, weights: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The samples in random order and batches of equal size, each with their indices.

        With weights, of mean 1, each comes as often as its weight says, give or take one.
        """
        order = torch.randperm(len(X), generator=self.generator).numpy()
        if weights is not None:
            start = torch.rand((), generator=self.generator, dtype=torch.float64).item()
            ends = np.cumsum(weights)
            order = np.searchsorted(ends, (order + start) * ends[-1] / len(X), side="right").clip(max=len(X) - 1)
        for index in np.array_split(order, max(1, len(X) // self.options.batch_size)):
            yield index, self._load(X[index])

    def scores(self, x: Tensor) -> Tensor:
        scores, clusters = self.network(x), len(self.clusters)
        if scores.shape != (len(x), clusters):
            name = "max_clusters" if self.options.n_clusters == "auto" else "n_clusters"
            raise ValueError(f"network gives {tuple(scores.shape)}; it must give (N, {name}) = ({len(x)}, {clusters})")
        return scores

    def _noisy(self, x: Tensor, share: float = 1.0) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return x + share * self.options.noise * noise.to(x.device)

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def fit(self, X: np.ndarray, weights: np.ndarray | None, run: int) -> None:
        """The estimator's number of EM passes, and the statistics of what has been trained."""
        verbose = self.options.verbose
        for epoch in range(1, self.options.epochs + 1):
            self.train_epoch(X, weights)
            if verbose > 1:
                self.calibrate(X, weights)
                print(f"run {run}, pass {epoch} of {self.options.epochs}: loss {self.loss(X, weights):.4f}")
        self.calibrate(X, weights)
        if verbose == 1:
            print(f"run {run} of {self.options.n_init}: loss {self.loss(X, weights):.4f}")

    def learn_seeds(self, X: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Teach the network which of K samples, drawn far apart, is the nearest."""
        draw = np.random.default_rng(self.seed)
        index = np.sort(draw.choice(len(X), min(len(X), INFERENCE_BATCH), replace=False))
        some, weight = X[index].reshape(-1, X[0].size), None if weights is None else weights[index]
        seeds, _ = kmeans_plusplus(some, len(self.clusters), sample_weight=weight, random_state=self.seed % 2**32)
        seeds = self._load(seeds.reshape(-1, *X.shape[1:])).flatten(1)
        counts = torch.ones_like(self.prior)
        for _ in range(SEEDING_EPOCHS):
            for _, x in self.batches(X, weights):
                nearest = torch.cdist(x.flatten(1), seeds).argmin(1)
                counts += torch.bincount(nearest, minlength=len(counts))
                self._step(cross_entropy(self.scores(x), nearest))
        if self.learns_prior:
            self.prior = counts / counts.sum()

    def train_epoch(self, X: np.ndarray, weights: np.ndarray | None = None, track: bool = False) -> None:
        """EM steps over X (Eq. 4.22). With `track`, the running statistics follow; else `calibrate` sets them later."""
        self.network.train()
        self.norm.train()
        for _, x in self.batches(X, weights):
            scores = self.scores(x)
            augmented = self.scores(self._noisy(x)) if self.options.noise else None
            loss, posterior = self.criterion(scores, augmented, self.prior if self.uses_prior else None)
            self._step(loss)
            if self.learns_prior:  # of the previous steps' posteriors (§4.4.2)
                prior = self.prior.lerp(posterior.mean(0), PRIOR_MOMENTUM)
                self.prior = prior / prior.sum()
            if track:
                self.norm(scores.detach())

    @torch.no_grad()
    def calibrate(self, X: np.ndarray, weights: np.ndarray | None = None) -> None:
        """The mean and spread of the trained network's scores over all of X."""
        self.network.eval()
        count, mean, square = 0, 0.0, 0.0
        for first, x in zip(range(0, len(X), INFERENCE_BATCH), self.in_order(X), strict=True):  # Chan's, by the batch
            scores = self.scores(x)
            if weights is None:
                (variance, part), new = torch.var_mean(scores, 0, correction=0), len(x)
            else:
                weight = torch.as_tensor(weights[first : first + len(x)]).to(scores)[:, None]
                new = weight.sum().item()
                if not new:
                    continue
                part = (weight * scores).sum(0) / new
                variance = (weight * (scores - part).square()).sum(0) / new
            total = count + new
            delta = part - mean
            square = square + variance * new + delta.square() * (count * new / total)
            mean, count = mean + delta * (new / total), total
        self.norm.running_mean.copy_(mean)
        self.norm.running_std.copy_((square / count).sqrt())

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posteriors and normalised scores of the clusters."""
        self.network.eval()
        normalized = self.norm.eval()(self.scores(x))
        prior = self.cluster_prior()
        if len(prior) < len(self.clusters):
            joint = normalized + self.prior.log()
            parts = [torch.logsumexp(joint[:, self.clusters == k], 1) for k in range(len(prior))]
            normalized = torch.stack(parts, 1) - prior.log()
        return torch.softmax(normalized + (prior.log() if self.uses_prior else 0), 1), normalized

    def cluster_prior(self) -> Tensor:
        """(K,): the weights of the clusters, of all components that they were merged from."""
        clusters = self.clusters.to(self.device)
        return self.prior.new_zeros(int(self.clusters.max()) + 1).index_add(0, clusters.clamp_min(0), self.prior)

    @torch.no_grad()
    def merge(self, X: np.ndarray) -> None:
        """Drop components that are empty, and make one cluster of those whose border lies in no valley."""
        components = len(self.clusters)
        moved = torch.zeros(components, components, dtype=torch.int64)  # by noise, from a component to another
        for _ in range(max(1, math.ceil(LEAST_MOVED / len(X)))):
            for x in self.in_order(X):
                pairs = [self.posterior(part)[0].argmax(1).cpu() for part in (x, self._noisy(x, MERGING_NOISE))]
                moved += torch.bincount(pairs[0] * components + pairs[1], minlength=components**2).view_as(moved)
        self._group(merged(moved.numpy(), CROSSING))
        # Beside a merged one, which has the sum of its parts' posteriors, a small cluster can lose all its samples.
        found = torch.cat([self.posterior(x)[0].argmax(1).cpu() for x in self.in_order(X)]).unique()
        self._group([torch.nonzero(self.clusters == k).flatten() for k in found])

    def _group(self, groups: Sequence[Sequence[int] | Tensor]) -> None:
        """Make a cluster of each group of components, and drop those in none."""
        clusters = torch.full_like(self.clusters, -1)
        for k, group in enumerate(groups):
            clusters[group] = k
        self.clusters = clusters
        self.prior = torch.where((clusters >= 0).to(self.device), self.prior, 0)
        self.prior = self.prior / self.prior.sum()

    def loss(self, X: np.ndarray, weights: np.ndarray | None = None) -> float:
        """The mean loss under the running statistics (Eq. 4.22)."""
        return -float(np.average(self.objective(X), weights=weights))

    @torch.no_grad()
    def objective(self, X: np.ndarray) -> np.ndarray:
        """The negative loss of each sample under the running statistics."""
        self.network.eval()
        tiny = torch.finfo(self.prior.dtype).tiny
        log_prior = self.prior.clamp(min=tiny).log() if self.uses_prior else torch.zeros_like(self.prior)
        found = []
        for x in self.in_order(X):
            normalized = self.norm.eval()(self.scores(x))
            logits = torch.where(self.prior > 0, normalized + log_prior, -torch.inf)
            log_joint = log_prior + logsigmoid(normalized / self.options.gamma)
            found.append((torch.softmax(logits, 1) * log_joint).sum(1))
        return torch.cat(found).cpu().numpy()


def merged(moved: np.ndarray, crossing: float) -> list[list[int]]:
    """Groups of clusters, of which again and again the two with the most exchange are joined.

    Args:
        moved: (K, K), how many samples of a cluster some noise carries into each; those without samples are left out.
        crossing: the most exchange of two groups that stay apart: samples that cross over from either side, on average,
            by those of the smaller one.
    """
    groups = [[k] for k in np.flatnonzero(moved.sum(1))]
    exchange = ((moved + moved.T) / 2)[np.ix_(*[[k for [k] in groups]] * 2)]
    while len(groups) > 1:
        sizes = exchange.sum(1)
        share = exchange / np.maximum(np.minimum(sizes[:, None], sizes), 1)  # all of a cluster may go to one left out
        np.fill_diagonal(share, 0)
        i, j = sorted(np.unravel_index(share.argmax(), share.shape))
        if share[i, j] <= crossing:
            break
        exchange[i] += exchange[j]
        exchange[:, i] += exchange[:, j]
        exchange = np.delete(np.delete(exchange, j, 0), j, 1)
        groups[i] += groups.pop(j)
    return groups


def perceptron(features: int, hidden: Sequence[int], clusters: int) -> nn.Sequential:
    """Dense layers with ReLU between, as in §4.5.1, and one score for each cluster."""
    layers, widths = [], [features, *hidden]
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], clusters))
