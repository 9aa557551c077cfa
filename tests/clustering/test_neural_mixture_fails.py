"""Fits of `NeuralMixture` that diverge, and parts that it refuses."""

import numpy as np
import pytest
from torch import nn

from fastroute.clustering import NeuralMixture
from tests.clustering.test_neural_mixture import blobs


def test_a_run_that_diverges_is_not_kept():
    X = blobs()[0]
    broken = nn.Sequential(nn.Linear(X.shape[1], 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(broken[2].weight, float("nan"))
    kept = NeuralMixture(3, network=broken, epochs=3, n_init=3, random_state=0).fit(X)  # later runs draw new weights
    assert np.isfinite(kept.loss_) and len(np.unique(kept.labels_)) == 3
    for fit in ("fit", "partial_fit"):
        with pytest.raises(ValueError, match=r"training diverged: .* lower learning_rate"):
            getattr(NeuralMixture(3, network=broken, epochs=1, n_init=1, random_state=0), fit)(X)
    model = NeuralMixture(3, warm_start=True, epochs=1, random_state=0).fit(X)
    for parameter in model._model.network.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"training diverged: .* lower learning_rate"):
        model.fit(X)


@pytest.mark.parametrize("options", [{}, {"prior": "learned"}, {"prior": "learned", "emerging": True}])
def test_a_part_that_is_refused_changes_nothing(options):
    X = blobs()[0]
    model = NeuralMixture(3, random_state=0, **options).partial_fit(X)
    before = model.predict_proba(X)
    with pytest.raises(ValueError, match="X has 1 sample; there must be at least 2"):
        model.partial_fit(X[:1])
    assert np.array_equal(model.predict_proba(X), before)
    model = NeuralMixture(3, network=nn.Linear(X.shape[1], 5), random_state=0)
    with pytest.raises(ValueError, match="network gives"):
        model.partial_fit(X)
    model.set_params(network=None).partial_fit(X)
