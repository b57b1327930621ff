"""The few exceptions of the project. Each teaches in at most three lines: what came, what was expected, what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import ClassVar


class CertifyError(Exception):
    """Base of all errors that a user can cause or cure.

    ``got`` says what came, ``expected`` what was expected, ``remedy`` what to do; each is one line.
    ``exit_code`` is what the command line returns for it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, got: str, expected: str = "", remedy: str = "") -> None:
        self.got, self.expected, self.remedy = (" ".join(part.split()) for part in (got, expected, remedy))
        lines = [self.got]
        if self.expected:
            lines.append(f"expected: {self.expected}")
        if self.remedy:
            lines.append(f"try: {self.remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.got, self.expected, self.remedy)  # across processes, with its three parts


class InvalidInput(CertifyError, ValueError):
    """A value, shape, dtype or name that cannot be meant."""


class InvalidModel(CertifyError, ValueError):
    """A model in a state that cannot be bounded: train mode, NaN weights, half precision, hooks."""


class InvalidFile(CertifyError):
    """A file that is missing, truncated, of the wrong kind or inconsistent."""

    exit_code: ClassVar[int] = 5


class UnsupportedOperation(CertifyError):
    """An operation of the model has no bound rule."""


class MissingDependency(CertifyError):
    """An optional package is needed and absent."""


class SoundnessAlarm(CertifyError):
    """A sample was both certified and attacked: a bug of ours or of the arithmetic, and the run stops."""

    exit_code: ClassVar[int] = 6


def unknown_name(kind: str, name: object, known: object) -> InvalidInput:
    """Return the error for a name that no registry knows, listing the names it knows."""
    names = ", ".join(sorted(str(item) for item in known)) if hasattr(known, "__iter__") else str(known)
    return InvalidInput(f"unknown {kind} {name!r}", f"one of {names}", "pick one from that list")


def require_siblings(*packages: str) -> None:
    """Make sure that ``packages`` are those installed beside ``certify``, not a user's folders of the same names.

    Raises ``MissingDependency`` otherwise (a ``models/`` folder of a user's project can shadow ours).
    """
    home = Path(__file__).resolve().parent.parent
    for package in packages:
        found = importlib.util.find_spec(package)
        where = Path(found.origin).resolve().parent.parent if found and found.origin else None
        if where != home:
            raise MissingDependency(
                f"the package {package!r} comes from {where or 'nowhere'}",
                f"the one installed beside certify in {home}",
                "run from another folder, or rename your own folder of that name",
            )
