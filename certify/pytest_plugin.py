"""A pytest plugin: robustness as a test.

In conftest.py: ``pytest_plugins = ["certify.pytest_plugin"]``. Tests then ask for the fixture ``assert_certified``, or
import the function of that name from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from certify.attacks import PGD
from certify.attacks.base import evaluating
from certify.errors import InvalidInput
from certify.propagate.methods import BoundMethod
from certify.results import Certificate, Verdict
from certify.sets import Clip, LpBall, Radius
from certify.specs import class_margins
from certify.verify import prove

#: Samples that a failure lists, at most.
LISTED = 5


def assert_certified(
    model: nn.Module,
    x: Tensor,
    label: int | Sequence[int] | Tensor,
    radius: Radius,
    *,
    p: float = torch.inf,
    clip: Clip | None = (0.0, 1.0),
    method: str | BoundMethod = "alpha-crown",
) -> None:
    """Pass iff ``prove`` says HOLDS, in float arithmetic, for every sample: nothing within ``radius`` changes a label.

    ``x`` is one sample [*shape] with an integer ``label``, or a batch [batch, *shape] with labels [batch]. A failure
    says which samples are violated (PGD found a counterexample) or unknown, and by how much. Raises what ``prove``
    raises for models and sets that cannot be bounded.
    """
    __tracebackhide__ = True
    given = torch.as_tensor(label, device=x.device)
    batch, labels = (x[None] if given.ndim == 0 else x), given.reshape(-1)
    spec = class_margins(labels, _classes(model, batch), batch.dtype)
    with torch.random.fork_rng(devices=[]):  # a test's own random numbers stay what they are
        torch.default_generator.manual_seed(0)
        found = prove(model, LpBall(batch, radius, p, clip), spec, method, attack=PGD(restarts=3))
    if not bool(found.holds.all()):
        pytest.fail(_words(found, labels, radius), pytrace=False)


def _classes(model: nn.Module, x: Tensor) -> int:
    """The number of the model's outputs."""
    with evaluating(model), torch.no_grad():
        outputs = model(x[:1])
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InvalidInput(f"a model with outputs {shape}", "logits [batch, classes]", "a wrapper that returns logits")
    return outputs.shape[1]


@pytest.fixture(name="assert_certified", scope="session")
def _assert_certified() -> Callable[..., None]:
    """The function ``assert_certified``."""
    return assert_certified


def _words(found: Certificate, labels: Tensor, radius: Radius) -> str:
    """Which samples are not proved, and what is known about them."""
    failed = [i for i, verdict in enumerate(found.verdicts) if verdict is not Verdict.HOLDS]
    lines = [f"{len(failed)} of {len(found.verdicts)} samples are not certified at radius {radius} by {found.method}:"]
    for i in failed[:LISTED]:
        verdict, lower = found.verdicts[i], float(found.margin.lower[i].amin())
        known = f"the margin's bound is {lower:.4g}" if verdict is Verdict.UNKNOWN else "a counterexample was found"
        lines.append(f"  sample {i} (label {int(labels[i])}): {verdict.value}, {known}")
    if len(failed) > LISTED:
        lines.append(f"  and {len(failed) - LISTED} more")
    return "\n".join(lines)
