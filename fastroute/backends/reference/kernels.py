"""One function per operator."""

from fastroute.backends.reference.cross_connect import cross_connect, cross_connect_backward, gate, gate_backward
from fastroute.backends.reference.cross_predict import cross_predict, cross_predict_backward
from fastroute.backends.reference.mix import mix, mix_backward
from fastroute.backends.reference.mixture_em import mixture_em_loss, mixture_em_loss_backward

__all__ = [
    "cross_connect",
    "cross_connect_backward",
    "cross_predict",
    "cross_predict_backward",
    "gate",
    "gate_backward",
    "mix",
    "mix_backward",
    "mixture_em_loss",
    "mixture_em_loss_backward",
]
