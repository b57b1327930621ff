"""``certify ops``: what is supported, from the registries."""

from __future__ import annotations

from typing import Any

from cli.options import OutputOptions


def ops(output: OutputOptions) -> None:
    """List what is supported."""
    import certify  # noqa: F401  # fills the registries
    import models  # noqa: F401  # registers KAF
    from certify import Activation, registry
    from cli import output as out
    from cli.theme import table
    from models import activations, data, networks
    from models.training import RECIPES

    console = out.console(output.json)
    known: dict[Any, Any] = {}
    refused: dict[Any, Any] = {}
    for target, facts in registry.ACTIVATIONS.items():
        (known if isinstance(facts, type) and issubclass(facts, Activation) else refused)[target] = facts
    found = {
        "operations": _names(registry.OPS),
        "activations": _names(known),
        "refused, with the reason": _names(refused),
        "bound methods": sorted(registry.METHODS),
        "attacks": sorted(registry.ATTACKS),
        "Lipschitz estimators": sorted(registry.ESTIMATORS),
        "networks to train": sorted(networks.NETWORKS),
        "activations to train": sorted(activations.ACTIVATIONS),
        "training recipes": sorted(RECIPES),
        "data sets": ["digits", *data.TORCHVISION, "npz:TEST", "npz:TRAIN,TEST"],
    }
    made = table("What is supported", "", "names")
    made.columns[1].justify, made.columns[1].overflow = "left", "fold"
    for kind, names in found.items():
        made.add_row(kind, ", ".join(names), end_section=True)
    console.print(made)
    console.print("Register your own with @certify.register_op, @certify.register_activation, ... (README).")
    out.publish(output.json, "ops", {}, found)


def _names(table: dict) -> list[str]:
    """Names of modules as nn.Linear, of functions and tensor methods as they are called; each once."""
    found = set()
    for target in table:
        if isinstance(target, type):
            home = "nn." if target.__module__.startswith("torch.nn") else f"{target.__module__.partition('.')[0]}."
            found.add(home + target.__name__)
        elif not isinstance(target, str):
            found.add(getattr(target, "__name__", str(target)))
        else:
            found.add(f"x.{target}")
    return sorted(found, key=lambda name: (not name.startswith("nn."), name))
