"""A convolutional KAF net against its ReLU twin, trained alike: CROWN and alpha-CROWN time, and what is proved.

    python tests/benchmarks/twins.py            the table
    python tests/benchmarks/twins.py ACTIVATION one net, JSON

Two strided convolutions of 8 and 16 channels and two dense layers on 5,000 MNIST images, fast adversarial training at
.1, 4 epochs, seed 0; 20 correctly classified test images at radius .02. Needs ../shared/data.
"""

from __future__ import annotations

import json
import sys

from measure import cpu_seconds, fresh, hardware, peak_mb
from shared_data import SHARED

RADIUS = 0.02


def case(activation: str) -> dict[str, object]:
    """Train one net and bound it."""
    from dataclasses import replace

    import torch

    import certify
    from models import cnn
    from models.data import load, subset
    from models.recipe import Recipe
    from models.training import train

    torch.set_num_threads(1)
    assert SHARED is not None
    data = load("mnist", data_dir=SHARED / "torchvision")
    x, y, _ = subset(data.train_x, data.train_y, 5000, seed=0)
    data = replace(data, train_x=x, train_y=y, val_x=data.val_x[:500], val_y=data.val_y[:500])
    torch.manual_seed(0)
    model = cnn(data.input_shape, 10, activation, width=8)
    train(model, data, Recipe(epochs=4, method="fast", radius=0.1, kaf_lr=0.2, device="cpu"))
    x, y = data.test_x[:200], data.test_y[:200]
    index = (model(x).argmax(1) == y).nonzero()[:20, 0]
    domain, spec = certify.LpBall(x[index], RADIUS, clip=(0.0, 1.0)), certify.class_margins(y[index], 10)
    found: dict[str, object] = {"clean": float((model(x).argmax(1) == y).float().mean())}
    attack = certify.attacks.PGD(steps=40, restarts=3)(model, domain, spec, generator=torch.Generator().manual_seed(0))
    found["attacked"] = int((~attack.success).sum())
    for method in ("crown", "alpha-crown"):
        before = peak_mb()

        def run(method: str = method) -> certify.Certificate:
            return certify.prove(model, domain, spec, method, arithmetic="real")

        found[f"{method} proved"] = int(run().holds.sum())
        found[f"{method} MB"] = peak_mb() - before
        found[f"{method} s"] = cpu_seconds(run, 5 if method == "crown" else 1)
    return found


def main() -> None:
    """Print the table."""
    if SHARED is None:
        print("needs MNIST in ../shared/data")
        return
    print(hardware())
    found = {name: fresh("twins.py", name) for name in ("relu", "kaf-elu")}
    for name, row in found.items():
        print(
            name,
            *(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()),
        )
    print(f"CROWN time, KAF / ReLU: {found['kaf-elu']['crown s'] / found['relu']['crown s']:.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(case(sys.argv[1])))
    else:
        main()
