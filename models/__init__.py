"""The things questioned: networks with ReLU, smooth or trainable activations, their data and training."""

from models import resnet, vgg  # noqa: F401  # register their networks
from models.kaf import KAF, fuse
from models.kaf_facts import KAFFacts
from models.networks import architecture, build, cnn, mlp
from models.penalties import curvature_penalty, slope_penalty
from models.published import from_authors

__all__ = [
    "KAF",
    "KAFFacts",
    "architecture",
    "build",
    "cnn",
    "curvature_penalty",
    "from_authors",
    "fuse",
    "mlp",
    "slope_penalty",
]
