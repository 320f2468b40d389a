"""A Replicate of your own for tests and demos. Needs the extra ``testing``."""

from .catalogue import FakeModel, FakeVersion
from .clock import Clock, ManualClock
from .faults import FAULTS, Fault, FaultedRequest, FaultServer
from .predictions import FakeFile
from .replicate import FakeReplicate, RecordedRequest
from .serve import Served, serve
from .webhooks import Delivery

__all__ = [
    "FAULTS",
    "Clock",
    "Delivery",
    "FakeFile",
    "FakeModel",
    "FakeReplicate",
    "FakeVersion",
    "Fault",
    "FaultServer",
    "FaultedRequest",
    "ManualClock",
    "RecordedRequest",
    "Served",
    "serve",
]
