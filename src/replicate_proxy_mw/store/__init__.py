"""What is known of predictions beyond a request: whose they are, which span created them, how often they were read."""

from .contract import PredictionStore, StoredPrediction
from .memory import MemoryPredictionStore

__all__ = ["MemoryPredictionStore", "PredictionStore", "StoredPrediction"]
