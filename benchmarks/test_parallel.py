"""Benchmarks of the forms of parallel convolutions."""

SUITE = "parallel"


def test_parallel(case, race):
    race(case)
