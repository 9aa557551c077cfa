"""Conversion of small networks to parallel paths."""

from functools import partial

from fastroute.models import multipath
from fastroute.nn import CrossConnection

SIZE = (3, 16, 16)
toy_paths = partial(multipath, input_size=SIZE)


def routers(model):
    return {name: module for name, module in model.named_children() if isinstance(module, CrossConnection)}
