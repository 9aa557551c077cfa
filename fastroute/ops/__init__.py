"""Functional operators. Each module holds one operator: checks, fake kernel, autograd and documentation."""

from fastroute.ops.cross_connect import Routed, cross_connect
from fastroute.ops.cross_predict import cross_predict
from fastroute.ops.gate import Gates, gate
from fastroute.ops.mix import mix
from fastroute.ops.mixture_em import MixtureEM, mixture_em_loss

__all__ = ["Gates", "MixtureEM", "Routed", "cross_connect", "cross_predict", "gate", "mix", "mixture_em_loss"]
