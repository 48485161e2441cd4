"""What is minimised.  A new one is a file with a subclass of `Objective` and its Options, and a line in OBJECTIVES."""

from __future__ import annotations

from typing import Any

from cibr.errors import UsageError
from cibr.models import Model
from cibr.objectives.alignment import Align, Ceb, Variance
from cibr.objectives.alignment_ib import AlignmentBottleneck
from cibr.objectives.cibr import Cibr
from cibr.objectives.classes import Classes
from cibr.objectives.contrastive import Clip, Clip2, MeanPos, Objective, SigLip
from cibr.objectives.penalty import Penalised

__all__ = ["DEFAULT", "OBJECTIVES", "Objective", "Penalised", "build", "options_type"]

OBJECTIVES: dict[str, type[Objective]] = {
    "clip": Clip,
    "siglip": SigLip,
    "clip2": Clip2,
    "meanpos": MeanPos,
    "cibr": Cibr,
    "align": Align,
    "ceb": Ceb,
    "variance": Variance,
    "classes": Classes,
    "aib": AlignmentBottleneck,
}
DEFAULT = "clip"


def options_type(name: Any) -> type:
    """The dataclass of an objective's options.  Raises UsageError for an unknown one."""
    if name not in OBJECTIVES:
        raise UsageError(f"--objective is {name!r}; known are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name].Options


def build(options: Any, model: Model) -> Objective:
    """The objective that `options` are of, for a model's widths.  Raises UsageError for options that make no sense."""
    if model.objective not in (None, options.objective):
        raise UsageError(f"--model {model.options.model} is trained by --objective {model.objective} only")
    return OBJECTIVES[options.objective](options, model)
