"""Benchmarks of training and inference steps of the thesis's networks."""

SUITE = "networks"


def test_networks(case, race):
    race(case)
