"""alpha-CROWN on the reference networks, ours beside auto_LiRPA 0.3 in one run, 20 steps, real arithmetic.

    python tests/benchmarks/alpha.py                 the tables
    python tests/benchmarks/alpha.py NET TOOL COUNT  one case, JSON

Every row is optimised to the end (goal = infinity); "decide" is the default, whose rows stop once they are proved.
First table: as many images as auto_LiRPA bears (10 of dense nets, else 1 or 2), both tools on the same ones. Second
table: ours on 10 images beside the published margins. Trace time included; cases over 3 s are run once, without a
warm-up. Needs ../shared/data.
"""

from __future__ import annotations

import json
import math
import sys
import time

from measure import cpu_seconds, fresh, hardware, peak_mb
from shared_data import RELU_NETS, SHARED, load_case, reference

SHARED_COUNT = {"mnist_cnn_a_adv": 2, "cifar_cnn_a_adv": 2, "cifar_resnet2b": 1}


def case(name: str, tool: str, count: int) -> dict[str, object]:
    """Run one net with one tool."""
    import torch

    import certify
    from certify.oracle.auto_lirpa import margins

    model, images, labels, spec = load_case(name)
    known = reference()["nets"][name]
    entry = known["alpha-CROWN"] if "lb" in known.get("alpha-CROWN", {}) else known["CROWN"]
    index = entry["idx"][:count]
    domain = certify.LpBall(images[index], spec["eps_raw"], clip=(0.0, 1.0))
    claim = certify.class_margins(labels[index], 10)

    def run() -> torch.Tensor:
        if tool == "auto-lirpa":
            return margins(model, domain, claim, "alpha-crown", steps=20)
        method = certify.AlphaCROWN(steps=20, goal=0.0 if tool == "decide" else math.inf)
        arithmetic = "float" if tool == "float" else "real"
        return certify.prove(model, domain, claim, method, arithmetic=arithmetic).margin.lower

    before, start = peak_mb(), time.process_time()
    lower = run()
    first, memory = time.process_time() - start, peak_mb() - before
    return {
        "seconds": cpu_seconds(run) if first < 3 else first,
        "memory": memory,
        "verified": int((lower > 0).all(1).sum()),
        "mean": float(lower.double().mean()),
        "reference": float(torch.tensor(entry["lb"][:count]).double().mean()),
    }


def main() -> None:
    """Print both tables."""
    if SHARED is None:
        print("needs the reference networks in ../shared/data")
        return
    print(hardware())
    times, memory = [], []
    print(f"{'net':26} {'tool':12} {'images':>6} {'CPU s':>8} {'MB':>7} {'proved':>7} {'mean':>10} {'reference':>10}")
    for name in RELU_NETS:
        count = SHARED_COUNT.get(name, 10)
        found = {tool: _line(name, tool, count) for tool in ("ours", "auto-lirpa")}
        if not any("error" in row for row in found.values()):
            times.append(found["ours"]["seconds"] / found["auto-lirpa"]["seconds"])
            memory.append(max(found["ours"]["memory"], 1) / found["auto-lirpa"]["memory"])
    if times:
        print(f"geometric means, ours / auto-lirpa: time {_mean(times):.3f}, memory {_mean(memory):.3f}")
    for name in (*RELU_NETS, "cifar_conv_small_sigmoid"):
        for tool in ("ours", "float", "decide"):
            _line(name, tool, 10)


def _mean(ratios: list[float]) -> float:
    return math.prod(ratios) ** (1 / len(ratios))


def _line(name: str, tool: str, count: int) -> dict[str, float]:
    found = fresh("alpha.py", name, tool, str(count))
    if "error" in found:
        print(f"{name:26} {tool:12} {count:6} {found['error']}", flush=True)
    else:
        print(
            f"{name:26} {tool:12} {count:6} {found['seconds']:8.2f} {found['memory']:7.0f} {found['verified']:7} "
            f"{found['mean']:10.4f} {found['reference']:10.4f}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(case(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        main()
