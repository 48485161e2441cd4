"""Image-text models, whatever they are made of: two towers that keep what enters their projections.

A new model is a file with a subclass of `Model` and its Options, and a line in MODELS.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from cibr.errors import UsageError
from cibr.models.conv import Conv
from cibr.models.features import Batch, Features, Output
from cibr.models.heads import Heads
from cibr.models.model import Facts, Model
from cibr.models.open_clip import OpenClip
from cibr.models.prompts import Coop, Maple

__all__ = ["DEFAULT", "MODELS", "Batch", "Facts", "Features", "Model", "Output", "build", "rebuild"]

MODELS: dict[str, type[Model]] = {"conv": Conv, "heads": Heads, "open_clip": OpenClip, "coop": Coop, "maple": Maple}
DEFAULT = "conv"


def kind_of(spec: Any) -> type[Model]:
    """`open_clip:ViT-B-32` -> OpenClip.  Raises UsageError for an unknown kind."""
    kind = str(spec).partition(":")[0]
    if kind not in MODELS:
        hint = f"; did you mean open_clip:{spec}?" if "-" in kind else ""
        raise UsageError(f"--model {spec} is unknown; known are {', '.join(MODELS)}{hint}")
    return MODELS[kind]


def options_type(spec: Any) -> type:
    """The dataclass of the options of the model that `spec` names."""
    return kind_of(spec).Options


def build(options: Any, facts: Facts = Facts()) -> Model:
    """A new model, with pretrained weights where the options name some.  Raises UsageError for what cannot be made."""
    kind = kind_of(options.model)
    model = kind(options, kind.new_recipe(options, facts))
    model.load_pretrained()
    if options.initial_scale is not None:
        nn.init.constant_(model.temperature()[0], math.log(options.initial_scale))
    return model


def rebuild(options: Any, recipe: dict[str, Any]) -> Model:
    """The model of a checkpoint, whose weights are still to be loaded."""
    return kind_of(options.model)(options, recipe)
