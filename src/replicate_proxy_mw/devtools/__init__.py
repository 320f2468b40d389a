"""For the developer's own terminal. Needs OpenTelemetry's SDK, which an app that records spans has already."""

from .span_tree import SpanTreePrinter, render

__all__ = ["SpanTreePrinter", "render"]
