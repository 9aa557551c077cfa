"""What `NeuralMixture` trains: a network, its statistics and priors (§4.4)."""

import contextlib
import copy
import io
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastroute._devices import indexed, is_there
from fastroute._random import generators_seeded
from fastroute.clustering._densities import em_loss, log_density
from fastroute.clustering._emerging import Places
from fastroute.clustering.networks import ExclusiveLinear, perceptron
from fastroute.nn import RelevanceNorm
from fastroute.ops.mixture_em import MAX_CLUSTERS

if TYPE_CHECKING:
    from fastroute.clustering.neural_mixture import NeuralMixture

INFERENCE_BATCH = 4096
# The priors are a moving average of the posteriors' means, over some 20 batches.
PRIOR_MOMENTUM = 0.05
# The seeds of k-means++ are only where EM begins: a few passes teach them to the network.
SEEDING_EPOCHS = 3
# A part of a stream has fewer batches than the data that seeds are taught on.
TEACHING = 5
# Two clusters are one where this share of the training's noise carries more than that share of the smaller one's
# samples across their border: over a valley between groups it carries 0 to 0.01 of them, through a group 0.02 and more.
MERGING_NOISE = 0.3
CROSSING = 0.015
# Least number of samples to move by noise; a smaller X is passed over several times.
LEAST_MOVED = 10_000


# Options that still have an effect after the network has been built.
OPTIONS = "n_clusters", "n_init", "epochs", "batch_size", "learning_rate", "gamma", "density", "noise", "verbose"
# Options that the trained network was built with.
BUILT_WITH = "network", "hidden", "exclusive_layers", "prior", "standardize", "device"

NOT_DENSE = "network does not end in a torch.nn.Linear; with emerging=True it must, to get more outputs"


class Model:
    """One run: the network, its statistics and priors, and how they are trained."""

    def __init__(self, estimator: "NeuralMixture", X: np.ndarray, frame: tuple, seed: int, fresh: bool):
        self.device = indexed(torch.device(estimator.device))
        self.center, self.scale = frame
        self.generator, self.seed = torch.Generator().manual_seed(seed), seed
        dtype = torch.float64 if X.dtype == np.float64 else torch.float32
        auto = estimator.n_clusters == "auto"
        clusters = min(estimator.max_clusters, len(X)) if auto else estimator.n_clusters
        self.clusters = torch.arange(clusters)  # which cluster each component is part of
        # Those of the user's network alone: to fork the generators of all GPUs initialises each.
        own = () if estimator.network is None else estimator.network.parameters()
        gpus = sorted({parameter.device.index for parameter in own if parameter.is_cuda})
        with generators_seeded(seed, gpus):
            if estimator.network is None:
                with torch.device("cpu"):  # whose generator is seeded
                    network = perceptron(X.shape[1], estimator.hidden, clusters, estimator.exclusive_layers)
            else:
                network = copy.deepcopy(estimator.network)
                for module in network.modules() if fresh else ():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
        self.network = network.to(self.device, dtype)
        self.norm = RelevanceNorm(clusters, device=self.device, dtype=dtype)
        self.learns_prior = estimator._learns_prior
        self.uses_prior = not isinstance(estimator.prior, str) or self.learns_prior
        prior = np.full(clusters, 1 / clusters) if isinstance(estimator.prior, str) else np.array(estimator.prior)
        self.prior = torch.tensor(prior, dtype=dtype, device=self.device)  # a copy
        if not any(parameter.requires_grad for parameter in self.network.parameters()):
            raise ValueError("network has no parameter that requires gradients; it must have one to train")
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=estimator.learning_rate, fused=True)
        self.take_options(estimator)
        self.built_with = {name: getattr(estimator, name) for name in BUILT_WITH}
        if not isinstance(estimator.prior, str):
            self.built_with["prior"] = copy.deepcopy(estimator.prior)
        self.places: Places | None = None  # of the components, where clusters may emerge

    def __getstate__(self) -> dict:
        if self.device.type == "cpu":
            return self.__dict__
        tensors = io.BytesIO()  # which can be read where there is no such device
        torch.save(self.__dict__, tensors)
        return {"saved": tensors.getvalue(), "device": self.device}

    def __setstate__(self, state: dict) -> None:
        if "saved" in state:
            device = state["device"] if is_there(state["device"]) else torch.device("cpu")
            state = torch.load(io.BytesIO(state["saved"]), map_location=device, weights_only=False)
            if state["device"] != device:
                state["device"], state["built_with"]["device"] = device, str(device)
        self.__dict__.update(state)

    def copy(self) -> "Model":
        """Return a copy to train, so that this one stays as it is if the training is stopped or diverges."""
        kept = getattr(self, "built_with", {}).values()  # the same objects, as `check_unchanged` asks for
        model = Model.__new__(Model)
        model.__dict__ |= copy.deepcopy(self.__dict__, {id(value): value for value in kept})
        return model

    def take_options(self, estimator: "NeuralMixture") -> None:
        """Train by an estimator's options from now on; what has been trained keeps them if the estimator's change."""
        self.options = SimpleNamespace(**{name: getattr(estimator, name) for name in OPTIONS})
        self.criterion = em_loss(estimator.density, estimator.gamma)
        for group in self.optimizer.param_groups:
            group["lr"] = estimator.learning_rate

    def check_unchanged(self, estimator: "NeuralMixture") -> None:
        """Check that an estimator's options are those that this was built with.

        Raises:
            ValueError: one of them has changed.
        """
        clusters = len(self.clusters)
        if estimator.n_clusters not in ("auto", clusters) and not estimator.emerging:
            raise ValueError(
                f"n_clusters is {estimator.n_clusters}; to train further, set it back to {clusters}, or fit anew"
            )
        for name, old in getattr(self, "built_with", {}).items():  # absent from older files
            new = getattr(estimator, name)
            if not _are_same(new, old):
                raise ValueError(f"{name} is {new!r}; to train further, set it back to {old!r}, or fit anew")

    @torch.no_grad()
    def check_can_grow(self, X: np.ndarray) -> None:
        """Check that the scores of a network of the user's are the output of the layer that `grow` adds a row to.

        Raises:
            ValueError: they are not.
        """
        layers, outputs = [module for module in self.network.modules() if isinstance(module, nn.Linear)], []
        hooks = [layer.register_forward_hook(lambda layer, x, y: outputs.append(y)) for layer in layers[-1:]]
        try:
            scores = self.network.eval()(self._load(X[:2]))
        finally:
            for hook in hooks:
                hook.remove()
        if not any(scores is output for output in outputs):
            raise ValueError(NOT_DENSE)

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """Set the network to training mode, with gradients, and with draws of its own, such as dropout's.

        The draws come from the run's seed, and leave PyTorch's generators as they were.
        """
        draw = torch.Generator()
        draw.set_state(self.generator.get_state())  # a copy: it draws nothing from the order of the samples
        seed = torch.randint(2**31, (), generator=draw).item()
        with generators_seeded(seed, [self.device.index] if self.device.type == "cuda" else []), torch.enable_grad():
            self.network.train()
            yield

    def _load(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy((X - self.center) * self.scale).to(self.device, self.prior.dtype)

    def in_order(self, X: np.ndarray) -> Iterator[Tensor]:
        for first in range(0, len(X), INFERENCE_BATCH):
            yield self._load(X[first : first + INFERENCE_BATCH])

    def infer(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return posteriors and normalised scores of the clusters, for all samples."""
        parts = [self.posterior(x) for x in self.in_order(X)]
        return tuple(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))

    def batches(self, X: np.ndarray, weights: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield the samples in random order and batches of equal size, each with their indices.

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
        if not isinstance(scores, Tensor):
            raise ValueError(f"network returns a {type(scores).__name__}; it must return scores, a tensor (N, K)")
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
        """Run the estimator's number of EM passes, and set the statistics of what has been trained."""
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
        counted = np.arange(len(X)) if weights is None else np.flatnonzero(weights)
        index = np.sort(draw.choice(counted, min(len(counted), INFERENCE_BATCH), replace=False))
        some, weight = self._load(X[index]).flatten(1).cpu().numpy(), None if weights is None else weights[index]
        count = min(len(self.clusters), len(some))  # fewer where samples have weight 0
        seeds, _ = kmeans_plusplus(some, count, sample_weight=weight, random_state=self.seed % 2**32)
        seeds = torch.from_numpy(seeds).to(self.device, self.prior.dtype)
        counts = torch.ones_like(self.prior)
        with self._training():
            for _ in range(SEEDING_EPOCHS):
                for _, x in self.batches(X, weights):
                    nearest = torch.cdist(x.flatten(1), seeds).argmin(1)
                    counts += torch.bincount(nearest, minlength=len(counts))
                    self._step(cross_entropy(self.scores(x), nearest))
        if self.learns_prior:
            self.prior = counts / counts.sum()

    def train_epoch(self, X: np.ndarray, weights: np.ndarray | None = None, track: bool = False) -> None:
        """Step over X (Eq. 4.22). With `track`, the running statistics follow; else `calibrate` sets them later."""
        self.norm.train()
        with self._training():
            for _, x in self.batches(X, weights):
                scores = self.scores(x)
                augmented = self.scores(self._noisy(x)) if self.options.noise else None
                loss, posterior = self.criterion(scores, augmented, self.prior if self.uses_prior else None)
                self._step(loss)
                if self.learns_prior:  # of the previous steps' posteriors (§4.4.2)
                    prior = self.prior.lerp(posterior.detach().mean(0), PRIOR_MOMENTUM)
                    self.prior = prior / prior.sum()
                if track:
                    self.norm(scores.detach())

    @torch.no_grad()
    def calibrate(self, X: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Set the mean and spread of the trained network's scores over all of X."""
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
        std = (square / count).sqrt()
        # Rows that are equal may differ by rounding, which must not be normalised to a spread of 1.
        std = torch.where(std <= 32 * torch.finfo(std.dtype).eps * mean.abs().max(), 0, std)
        self.norm.running_mean.copy_(mean)
        self.norm.running_std.copy_(std)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return posteriors and normalised scores of the clusters."""
        self.network.eval()
        normalized = self.norm.eval()(self.scores(x))
        prior = self.cluster_prior()
        if len(prior) < len(self.clusters):
            joint = normalized + self.prior.log()
            parts = [torch.logsumexp(joint[:, self.clusters == k], 1) for k in range(len(prior))]
            normalized = torch.stack(parts, 1) - prior.log()
        return torch.softmax(normalized + (prior.log() if self.uses_prior else 0), 1), normalized

    def cluster_prior(self) -> Tensor:
        """Return the weights (K,) of the clusters, each with all components that it was merged from."""
        clusters = self.clusters.to(self.device)
        return self.prior.new_zeros(int(self.clusters.max()) + 1).index_add(0, clusters.clamp_min(0), self.prior)

    @torch.no_grad()
    def merge(self, X: np.ndarray) -> None:
        """Drop empty components, and merge those without a valley of density at their border into one cluster."""
        components = len(self.clusters)
        moved = torch.zeros(components, components, dtype=torch.int64)  # by noise, from a component to another
        for _ in range(max(1, math.ceil(LEAST_MOVED / len(X)))):
            for x in self.in_order(X):
                pairs = [self.posterior(part)[0].argmax(1).cpu() for part in (x, self._noisy(x, MERGING_NOISE))]
                moved += torch.bincount(pairs[0] * components + pairs[1], minlength=components**2).view_as(moved)
        self._group(merged(moved.numpy(), CROSSING))
        # A merged cluster has the sum of its parts' posteriors, so a small cluster next to it can lose all its samples.
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

    @torch.no_grad()
    def components(self, x: Tensor) -> Tensor:
        """Return the most probable component of each sample: (N,)."""
        self.network.eval()
        return (self.norm.eval()(self.scores(x)) + self.prior.log()).argmax(1)

    def renew(self, X: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Drop the components that run dry with X, and add one for each group of samples that fit none."""
        X, weights = _of_weight(X, weights)
        x = self._load(X)
        where, weight = x.flatten(1).cpu(), torch.ones(len(X)) if weights is None else torch.from_numpy(weights)
        for k in self.places.dry(where):
            self._drop_component(k)
        groups = self.places.strangers(where, weight)[: MAX_CLUSTERS - int((self.clusters >= 0).sum())]
        if not groups:
            return
        labels = self.components(x)
        for group in groups:
            share = weight[group].sum() / weight.sum()
            labels[group.to(self.device)] = self._add_component(share.item())
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.options.learning_rate, fused=True)
        with self._training():
            for _ in range(SEEDING_EPOCHS * TEACHING):
                for index, part in self.batches(X, weights):
                    self._step(cross_entropy(self.scores(part), labels[torch.from_numpy(index).to(self.device)]))
        self.calibrate(X, weights)

    def _drop_component(self, k: int) -> None:
        left = [torch.nonzero(self.clusters == j).flatten() for j in range(int(self.clusters.max()) + 1)]
        left = [members[members != k] for members in left]
        if left := [members for members in left if len(members)]:
            self._group(left)

    def _add_component(self, prior: float) -> int:
        """Return the number of a fresh component, in the place of one that was dropped or behind the others."""
        free = (self.clusters < 0).nonzero().flatten().tolist()
        k = free[0] if free else len(self.clusters)
        draw = torch.Generator().manual_seed(torch.randint(2**31, (), generator=self.generator).item())
        grow(self.network, k, draw)
        self.places.add(k)
        if not free:
            self.clusters = torch.cat([self.clusters, self.clusters.new_tensor([-1])])
            self.prior = torch.cat([self.prior, self.prior.new_zeros(1)])
            norm = RelevanceNorm(k + 1, device=self.device, dtype=self.prior.dtype)
            norm.num_batches_tracked.copy_(self.norm.num_batches_tracked)
            self.norm = norm  # `renew` sets the statistics
        self.clusters[k] = self.clusters.max() + 1
        self.prior = self.prior * (1 - prior)
        self.prior[k] = prior
        return k

    def settle(self, X: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Follow the places of the components."""
        X, weights = _of_weight(X, weights)
        x = self._load(X)
        if self.places is None:
            self.places = Places(len(self.clusters), X[0].size, torch.zeros((), dtype=self.prior.dtype))
        weight = torch.ones(len(X)) if weights is None else torch.from_numpy(weights)
        self.places.follow(x.flatten(1).cpu(), self.components(x).cpu(), weight)

    def loss(self, X: np.ndarray, weights: np.ndarray | None = None) -> float:
        """Return the mean loss under the running statistics (Eq. 4.22)."""
        return -float(np.average(self.objective(X), weights=weights))

    @torch.no_grad()
    def objective(self, X: np.ndarray) -> np.ndarray:
        """Return the negative loss of each sample under the running statistics."""
        self.network.eval()
        tiny = torch.finfo(self.prior.dtype).tiny
        log_prior = self.prior.clamp(min=tiny).log() if self.uses_prior else torch.zeros_like(self.prior)
        found = []
        for x in self.in_order(X):
            normalized = self.norm.eval()(self.scores(x))
            logits = torch.where(self.prior > 0, normalized + log_prior, -torch.inf)
            log_joint = log_prior + log_density(normalized, self.options.density, self.options.gamma)
            found.append((torch.softmax(logits, 1) * log_joint).sum(1))
        return torch.cat(found).cpu().numpy()


def _are_same(new: object, old: object) -> bool:
    """Return whether options are equal: networks if they are one object, devices by name, numbers in any sequence."""
    if isinstance(new, nn.Module) or isinstance(old, nn.Module):
        return new is old
    new, old = (str(option) if isinstance(option, torch.device) else option for option in (new, old))
    return np.array_equal(np.asarray(new), np.asarray(old))


def _of_weight(X: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the samples that count, and their weights."""
    return (X, None) if weights is None else (X[weights > 0], weights[weights > 0])


def grow(network: nn.Module, k: int, draw: torch.Generator) -> None:
    """Draw the weights of output k of a network anew, or add an output if it has k.

    Raises:
        ValueError: the network does not end in dense layers.
    """
    layers = [module for module in network.modules() if isinstance(module, (nn.Linear, ExclusiveLinear))]
    own = [layer for layer in layers if isinstance(layer, ExclusiveLinear)]
    last = own or layers[-1:]
    if not last or len(last[-1].weight) < k:
        raise ValueError(NOT_DENSE)
    for layer in last:
        bound = 1 / math.sqrt(layer.weight.shape[-1])
        for name in ("weight", "bias"):
            value = getattr(layer, name)
            if value is None:
                continue
            fresh = (2 * torch.rand(value.shape[1:], generator=draw, dtype=torch.float64) - 1) * bound
            fresh = fresh.to(value).unsqueeze(0)
            setattr(layer, name, nn.Parameter(torch.cat([value.data[:k], fresh, value.data[k + 1 :]])))
        if isinstance(layer, nn.Linear):
            layer.out_features = len(layer.weight)


def merged(moved: np.ndarray, crossing: float) -> list[list[int]]:
    """Return groups of clusters, by repeatedly joining the two with the most exchange.

    Args:
        moved: (K, K), how many samples of a cluster some noise carries into each; those without samples are left out.
        crossing: the most exchange of two groups that stay apart: the mean number of samples that cross from either
            side, as a share of the smaller group's.
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
