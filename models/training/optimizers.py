"""The optimizer of a config, with KAF parameters in a group of their own."""

from __future__ import annotations

import torch
from torch import nn

from models.kaf import KAF
from models.training.config import Optimizer


def optimizer_for(model: nn.Module, options: Optimizer) -> tuple[list[float], torch.optim.Optimizer]:
    """Return the peak rates of the parameter groups, and the optimizer.

    KAF parameters have a rate of their own and no weight decay: it would pull a function towards 0, not towards a
    simpler one.
    """
    kaf = [p for m in model.modules() if isinstance(m, KAF) for p in m.parameters(recurse=False)]
    apart = {id(p) for p in kaf}
    rest = [p for p in model.parameters() if id(p) not in apart]
    parts = [(rest, options.lr, options.weight_decay), (kaf, options.lr * options.kaf_lr, 0.0)]
    parts = [part for part in parts if part[0]]
    groups = [{"params": p, "weight_decay": decay} for p, _, decay in parts]
    rates = [rate for _, rate, _ in parts]
    if options.name == "sgd":
        nesterov = options.momentum > 0
        return rates, torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=nesterov)
    kind = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return rates, kind(groups, lr=options.lr)
