"""Standard streams that outlive their readers: ``certify ... | head`` writes its files and keeps its exit code."""

from __future__ import annotations

import io
import sys
from typing import Any


class Unread(io.FileIO):
    """A stream on which what nobody reads any more is written nowhere: a pipe that was closed raises no error."""

    def write(self, data: Any, /) -> int:
        """Return how many bytes are dealt with."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Let stdout and stderr go on after their readers have left."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # None where it was closed before we began
            stream.flush()
            raw = Unread(stream.fileno(), "w", closefd=False)
            lines = stream.line_buffering
            new = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=lines)
            setattr(sys, name, new)
