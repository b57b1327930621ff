"""The learning rate's share of its peak, as a function of the step alone: a resume needs no state of it."""

from __future__ import annotations

from certify.attacks.annealing import annealed
from models.training.config import Schedule


def share(schedule: Schedule, step: int, steps: int) -> float:
    """Return the share in [0, 1] of the peak at step 0 <= ``step`` < ``steps``."""
    return {"one-cycle": one_cycle, "cosine": cosine, "constant": constant}[schedule.name](step, steps, schedule.rise)


def one_cycle(step: int, steps: int, rise: float = 0.3) -> float:
    """Return a triangle's height: a line up over ``rise`` of the steps, then down to 0.

    Reference: L. Smith, N. Topin, "Super-convergence" (2018), with the first cycle alone.
    """
    peak = max(1, round(rise * steps))
    return (step + 1) / peak if step < peak else (steps - step) / (steps - peak + 1)


def cosine(step: int, steps: int, rise: float = 0.0) -> float:
    """Return half a cosine from 1 to 0 (``annealed``), after a line up over ``rise`` of the steps."""
    peak = round(rise * steps)
    return (step + 1) / peak if step < peak else annealed(step - peak, steps - peak)


def constant(step: int, steps: int, rise: float = 0.0) -> float:
    """Return 1, after a line up over ``rise`` of the steps."""
    return min(1.0, (step + 1) / max(1, round(rise * steps)))
