"""One step: towers, objective, backward, update.

Towers and objective meet at the features (`cibr_kernels.accumulate`): the objective's backward ends in their gradients,
and the towers' begins there.  So a batch can be encoded in parts without being cut for the loss.

Random numbers are drawn anew from (seed, step, rank, part) before each encoding and from (seed, step) before the
objective, so a step depends on nothing that came before it but the weights.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cibr_kernels as ck
from cibr.config import RunConfig
from cibr.models import Batch, Model, Output
from cibr.run.clock import Clock
from cibr.run.ema import Ema
from cibr.run.ranks import Ranks
from cibr.run.sharding import is_sharded, whole
from cibr.stages import Stage

DTYPES = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


@dataclass
class Players:
    """What a step moves, and what it needs to."""

    config: RunConfig
    model: Model
    called: Model | DistributedDataParallel  # the model, or what averages its gradients over ranks
    stages: list[Stage]
    critics: nn.Module  # what the stages' objectives hold: parameters and statistics, each once
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing but for amp_fp16
    ema: Ema | None
    ranks: Ranks
    clock: Clock
    device: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = DTYPES.get(self.config.run.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device, dtype)

    def seed(self, step: int, *more: int) -> None:
        """Sets every random state of torch by the run's seed and these numbers."""
        words = np.random.SeedSequence((self.config.run.seed, step, *more)).generate_state(2, np.uint32)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))


@dataclass(frozen=True)
class Taken:
    """A step that was taken, or skipped because something was not finite: nothing has changed then."""

    parts: dict[str, Tensor]  # of the loss, means over ranks; norms of the gradients, before clipping
    finite: bool

    def numbers(self) -> str:
        return ", ".join(f"{name} {value.item():.4g}" for name, value in self.parts.items())


def take_step(players: Players, stage: Stage, batch: Batch, step: int) -> Taken:
    """Moves the weights by one batch of a stage; `batch` is this rank's rows."""
    modules = (players.model, players.critics)
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    players.optimizer.zero_grad()
    parts = forward_backward(players, stage, batch, step)
    players.clock.mark("update")
    players.scaler.unscale_(players.optimizer)
    norm, critic_norm = (gradient_norm(module).to(players.device) for module in modules)
    parts = players.ranks.mean({name: value.detach() for name, value in parts.items()})
    parts |= {"gradient_norm": norm, "critic_gradient_norm": critic_norm}
    decisive = [parts["loss"].double(), norm.double(), critic_norm.double()]
    finite = bool(torch.isfinite(torch.stack(decisive)).all())
    if finite:
        update(players, stage, norm, step)
    else:
        for buffer, value in before:
            buffer.copy_(value)
    players.scaler.update()
    return Taken(parts, finite)


def forward_backward(players: Players, stage: Stage, batch: Batch, step: int) -> dict[str, Tensor]:
    """Leaves the whole batch's gradients, averaged over ranks, in the parameters; returns the parts of the loss."""
    rows = len(batch["index"])
    cuts = slices(rows, min(players.config.optim.accumulate, rows))
    parts: dict[str, Tensor] = {}

    def encode_part(k: int) -> list[Tensor]:
        return encode(players, {name: t[cuts[k]] for name, t in batch.items()}, step, k).tensors()

    def loss(*tensors: Tensor) -> Tensor:
        players.clock.mark("loss")
        players.seed(step)
        parts.update(stage.objective(Output.of(tensors), batch))
        return players.scaler.scale(parts["loss"])

    with contextlib.nullcontext() if len(cuts) == 1 else unsynchronised(players.called):
        ck.accumulate(encode_part, range(len(cuts)), loss, buffers=players.model.buffers())
    players.ranks.average(left_to_average(players, parted=len(cuts) > 1))
    return parts


def unsynchronised(called: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Several backward passes that add up, without a message each."""
    return called.no_sync() if isinstance(called, DistributedDataParallel) else contextlib.nullcontext()


def left_to_average(players: Players, *, parted: bool) -> Iterator[nn.Parameter]:
    """Parameters whose gradients are still this rank's: critics', scalars under FSDP, all of a batch in parts."""
    yield from players.critics.parameters()
    sharded = any(is_sharded(p) for p in players.model.parameters())
    if sharded or parted:
        yield from (p for p in players.model.parameters() if not is_sharded(p))


def encode(players: Players, piece: Batch, step: int, part: int) -> Output:
    players.clock.mark("towers")
    players.seed(step, players.ranks.rank, part)
    with players.autocast():
        output = players.called(piece)
    if output.image.embedding.requires_grad:
        output.image.embedding.register_hook(lambda _: players.clock.mark("towers"))  # where their backward begins
    return output


def slices(total: int, count: int) -> list[slice]:
    """`count` parts of `total` rows, the first ones a row longer where it does not divide."""
    each, more = divmod(total, count)
    edges = [k * each + min(k, more) for k in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def update(players: Players, stage: Stage, norm: Tensor, step: int) -> None:
    largest = players.config.optim.clip_gradient
    if largest is not None:
        factor = min(
            1.0, largest / (norm.item() + 1e-6)
        )  # as clip_grad_norm_, which takes no mixture of sharded and not
        for p in players.model.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)
    for name, p in players.model.named_parameters():
        if not stage.pattern.search(name):
            p.grad = None
    players.scaler.step(players.optimizer)
    players.model.clamp_scale()
    if players.ema is not None:
        players.ema.update(step)


def gradient_norm(module: nn.Module) -> Tensor:
    """0-d; 0 of a module without gradients."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    kinds = [[g for g in gradients if is_sharded(g) == kind] for kind in (False, True)]
    norms = [whole(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    return torch.stack(norms).norm() if norms else torch.zeros(())
