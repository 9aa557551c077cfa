import pytest

from fastroute.models import list_models
from fastroute.training.recipes import recipe, recipes


def test_every_experiment_of_the_thesis_has_its_recipe():
    expected = {
        "cifar10_base_cnn_cc2": ("cifar10", 200, 128, [80, 150], {"error": 7.03}),
        "cifar10_base_cnn_cc2_350": ("cifar10", 350, 128, [150, 250], {"error": 6.53}),
        "cifar10_resnet20_cc2": ("cifar10", 350, 64, [150, 250], {"error": 5.5}),
        "cifar100_resnet32_cc4": ("cifar100", 350, 64, [150, 250], {"error": 23.52}),
        "ilsvrc2012_resnet18_cc2": (
            "imagefolder",
            120,
            256,
            None,
            {"error": 26.48, "top5": 8.6, "10-crop": 24.5, "10-crop top5": 7.34},
        ),
        "ilsvrc100_resnet50_cc2": (
            "imagefolder",
            90,
            256,
            None,
            {"error": 18.64, "top5": 4.34, "10-crop": 17.62, "10-crop top5": 4.0},
        ),
    }
    for name, (dataset, epochs, batch_size, milestones, reported) in expected.items():
        found = recipe(name)
        options = found.options
        assert (options["dataset"], options["epochs"], options["batch_size"]) == (dataset, epochs, batch_size)
        assert options.get("decay_milestones") == milestones and found.reported == reported
        assert (options["lr"], options["momentum"], options["opt"], options["decay_rate"]) == (0.1, 0.9, "sgd", 0.1)
        assert options["weight_decay"] == (1e-4 if dataset == "imagefolder" else 5e-4)
    assert recipe("ilsvrc100_resnet50_cc2").options["first_classes"] == 100
    assert recipe("ilsvrc2012_resnet18_cc2").options["decay_epochs"] == 30


def test_every_recipe_names_a_known_network():
    assert {recipe.options["model"] for recipe in recipes().values()} <= set(list_models())


def test_every_experiment_has_a_short_recipe():
    prefixes = {name.partition("_")[0] for name in recipes()}
    assert prefixes == {"cifar10", "cifar100", "ilsvrc2012", "ilsvrc100", "mnist"}
    for prefix in prefixes:
        short = [r for name, r in recipes().items() if name.startswith(prefix) and name.endswith("_short")]
        assert short and all(r.options["sched"] == "onecycle" and r.options["epochs"] <= 30 for r in short)


def test_comparators_have_their_recipes():
    assert recipe("cifar10_capsnet").reported == {"error": 10.6} and recipe("cifar10_capsnet").options["opt"] == "adam"
    assert recipe("cifar100_blockdrop110").reported == {"error": 26.3}
    assert recipe("cifar10_skipnet110").options["decay_milestones"] == [150, 250]
    options = recipe("cifar10_resnet20_cc2_split_attention").options
    assert options == recipe("cifar10_resnet20_cc2").options | {"block": "split_attention"}


def test_suggests_recipes_for_an_unknown_name():
    with pytest.raises(ValueError, match=r"config is 'cifar10_resnet20_c2'; .* did you mean .*cifar10_resnet20_cc2"):
        recipe("cifar10_resnet20_c2")


def test_every_clustering_of_the_thesis_has_its_recipe():
    assert recipe("cluster_mnist_two-fold", "cluster").reported == {"accuracy": 98.88, "NMI": 96.74}
    found = recipe("cluster_cifar100_iic", "cluster")
    assert found.reported == {"accuracy": 16.18, "NMI": 9.88} and found.options["clusters"] == 20
    options = {"dataset": "stl10", "epochs": 250, "batch_size": 128, "lr_em": 5e-5, "lr_consistency": 1e-4}
    assert options.items() <= recipe("cluster_stl10_em", "cluster").options.items()
    assert not recipes("cluster").keys() & recipes("train").keys()
