"""A Replicate of your own for tests and demos. Needs the extra ``testing``."""

from .catalogue import FakeModel, FakeVersion
from .clock import Clock, ManualClock
from .predictions import FakeFile
from .replicate import FakeReplicate, RecordedRequest
from .serve import Served, serve
from .webhooks import Delivery

__all__ = [
    "Clock",
    "Delivery",
    "FakeFile",
    "FakeModel",
    "FakeReplicate",
    "FakeVersion",
    "ManualClock",
    "RecordedRequest",
    "Served",
    "serve",
]
