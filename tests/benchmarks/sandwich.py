"""Proofs and attacks side by side on every reference network: python tests/benchmarks/sandwich.py [IMAGES] [NET ...].

Accuracies clean, after PGD-40-5, after the whole ensemble, certified by alpha-CROWN or CROWN; an alarm would stop it.
"""

from __future__ import annotations

import sys
import time
from fractions import Fraction

from measure import hardware
from shared_data import load_case, with_our_kafs

RADII = {
    "mnist_6x100_nat": Fraction(13, 500),
    "mnist_cnn_a_adv": Fraction(3, 10),
    "mnist_fc_256x2": Fraction(3, 100),
    "cifar_cnn_a_adv": Fraction(2, 255),
    "cifar_conv_small_sigmoid": Fraction(2, 255),
    "cifar_resnet2b": Fraction(2, 255),
    "mnist_kaf_2x32": Fraction(1, 100),
}


def main() -> None:
    """Print a line per network and radius."""
    import torch

    from analysis.protocol import Protocol
    from analysis.sandwich import sandwich
    from certify.attacks import PGD

    torch.set_num_threads(1)
    print(hardware(), flush=True)
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for name in sys.argv[2:] or RADII:
        net, x, y, _ = load_case(name)
        model, radius = with_our_kafs(net), RADII[name]
        asked = Protocol(radii=(radius / 2, radius), methods=("crown",), attack=PGD(restarts=5))
        start = time.process_time()
        found = sandwich(name, model, x[:images], y[:images], asked, index=torch.arange(images))
        spent = time.process_time() - start
        for place, at in enumerate((radius / 2, radius)):
            counts = " >= ".join(str(rate.count) for rate in found.layers(place))
            print(f"{name} at {at}: clean >= PGD >= all >= certified: {counts} of {images}")
        ratios = sorted(pair.certified / pair.adversarial for pair in found.pairs if pair.adversarial)
        median = ratios[len(ratios) // 2] if ratios else float("nan")
        print(
            f"  certified radius / nearest adversarial, median {median:.3f}, largest {max(ratios):.3f}; {spent:.0f} s"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
