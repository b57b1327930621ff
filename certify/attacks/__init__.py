"""Attacks: searches for counterexamples that are always re-validated."""

from certify.attacks.base import Attack
from certify.attacks.fgsm import FGSM, RFGSM
from certify.attacks.pgd import PGD

__all__ = ["FGSM", "PGD", "RFGSM", "Attack"]
