"""Critics and encoders in turns, `--update alternating`, instead of one backward that moves both.

    critics    n_critic turns, each on features without a graph of a batch of its own
    encoders   one turn, on the last of these batches, with the critics as they then are and fixed

The last batch is encoded once for both.  Running statistics and the objective's count of steps move in the encoders'
turn only, so that each step counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cibr.models import Batch, Output
from cibr.run.sharding import gradient_norm

if TYPE_CHECKING:
    from cibr.stages import Stage
    from cibr.step import Players


def critics_turn(players: Players, stage: Stage, output: Output, batch: Batch, step: int, turn: int) -> Tensor:
    """Moves the critics by one batch; no gradient reaches its features.  Returns the norm of their gradient, 0-d.

    Where that is not finite, nothing moves.  The noise is that of (seed, step, turn), the same on all ranks.
    """
    objective = stage.objective
    players.clock.mark("critics")
    kept = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    players.seed(step, 0, 0, turn + 1)
    objective(Output.of({name: t.detach() for name, t in output.tensors().items()}), batch)["loss"].backward()
    for buffer, value in kept:
        buffer.copy_(value)
    players.ranks.average(objective.parameters())
    norm = gradient_norm(objective.parameters())
    if torch.isfinite(norm):
        players.optimizer.step()  # weights without a gradient stay: the model's have none yet
    players.optimizer.zero_grad()
    return norm


@contextmanager
def fixed(objective: nn.Module) -> Iterator[None]:
    """Its parameters get no gradient meanwhile."""
    objective.requires_grad_(False)
    try:
        yield
    finally:
        objective.requires_grad_(True)
