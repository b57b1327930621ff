"""Cost of a KAF, forward and backward, against ReLU on one tensor [128, 64, 32, 32] float32 (D = 20).

python tests/benchmarks/kaf_cost.py            the table
python tests/benchmarks/kaf_cost.py NAME       one case, JSON
"""

from __future__ import annotations

import json
import sys

from measure import cpu_seconds, fresh, hardware, peak_mb

CASES = ("relu", "silu", "kaf", "kaf-free")


def case(name: str) -> dict[str, float]:
    """Time and memory of one activation."""
    import torch

    from models import KAF

    modules = {
        "relu": torch.nn.ReLU(),
        "silu": torch.nn.SiLU(),
        "kaf": KAF(64),
        "kaf-free": KAF(64, trainable=True),
    }
    x = torch.randn(128, 64, 32, 32, requires_grad=True)
    upstream = torch.randn_like(x)

    def run():
        x.grad = None
        modules[name](x).backward(upstream)

    before = peak_mb()
    run()
    return {"tensors": (peak_mb() - before) / (x.numel() * 4 / 2**20), "seconds": cpu_seconds(run, 3)}


def main() -> None:
    """Print the table."""
    print(hardware())
    print(f"{'activation':12} {'CPU s':>8} {'x ReLU':>8} {'peak memory, tensors':>22}")
    base = None
    for name in CASES:
        found = fresh("kaf_cost.py", name)
        base = base or found["seconds"]
        print(f"{name:12} {found['seconds']:8.3f} {found['seconds'] / base:8.1f} {found['tensors']:22.1f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(case(sys.argv[1])))
    else:
        main()
