"""Zero-slack soundness checks: bounds against float executions in many orders; prints the counter and violations.

    python tests/benchmarks/soundness.py [CHECKS]     at least so many comparisons (default 10 million)

Every check compares one float value of the running network (a node, an output or a margin, at a corner, face, random,
attacked or neighbouring point; batched, one by one, with permuted sums, channels_last) with one end of a bound.
"""

from __future__ import annotations

import itertools
import sys
import time

import torch
from measure import hardware
from strategies import ACTIVATIONS, convolutional, dense, inputs, random_graph
from zero_slack import Tally, check_bounds

import certify

RADII = (0.0, 1e-9, 1e-3, 0.1)
NORMS = (torch.inf, 2, 1)


def cases():
    """Networks with sets, without end."""
    for seed in itertools.count():
        for i, activation in enumerate(ACTIVATIONS):
            dtype = (torch.float32, torch.float64)[(seed + i) % 2]
            radius, p = RADII[(seed + i) % 4], NORMS[(seed + i) % 3]
            families = (
                (dense(activation, seed=seed), (6,)),
                (convolutional(activation, seed=seed), (2, 5, 5)),
                (random_graph(seed=seed * len(ACTIVATIONS) + i), (6,)),
            )
            for model, shape in families:
                x = inputs(shape, seed=seed, dtype=dtype)
                yield activation, model.to(dtype), certify.LpBall(x, radius, p=p, clip=(0.0, 1.0))


def main() -> None:
    """Count until the target is met, all activations at least once."""
    target = int(float(sys.argv[1])) if len(sys.argv) > 1 else 10_000_000
    print(hardware())
    total, kaf, start = Tally(), 0, time.perf_counter()
    seen: set[str] = set()
    for activation, model, domain in cases():
        found = check_bounds(model, domain, count=2)
        total.checks += found.checks
        total.violations += found.violations
        kaf += found.checks if activation.startswith("kaf") else 0
        seen.add(activation)
        for example in found.examples:
            print(f"VIOLATION {activation} {domain.center.dtype}: {example}", flush=True)
        if total.checks >= target and len(seen) == len(ACTIVATIONS):
            break
    seconds = time.perf_counter() - start
    print(f"{total.checks:,} checks ({kaf:,} on KAF networks), {total.violations} violations, {seconds:.0f} s")


if __name__ == "__main__":
    main()
