"""nn.Module -> Graph: nodes with bound rules, named by the user's own module paths.

Registered modules are leaves of a torch.fx trace (symbolic.py). A traced lie would become a wrong proof, so every
value is computed once while the graph is built, overwritten values are refused, and safeguards.py compares the
finished graph with the model.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from certify.errors import InvalidInput, InvalidModel, UnsupportedOperation
from certify.registry import ACTIVATIONS, OPS, Target
from certify.safeguards import check_model, check_values
from certify.symbolic import needed, registered, symbolic_trace

if TYPE_CHECKING:
    from certify.ops.base import Rule

INPUT = "input"  # the name of the node that stands for x

#: What may return several tensors: the pieces of one.
SPLITS = (torch.chunk, torch.split, torch.tensor_split, torch.unbind, "chunk", "split", "tensor_split", "unbind")


def held(value: Tensor) -> Tensor:
    """Return a parameter as rules and facts keep it: itself while a model is traced for training, else detached."""
    return value if torch.is_grad_enabled() else value.detach()


@dataclass(frozen=True)
class Input:
    """Stands for a value that depends on x, among the arguments of a ``Call``; ``shape`` is that of one sample."""

    position: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """One operation as the trace met it: what builders of rules and facts read.

    ``args`` and ``kwargs`` hold constants as they are and ``Input`` where a value depends on x. ``run`` executes the
    operation on tensors put in the inputs' places (batch size 2, any dtype).
    """

    name: str
    target: Target
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Input, ...]
    output_shape: tuple[int, ...]
    run: Callable[..., Tensor]
    dtype: torch.dtype
    device: torch.device

    @property
    def kind(self) -> str:
        """The operation's short name, such as ``Linear`` or ``add``."""
        if self.module is not None:
            return type(self.module).__name__
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", str(self.target))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample of the first input."""
        return self.inputs[0].shape

    def option(self, name: str, position: int, default: Any) -> Any:
        """Return an option: the module's attribute, or the call's keyword or positional argument."""
        if self.module is not None:
            return getattr(self.module, name, default)
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if position < len(self.args) else default

    def constant(self, name: str, position: int) -> Tensor | None:
        """Return a constant tensor option, or None; raises where it depends on x."""
        value = self.option(name, position, None)
        if isinstance(value, Input):
            raise UnsupportedOperation(
                f"{name} of {self.kind} at {self.name!r} depends on the input", "a constant tensor"
            )
        return None if value is None else held(value).to(self.device)

    def per_sample(self, value: Tensor | float) -> Tensor:
        """Return a constant operand without batch dimension; it must not enlarge the sample or vary over the batch."""
        number = not isinstance(value, Tensor)  # keeps all its digits: torch's default dtype is not the model's
        constant = held(torch.as_tensor(value, dtype=self.dtype if number else None, device=self.device))
        if not bool(torch.isfinite(constant).all()):
            raise InvalidModel(f"NaN or infinity in a constant at {self.name!r}", "finite numbers")
        shape = self.input_shape
        if constant.ndim == len(shape) + 1 and constant.shape[0] == 1:
            constant = constant[0]
        try:
            same = torch.broadcast_shapes(constant.shape, shape) == torch.Size(shape)
        except RuntimeError:
            same = False
        if constant.ndim > len(shape) or not same:
            raise UnsupportedOperation(
                f"a constant of shape {tuple(constant.shape)} at {self.name!r}",
                f"one that broadcasts against a sample of shape {shape}, the same for the whole batch",
            )
        return constant.to(self.dtype)


@dataclass(frozen=True, eq=False)
class Node:
    """One place in the graph: ``rule`` applied to the values of ``inputs``; ``shape`` is that of one sample."""

    name: str
    kind: str
    rule: Rule
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int = 0


@dataclass(frozen=True, eq=False)
class Graph:
    """A model as nodes in topological order, from ``INPUT`` to ``output``."""

    model: nn.Module
    nodes: OrderedDict[str, Node]
    output: str
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return every node's value, through the rules."""
        values = {INPUT: x}
        for node in self.nodes.values():
            values[node.name] = node.rule.forward(*(values[name] for name in node.inputs))
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one sample of a node's value."""
        return self.input_shape if name == INPUT else self.nodes[name].shape

    def consumers(self, name: str) -> list[Node]:
        """Return the nodes that read ``name``."""
        return [node for node in self.nodes.values() if name in node.inputs]


def trace(model: nn.Module, example: Tensor, *, live: bool = False) -> Graph:
    """Return the ``Graph`` of a model in eval mode; ``example`` [batch, *shape] gives shape, dtype and device.

    Rules of a ``live`` graph keep the parameters themselves, and all that is derived from them (|W|, folded scales)
    with its history: bounds can be differentiated, once per graph. The others keep numbers.

    Raises ``InvalidModel`` for a model in train mode, with hooks, NaN weights, other dtypes or devices, and
    ``UnsupportedOperation``, with the module path and the remedy, for operations without a rule.
    """
    check_model(model, example)
    root = model if registered(model) is None else nn.Sequential(OrderedDict(model=model))
    traced = symbolic_trace(root)
    with torch.inference_mode(False):
        with torch.set_grad_enabled(live):
            graph = _Builder(model, root, traced, example).build()
        with torch.no_grad():
            check_values(graph, example, lambda: trace(copy.deepcopy(model).double(), example.double()))
    return graph


class _Builder:
    """Walks the traced graph once with a real batch of two and makes a ``Node`` of what depends on the input."""

    def __init__(self, model: nn.Module, root: nn.Module, traced: fx.Graph, example: Tensor) -> None:
        self.model, self.root, self.traced, self.example = model, root, traced, example
        self.values: dict[fx.Node, Any] = {}  # concrete, batch of two
        self.versions: dict[fx.Node, Any] = {}  # of those values when they were made: torch counts in-place writes
        self.names: dict[fx.Node, str] = {}  # of those that depend on x
        self.splits: set[fx.Node] = set()  # tuples of tensors (chunk, split), waiting for getitem
        self.nodes: OrderedDict[str, Node] = OrderedDict()

    def build(self) -> Graph:
        """Return the graph. What the output does not need is run too: it may write into what the output needs."""
        output, wanted = "", needed(self.traced)
        for node in self.traced.nodes:
            self._check_unwritten(node)
            if node.op == "placeholder":
                if self.names:
                    raise UnsupportedOperation("a model with several inputs", "forward(x) with one tensor")
                self._keep(node, self.example[:1].expand(2, *self.example.shape[1:]).clone())
                self.names[node] = INPUT
            elif node.op == "output":
                output = self._output(node.args[0])
            else:
                self._visit(node, wanted=node in wanted)
        shape = tuple(self.example.shape[1:])
        return Graph(self.model, self.nodes, output, shape, self.example.dtype, self.example.device)

    def _output(self, result: Any) -> str:
        if not isinstance(result, fx.Node) or result not in self.names:
            raise UnsupportedOperation(
                "an output that is no tensor, or does not depend on the input", "forward(x) -> one tensor"
            )
        if self.names[result] == INPUT:
            raise UnsupportedOperation("a model that returns its input", "at least one operation")
        return self.names[result]

    def _keep(self, node: fx.Node, value: Any) -> None:
        self.values[node], self.versions[node] = value, _versions(value)

    def _check_unwritten(self, node: fx.Node) -> None:
        """Refuse to read a value, or a view of it, that was overwritten since: the graph knows values only."""
        for source in node.all_input_nodes:
            if _versions(self.values[source]) != self.versions[source]:
                raise UnsupportedOperation(
                    f"{self._path(node)!r} reads {self._path(source)!r} after an in-place operation changed it",
                    "operations that return new values",
                    "y = torch.relu(x) and inplace=False instead of writing into x",
                )

    def _visit(self, node: fx.Node, *, wanted: bool) -> None:
        if node.op == "get_attr":
            self._keep(node, _attribute(self.root, str(node.target)))
            return
        function, module = self._function(node)
        self._keep(node, self._call(node, function))
        value, sources = self.values[node], [n for n in node.all_input_nodes if n in self.names or n in self.splits]
        if node.target is getattr and not isinstance(value, Tensor):  # x.shape and the like: no data
            return
        if not sources or node.target in ("size", "dim", "numel", "ndimension", len):
            return
        if node.target is getattr:  # x.T, x.data: also where nothing needs it, as x.data can be written unnoticed
            raise UnsupportedOperation(f"{self._path(node)!r}: attribute {node.args[1]!r} of data", "a tensor method")
        if not wanted:
            return
        if isinstance(value, (tuple, list)):
            self._check_split(node, module)
        elif isinstance(value, Tensor):
            self._add(node, function, module)
        else:
            raise UnsupportedOperation(
                f"{self._path(node)!r} turns data into a {type(value).__name__}", "tensors from input to output"
            )

    def _call(self, node: fx.Node, function: Callable[..., Any]) -> Any:
        args: Any
        kwargs: Any
        args, kwargs = (fx.map_arg(part, lambda n: self.values[n]) for part in (node.args, node.kwargs))
        try:
            return function(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InvalidInput(
                f"the model fails on inputs of shape {tuple(self.example.shape[1:])} at {self._path(node)!r}: "
                f"{str(error).splitlines()[0][:120]}",
                "inputs that the model accepts",
                "check the input shape",
            ) from None

    def _function(self, node: fx.Node) -> tuple[Callable[..., Any], nn.Module | None]:
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return module, module
        if node.op == "call_method":
            return lambda x, *args, **kwargs: getattr(x, str(node.target))(*args, **kwargs), None
        return node.target, None  # type: ignore[return-value]

    def _add(self, node: fx.Node, function: Callable[..., Any], module: nn.Module | None) -> None:
        """Make the node: what depends on x becomes an ``Input`` per occurrence, everything else is a constant."""
        sources: list[fx.Node] = []
        args: Any
        kwargs: Any

        def place(n: fx.Node) -> Any:
            if n not in self.names:
                return self.values[n]
            sources.append(n)
            return Input(len(sources) - 1, tuple(self.values[n].shape[1:]))

        if any(n in self.splits for n in node.all_input_nodes):
            source, function = self._piece(node)
            args, kwargs = (place(source),), {}
        else:
            args, kwargs = (fx.map_arg(part, place) for part in (node.args, node.kwargs))

        def run(*tensors: Tensor) -> Tensor:
            positional: Any
            named: Any
            positional, named = (
                fx.node.map_aggregate(part, lambda a: tensors[a.position] if isinstance(a, Input) else a)
                for part in (args, kwargs)
            )
            return function(*positional, **named)

        name, value = self._name(node), self.values[node]
        if value.ndim < 2 or value.shape[0] != 2:
            raise UnsupportedOperation(
                f"{name!r} returns the shape {tuple(value.shape)} for a batch of 2",
                "[batch, *shape] with at least one more dimension",
                "x[:, :1] or keepdim=True instead of x[:, 0] or squeeze",
            )
        call = Call(
            name,
            type(module) if module is not None else node.target,
            module,
            tuple(args),
            dict(kwargs),
            tuple(Input(i, tuple(self.values[n].shape[1:])) for i, n in enumerate(sources)),
            tuple(value.shape[1:]),
            run,
            self.example.dtype,
            self.example.device,
        )
        count = sum(p.numel() for p in module.parameters()) if module is not None else 0
        inputs = tuple(self.names[n] for n in sources)
        self.nodes[name] = Node(name, call.kind, build_rule(call), inputs, call.output_shape, count)
        self.names[node] = name
        if value.dtype != self.example.dtype:
            raise UnsupportedOperation(f"{name!r} turns {self.example.dtype} into {value.dtype}", "one dtype")

    def _check_split(self, node: fx.Node, module: nn.Module | None) -> None:
        """Let only what cuts a tensor into pieces return several: torch.max or an LSTM compute theirs."""
        if node.target not in SPLITS:
            kind = node.target if module is None else f"nn.{type(module).__name__}"
            raise no_rule(getattr(kind, "__name__", str(kind)), self._path(node))
        self.splits.add(node)

    def _piece(self, node: fx.Node) -> tuple[fx.Node, Callable[..., Any]]:
        """One piece of a chunk or split: the split and the getitem as one operation."""
        split = node.args[0]
        if not isinstance(split, fx.Node) or split not in self.splits or node.target is not operator.getitem:
            raise UnsupportedOperation(f"{self._path(node)!r} on a tuple of tensors", "chunk(...)[i]")
        parts, _ = self._function(split)
        source, index = split.args[0], node.args[1]
        if not isinstance(source, fx.Node) or source not in self.names:
            raise UnsupportedOperation(f"{self._path(node)!r} of {split.args[0]}", "chunk(...) of one tensor")
        rest: Any
        named: Any
        rest, named = (fx.map_arg(part, lambda n: self.values[n]) for part in (split.args[1:], split.kwargs))
        return source, lambda x: parts(x, *rest, **named)[index]

    def _path(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack")
        scope = list(stack.values())[-1][0] if stack else ""
        return f"{scope}.{node.name}" if scope else node.name

    def _name(self, node: fx.Node) -> str:
        """The user's path; a shared module's later uses are ``act@2``, ``act@3``."""
        base = self._path(node)
        name, use = base, 1
        while name in self.nodes or name == INPUT:
            use += 1
            name = f"{base}@{use}"
        return name


def build_rule(call: Call) -> Rule:
    """Return the rule of a call from the registries; raises ``UnsupportedOperation`` with path and remedy."""
    from certify.ops.base import Elementwise  # rules import this module for ``Call``

    key = call.target
    builder: Any = registered(call.module) if call.module is not None else OPS.get(key, ACTIVATIONS.get(key))
    if builder is None:
        raise no_rule(f"nn.{call.kind}" if call.module is not None else call.kind, call.name)
    if builder in ACTIVATIONS.values():
        if len(call.inputs) != 1:
            raise UnsupportedOperation(f"{call.kind} at {call.name!r} of several inputs", "one input")
        return Elementwise(builder.from_call(call))
    return builder(call)


def no_rule(kind: str, name: str) -> UnsupportedOperation:
    """Return the error for an operation that no registry knows, with the user's path and the remedy."""
    return UnsupportedOperation(
        f"no bound rule for {kind} at {name!r}",
        "an operation listed by `certify ops`",
        f"register one with @certify.register_op({kind}) (see certify/ops/linear.py)",
    )


def _versions(value: Any) -> Any:
    """How often torch has written into a tensor, its views included; nested like ``value``."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return tuple(_versions(item) for item in value) if isinstance(value, (tuple, list)) else None


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value
