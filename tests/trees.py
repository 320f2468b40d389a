"""Span trees as text, compared with those of another run."""

from __future__ import annotations

import re


def words(tree: str) -> list[str]:
    """What `tree` says, but for what differs from run to run, and for how it is wrapped."""
    tree = re.sub(r"\b[0-9a-f]{32}\b", "TRACE", tree)
    tree = re.sub(r"\b[a-z0-9]{26}\b", "ID", tree)
    tree = re.sub(r"\b\d+(\.\d+)?( ms| s|\b)", "N", tree)
    return re.sub("[│├└─]", " ", tree).split()


def shown(page: str) -> list[list[str]]:
    """The trees on a page, as words."""
    return [words(tree) for tree in re.findall(r"^```\n(trace .*?)^```", page, re.DOTALL | re.MULTILINE)]
