"""Benchmarks of operators on the shapes of the thesis's networks."""

SUITE = "operators"


def test_operators(case, race):
    race(case)
