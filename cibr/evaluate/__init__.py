"""What a model can do: zero-shot classification, retrieval, probes and information, each a function of features alone.

zero_shot.py    class embeddings by prompts; top-1, top-5, mean per class
retrieval.py    R@1, R@5, R@10 both ways, several captions an image
probes.py       linear and noisy probes, share of variance, neighbours, CKA
information.py  estimates of mutual information on rows the critics never saw
encode.py       from a data set to features
report.py       all of it for the sets named, as a dictionary and as a table
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cibr.errors import UsageError
from cibr.evaluate.report import Specs, evaluate, own_sets, table
from cibr.run import checkpoint

__all__ = ["evaluate", "evaluate_run", "named", "table"]


def named(specs: Sequence[str], option: str) -> dict[str, str]:
    """NAME=SPEC, ... -> {NAME: SPEC}. Raises UsageError for another form and for a name twice."""
    found: dict[str, str] = {}
    for text in specs:
        name, equals, spec = text.partition("=")
        if not equals or not name or not spec:
            raise UsageError(f"{option} {text!r} is not NAME=SPEC, as in {option} pets=pets:DIR")
        if name in found:
            raise UsageError(f"{option} has two sets named {name}; give each a name of its own")
        found[name] = spec
    return found


def evaluate_run(
    path: Path,
    *,
    zero_shot: Specs | None = None,
    retrieval: Specs | None = None,
    probe: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """`evaluate` of the checkpoint at `path`, or the last one of the run there, with what it is: checkpoint, step.

    Without any set named it is on the run's own (`report.own_sets`).
    """
    loaded = checkpoint.load_run(path)
    model = loaded.model.to(device)
    own = None if zero_shot or retrieval else own_sets(loaded.config)
    report = evaluate(model, zero_shot=zero_shot, retrieval=retrieval, probe=probe, options=loaded.config.data, own=own)
    return {"checkpoint": str(path), "step": loaded.step, "objective": loaded.config.objective.objective, **report}
