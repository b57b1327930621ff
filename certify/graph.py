"""nn.Module -> Graph: nodes with bound rules, named by the user's own module paths.

Registered modules are leaves of a torch.fx trace. A traced lie would become a wrong proof, so hooks and replaced
``forward`` methods are refused, leaves are matched by their real forward, and the finished graph, evaluated through
its own rules, must equal ``model(x)`` at two batch sizes.
"""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from certify.errors import InvalidInput, InvalidModel, UnsupportedOperation
from certify.registry import ACTIVATIONS, OPS, Target

if TYPE_CHECKING:
    from certify.ops.base import Rule

INPUT = "input"  # the name of the node that stands for x


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
        return None if value is None else value.detach().to(self.device)

    def per_sample(self, value: Tensor | float) -> Tensor:
        """Return a constant operand without batch dimension; it must not enlarge the sample or vary over the batch."""
        constant = torch.as_tensor(value, device=self.device).detach()
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


def trace(model: nn.Module, example: Tensor) -> Graph:
    """Return the ``Graph`` of a model in eval mode; ``example`` [batch, *shape] gives shape, dtype and device.

    Raises ``InvalidModel`` for a model in train mode, with hooks, NaN weights, other dtypes or devices, and
    ``UnsupportedOperation``, with the module path and the remedy, for operations without a rule.
    """
    _check_model(model, example)
    root = model if _registered(model) is None else nn.Sequential(OrderedDict(model=model))
    traced = _symbolic_trace(root)
    with torch.no_grad(), _quiet_rng():
        graph = _Builder(model, root, traced, example).build()
        _check_values(graph, example)
    return graph


def _registered(module: nn.Module) -> Callable[..., Any] | None:
    """Return the builder of a module whose forward is that of a registered class, else None."""
    for cls in type(module).__mro__:
        for table in (OPS, ACTIVATIONS):
            if cls in table:
                return table[cls] if type(module).forward is getattr(cls, "forward", None) else None
    return None


def _check_model(model: nn.Module, example: Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"a {type(model).__name__} as model", "a torch.nn.Module", "wrap the function in one")
    for path, module in model.named_modules():
        _check_module(path or type(model).__name__, module)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            _check_tensor(name, tensor, example)
    if torch.is_autocast_enabled(example.device.type):
        raise InvalidModel("autocast is on", "full precision", "leave the autocast context")


def _check_module(where: str, module: nn.Module) -> None:
    if module.training:
        raise InvalidModel(f"{where!r} is in train mode", "eval mode", "call model.eval() first")
    if "forward" in vars(module):
        raise InvalidModel(f"forward of {where!r} was replaced on the instance", "the class's own forward")
    if module._forward_hooks or module._forward_pre_hooks:
        raise InvalidModel(
            f"{where!r} has forward hooks", "none: a hook can change what is computed", "remove the hooks"
        )


def _check_tensor(name: str, tensor: Tensor, example: Tensor) -> None:
    if tensor.dtype != example.dtype or tensor.device != example.device:
        raise InvalidModel(
            f"{name!r} is {tensor.dtype} on {tensor.device}, the inputs are {example.dtype} on {example.device}",
            "one dtype (float32 or float64) and one device",
            "model.to(inputs.device, inputs.dtype)",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidModel(f"{name!r} holds NaN or infinities", "finite weights", "train or load it again")


class _Tracer(fx.Tracer):
    """Stops at registered modules and at torch's own layers; goes through everything else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _registered(m) is not None:
            return True
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Module)
        return type(m).__module__.startswith("torch.nn") and type(m) not in containers


def _symbolic_trace(root: nn.Module) -> fx.Graph:
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


def _needed(traced: fx.Graph) -> set[fx.Node]:
    """The nodes that the output depends on."""
    needed: set[fx.Node] = set()
    for node in reversed(traced.nodes):
        if node.op in ("output", "placeholder") or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return needed


def _user_line(error: BaseException) -> str:
    """Where in the user's code a trace failed."""
    frame, last = error.__traceback__, ""
    while frame is not None:
        code = frame.tb_frame.f_code
        if code.co_name == "forward" and "torch" not in code.co_filename.split("/"):
            last = f"(in {code.co_qualname}, line {frame.tb_lineno})"
        frame = frame.tb_next
    return last


class _Builder:
    """Walks the traced graph once with a real batch of two and makes a ``Node`` of what depends on the input."""

    def __init__(self, model: nn.Module, root: nn.Module, traced: fx.Graph, example: Tensor) -> None:
        self.model, self.root, self.traced, self.example = model, root, traced, example
        self.values: dict[fx.Node, Any] = {}  # concrete, batch of two
        self.names: dict[fx.Node, str] = {}  # of those that depend on x
        self.splits: set[fx.Node] = set()  # tuples of tensors (chunk, split), waiting for getitem
        self.nodes: OrderedDict[str, Node] = OrderedDict()

    def build(self) -> Graph:
        """Return the graph."""
        output, needed = "", _needed(self.traced)
        for node in self.traced.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                if self.names:
                    raise UnsupportedOperation("a model with several inputs", "forward(x) with one tensor")
                self.values[node] = self.example[:1].expand(2, *self.example.shape[1:]).clone()
                self.names[node] = INPUT
            elif node.op == "output":
                result = node.args[0]
                if not isinstance(result, fx.Node) or result not in self.names:
                    raise UnsupportedOperation(
                        "an output that is no tensor, or does not depend on the input",
                        "forward(x) -> one tensor",
                    )
                output = self.names[result]
            else:
                self._visit(node)
        if output == INPUT:
            raise UnsupportedOperation("a model that returns its input", "at least one operation")
        shape = tuple(self.example.shape[1:])
        return Graph(self.model, self.nodes, output, shape, self.example.dtype, self.example.device)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.values[node] = _attribute(self.root, str(node.target))
            return
        if node.op == "call_function" and node.target is getattr:  # x.shape and the like: no data
            self.values[node] = getattr(self.values[node.args[0]], node.args[1])  # type: ignore[index]
            return
        function, module = self._function(node)
        args: Any
        kwargs: Any
        args, kwargs = (fx.map_arg(part, lambda n: self.values[n]) for part in (node.args, node.kwargs))
        try:
            value = function(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InvalidInput(
                f"the model fails on inputs of shape {tuple(self.example.shape[1:])} at {self._path(node)!r}: "
                f"{str(error).splitlines()[0][:120]}",
                "inputs that the model accepts",
                "check the input shape",
            ) from None
        self.values[node] = value
        dependent = [n for n in node.all_input_nodes if n in self.names or n in self.splits]
        if not dependent or node.target in ("size", "dim", "numel", "ndimension", len):
            return
        if isinstance(value, (tuple, list)):
            self.splits.add(node)
        elif isinstance(value, Tensor):
            self._add(node, function, module)
        else:
            raise UnsupportedOperation(
                f"{self._path(node)!r} turns data into a {type(value).__name__}",
                "tensors from input to output",
            )

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
        if value.ndim < 1 or value.shape[0] != 2:
            raise UnsupportedOperation(f"{name!r} ({node.target}) loses the batch dimension", "batch first")
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

    def _piece(self, node: fx.Node) -> tuple[fx.Node, Callable[..., Any]]:
        """One piece of a chunk or split: the split and the getitem as one operation."""
        split = node.args[0]
        if not isinstance(split, fx.Node) or split not in self.splits or node.target is not operator.getitem:
            raise UnsupportedOperation(f"{self._path(node)!r} on a tuple of tensors", "chunk(...)[i]")
        parts, _ = self._function(split)
        source, rest, index = split.args[0], split.args[1:], node.args[1]
        if not isinstance(source, fx.Node) or source not in self.names:
            raise UnsupportedOperation(f"{self._path(node)!r} of {split.args[0]}", "chunk(...) of one tensor")
        return source, lambda x: parts(x, *rest, **split.kwargs)[index]

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
    builder: Any = _registered(call.module) if call.module is not None else OPS.get(key, ACTIVATIONS.get(key))
    if builder is None:
        kind = f"nn.{call.kind}" if call.module is not None else call.kind
        raise UnsupportedOperation(
            f"no bound rule for {kind} at {call.name!r}",
            "an operation listed by `certify ops`",
            f"register one with @certify.register_op({kind}) (see certify/ops/linear.py)",
        )
    if builder in ACTIVATIONS.values():
        if len(call.inputs) != 1:
            raise UnsupportedOperation(f"{call.kind} at {call.name!r} of several inputs", "one input")
        return Elementwise(builder.from_call(call))
    return builder(call)


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


@contextlib.contextmanager
def _quiet_rng() -> Iterator[None]:
    """Keep the caller's random state whatever the check draws."""
    with torch.random.fork_rng(devices=[]):
        yield


def _check_values(graph: Graph, example: Tensor) -> None:
    """The graph, evaluated through its rules, must equal the model at two batch sizes and twice in a row."""
    generator = torch.Generator().manual_seed(0)
    for batch in (2, 3):
        noise = torch.randn((batch, *example.shape[1:]), generator=generator, dtype=torch.float64)
        x = example[:1] + 0.5 * noise.to(example)
        want, again = graph.model(x.clone()), graph.model(x.clone())
        try:
            got = graph.forward(x)[graph.output]
        except RuntimeError:
            got = want.new_full((0,), torch.nan)
        scale = 1 + float(want.abs().max())
        tolerance = (1e-4 if x.dtype == torch.float32 else 1e-9) * scale
        same = got.shape == want.shape and want.shape == again.shape
        if not same or not bool(((got - want).abs() <= tolerance).all() & ((want - again).abs() <= tolerance).all()):
            raise UnsupportedOperation(
                f"the traced graph of {type(graph.model).__name__} does not compute what the model computes",
                "a forward that is a fixed function of x, sample by sample, without in-place side effects",
                "remove randomness, in-place updates and branches on the batch size",
            )
