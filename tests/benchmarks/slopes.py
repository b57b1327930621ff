"""Certified ranges of f' and f'' of KAFs on 100,000 intervals: CPU time per neuron, memory, and how tight they are.

The gap is the distance of a bound from an attained value, the largest of all neurons: relative to max |f'| on the
interval, and to max f' - min f'. Intervals lie in the range of the dictionary, with widths from 1e-3 to 10.

python tests/benchmarks/slopes.py                                the table
python tests/benchmarks/slopes.py CHANNELS INIT ORDER SCOPE      one case, JSON
"""

from __future__ import annotations

import itertools
import json
import sys
import time

from measure import fresh, hardware, peak_mb

NEURONS = 100_000


def case(channels: int, init: str, order: int, scope: str) -> dict[str, float]:
    """Cost and gap for a layer of that many channels, each with its own alpha; the first call is timed."""
    import torch

    from certify import Interval
    from models import KAF, KAFFacts
    from models.kaf_turns import evaluate

    torch.manual_seed(0)
    kaf = KAF(channels, init=init).eval()
    with torch.no_grad():
        kaf.alpha.add_(1e-2 * torch.randn(kaf.alpha.shape))
    facts = KAFFacts(kaf, None, 1)
    bound = 3.0
    lower = bound * (2 * torch.rand(NEURONS // channels, channels, dtype=torch.float64) - 1)
    upper = lower + 10 ** (4 * torch.rand(lower.shape, dtype=torch.float64) - 3)
    if scope == "global":
        lower, upper = torch.full_like(lower, -torch.inf), torch.full_like(upper, torch.inf)
    z = Interval(lower, upper)
    before = peak_mb()
    times = []
    for _ in range(2):
        start = time.process_time()
        found = facts.slope_range(z) if order == 1 else facts.curvature(z)
        times.append((time.process_time() - start) / NEURONS * 1e3)
    used, turns = peak_mb() - before, facts._slopes if order == 1 else facts._curvatures
    channel = torch.arange(channels).repeat(NEURONS // channels)
    places = turns.extremes(lower.flatten(), upper.flatten(), channel)
    least, most = (evaluate(facts._sum, (order,), s, channel)[0].view(lower.shape) for s in (places.least, places.most))
    gap = torch.maximum(least - found.lower, found.upper - most)
    size, width = torch.maximum(least.abs(), most.abs()), most - least
    return {
        "first": times[0],
        "again": times[1],
        "memory": used,
        "gap": float((gap / size).max()),
        "width": float((gap / width).max()),
        "mass": float(facts._sum.mass.max()),
    }


def main() -> None:
    """Print the table."""
    print(hardware())
    columns = ("first, ms", "again, ms", "memory, MB", "gap/size", "gap/width", "sum|alpha|")
    print(f"{'derivative':10} {'channels':>8} {'init':>7} {'interval':>8}" + "".join(f"{name:>12}" for name in columns))
    for order, channels, init, scope in itertools.product(
        ("1", "2"), ("100", "100000"), ("random", "elu"), ("local", "global")
    ):
        found = fresh("slopes.py", channels, init, order, scope)
        if "error" in found:
            print(f"{order:10} {channels:>8} {init:>7} {scope:>8}  {found['error']}", flush=True)
            continue
        numbers = "".join(f"{value:12.2g}" for value in found.values())
        print(f"{order:10} {channels:>8} {init:>7} {scope:>8}{numbers}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        print(json.dumps(case(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])))
    else:
        main()
