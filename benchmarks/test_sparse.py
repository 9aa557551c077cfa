"""Sparse layers, which send each sample to one of their paths."""

SUITE = "sparse"


def test_sparse(case, race):
    race(case)
