"""For the developer's own terminal and browser. Needs OpenTelemetry's SDK, as every app does that records spans."""

from .span_tree import SpanTreePrinter, render
from .trace_buffer import TraceBuffer
from .trace_viewer import TraceViewer

__all__ = ["SpanTreePrinter", "TraceBuffer", "TraceViewer", "render"]
