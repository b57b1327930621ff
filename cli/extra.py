"""What a command adds to its report in files for people: tables, pictures, a layer to look into."""

from __future__ import annotations

from dataclasses import dataclass

from cli.grids import Grid
from cli.pictures import Picture


@dataclass(frozen=True)
class Extra:
    """``tables`` stand in place of ``overview.of_all``, ``pictures`` before the report's own.

    ``layer`` is one whose neurons are shown whatever it costs.
    """

    tables: tuple[Grid, ...] = ()
    pictures: tuple[Picture, ...] = ()
    layer: str | None = None


NOTHING = Extra()
