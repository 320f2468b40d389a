"""Checks of what goes into models and comes out of them, for the layer `guardrails`. Those that need a package are not
imported here: `patterns` and `input_schema`, both of the extra `guardrails`."""

from .contract import ALLOW, Check, Checked, Verdict

__all__ = ["ALLOW", "Check", "Checked", "Verdict"]
