"""Functional operators. Each file holds one operator: schema, checks, fake kernel, autograd and docstring."""

from fastroute.ops.cross_connect import Routed, cross_connect
from fastroute.ops.mix import mix

__all__ = ["Routed", "cross_connect", "mix"]
