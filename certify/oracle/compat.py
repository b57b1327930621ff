"""What auto-lirpa 0.3 (2022) needs beside a current torch and numpy: supplied from outside, and undone.

No file of it is edited. It looks for names that numpy 2 and torch 2 dropped; its import changes the warnings
filter and the root logger, and every conversion sets the ONNX opset of the exporter.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from certify.errors import MissingDependency

_REMEDY = "pip install appdirs tqdm setuptools && pip install --no-deps auto-lirpa==0.3"


@contextmanager
def auto_lirpa() -> Iterator[types.ModuleType]:
    """Give the package ``auto_LiRPA``, with the names it misses in place until the end of the block.

    Raises ``MissingDependency`` if it is not installed. Not thread-safe: module tables are patched meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_quiet_logging())
        stack.enter_context(_opset_kept())
        for owner, name, value in _missing_names():
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(_stand_in("numpy.lib.arraysetops", isin=np.isin))  # imported, never used
        yield _package()


@contextmanager
def gradients() -> Iterator[None]:
    """Record gradients, and pass them at the bounds of torch.clamp, where auto-lirpa's alphas start.

    torch 2.15 passes none there: alphas of 0 and 1 would never move.
    """

    def inclusive(x: torch.Tensor, *bounds: Any, **named: Any) -> torch.Tensor:
        y = clamp(x, *bounds, **named)
        return torch.where(y == x, x, y)

    clamp = torch.clamp
    with torch.enable_grad(), mock.patch.object(torch, "clamp", inclusive):
        yield


def _package() -> types.ModuleType:
    try:
        with mock.patch.object(warnings, "simplefilter"):  # its import would change the filter and print the rest
            package = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        raise MissingDependency(
            f"auto-lirpa cannot be imported ({error})", "version 0.3, an optional cross-check", _REMEDY
        ) from error
    for wrapper in (package.BoundedModule, package.BoundDataParallel):
        _accept_remove_duplicate(wrapper)
    return package


def _missing_names() -> list[tuple[Any, str, Any]]:
    """(owner, name, value) of what torch and numpy dropped since 2022."""
    helper = importlib.import_module("torch.onnx.symbolic_helper")
    names: list[tuple[Any, str, Any]] = []
    if not hasattr(helper, "_set_opset_version"):
        names.append((helper, "_set_opset_version", _set_opset))
    if not hasattr(torch._C.Node, "__getitem__"):
        names.append((torch._C.Node, "__getitem__", lambda node, key: getattr(node, node.kindOf(key))(key)))
    if not hasattr(np, "bool"):  # numpy 1.24 to 1.26
        names.append((np, "bool", np.bool_))
    return names


@contextmanager
def _stand_in(path: str, **names: Any) -> Iterator[None]:
    """Put a module in the place of one that does not exist any more."""
    try:
        importlib.import_module(path)
    except ImportError:
        sys.modules[path] = types.ModuleType(path)
        vars(sys.modules[path]).update(names)
        try:
            yield
        finally:
            del sys.modules[path]
    else:
        yield


def _exporter_globals() -> Any:
    """The TorchScript exporter's global state: moved in torch 2.9."""
    for path in ("torch.onnx._internal.torchscript_exporter._globals", "torch.onnx._globals"):
        try:
            return importlib.import_module(path).GLOBALS
        except ImportError:
            continue
    raise MissingDependency(
        f"torch {torch.__version__} has no TorchScript exporter",
        "a torch that auto-lirpa can use",
        "torch 2.11",
    )


def _set_opset(version: int) -> None:
    _exporter_globals().export_onnx_opset_version = version


@contextmanager
def _opset_kept() -> Iterator[None]:
    state = _exporter_globals()
    before = state.export_onnx_opset_version
    try:
        yield
    finally:
        state.export_onnx_opset_version = before


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Silence what the import and failures log; take away the handlers that the import adds to the root."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)


def _accept_remove_duplicate(wrapper: type[nn.Module]) -> None:
    """Let ``_named_members`` of auto-lirpa take the argument that torch 2.0 added."""
    original = wrapper._named_members
    if "remove_duplicate" in original.__code__.co_varnames:
        return

    def named_members(
        self: nn.Module,
        get_members_fn: Callable[..., Any],
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,  # noqa: ARG001 - auto-lirpa always removes them
    ) -> Iterator[Any]:
        return original(self, get_members_fn, prefix, recurse)

    wrapper._named_members = named_members  # type: ignore[method-assign]
