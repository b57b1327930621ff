"""Attacks: searches for counterexamples that are always re-validated."""

from certify.attacks.adaptive import Adaptive
from certify.attacks.apgd import APGD, APGDT
from certify.attacks.base import Attack
from certify.attacks.bisection import Bisection
from certify.attacks.carlini_wagner import CarliniWagner
from certify.attacks.deepfool import DeepFool
from certify.attacks.ensemble import Ensemble
from certify.attacks.fgsm import FGSM, RFGSM
from certify.attacks.fmn import FMN
from certify.attacks.pgd import PGD
from certify.attacks.square import Square
from certify.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "APGDT",
    "FGSM",
    "FMN",
    "PGD",
    "RFGSM",
    "Adaptive",
    "Attack",
    "Bisection",
    "CarliniWagner",
    "DeepFool",
    "Ensemble",
    "Square",
    "Transfer",
]
