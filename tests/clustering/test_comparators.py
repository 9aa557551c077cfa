"""Each method, as `fastroute cluster` builds it, on a few digits."""

import warnings

import pytest
import pytorch_lightning as pl

from fastroute.clustering.build import ClusteringRun, build
from fastroute.clustering.run import Batches
from tests.clustering.test_two_fold import digits, trainer_of


@pytest.mark.parametrize("method", ["dac", "triplet", "kmeansnet", "jule"])
def test_learns_digits(method):
    """Without a spread of the scores, all pairs of dac are similar at first, and one cluster takes all images."""
    pl.seed_everything(0, verbose=False)
    images, labels = digits(600)
    run = ClusteringRun(
        dataset="digits", method=method, clusters=10, heads=1, batch_norm=True, architecture="C16 M C32 F32"
    )
    module = build(run, images.shape[1:], epochs=4)
    trainer = trainer_of(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has collapsed at first
        trainer.fit(module, Batches(images, labels, 32, 0), Batches(images, labels, 1000))
    assert trainer.callback_metrics["acc"] > 0.55
