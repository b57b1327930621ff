"""Arrays to .npz files, atomically."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from models.files import write


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray | float | str]) -> Path:
    """Write ``arrays`` as ``path``, whole or not at all, and return the path."""
    buffer = io.BytesIO()
    given = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(buffer, **given)  # type: ignore[arg-type]  # numpy's stubs take the names for options
    write({path: buffer.getvalue()})
    return path
