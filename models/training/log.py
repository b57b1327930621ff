"""The log of a run beside its checkpoint: one line of JSON per epoch, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from models.files import write
from models.training.records import EpochRecord

FILE = "log.jsonl"


def log(directory: Path, records: Sequence[EpochRecord]) -> None:
    """Write all epochs to ``directory``/log.jsonl, whole, and the last one to TensorBoard's folder beside it.

    Written anew every time: a resume after a kill leaves no epoch twice.
    """
    lines = "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in records)
    write({directory / FILE: lines.encode()})
    if importlib.util.find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(directory / "tensorboard")) as board:
            for name, value in asdict(records[-1]).items():
                if isinstance(value, float):
                    board.add_scalar(name, value, records[-1].epoch)
