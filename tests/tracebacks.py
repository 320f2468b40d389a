"""What an error tracker sees of an exception."""

from __future__ import annotations

from types import TracebackType


def locals_of(error: BaseException) -> str:
    """The locals of the package's own frames, as an error tracker would show them."""
    shown = []
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        if "/replicate_proxy_mw/" in traceback.tb_frame.f_code.co_filename:
            shown.append(repr(dict(traceback.tb_frame.f_locals)))
        traceback = traceback.tb_next
    return "\n".join(shown)
