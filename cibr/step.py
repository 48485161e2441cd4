"""One step: towers, objective, backward, update.

With --accumulate towers and objective meet at the features (`cibr_kernels.accumulate`): the objective's backward ends
in their gradients, and the towers' begins there.  So a batch is encoded in parts without being cut for the loss.

Random numbers are drawn anew from (seed, step, rank, part) before each encoding and from (seed, step) before the
objective, so a step depends on nothing that came before it but the weights.

Critics move in the same backward, or before it in turns of their own (`cibr.critics`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cibr_kernels as ck
from cibr.config import RunConfig
from cibr.critics import critics_turn, fixed
from cibr.models import Batch, Model, Output
from cibr.run.clock import Clock
from cibr.run.ema import Ema
from cibr.run.ranks import Ranks
from cibr.run.sharding import gradient_norm, is_sharded
from cibr.stages import EVERYTHING, Stage

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

    @cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        """The model's, by name: going through all modules takes longer than a head's loss."""
        return dict(self.model.named_parameters())

    @cached_property
    def critic_weights(self) -> list[nn.Parameter]:
        return list(self.critics.parameters())

    @cached_property
    def buffers(self) -> list[Tensor]:
        return [*self.model.buffers(), *self.critics.buffers()]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = DTYPES.get(self.config.run.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device, dtype)

    def seed(self, step: int, *more: int) -> None:
        """Sets the random states of the CPU and the device by the run's seed and these numbers."""
        words = np.random.SeedSequence((self.config.run.seed, step, *more)).generate_state(2, np.uint32)
        seed = int(words[0]) << 32 | int(words[1])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for every kind of device, half a ms a call
        if self.device == "cuda":
            torch.cuda.manual_seed(seed)


@dataclass(frozen=True)
class Taken:
    """A step that was taken, or skipped because something was not finite: nothing has changed then.

    But for the turns of critics that came before and were finite.
    """

    parts: dict[str, Tensor]  # of the loss, means over ranks; norms of the gradients, before clipping
    finite: bool

    def numbers(self) -> str:
        return ", ".join(f"{name} {value.item():.4g}" for name, value in self.parts.items())


def take_step(players: Players, stage: Stage, batches: Sequence[Batch], step: int) -> Taken:
    """Moves the weights by this rank's rows of a batch, the last one; those before it are for critics' turns only."""
    before = [(buffer, buffer.clone()) for buffer in players.buffers]
    for p in itertools.chain(players.weights.values(), players.critic_weights):
        p.grad = None
    for turn, batch in enumerate(batches[:-1]):
        turn_on_fresh(players, stage, batch, step, turn)
    parts = forward_backward(players, stage, batches[-1], step, turn=len(batches) - 1)
    players.clock.mark("update")
    players.scaler.unscale_(players.optimizer)
    both = (players.weights.values(), players.critic_weights)
    norm, critic_norm = (gradient_norm(weights).to(players.device) for weights in both)
    critic_norm = parts.pop("critic_gradient_norm", critic_norm)  # of a turn of their own
    parts = players.ranks.mean({name: value.detach() for name, value in parts.items()})
    parts |= {"gradient_norm": norm, "critic_gradient_norm": critic_norm}
    decisive = [parts["loss"].double(), norm.double(), critic_norm.double()]
    finite = all(map(math.isfinite, torch.stack(decisive).tolist()))
    if finite:
        update(players, stage, norm, step)
    else:
        for buffer, value in before:
            buffer.copy_(value)
    players.scaler.update()
    return Taken(parts, finite)


def forward_backward(players: Players, stage: Stage, batch: Batch, step: int, turn: int = 0) -> dict[str, Tensor]:
    """Leaves the whole batch's gradients, averaged over ranks, in the parameters; returns the parts of the loss.

    With --update alternating the critics first take their `turn` on this batch, and get no gradient after it.
    """
    pieces = cut(batch, players.config.optim.accumulate)
    parts: dict[str, Tensor] = {}
    names: list[str] = []  # of what the towers give

    def encode_part(k: int) -> list[Tensor]:
        found = encode(players, pieces[k], step, k).tensors()
        names[:] = found
        return list(found.values())

    def loss(*tensors: Tensor) -> Tensor:
        output = Output.of(dict(zip(names, tensors, strict=True)))
        if alternates(players, stage):
            parts["critic_gradient_norm"] = critics_turn(players, stage, output, batch, step, turn)
            meanwhile.enter_context(fixed(stage.objective))
        players.clock.mark("loss")
        players.seed(step)
        parts.update(stage.objective(output, batch))
        return players.scaler.scale(parts["loss"])

    with contextlib.ExitStack() as meanwhile:
        ck.accumulate(encode_part, range(len(pieces)), loss, model=players.called)
    players.ranks.average(left_to_average(players))
    return parts


def alternates(players: Players, stage: Stage) -> bool:
    """Whether the critics have turns of their own, and there are any."""
    return players.config.optim.update == "alternating" and any(True for _ in stage.objective.parameters())


def turn_on_fresh(players: Players, stage: Stage, batch: Batch, step: int, turn: int) -> None:
    """A turn of the critics on a batch that the encoders do not learn from."""
    if not alternates(players, stage):
        return
    pieces = cut(batch, players.config.optim.accumulate)
    with torch.no_grad():
        outputs = [encode(players, piece, step, k, turn + 1).tensors() for k, piece in enumerate(pieces)]
    whole_batch = {n: torch.cat([out[n] for out in outputs]) if t.ndim else t for n, t in outputs[0].items()}
    critics_turn(players, stage, Output.of(whole_batch), batch, step, turn)


def cut(batch: Batch, count: int) -> list[Batch]:
    """The batch in at most `count` parts."""
    rows = len(batch["index"])
    return [{name: t[part] for name, t in batch.items()} for part in slices(rows, min(count, rows))]


def left_to_average(players: Players) -> Iterator[nn.Parameter]:
    """Parameters whose gradients are still this rank's: critics', and scalars under FSDP."""
    yield from players.critic_weights
    if any(is_sharded(p) for p in players.weights.values()):
        yield from (p for p in players.weights.values() if not is_sharded(p))


def encode(players: Players, piece: Batch, step: int, part: int, *more: int) -> Output:
    players.clock.mark("towers")
    players.seed(step, players.ranks.rank, part, *more)
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
    """The optimiser's step on what the stage trains; the gradient, of `norm`, is cut to --clip-gradient before."""
    largest = players.config.optim.clip_gradient
    if largest is not None:
        factor = min(
            1.0, largest / (norm.item() + 1e-6)
        )  # as clip_grad_norm_, which takes no mixture of sharded and not
        for p in players.weights.values():
            if p.grad is not None:
                p.grad.mul_(factor)
    if stage.pattern is not EVERYTHING:
        for name, p in players.weights.items():
            if not stage.pattern.search(name):
                p.grad = None
    players.scaler.step(players.optimizer)
    players.model.clamp_scale()
    if players.ema is not None:
        players.ema.update(step)
