"""From a checkpoint to predictions, and to files for other programs."""

from fastroute.inference.predictor import Prediction, Predictor, load
from fastroute.inference.preprocessing import Preprocessing

__all__ = ["Prediction", "Predictor", "Preprocessing", "load"]
