"""Lipschitz constants: known optima, deep random networks, KAFs, image networks, local constants, traps.

    python tests/benchmarks/lipschitz.py [known deep kaf cnn images local traps]

CPU seconds of one thread; a case runs once after ``import``, in this process. "Fast" is ECLipsE-Fast's closed form,
"product" the product bound with slopes inside the norms; "at least" is the largest Jacobian norm met.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable

import measure
import mpmath
import numpy as np
import torch
from exact_recursion import exact_square
from random_nets import attained, dense, random_net
from shared_data import SHARED, load_case, with_our_kafs
from torch import nn

from certify import LipschitzEstimate, LpBall, class_margins, lipschitz_constant
from certify.lipschitz.recursion import Recursion
from certify.lipschitz.sampled import JacobianAscent
from models import KAF, cnn
from models.data import load

Act = Callable[[int], nn.Module]
ASCENT = JacobianAscent(starts=8, steps=10)


def timed(model: nn.Module, method, **options) -> tuple[LipschitzEstimate, float]:
    start = time.process_time()
    found = lipschitz_constant(model, method=method, **options)
    return found, time.process_time() - start


def known() -> None:
    """Published networks against their optimum, and cvxpy + Clarabel in the same run."""
    assert SHARED is not None
    cases = json.loads((SHARED / "lipschitz" / "expected.json").read_text())["cases"]
    for method in ("lipsdp-neuron", "recursion"):  # imports the solver, warms up
        timed(dense(torch.ones(2, 2), torch.ones(1, 2)), method, input_shape=(2,))
    for name, case in cases.items():
        arrays = np.load(SHARED / "lipschitz" / case["file"])
        model = dense(*(torch.from_numpy(arrays[key]) for key in sorted(arrays.files)))
        shape = (model[0].in_features,)
        best, seconds = timed(model, "recursion", input_shape=shape)
        fast, _ = timed(model, "eclipse-fast", input_shape=shape)
        reference = case.get("exact", case.get("LipSDP_neuron_Clarabel", case.get("best_known_upper")))
        ratio = best.value / fast.value
        line = f"{name:22} {best.value:.7f} in {seconds:.2f} s; reference {reference:.7f}; {ratio:.3f} of Fast"
        if name.startswith("lipsdp"):
            solver, spent = timed(model, "lipsdp-neuron", input_shape=shape)
            line += f"; Clarabel's multipliers {solver.value:.7f} in {spent:.1f} s ({spent / seconds:.0f} x)"
        print(line, flush=True)


def deep() -> None:
    """Random MLPs, N(0, 1/width) weights, seed 0; three of them re-evaluated in 60 digits."""
    for layers, width in ((16, 16), (64, 16), (16, 64), (64, 64)):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(width, width, generator=generator).double() / math.sqrt(width) for _ in range(layers)]
        weights.append(torch.randn(1, width, generator=generator).double() / math.sqrt(width))
        model = dense(*weights)
        best, seconds = timed(model, "recursion", input_shape=(width,))
        fast, _ = timed(model, "eclipse-fast", input_shape=(width,))
        ratio = best.value / fast.value
        line = (
            f"{layers} layers of {width}: {best.value:.4g} in {seconds:.1f} s, Fast {fast.value:.4g}, ratio {ratio:.2g}"
        )
        if (layers, width) != (64, 64):
            with mpmath.workdps(60):
                multipliers = [rows[0] for rows in best.multipliers.values()]
                exact = mpmath.sqrt(exact_square([w.tolist() for w in weights], (0.0, 1.0), multipliers))
                line += f"; 60 digits: certified, {float(best.value / exact - 1):.1e} above them"
                assert exact <= best.value
        print(line, flush=True)


def kaf_net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model, images, labels, _ = load_case("mnist_kaf_2x32")
    return with_our_kafs(model).eval(), images, labels


def kaf() -> None:
    """mnist_kaf_2x32, on the whole space."""
    model, images, _ = kaf_net()
    shape = tuple(images.shape[1:])
    for method in ("recursion", "lipsdp-neuron", "eclipse-fast", "product", ASCENT):
        found, seconds = timed(model, method, input_shape=shape)
        print(f"mnist_kaf_2x32 {found.method:14} {found.side} {found.value:.5f} in {seconds:.2f} s", flush=True)


def trained(activation: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A CNN on 8 x 8 digits: 30 epochs of Adam at 3e-3, batches of 64, seed 0."""
    torch.manual_seed(0)
    data = load("digits")
    model = cnn((1, 8, 8), 10, activation, width=8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for index in torch.randperm(len(data.train_x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train_x[index]), data.train_y[index]).backward()
            optimizer.step()
    return model.eval(), (1, 8, 8)


def cnns() -> None:
    """CNNs of the package, trained by the recipe above."""
    for activation in ("relu", "kaf"):
        model, shape = trained(activation)
        report(f"cnn {activation}, digits", model, shape, Recursion())


class Block(nn.Module):
    """A residual block of a CIFAR ResNet, activation after the sum."""

    def __init__(self, before: int, after: int, stride: int, act: Act) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.act1, self.act2, self.short = act(after), act(after), nn.Sequential()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + self.short(x))


def resnet20(act: Act) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), act(16)]
    before = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(3):
            layers.append(Block(before, width, stride if i == 0 else 1, act))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vgg(act: Act, channels: int = 3, side: int = 32) -> nn.Module:
    """3 blocks of two convolutions with batch normalisation and a max-pool; a dense layer of 128."""
    layers: list[nn.Module] = []
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.BatchNorm2d(width), act(width)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (side // 8) ** 2, 128), act(128), nn.Linear(128, 10))


def settled(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Random weights; batch normalisation saw 20 batches of uniform noise."""
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(64, *shape))
    return model.eval()


def images() -> None:
    """VGG-like and ResNet20, ReLU and KAF (starting as ELU), CIFAR- and MNIST-shaped."""
    for name, build, shape in (
        ("VGG-like", vgg, (3, 32, 32)),
        ("VGG-like", lambda act: vgg(act, 1, 28), (1, 28, 28)),
        ("ResNet20", resnet20, (3, 32, 32)),
    ):
        for kind, act in (("relu", lambda c: nn.ReLU()), ("kaf", lambda c: KAF(c, init="elu"))):
            torch.manual_seed(0)
            report(f"{name} {kind} {shape}", settled(build(act), shape), shape, Recursion(time_limit=40))


def report(name: str, model: nn.Module, shape: tuple[int, ...], method: Recursion) -> None:
    start = time.monotonic()
    best, seconds = timed(model, method, input_shape=shape)
    wall = time.monotonic() - start
    product, spent = timed(model, "product", input_shape=shape)
    fast, _ = timed(model, "eclipse-fast", input_shape=shape)
    lower, _ = timed(model, JacobianAscent(starts=2, steps=4), input_shape=shape)
    assert lower.value <= best.value
    print(
        f"{name}: {best.value:.5g} in {seconds:.1f} s CPU, {wall:.1f} s wall; product {product.value:.5g} in "
        f"{spent:.1f} s (ratio {best.value / product.value:.3g}), Fast {fast.value:.5g}, at least {lower.value:.5g}",
        flush=True,
    )


def local() -> None:
    """Constants of the nine margins of mnist_kaf_2x32 and mnist_fc_256x2 on 20 balls."""
    model, x, y = kaf_net()
    source = load_case("mnist_fc_256x2")
    for name, net, points, labels, count in (
        ("kaf_2x32", model, x, y, 20),
        ("fc_256x2", source[0], source[1], source[2], 2),
    ):
        spec = class_margins(labels[:count], 10)
        for p, radius in ((math.inf, 0.02), (2, 0.3)):
            domain = LpBall(points[:count], radius, p=p, clip=(0.0, 1.0))
            whole, _ = timed(net, "recursion", p=p, spec=spec, input_shape=tuple(points.shape[1:]))
            line = f"{name} {count} balls, p = {p:g}, radius {radius}: mean over margins: global {mean(whole):.4g}"
            values = {}
            for method in ("recursion", "interval-jacobian", "crown-jacobian", "product", "tightest", ASCENT):
                found, seconds = timed(net, method, p=p, domain=domain, spec=spec)
                values[found.method] = np.array(found.rows)
                line += f", {found.method} {mean(found):.4g} ({seconds:.1f} s)"
            least, above = values["tightest"], np.array(whole.rows)
            met, interval = values["jacobian"], values["interval-jacobian"]
            counts = {
                "tightest above global": least > above,
                "tightest above interval-jacobian": least > interval,
                "tightest below the lower bound": least < met,
                "recursion not below interval-jacobian": values["recursion"] >= interval,
            }
            said = ", ".join(f"{claim} {int(where.sum())}" for claim, where in counts.items())
            print(f"{line}\n  of {least.size} margins: {said}", flush=True)


def mean(found: LipschitzEstimate) -> float:
    return float(np.mean(found.rows))


def traps() -> None:
    """2,000 random small networks: no attained ratio above any "upper"."""
    worst, wrong, total = 0.0, 0, 0
    methods = (Recursion(steps=6, time_limit=5), "eclipse-fast", "product", "crown-jacobian", "interval-jacobian")
    for seed in range(2000):
        model, shape = random_net(seed)
        lower = attained(copy.deepcopy(model), shape, None)
        for method in methods:
            found = lipschitz_constant(model, method=method, input_shape=shape).value
            wrong += not lower <= found * (1 + 1e-12)
            worst, total = max(worst, lower / found if found else 0.0), total + 1
    print(
        f"{total} upper bounds of 2000 random networks: {wrong} below an attained ratio; largest quotient {worst:.15f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"known": known, "deep": deep, "kaf": kaf, "cnn": cnns, "images": images, "local": local, "traps": traps}
    print(measure.hardware())
    for part in sys.argv[1:] or parts:
        parts[part]()
