"""Whole steps of the thesis's networks."""

SUITE = "networks"


def test_networks(case, race):
    race(case)
