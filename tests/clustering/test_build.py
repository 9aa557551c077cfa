from dataclasses import asdict

import pytest

from fastroute._methods import METHODS, check_count
from fastroute.clustering.build import ClusteringRun, build

RUN = {"dataset": "digits", "clusters": 3, "heads": 1, "batch_norm": True, "architecture": "C4 F8"}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "two-fold", "heads": 2, "n_init": 2},
        {"method": "iic", "self_label": 1},
        *({"method": name} for name, method in METHODS.items() if method.builder is not None),
    ],
    ids=lambda options: options["method"],
)
def test_rebuilds_the_network_of_a_checkpoint(options):
    run = ClusteringRun(**RUN | options)
    module = build(run, (1, 8, 8), epochs=4, gamma=2.0, statistics="batch")
    assert dict(module.hparams) == asdict(run)
    again = build(ClusteringRun.of(module.hparams), (1, 8, 8))
    again.load_state_dict(module.state_dict())
    assert again.hparams == module.hparams


def test_the_architecture_is_that_of_the_dataset_unless_given():
    run = RUN | {"method": "iic", "architecture": None}
    datasets = ("digits", "mnist", "stl10", "cifar100", "imagefolder")
    found = [ClusteringRun(**run | {"dataset": dataset}).architecture for dataset in datasets]
    assert found == ["mnist", "mnist", "stl10", "cifar", "cifar"]


def test_ignores_other_names_and_fills_those_that_older_checkpoints_lack():
    run = ClusteringRun.of(RUN | {"method": "iic", "epochs": 3})
    assert (run.n_init, run.limit, run.lr_em) == (1, None, 5e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="method is 'kmeans'; it must be one of two-fold, em, consistency"):
        build(ClusteringRun(**RUN | {"method": "kmeans"}), (1, 8, 8))
    with pytest.raises(ValueError, match="heads is 2; with the method 'deepcluster' it must be 1"):
        build(ClusteringRun(**RUN | {"method": "deepcluster", "heads": 2}), (1, 8, 8))
    with pytest.raises(ValueError, match="self_label is 1; the method 'deepcluster' has no scores to label by: choose"):
        build(ClusteringRun(**RUN | {"method": "deepcluster", "self_label": 1}), (1, 8, 8))


def test_methods_say_how_many_images_they_take():
    check_count("jule", 20_000)
    check_count("dac", 10**6)
    with pytest.raises(ValueError, match="images are 20,001; the method 'jule' takes at most 20,000: choose another"):
        check_count("jule", 20_001)
