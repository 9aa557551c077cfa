"""The images that are clustered."""

import numpy as np

from fastroute.clustering.images import CIFAR100_SUPERCLASSES


def test_superclasses_of_cifar100():
    assert (np.bincount(CIFAR100_SUPERCLASSES) == 5).all() and len(CIFAR100_SUPERCLASSES) == 100
    # From apple, aquarium fish and baby to wolf, woman and worm.
    assert CIFAR100_SUPERCLASSES[:3] == (4, 1, 14) and CIFAR100_SUPERCLASSES[-3:] == (8, 14, 13)


def test_each_class_of_cifar100_is_in_its_superclass():
    superclasses = [
        "beaver dolphin otter seal whale",
        "aquarium_fish flatfish ray shark trout",
        "orchid poppy rose sunflower tulip",
        "bottle bowl can cup plate",
        "apple mushroom orange pear sweet_pepper",
        "clock keyboard lamp telephone television",
        "bed chair couch table wardrobe",
        "bee beetle butterfly caterpillar cockroach",
        "bear leopard lion tiger wolf",
        "bridge castle house road skyscraper",
        "cloud forest mountain plain sea",
        "camel cattle chimpanzee elephant kangaroo",
        "fox porcupine possum raccoon skunk",
        "crab lobster snail spider worm",
        "baby boy girl man woman",
        "crocodile dinosaur lizard snake turtle",
        "hamster mouse rabbit shrew squirrel",
        "maple_tree oak_tree palm_tree pine_tree willow_tree",
        "bicycle bus motorcycle pickup_truck train",
        "lawn_mower rocket streetcar tank tractor",
    ]
    classes = sorted(" ".join(superclasses).split())  # the order of the data set
    found = [sorted(c for c, of in zip(classes, CIFAR100_SUPERCLASSES, strict=True) if of == k) for k in range(20)]
    assert found == [names.split() for names in superclasses]
