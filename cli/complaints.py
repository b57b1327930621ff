"""Errors as people see them: at most three lines on stderr, and an exit code. Never a traceback for bad input."""

from __future__ import annotations

import os
import sys
import traceback

import typer

INTERRUPTED, INTERNAL, BAD_FILE, TIMEOUT = 130, 6, 5, 4

#: click's own errors, wherever typer keeps click.
_ClickError = typer.BadParameter.__mro__[2]


def complain(error: BaseException) -> int:
    """Print what went wrong and what to do, and return the exit code."""
    if os.environ.get("CERTIFY_DEBUG"):
        traceback.print_exception(error)
    lines, code = _told(error)
    typer.echo("\n".join([f"error: {lines[0]}", *lines[1:3]]), err=True)
    return code


def _told(error: BaseException) -> tuple[list[str], int]:
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return ["interrupted"], INTERRUPTED
    if isinstance(error, _ClickError):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "certify"
        return [_line(error.format_message()), f"try: {path} --help"], error.exit_code  # type: ignore[attr-defined]
    if "certify.errors" in sys.modules:
        from certify.errors import CertifyError

        if isinstance(error, CertifyError):
            return str(error).splitlines(), error.exit_code
    if isinstance(error, OSError):
        return [_line(f"{error.strerror or type(error).__name__}: {error.filename or 'a file'}")], BAD_FILE
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return [
        _line(f"internal error: {type(error).__name__}: {error}"),
        f"in {os.path.basename(frame.filename)}, line {frame.lineno}",
        "try: report it as a bug, with the output of CERTIFY_DEBUG=1 certify ...",
    ], INTERNAL


def _line(text: str) -> str:
    return " ".join(text.split())[:400]
