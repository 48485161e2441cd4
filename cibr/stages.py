"""The stages of a run: what is minimised, which weights move, for how many steps, at which rate.

Most runs have one.  `--stages` takes them in turn, and so does the list `stages` of a configuration file:

    STEPS:PATTERN[:FACTOR]                           the run's objective, at FACTOR times its rate
    {steps: 200, train: PATTERN, lr: 1e-3, objective: cibr, lam: 0.1}
                                                     every key may be left out; further ones are the objective's options

`train` is a regular expression that the names of the model's moving parameters match; critics always move.  The last
stage goes on to the end of the run.  Stages of one objective share its parameters: a later one goes on with the critics
of the one before.  Which stage it is depends on the step alone, so a run is resumed within any.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cibr import objectives
from cibr.config import RunConfig, check, of_kind
from cibr.errors import UsageError
from cibr.models import Model
from cibr.needs import Needs
from cibr.objectives import Objective

KEYS = ("steps", "train", "lr", "objective")
EVERYTHING = re.compile("")


@dataclass(frozen=True)
class StageOptions:
    """One stage as the configuration has it."""

    objective: Any  # the Options of an objective
    steps: float = math.inf
    pattern: re.Pattern[str] = EVERYTHING
    factor: float = 1.0  # of the learning rates


@dataclass(frozen=True)
class Stage:
    """Steps in which only parameters whose names match `pattern` move, by `objective`, at `factor` times their rate."""

    objective: Objective
    steps: float  # infinite for the last one
    pattern: re.Pattern[str] = EVERYTHING
    factor: float = 1.0


def stages_of(config: RunConfig) -> list[StageOptions]:
    """The stages in turn, by default one of everything; the last has no end.  UsageError for what is none."""
    texts = config.optim.stages
    stages = [stage_of(text, config, last=text is texts[-1]) for text in texts] or [StageOptions(config.objective)]
    return [*stages[:-1], dataclasses.replace(stages[-1], steps=math.inf)]


def stage_of(text: str, config: RunConfig, *, last: bool) -> StageOptions:
    """One stage from either notation."""
    try:
        if text.lstrip().startswith("{"):
            return stage_of_keys(json.loads(text), config, last=last)
        steps, _, rest = text.partition(":")
        pattern, _, factor = rest.rpartition(":") if re.search(r":[\d.]+$", rest) else (rest, "", "1")
        return StageOptions(config.objective, whole_steps(steps), re.compile(pattern), float(factor))
    except (ValueError, re.error) as error:
        form = "STEPS:PATTERN[:FACTOR] or {" + ", ".join(f'"{key}": ...' for key in KEYS) + "}"
        raise UsageError(f"--stages {text!r} is not {form}: {error}") from error


def stage_of_keys(values: Mapping[str, Any], config: RunConfig, *, last: bool) -> StageOptions:
    """Raises ValueError or re.error for keys and values that make no stage."""
    name = values.get("objective", config.objective.objective)
    kind = objectives.options_type(name)
    own = {key: value for key, value in values.items() if key not in KEYS}
    known = [field.name for field in dataclasses.fields(kind) if field.name != "objective"]
    if unknown := sorted(set(own) - set(known)):
        raise ValueError(f"unknown {', '.join(unknown)}; known are {', '.join((*KEYS, *known))}")
    inherited = dataclasses.asdict(config.objective) if name == config.objective.objective else {"objective": name}
    objective = of_kind(kind, {**inherited, **own})
    check(objective)
    if not last and "steps" not in values:
        raise ValueError("only the last stage can do without steps")
    lr = values.get("lr", config.optim.lr)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not lr > 0:
        raise ValueError(f"lr is {lr!r}, but must be a positive number")
    train = values.get("train", "")
    if not isinstance(train, str):
        raise ValueError(f"train is {train!r}, but must be a regular expression")
    return StageOptions(objective, whole_steps(values.get("steps", 1)), re.compile(train), lr / config.optim.lr)


def whole_steps(value: Any) -> int:
    """Raises ValueError for what is no number of steps."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"steps is {value!r}, but must be a positive whole number")
    return value


def build(config: RunConfig, model: Model, device: str) -> list[Stage]:
    """The stages with their objectives, on `device`; those of one name share parameters and buffers.

    Raises UsageError for two of one name whose parameters are not alike.
    """
    first: dict[str, Objective] = {}
    stages = []
    for options in stages_of(config):
        objective = objectives.build(options.objective, model).to(device)
        name = options.objective.objective
        share(first.setdefault(name, objective), objective, name)
        stages.append(Stage(objective, options.steps, options.pattern, options.factor))
    return stages


def share(source: Objective, other: Objective, name: str) -> None:
    """Makes the parameters and buffers of `source` those of `other`."""
    if source is other:
        return
    tensors = source.state_dict(keep_vars=True)
    shapes = [{key: t.shape for key, t in state.items()} for state in (tensors, other.state_dict())]
    if differing := sorted(key for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key)):
        raise UsageError(
            f"--stages: all stages of {name} share its parameters, but with the options of a later one "
            f"{differing[0]} is another"
        )
    other.load_state_dict(tensors, assign=True)


def critics_of(stages: Sequence[Stage]) -> nn.Module:
    """All parameters and buffers of the objectives, each once: the one objective, or a dictionary of them by name."""
    distinct: dict[str, Objective] = {}
    for stage in stages:
        distinct.setdefault(stage.objective.options.objective, stage.objective)
    return stages[0].objective if len(distinct) == 1 else nn.ModuleDict(distinct)


def needs(stages: Iterable[Stage]) -> Needs:
    """What any of them asks of a batch."""
    found = Needs()
    for stage in stages:
        found |= stage.objective.needs(stage.objective.options)
    return found


def stage_at(stages: Iterable[Stage], step: int) -> tuple[Stage, bool]:
    """The stage of step `step`, counted from 0, and whether it ends with it."""
    for stage in stages:
        if step < stage.steps:
            return stage, step + 1 == stage.steps
        step -= int(stage.steps)
    raise AssertionError("the last stage has no end")
