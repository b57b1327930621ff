"""A convolutional KAF net against its ReLU twin, trained alike: CROWN and alpha-CROWN time, and what is proved.

    python tests/benchmarks/twins.py            the table
    python tests/benchmarks/twins.py ACTIVATION one net, JSON

Two strided convolutions of 8 and 16 channels and two dense layers on 5,000 MNIST images, fast adversarial training at
.1, 4 epochs, seed 0; 20 correctly classified test images at three radii. The fewer of the twin's neurons are unstable,
the less it asks for, while every neuron of a KAF is curved: the ratio falls with the radius. Needs ../shared/data.
"""

from __future__ import annotations

import json
import sys

from measure import cpu_seconds, fresh, hardware
from shared_data import SHARED

RADII = (0.02, 0.05, 0.1)
METHODS = ("crown", "alpha-crown")


def case(activation: str) -> dict[str, object]:
    """Train one net and bound it."""
    from dataclasses import replace

    import torch

    import certify
    from models import cnn
    from models.data import load, subset
    from models.training import Engine, Fast, Optimizer, TrainConfig, train

    torch.set_num_threads(1)
    assert SHARED is not None
    data = load("mnist", data_dir=SHARED / "torchvision")
    x, y, _ = subset(data.train_x, data.train_y, 5000, seed=0)
    data = replace(data, train_x=x, train_y=y, val_x=data.val_x[:500], val_y=data.val_y[:500])
    torch.manual_seed(0)
    model = cnn(data.input_shape, 10, activation, width=8)
    config = TrainConfig(
        epochs=4, recipe=Fast(radius=0.1), optimizer=Optimizer(kaf_lr=0.2), engine=Engine(device="cpu")
    )
    train(model, data, config)
    x, y = data.test_x[:200], data.test_y[:200]
    index = (model(x).argmax(1) == y).nonzero()[:20, 0]
    spec = certify.class_margins(y[index], 10)
    found: dict[str, object] = {"clean": float((model(x).argmax(1) == y).float().mean())}
    attack = certify.attacks.PGD(steps=40, restarts=3)
    for radius in RADII:
        domain = certify.LpBall(x[index], radius, clip=(0.0, 1.0))
        broken = attack(model, domain, spec, generator=torch.Generator().manual_seed(0)).success
        found[f"{radius} attacked"] = int((~broken).sum())
        for method in METHODS:

            def run(method: str = method, domain: certify.LpBall = domain) -> certify.Certificate:
                return certify.prove(model, domain, spec, method, arithmetic="real")

            found[f"{radius} {method} proved"] = int(run().holds.sum())
            found[f"{radius} {method} s"] = cpu_seconds(run, 5 if method == "crown" else 1)
    return found


def main() -> None:
    """Print the table."""
    if SHARED is None:
        print("needs MNIST in ../shared/data")
        return
    print(hardware())
    found = {name: fresh("twins.py", name) for name in ("relu", "kaf-elu")}
    for name, row in found.items():
        print(name, f"clean {row['clean']:.3f}")
        for radius in RADII:
            parts = (f"{m} proves {row[f'{radius} {m} proved']} in {row[f'{radius} {m} s']:.2f} s" for m in METHODS)
            print(f"  radius {radius}: {row[f'{radius} attacked']} of 20 survive PGD;", ", ".join(parts))
    for radius in RADII:
        ratio = found["kaf-elu"][f"{radius} crown s"] / found["relu"][f"{radius} crown s"]
        print(f"CROWN time at radius {radius}, KAF / ReLU: {ratio:.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(case(sys.argv[1])))
    else:
        main()
