"""torch.fx traces whose leaves are registered modules: which modules may be leaves, and what a failed trace says."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from certify.errors import UnsupportedOperation
from certify.registry import ACTIVATIONS, OPS

#: Methods that a subclass of a registered module may override: none of them changes what forward computes.
HARMLESS = {
    "__init__", "extra_repr", "__repr__", "reset_parameters", "_check_input_dim", "train", "eval",
    "__getstate__", "__setstate__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__class_getitem__",
    "_load_from_state_dict", "_save_to_state_dict",
}  # fmt: skip


def registered(module: nn.Module) -> Callable[..., Any] | None:
    """Return the builder of a module that computes what a registered class computes, else None.

    That is the class itself, or a subclass that overrides none of its methods but ``HARMLESS`` ones: a new
    ``_conv_forward`` changes a convolution as much as a new ``forward``.
    """
    between: list[type] = []
    for cls in type(module).__mro__:
        for table in (OPS, ACTIVATIONS):
            if cls in table:
                return None if any(_changes(derived, cls) for derived in between) else table[cls]
        between.append(cls)
    return None


def _changes(derived: type, base: type) -> bool:
    names = (name for name, item in vars(derived).items() if callable(item) and name not in HARMLESS)
    return any(hasattr(base, name) for name in names)


class _Proxy(fx.Proxy):
    """Records ``x += y`` as the in-place operation that it is; torch's own proxy would record x + y."""


def _in_place(name: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift".split():  # noqa: SIM905
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Stops at registered modules and at torch's own layers; goes through everything else."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if registered(m) is not None:
            return True
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Module)
        return type(m).__module__.startswith("torch.nn") and type(m) not in containers


def symbolic_trace(root: nn.Module) -> fx.Graph:
    """Return the traced forward of ``root``; raises ``UnsupportedOperation`` with the user's line and the cure."""
    try:
        traced = _Tracer().trace(root)
    except (
        fx.proxy.TraceError,
        TypeError,
        RuntimeError,
        ValueError,
        AttributeError,
        NotImplementedError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedOperation(
            f"cannot trace {type(root).__name__}: {reason[:160]} {_user_line(error)}",
            "a forward without branches on values, len() or unpacking of shapes",
            "x.flatten(1) or x.shape[i] instead, or register the module with @certify.register_op",
        ) from None
    return traced


def needed(traced: fx.Graph) -> set[fx.Node]:
    """Return the nodes that the output depends on."""
    found: set[fx.Node] = set()
    for node in reversed(traced.nodes):
        if node.op in ("output", "placeholder") or node in found:
            found.add(node)
            found.update(node.all_input_nodes)
    return found


def _user_line(error: BaseException) -> str:
    """Where in the user's code a trace failed."""
    frame, last = error.__traceback__, ""
    while frame is not None:
        code = frame.tb_frame.f_code
        if code.co_name == "forward" and "torch" not in code.co_filename.split("/"):
            last = f"(in {code.co_qualname}, line {frame.tb_lineno})"
        frame = frame.tb_next
    return last
