"""Runs of `cibr omib` trained at once: their weights stacked, `torch.vmap` over them, one AdamW.

A run's model, data, rows of every batch, learning rates and weight decay are those of `cibr.omib.train`; the noise is
drawn for all runs together, so a run here is one of `cibr omib` with another noise.  No gradient passes between runs:
the loss that is differentiated is a sum over them, and AdamW treats each weight alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel

from cibr.omib import train
from cibr.omib.data import Data
from cibr.omib.options import OmibOptions

Opened = Callable[[OmibOptions], Data]


class Stack:
    """Runs that differ in data, seed, beta, learning rate and weight decay alone.

    opened: the data of a run, asked for once for each (options.data, options.seed).
    """

    def __init__(self, options: Sequence[OmibOptions], opened: Opened) -> None:
        options = sorted(options, key=rates)
        first = {(o.data, o.seed): o for o in options}
        data = {key: opened(o) for key, o in first.items()}
        self.runs = [train.start(o, data[o.data, o.seed]) for o in options]
        places = {key: k for k, key in enumerate(data)}
        self.of = torch.tensor([places[o.data, o.seed] for o in options])  # the data of each run
        batches = [d.train.batch() for d in data.values()]
        self.rows = {key: torch.stack([b[key] for b in batches]) for key in batches[0]}
        self.betas = torch.tensor([run.objective.beta for run in self.runs])
        self.model, self.objective = self.runs[0].model, self.runs[0].objective
        alike = [list(group) for _, group in itertools.groupby(self.runs, key=lambda run: rates(run.options))]
        self.weights = [leaves(group) for group in alike]
        groups = [
            {"params": list(weights.values()), "weight_decay": group[0].options.weight_decay}
            for weights, group in zip(self.weights, alike, strict=True)
        ]
        self.optimizer, self.first = torch.optim.AdamW(groups, fused=True), [group[0] for group in alike]
        self.step = 0

    def params(self) -> dict[str, Tensor]:
        """Every weight, (runs, ...) each."""
        return {name: torch.cat([weights[name] for weights in self.weights]) for name in self.weights[0]}

    @property
    def total(self) -> int:
        options = self.runs[0].options
        return options.warm_up_steps * self.model.method.branches + options.steps

    def take_step(self) -> dict[str, Tensor]:
        """One update of every run -> the parts of the losses, (runs,) each."""
        warm_up = train.warming(self.runs[0], self.step)
        rows = torch.stack([train.rows_of(run, self.step) for run in self.runs])
        batch = {key: values[self.of[:, None], rows] for key, values in self.rows.items()}

        def parts_of(params: dict[str, Tensor], beta: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            self.objective.beta = beta
            return self.objective(functional_call(self.model, params, (batch,), {"warm_up": warm_up}), batch)

        for group, run in zip(self.optimizer.param_groups, self.first, strict=True):
            group["lr"] = train.rate(run, self.step)
        self.model.train()
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused one
            parts = torch.vmap(parts_of, randomness="different")(self.params(), self.betas, batch)
        self.optimizer.zero_grad()
        parts["loss"].sum().backward()
        self.optimizer.step()
        self.step += 1
        return {name: value.detach() for name, value in parts.items()}

    def trained(self, every: int = 50) -> list[dict[str, Tensor]]:
        """All steps -> the parts of the losses at every `every`th step and the last."""
        torch.manual_seed(self.runs[0].options.seed)
        seen = []
        while self.step < self.total:
            parts = self.take_step()
            if self.step % every == 0 or self.step == self.total:
                seen.append(parts)
        return seen

    @torch.no_grad()
    def measured(self, split: str) -> list[dict[str, float]]:
        """Of each run `train.evaluate` on "val" or "test"."""
        found, params = [], self.params()
        for k, run in enumerate(self.runs):
            run.model.load_state_dict({name: value[k] for name, value in params.items()})
            found.append(train.evaluate(run, getattr(run.data, split)))
        return found


def rates(options: OmibOptions) -> tuple[float, float]:
    return options.lr, options.weight_decay


def leaves(runs: Sequence[train.Run]) -> dict[str, Tensor]:
    """The runs' weights, stacked, to be trained."""
    params, _ = stack_module_state([run.model for run in runs])
    return {name: value.detach().requires_grad_() for name, value in params.items()}
