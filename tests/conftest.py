"""Shape annotations run in the tests: those of the engine's inner modules are checked by beartype.

The public entrances are left out: their own errors are tested, and the checker would be faster.
"""

from jaxtyping import install_import_hook

INNER = ["activations", "enclosures", "ops", "propagate", "lipschitz"]
_hook = install_import_hook([f"certify.{name}" for name in INNER] + ["models.kaf_facts"], "shapecheck.check")

import pytest  # noqa: E402 - the hook must stand before the packages are imported
import torch  # noqa: E402

import certify  # noqa: E402, F401
import models  # noqa: E402, F401

_hook.uninstall()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
