"""Calls of the compiled operators that users do not make, and that must raise and not crash."""

import pytest
import torch

NATIVE = torch.ops.fastroute_native
X, GATES = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 1)
WEIGHT, SCORES = torch.zeros(1, 1, 5, 3, 3, 3), torch.zeros(6, 4)
ONES = [1, 1]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cpu_plan", (X, 100, 100)),
        ("cpu_plan", (X, 0, 1)),
        ("cpu_plan", (torch.zeros(3), 1, 1)),
        ("mix", ([], GATES)),
        ("mix", ([X], None)),
        ("gate_backward", (None, None, [], None, None, torch.zeros(1, 1, 3), None, GATES, X, X)),
        ("cross_connect", ([X], None, None, None, None, False)),
        ("mixture_em_loss", (SCORES, None, None, torch.zeros(4), None, 5.0)),
        ("mixture_em_loss", (None, None, None, None, None, 5.0)),
        ("new_empty_strided", (X, [-2, 1 << 20], [1, 1])),
        ("new_empty_strided", (X, [1 << 10, 1 << 10], [-1, 1 << 10])),
        ("sum_predictions", ([X], GATES, None, False, [])),
        ("cross_predict", ([X], WEIGHT, None, GATES, [0, 1], ONES, ONES, False, "predict")),
        ("cross_predict", ([X], WEIGHT, None, GATES, [1], ONES, ONES, False, "predict")),
        ("cross_predict", ([X], WEIGHT, None, GATES, ONES, [1 << 62, 1], ONES, False, "predict")),
        ("cross_predict", ([X], WEIGHT[0], None, GATES, ONES, ONES, ONES, False, "predict")),
        ("cross_predict_backward", ([], [], [X], WEIGHT, None, GATES, ONES, ONES, ONES, True)),
        ("cross_predict_backward", ([X], [], [X], WEIGHT, None, GATES, ONES, ONES, ONES, True)),
    ],
)
def test_bad_arguments_are_errors(native_library, name, arguments):
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)):
        getattr(NATIVE, name)(*arguments)


def test_public_operators_check_geometries_too(native_library):
    for stride in ([0, 1], [1], [1 << 62, 1]):
        with pytest.raises(ValueError, match="stride is"):
            torch.ops.fastroute.cross_predict([X], WEIGHT, None, GATES, stride, ONES, ONES, False, "predict")
