"""Zero-slack checks of bounds against float executions: prints how many were made and how many failed.

    python tests/benchmarks/soundness.py           every family, about five minutes
    python tests/benchmarks/soundness.py MINUTES   keep drawing networks for that long

One check compares one number that some float execution of a network produces (a node, an output, a claim's row) with
one certified end of it. Executions differ in batch size, threads, memory format and order of summation, with and
without fused multiply-add, KAF nets eager and compiled; points are corners, faces, float neighbours, random ones and
those of an attack.
"""

from __future__ import annotations

import itertools
import sys
import time

import torch
from measure import hardware
from strategies import FAMILIES, domains, inputs
from zero_slack import Tally, check_bounds

RADII = (0.0, 1e-9, 1e-3, 0.1, 1.0)


def cases():
    """Yield (family, seed, dtype, radius, kind of set) without end; every family is met before one comes again."""
    for seed in itertools.count():
        for i, family in enumerate(FAMILIES):
            turn = i + seed
            yield (
                family,
                seed,
                (torch.float32, torch.float64)[turn % 3 == 2],
                RADII[turn % len(RADII)],
                ("linf", "l2", "box", "l1")[(turn // 2) % 4],
            )


def main(minutes: float) -> int:
    """Run until the time is over; returns 1 if a bound was violated."""
    torch.set_num_threads(1)
    print(hardware())
    end, networks = time.monotonic() + 60 * minutes, 0
    total: dict[str, Tally] = {}
    for family, seed, dtype, radius, kind in cases():
        if time.monotonic() > end and seed:
            break
        build, shape = FAMILIES[family]
        model, x = build(seed=seed).to(dtype), inputs(shape, dtype=dtype, seed=seed)
        tally = check_bounds(model, domains(x, radius)[kind], seed=seed, count=2, orders=2,
                             compiled=seed == 0 and "kaf" in family)  # fmt: skip
        if tally.violations:
            print(
                f"VIOLATED: {family}, seed {seed}, {dtype}, radius {radius}, {kind}: {tally.examples[:3]}", flush=True
            )
        found = total.setdefault(family.split()[0] + (" kaf" if "kaf" in family else ""), Tally())
        found.checks += tally.checks
        found.violations += tally.violations
        networks += 1
    for name, found in sorted(total.items()):
        print(f"{name:16} {found.checks:>14,} checks {found.violations:>6} violations")
    checks, violations = (sum(getattr(t, field) for t in total.values()) for field in ("checks", "violations"))
    print(f"{'all':16} {checks:>14,} checks {violations:>6} violations, {networks} networks")
    return int(violations > 0)


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0))
