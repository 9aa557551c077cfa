"""Load checkpoints, predict, and export networks."""

from fastroute.inference.export import export
from fastroute.inference.predictor import Prediction, Predictor, load
from fastroute.inference.preprocessing import Preprocessing

__all__ = ["Prediction", "Predictor", "Preprocessing", "export", "load"]
