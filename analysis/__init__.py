"""Measuring and comparing: robust accuracy with intervals, the sensitivity of layers, paired comparisons."""

from certify.errors import require_siblings

require_siblings("models")
