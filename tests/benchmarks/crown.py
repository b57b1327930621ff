"""CROWN on the reference networks, ours beside auto_LiRPA 0.3 in one run: time, memory, margins, verified counts.

    python tests/benchmarks/crown.py            the table
    python tests/benchmarks/crown.py NET TOOL   one case, JSON

20 images (the first correctly classified ones) of each net; trace time included. "below published" is the smallest
(margin - published) / (1 + |published|). Needs ../shared/data.
"""

from __future__ import annotations

import json
import math
import sys

from measure import cpu_seconds, fresh, hardware, peak_mb
from shared_data import RELU_NETS, SHARED, load_case, reference

TOOLS = ("ours, real", "ours, float", "auto-lirpa")


def case(name: str, tool: str) -> dict[str, object]:
    """Run one net with one tool."""
    import torch

    import certify
    from certify.oracle.auto_lirpa import margins

    model, images, labels, spec = load_case(name)
    entry = reference()["nets"][name]["CROWN"]
    index, want = entry["idx"][:20], torch.tensor(entry["lb"][:20], dtype=torch.float64)
    domain = certify.LpBall(images[index], spec["eps_raw"], clip=(0.0, 1.0))
    claim = certify.class_margins(labels[index], 10)

    def run():
        if tool == "auto-lirpa":
            return margins(model, domain, claim, "crown")
        kind = tool.removeprefix("ours, ")
        return certify.prove(model, domain, claim, "crown", arithmetic=kind).margin.lower

    before = peak_mb()
    lower = run()
    memory = peak_mb() - before
    repeats = 3 if name == "cifar_resnet2b" else 5
    return {
        "seconds": cpu_seconds(run, repeats),
        "memory": memory,
        "verified": int((lower > 0).all(1).sum()),
        "mean": float(lower.double().mean()),
        "worst": float(((lower.double() - want) / (1 + want.abs())).min()),
    }


def main() -> None:
    """Print the table."""
    if SHARED is None:
        print("needs the reference networks in ../shared/data")
        return
    print(hardware())
    print(f"{'net':26} {'tool':12} {'CPU s':>8} {'MB':>7} {'verified':>9} {'mean margin':>12} {'below published':>16}")
    ratios = []
    for name in (*RELU_NETS, "cifar_conv_small_sigmoid"):
        times = {}
        for tool in TOOLS:
            found = fresh("crown.py", name, tool)
            if "error" in found:
                print(f"{name:26} {tool:12} {found['error']}")
                continue
            times[tool] = found["seconds"]
            print(
                f"{name:26} {tool:12} {found['seconds']:8.2f} {found['memory']:7.0f} {found['verified']:>6}/20 "
                f"{found['mean']:12.4f} {found['worst']:16.1e}",
                flush=True,
            )
        if len(times) == len(TOOLS):
            ratios.append(times["ours, real"] / times["auto-lirpa"])
    if ratios:
        print(
            f"geometric mean of the time ratios, ours (real) / auto-lirpa: {math.prod(ratios) ** (1 / len(ratios)):.2f}"
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(case(*sys.argv[1:])))
    else:
        main()
