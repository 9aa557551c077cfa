from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from fastroute._plain import plain, takes_plain_values


def test_numbers_of_numpy_become_python_s():
    given = {"a": np.int64(3), "b": [np.float32(0.5), (np.bool_(True),)], "c": np.arange(3), "d": Path("x/y")}
    found = plain(given)
    assert found == {"a": 3, "b": [0.5, (True,)], "c": [0, 1, 2], "d": "x/y"}
    assert [type(value) for value in (found["a"], found["b"][0], found["b"][1][0])] == [int, float, bool]
    assert type(plain(np.float64(0.5))) is float  # which is a float, too
    assert plain(torch.tensor(0.5)) == 0.5 and type(plain(torch.tensor(0.5))) is float


def test_all_else_stays():
    weights = OrderedDict(count=torch.tensor(3), weight=torch.ones(2))
    weights._metadata = {"": 1}
    for value in (weights, [1, "a", None], (torch.ones(2),), {"a": {1: 2.0}}, "text", torch.ones(1), object()):
        assert plain(value, tensors=False) is value


def test_arguments_of_functions():
    @takes_plain_values
    def kinds(a, *, b=None):
        return type(a), type(b)

    assert kinds(np.int64(1), b=np.float32(2)) == (int, float) and kinds("a") == (str, type(None))
