"""The forms in which parallel convolutions can run."""

SUITE = "parallel"


def test_parallel(case, race):
    race(case)
