"""What is known beyond a request: of predictions, whose they are, which span created them, how often they were read;
and what optional layers remember, each in a module of its own."""

from .contract import PredictionStore, StoredPrediction
from .ledger import Ledger
from .memory import MemoryPredictionStore

__all__ = ["Ledger", "MemoryPredictionStore", "PredictionStore", "StoredPrediction"]
