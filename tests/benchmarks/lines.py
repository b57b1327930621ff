"""CPU seconds of the facts of an activation on 60,000 intervals [20, 8, 375] of widths .01 to 3, one thread.

A fan, which has nine lines per side, is made on the first half of them.

python tests/benchmarks/lines.py [NAME ...]
"""

from __future__ import annotations

import sys
from functools import partial

from measure import cpu_seconds, hardware

FACTS = ("relax", "range", "slope_range", "rounding_error", "fan")


def intervals():
    """Centres of standard deviation 2, widths even on a logarithmic scale."""
    import torch

    from certify import Interval

    generator = torch.Generator().manual_seed(0)
    centre = 2 * torch.randn(20, 8, 375, generator=generator)
    half = 10 ** (-2.3 + 2.48 * torch.rand(20, 8, 375, generator=generator))
    return Interval(centre - half, centre + half)


def activations():
    """The closed forms, and KAFs of 8 channels: random, and ridge-fitted with a large sum of |alpha|."""
    import torch

    from certify.activations import smooth
    from models import KAF, KAFFacts

    torch.manual_seed(0)
    found = {cls.__name__: cls() for cls in (smooth.Sigmoid, smooth.Tanh, smooth.SiLU)}
    for name, init in (("KAF", "random"), ("KAF-elu", "elu")):
        found[name] = KAFFacts(KAF(8, init=init).eval(), None, 2)
    return found


def main() -> None:
    """Print the table."""
    z = intervals()
    print(hardware())
    print(f"{'':10}" + "".join(f"{name:>16}" for name in FACTS))
    for name, facts in activations().items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        seconds = [cpu_seconds(partial(getattr(facts, fact), z[:10] if fact == "fan" else z), 3) for fact in FACTS]
        print(f"{name:10}" + "".join(f"{value:16.3f}" for value in seconds), flush=True)


if __name__ == "__main__":
    main()
