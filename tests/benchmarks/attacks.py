"""Attacks beside their peers: PGD beside torchattacks, the ensemble beside pyautoattack, on the reference networks.

python tests/benchmarks/attacks.py pgd        five networks, 40 steps, at most 200 images
python tests/benchmarks/attacks.py ensemble   two networks, 200 images, 3 seeds
python tests/benchmarks/attacks.py schedule   PGD's losses, with steps of one length and with shrinking ones

The peers come from an environment of their own: PEERS=FOLDER names the folder of its packages (pip install --no-deps
--target FOLDER torchattacks==3.5.1 pyautoattack==0.2.0 requests). CPU seconds, one thread.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from measure import hardware
from shared_data import load_case

sys.path.append(os.environ.get("PEERS", "peers"))
NETS = {
    "mnist_6x100_nat": 0.026,
    "mnist_fc_256x2": 0.03,
    "mnist_cnn_a_adv": 0.3,
    "cifar_cnn_a_adv": 2 / 255,
    "cifar_resnet2b": 2 / 255,
}
IMAGES, STEPS, SEEDS, RUNS = 200, 40, (0, 1, 2), 3


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The fewest CPU seconds of three runs, and the last result."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.process_time()
        found = run()
        best = min(best, time.process_time() - start)
    return best, found


def pgd() -> None:
    """Survivors and seconds at equal steps: ours as it comes, the peer with its usual constant step."""
    import torch
    import torchattacks

    import certify

    for name, radius in NETS.items():
        net, x, y, _ = load_case(name)
        x, y = x[:IMAGES], y[:IMAGES]
        ball, spec = certify.LpBall(x, radius, clip=(0.0, 1.0)), certify.class_margins(y, 10)
        peer = torchattacks.PGD(net, eps=radius, alpha=2.5 * radius / STEPS, steps=STEPS)
        torch.manual_seed(0)
        theirs, points = timed(lambda peer=peer, x=x, y=y: peer(x, y))
        survived = int((net(points).argmax(1) == y).sum())
        line = f"{name} ({len(x)} images): torchattacks {survived} in {theirs:.2f} s"
        for steps in (STEPS, STEPS // 2):
            attack = certify.attacks.PGD(steps=steps)

            def run(attack: Any = attack, ball: Any = ball, spec: Any = spec, net: Any = net) -> Any:
                return attack(net, ball, spec, generator=torch.Generator().manual_seed(0))

            ours, found = timed(run)
            survived = int((~found.success).sum())
            line += f"; ours in {steps} steps {survived} in {ours:.2f} s, {theirs / ours:.2f} times as fast"
        print(line, flush=True)


def schedule() -> None:
    """Survivors of PGD by loss, constant steps and shrinking ones, two seeds."""
    import torch

    import certify

    for name, radius in NETS.items():
        net, x, y, _ = load_case(name)
        x, y = x[:IMAGES], y[:IMAGES]
        ball, spec = certify.LpBall(x, radius, clip=(0.0, 1.0)), certify.class_margins(y, 10)
        for words, step in (("constant", 2.5 * radius / STEPS), ("shrinking", None)):
            counts = []
            for loss in ("ce", "margin", "dlr", "ce-margin"):
                attack = certify.attacks.PGD(steps=STEPS, step=step, loss=loss)
                draws = (torch.Generator().manual_seed(seed) for seed in SEEDS[:2])
                found = "/".join(str(int((~attack(net, ball, spec, generator=g).success).sum())) for g in draws)
                counts.append(f"{loss} {found}")
            print(f"{name}, {words} steps: {', '.join(counts)}", flush=True)


def ensemble() -> None:
    """Survivors of AutoAttack's standard version and of ours; images that only one of them breaks."""
    import pyautoattack
    import torch

    import certify

    for name in ("mnist_cnn_a_adv", "cifar_cnn_a_adv"):
        net, x, y, _ = load_case(name)
        x, y, radius = x[:IMAGES], y[:IMAGES], NETS[name]
        ball, spec = certify.LpBall(x, radius, clip=(0.0, 1.0)), certify.class_margins(y, 10)
        right = net(x).argmax(1) == y
        for seed in SEEDS:
            start = time.process_time()
            peer = pyautoattack.AutoAttack(net, norm="Linf", eps=radius, version="standard", seed=seed)
            found = peer.run_standard_evaluation(x[right], y[right], batch_size=IMAGES)
            theirs = time.process_time() - start
            whole = torch.zeros_like(right)
            whole[right] = net(found if torch.is_tensor(found) else found[0]).argmax(1) == y[right]
            start = time.process_time()
            result = certify.attacks.Ensemble()(net, ball, spec, generator=torch.Generator().manual_seed(seed))
            ours = time.process_time() - start
            extra = int((~result.success & ~whole).sum()), int((result.success & whole).sum())
            print(
                f"{name}, seed {seed}: AutoAttack {int(whole.sum())} in {theirs:.0f} s; ours "
                f"{int((~result.success).sum())} in {ours:.0f} s; broken by it alone "
                f"{extra[0]}, by ours alone {extra[1]}",
                flush=True,
            )


def main() -> None:
    """Run what was asked for."""
    import torch

    torch.set_num_threads(1)
    print(hardware(), flush=True)
    for name in sys.argv[1:] or ["pgd", "ensemble"]:
        {"pgd": pgd, "ensemble": ensemble, "schedule": schedule}[name]()


if __name__ == "__main__":
    main()
