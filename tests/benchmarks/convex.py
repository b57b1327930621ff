"""What the convex certificates gain over lines, and what they cost: margins on digits, all on CROWN's intervals.

    python tests/benchmarks/convex.py                    the table
    python tests/benchmarks/convex.py ACTIVATION METHOD  one case, JSON

Networks 64-32-32-10, trained here from one seed for 30 epochs; 20 test images, linf radius .05 in [0, 1], real
arithmetic. The margin of a sample is the smallest of its 9 rows; "mean" is over samples, "proved" counts margins > 0,
PGD is what an attack leaves: no certificate can be above it. CPU seconds are those of one run over all 180 rows
after tracing. About 6 CPU minutes on one thread, most of them for the semidefinite programs of smooth activations.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from measure import fresh, hardware

ACTIVATIONS = ("relu", "tanh", "kaf")
METHODS = ("crown", "alpha-crown", "wong-kolter", "lp", "sdp", "lipschitz", "pgd")
SAMPLES, RADIUS = 20, 0.05


def case(activation: str, name: str) -> dict[str, Any]:
    """Bound, or attack, all rows of the samples of one network."""
    import math

    import torch

    import certify
    from certify.bounding import prepare
    from certify.convex.wong_kolter import WongKolter
    from certify.propagate.methods import BoundMethod, resolve_method
    from certify.rounding import Real
    from models import mlp
    from models.data import load
    from models.training import Engine, TrainConfig, train

    torch.set_num_threads(1)
    data = load("digits")
    torch.manual_seed(0)
    model = mlp((64, 32, 32, 10), activation)
    train(model, data, TrainConfig(epochs=30, engine=Engine(device="cpu")))
    model.eval()
    x, labels = data.test_x[:SAMPLES], data.test_y[:SAMPLES]
    domain, spec = certify.LpBall(x, RADIUS, clip=(0.0, 1.0)), certify.class_margins(labels, 10)
    graph = prepare(model, domain)
    methods: dict[str, str | BoundMethod] = {
        "wong-kolter": WongKolter(intervals="crown"),
        "alpha-crown": certify.AlphaCROWN(steps=50, intermediate="fixed", goal=math.inf),
    }
    start = time.process_time()
    if name == "pgd":
        attack = certify.attacks.PGD(steps=100, restarts=5)
        margin = attack(model, domain, spec, generator=torch.Generator().manual_seed(0)).margin.double().amin(1)
    else:
        with torch.no_grad():
            margin = resolve_method(methods.get(name, name)).bound(graph, domain, spec, Real()).amin(1)
    seconds = time.process_time() - start
    return {"seconds": seconds, "mean": float(margin.mean()), "proved": int((margin > 0).sum())}


def main() -> None:
    """Print the table."""
    print(hardware())
    print(f"{'network':8} {'method':12} {'mean':>9} {'proved':>7} {'CPU s':>9}")
    for activation in ACTIVATIONS:
        for name in METHODS:
            row = fresh("convex.py", activation, name)
            if "error" in row:
                print(f"{activation:8} {name:12} {row['error']}", flush=True)
                continue
            print(f"{activation:8} {name:12} {row['mean']:9.4f} {row['proved']:7} {row['seconds']:9.3f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(case(*sys.argv[1:])))
    else:
        main()
