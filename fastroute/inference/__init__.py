"""Load checkpoints, predict, and export networks."""

from fastroute.inference.predictor import Prediction, Predictor, load
from fastroute.inference.preprocessing import Preprocessing

__all__ = ["Prediction", "Predictor", "Preprocessing", "load"]
