"""What is known of predictions beyond a request: whose they are, which span created them, how often they were read."""

from .contract import PredictionStore, StoredPrediction
from .ledger import Ledger
from .memory import MemoryPredictionStore

__all__ = ["Ledger", "MemoryPredictionStore", "PredictionStore", "StoredPrediction"]
