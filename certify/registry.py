"""The one way in which modules and functions meet their rules, and names meet methods.

Adding an activation, an operation, a method, an attack or an estimator means one file with one decorator in its
folder; the folders import whatever they hold. ``certify ops``, the tests and the README's tables read these tables.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from certify.errors import unknown_name

T = TypeVar("T")

#: A target of a rule: a module class, a function, or the name of a tensor method.
Target = type[nn.Module] | Callable[..., Any] | str

#: Builders of rules by target: ``builder(call) -> Rule`` (see certify/graph.py for ``Call``).
OPS: dict[Target, Callable[..., Any]] = {}
#: Facts of activations by target: ``facts(call) -> Activation``.
ACTIVATIONS: dict[Target, Callable[..., Any]] = {}
#: Factories by public name.
METHODS: dict[str, Callable[..., Any]] = {}
ATTACKS: dict[str, Callable[..., Any]] = {}
ESTIMATORS: dict[str, Callable[..., Any]] = {}


def register_op(*targets: Target) -> Callable[[T], T]:
    """Register a builder of rules for modules, functions and tensor methods: ``builder(call) -> Rule``."""
    return _into(OPS, targets)


def register_activation(*targets: Target) -> Callable[[T], T]:
    """Register the facts of an activation: a class whose ``from_call(call)`` returns an ``Activation``.

    A module whose class is registered becomes one node of the graph. Example (models/kaf.py):
    ``@certify.register_activation(KAF)`` above ``class KAFFacts(certify.Smooth)``.
    """
    return _into(ACTIVATIONS, targets)


def register_method(name: str) -> Callable[[T], T]:
    """Register a bound method under its public name."""
    return _into(METHODS, (name,))


def register_attack(name: str) -> Callable[[T], T]:
    """Register an attack class under its public name."""
    return _into(ATTACKS, (name,))


def register_estimator(name: str) -> Callable[[T], T]:
    """Register a Lipschitz estimator under its public name."""
    return _into(ESTIMATORS, (name,))


def lookup(kind: str, table: dict[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    """Return ``table[name]``, or raise ``InvalidInput`` with the known names."""
    if name not in table:
        raise unknown_name(kind, name, table)
    return table[name]


def discover(package: str, path: list[str]) -> None:
    """Import every module of a package's folder, so that its decorators run."""
    for info in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{info.name}")


def _into(table: dict[Any, Any], targets: tuple[Any, ...]) -> Callable[[T], T]:
    def add(item: T) -> T:
        for target in targets:
            table[target] = item
        return item

    return add
