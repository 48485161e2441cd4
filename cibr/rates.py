"""How fast weights move: the schedule over a run, the rates and decays of towers, depths and critics."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from cibr.config import OptimOptions
from cibr.errors import UsageError
from cibr.models import Model
from cibr.run.sharding import is_sharded

BLOCK = re.compile(r"(.*?\.(?:resblocks|blocks|layers?|stages)\.)(\d+)\.")
BOTTOM = re.compile(r"embedding|patch_embed|conv1|ln_pre|\bstem\b|cls_token|pos_embed")
FIRST_EPOCH_LR = 1e-5


def progress(options: OptimOptions, step: int, seconds: float) -> float:
    """The part of the run that is over, by steps or by seconds, whichever is further."""
    by_steps = step / options.steps if options.steps is not None else 0.0
    by_seconds = seconds / options.seconds if options.seconds is not None else 0.0
    return max(by_steps, by_seconds)


def rate(options: OptimOptions, step: int, done: float) -> float:
    """The factor of the learning rates at `step`, in [0, 1]; open_clip's schedules where the length is in steps.

    cosine    after the warm-up, (1 + cos(pi t)) / 2, t from 0 to 1 over the steps that are left
    cooldown  constant, then linear to 0 over the last `cooldown_steps`
    epochs    of `epoch_steps`: the first at a rate of 1e-5, epoch e of E at (1 + cos(pi (e - 1) / E)) / 2; as CoOp's
    """
    warmup = options.lr_warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "cooldown":
        assert options.steps is not None
        return min(1.0, (options.steps - step) / options.cooldown_steps)
    if options.schedule == "epochs":
        assert options.steps is not None
        epoch, epochs = step // options.epoch_steps, options.steps / options.epoch_steps
        return (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2 if epoch else min(1.0, FIRST_EPOCH_LR / options.lr)
    if options.steps is not None and done == step / options.steps:
        done = (step - warmup) / max(1, options.steps - warmup)
    return (1 + math.cos(math.pi * done)) / 2


def make_optimizer(options: OptimOptions, model: Model, objective: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD; a group has "peak_lr", its rate at the top of the schedule, and the "names" of its parameters.

    Tensors that `no_decay` names have no weight decay; with AdamW neither have those of one dimension.
    """
    try:
        spared = re.compile(options.no_decay) if options.no_decay else None
    except re.error as error:
        raise UsageError(f"--no-decay {options.no_decay!r} is no regular expression: {error}") from error
    critic_lr = max(2 * options.lr, 1e-4) if options.critic_lr is None else options.critic_lr
    rates = {name: options.lr * factor for name, factor in tower_factors(options, model).items()}
    moving = [(f"model.{name}", p, rates[name]) for name, p in model.named_parameters() if p.requires_grad]
    moving += [(f"objective.{name}", p, critic_lr) for name, p in objective.named_parameters()]
    if not moving:
        raise UsageError("every parameter is locked: there is nothing to train")
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, p, lr in moving:
        decays = (p.ndim > 1 or options.optimizer == "sgd") and not (spared and spared.search(name))
        weight_decay = options.weight_decay if decays else 0.0
        group = {"params": [], "names": [], "peak_lr": lr, "lr": lr, "weight_decay": weight_decay}
        chosen = groups.setdefault((lr, decays, is_sharded(p)), group)  # a fused update takes one kind of tensor
        chosen["params"].append(p)
        chosen["names"].append(name)
    if options.optimizer == "sgd":
        return torch.optim.SGD(list(groups.values()), momentum=options.momentum)
    # one pass over the weights instead of one for each operation; on a GPU torch's own choice is as good
    fused = all(p.device.type == "cpu" and not is_sharded(p) for _, p, _ in moving) or None
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(list(groups.values()), betas=betas, eps=options.eps, fused=fused)


def tower_factors(options: OptimOptions, model: Model) -> dict[str, float]:
    """The learning rate of each parameter of the model as a factor of --lr: its tower's, times its depth's decay.

    The projection and what follows the blocks are at the top; each block is one below the next; embeddings, stems and
    what precedes the blocks are below the first.
    """
    names = [name for name, _ in model.named_parameters()]
    depths: dict[str, int] = {}
    for name in names:
        if found := BLOCK.match(name):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    factors = {}
    for name in names:
        below = 0
        if found := BLOCK.match(name):
            below = depths[found[1]] - int(found[2])
        elif BOTTOM.search(name):
            below = 1 + max(
                (n for stack, n in depths.items() if is_image(stack, model) == is_image(name, model)), default=0
            )
        tower = options.image_lr if is_image(name, model) else options.text_lr
        factors[name] = (1.0 if name.endswith(("logit_scale", "logit_bias")) else tower) * options.layer_decay**below
    return factors


def is_image(name: str, model: Model) -> bool:
    """Whether a parameter is the image tower's rather than the text tower's."""
    return name.startswith(model.image_prefix)
