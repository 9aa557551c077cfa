"""What the host spends on one call."""

SUITE = "overhead"


def test_overhead(case, race):
    race(case)
