"""Cost of a KAF, forward and backward, against ReLU on one tensor [128, 64, 32, 32] float32 (D = 20).

python tests/benchmarks/kaf_cost.py            the table
python tests/benchmarks/kaf_cost.py NAME       one case, JSON
"""

from __future__ import annotations

import json
import sys

from measure import cpu_seconds, fresh, growth_mb, hardware

CASES = ("relu", "silu", "kaf", "kaf-fused", "kaf-free")


def case(name: str) -> dict[str, float]:
    """Time and memory of one activation."""
    import torch

    from models import KAF, fuse

    torch.set_num_threads(1)
    torch.manual_seed(0)
    modules = {
        "relu": torch.nn.ReLU(),
        "silu": torch.nn.SiLU(),
        "kaf": KAF(64),
        "kaf-fused": fuse(KAF(64)),
        "kaf-free": KAF(64, trainable=True),
    }
    x = torch.randn(128, 64, 32, 32, requires_grad=True)
    upstream = torch.randn_like(x)

    def run():
        x.grad = None
        modules[name](x).backward(upstream)

    small = x.detach()[:2].requires_grad_()  # compiles, where that is asked for
    modules[name](small).sum().backward()
    tensors = growth_mb(run) / (x.numel() * 4 / 2**20)
    return {"tensors": tensors, "seconds": cpu_seconds(run, 5), "error": error(modules[name])}


def error(module) -> float:
    """Return the largest |float32 - float64| / sum|alpha| of a KAF, near and far, random and one term at a time."""
    import torch

    from models.gaussian import gaussian_sum

    if not hasattr(module, "gaussian"):
        return 0.0
    near = torch.linspace(-12, 12, 40_001)
    x = torch.cat([near, torch.tensor([1e2, -1e4, 1e9, -1e30, 1e38])])[:, None].expand(-1, 64)
    worst = 0.0
    for alpha in (module.alpha.detach().clone(), torch.eye(64, 20), 1e2 * torch.randn(64, 20)):
        with torch.no_grad():
            module.alpha.copy_(alpha)
            exact = gaussian_sum(x.double(), *(value.double() for value in module.gaussian()))
            mass = alpha.double().abs().sum(1).clamp(min=1e-300)
            worst = max(worst, float(((module(x).double() - exact).abs() / mass)[:, mass > 1e-9].max()))
    return worst


def main() -> None:
    """Print the table."""
    print(hardware())
    print(f"{'activation':15} {'CPU s':>8} {'x ReLU':>8} {'peak memory, tensors':>22} {'error / sum|alpha|':>20}")
    base = None
    for name in CASES:
        found = fresh("kaf_cost.py", name)
        base = base or found["seconds"]
        ratio = found["seconds"] / base
        print(
            f"{name:15} {found['seconds']:8.3f} {ratio:8.1f} {found['tensors']:22.1f} {found['error']:20.1e}",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(case(sys.argv[1])))
    else:
        main()
