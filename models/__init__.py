"""The things questioned: networks with ReLU, smooth or trainable activations, their data and training."""

from models.kaf import KAF
from models.kaf_facts import KAFFacts
from models.networks import cnn, mlp

__all__ = ["KAF", "KAFFacts", "cnn", "mlp"]
