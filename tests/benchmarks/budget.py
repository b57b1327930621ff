"""A claim of 40 rows on cifar_resnet2b within 500 MB: peak memory above the loaded net, and equal verdicts.

    python tests/benchmarks/budget.py                the table
    python tests/benchmarks/budget.py METHOD BUDGET  one case, JSON; BUDGET "none" for the device's default

10 images; the rows are the nine margins and 31 of their sums with fixed random weights. Needs ../shared/data.
"""

from __future__ import annotations

import json
import sys

from measure import fresh, hardware, peak_mb
from shared_data import SHARED, load_case, reference


def case(method: str, budget: str) -> dict[str, object]:
    """Prove the claim under one budget."""
    import torch

    import certify

    model, images, labels, _ = load_case("cifar_resnet2b")
    index = reference()["nets"]["cifar_resnet2b"]["CROWN"]["idx"][:10]
    margins = certify.class_margins(labels[index], 10).C
    weights = torch.rand(31, 9, generator=torch.Generator().manual_seed(0))
    C = torch.cat([margins, weights / weights.sum(1, keepdim=True) @ margins], 1)
    claim, domain = certify.Spec(C, C.new_zeros(C.shape[:2])), certify.LpBall(images[index], 1 / 255, clip=(0.0, 1.0))
    before = peak_mb()
    with certify.options(memory=None if budget == "none" else budget):
        found = certify.prove(model, domain, claim, method)
    return {
        "memory": peak_mb() - before,
        "verdicts": [verdict.name for verdict in found.verdicts],
        "lower": found.margin.lower.flatten().tolist(),
    }


def main() -> None:
    """Print the table."""
    if SHARED is None:
        print("needs the reference networks in ../shared/data")
        return
    print(hardware())
    for method in ("crown", "alpha-crown"):
        found = {budget: fresh("budget.py", method, budget) for budget in ("none", "500MB", "20MB")}
        for budget, row in found.items():
            same = row["verdicts"] == found["none"]["verdicts"]
            gap = max(abs(a - b) for a, b in zip(row["lower"], found["none"]["lower"], strict=True))
            proved = row["verdicts"].count("HOLDS")
            print(f"{method:12} budget {budget:6} {row['memory']:6.0f} MB, {proved} of 10 proved, "
                  f"{'the same verdicts' if same else 'OTHER VERDICTS'}, margins within {gap:.1e}")  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(case(*sys.argv[1:])))
    else:
        main()
