"""Lipschitz constants: upper bounds that are certificates, lower bounds that are attained."""

from certify.lipschitz.estimate import lipschitz_constant

__all__ = ["lipschitz_constant"]
