"""What must be true of a model before it is traced, and of its graph afterwards: a traced lie is a wrong proof."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from certify.errors import InvalidInput, InvalidModel, UnsupportedOperation

if TYPE_CHECKING:
    from certify.graph import Graph


def check_model(model: nn.Module, example: Tensor) -> None:
    """Raise ``InvalidInput`` or ``InvalidModel`` unless the model is in eval mode, unhooked, finite, of one dtype."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"a {type(model).__name__} as model", "a torch.nn.Module", "wrap the function in one")
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        raise InvalidModel("forward hooks on all modules", "none: a hook can change what is computed", "remove them")
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
    for name, item in vars(module).items():
        if callable(item) and callable(getattr(type(module), name, None)):
            raise InvalidModel(f"{name} of {where!r} was replaced on the instance", "the class's own methods")
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


def check_values(graph: Graph, example: Tensor, in_double: Callable[[], object]) -> None:
    """Raise ``UnsupportedOperation`` unless the graph, evaluated through its rules, equals the model.

    Two batch sizes, points near and far, every point twice; the model may not draw random numbers. Where float32 values
    differ by more than is usual, but by less than a hundredth, rounding may be the reason (large weights that cancel):
    ``in_double`` then decides, which traces the model in float64 and raises unless that agrees to a billionth.
    """
    generator = torch.Generator().manual_seed(0)
    devices = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for batch, spread in ((2, 0.5), (3, 4.0)):
            noise = torch.randn((batch, *example.shape[1:]), generator=generator, dtype=torch.float64)
            _compare(graph, example[:1] + spread * noise.to(example), in_double)


def _compare(graph: Graph, x: Tensor, in_double: Callable[[], object]) -> None:
    before, fed = _random_states(x.device), x.clone()
    try:
        want, again = graph.model(fed), graph.model(x.clone())
        got = graph.forward(x)[graph.output]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedOperation(
            f"{type(graph.model).__name__} fails on a batch of {len(x)}: {str(error).splitlines()[0][:120]}",
            "a model that takes any batch size",
        ) from None
    if fed._version:
        raise UnsupportedOperation("a model that writes into its input", "a new value", "x = x - 1 instead of x -= 1")
    random = any(not torch.equal(a, b) for a, b in zip(before, _random_states(x.device), strict=True))
    alike = not random and got.shape == want.shape and len(want) == len(x)
    if alike and want.dtype == torch.float32 and not _close(got, want, again) and _close(got, want, again, 1e-2):
        in_double()
    elif not alike or not _close(got, want, again):
        raise UnsupportedOperation(
            f"the traced graph of {type(graph.model).__name__} does not compute what the model computes",
            "a forward that is a fixed function of x, sample by sample, without in-place side effects",
            "remove randomness, in-place updates and branches on the batch size",
        )


def _close(got: Tensor, want: Tensor, again: Tensor, share: float | None = None) -> bool:
    """Whether the graph's values are the model's up to ``share`` (of rounding), and the model's own values repeat."""
    scale = 1 + float(want.abs().max())
    usual = 1e-4 if want.dtype == torch.float32 else 1e-9
    rounding = (usual if share is None else share) * scale
    repeat = 64 * torch.finfo(want.dtype).eps * scale
    return bool(((got - want).abs() <= rounding).all() & ((want - again).abs() <= repeat).all())


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
