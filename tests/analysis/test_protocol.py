"""What a protocol says of itself."""

from __future__ import annotations

from analysis.protocol import attack_name, describe
from certify.attacks import PGD, Adaptive, Ensemble, Square


def test_attacks_within_attacks_are_described_alike() -> None:
    whole = Ensemble(attacks=(PGD(steps=7, loss="ce"), Adaptive(attack=PGD(steps=3)), Square()))
    parts = "PGD(steps=7, restarts=1, loss=ce), Adaptive(attack=PGD(steps=3, restarts=1)), Square()"
    assert describe(whole) == f"Ensemble(attacks=[{parts}])"
    assert describe(Ensemble()) == "Ensemble()"
    assert describe(Adaptive()) == "Adaptive()"
    assert attack_name(describe(whole)) == "Ensemble"
