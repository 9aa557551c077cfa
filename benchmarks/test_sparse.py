"""Benchmarks of sparse layers."""

SUITE = "sparse"


def test_sparse(case, race):
    race(case)
