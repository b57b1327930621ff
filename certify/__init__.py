"""Certified robustness: sound bounds, attacks and Lipschitz constants for PyTorch networks.

domain = certify.LpBall(x, radius=8/255, p=torch.inf, clip=(0.0, 1.0))
spec = certify.class_margins(labels, classes=10)
certify.prove(model, domain, spec, method="crown").verdicts
"""

from certify import activations, attacks, convex, lipschitz, ops, oracle, propagate, testing
from certify.activations.base import Activation
from certify.activations.enclose import Curve
from certify.activations.smooth import Smooth
from certify.bounding import bounds, layer_bounds
from certify.convex.lp import LP
from certify.convex.margin import LipschitzMargin
from certify.convex.semidefinite import SemidefiniteProgram
from certify.convex.wong_kolter import WongKolter
from certify.enclosures import Interval, LinearBounds, Relaxation
from certify.errors import (
    CertifyError,
    InvalidFile,
    InvalidInput,
    InvalidModel,
    MissingDependency,
    SoundnessAlarm,
    UnsupportedOperation,
)
from certify.lipschitz import lipschitz_constant, penalties
from certify.memory import options
from certify.propagate.alpha import AlphaCROWN
from certify.propagate.attribute import NodeBlame, explain
from certify.propagate.methods import CROWN, IBP, CrownIBP
from certify.registry import (
    discover,
    register_activation,
    register_attack,
    register_estimator,
    register_method,
    register_op,
)
from certify.results import AttackResult, Certificate, LipschitzEstimate, Verdict
from certify.sets import Box, LpBall, PerturbationSet
from certify.smoothing import SmoothedCertificate, Smoothing, certify_smoothed
from certify.specs import Spec, class_margins, logit_sign, output_band
from certify.training import training_margins
from certify.verify import certified_radius, prove

for _folder in (activations, ops, propagate, attacks, lipschitz, oracle, convex):
    discover(_folder.__name__, _folder.__path__)  # type: ignore[arg-type]
del _folder

__all__ = [
    "CROWN",
    "IBP",
    "LP",
    "Activation",
    "AlphaCROWN",
    "AttackResult",
    "Box",
    "Certificate",
    "CertifyError",
    "CrownIBP",
    "Curve",
    "Interval",
    "InvalidFile",
    "InvalidInput",
    "InvalidModel",
    "LinearBounds",
    "LipschitzEstimate",
    "LipschitzMargin",
    "LpBall",
    "MissingDependency",
    "NodeBlame",
    "PerturbationSet",
    "Relaxation",
    "SemidefiniteProgram",
    "Smooth",
    "SmoothedCertificate",
    "Smoothing",
    "SoundnessAlarm",
    "Spec",
    "UnsupportedOperation",
    "Verdict",
    "WongKolter",
    "attacks",
    "bounds",
    "certified_radius",
    "certify_smoothed",
    "class_margins",
    "explain",
    "layer_bounds",
    "lipschitz_constant",
    "logit_sign",
    "options",
    "output_band",
    "penalties",
    "prove",
    "register_activation",
    "register_attack",
    "register_estimator",
    "register_method",
    "register_op",
    "testing",
    "training_margins",
]
