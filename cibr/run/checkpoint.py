"""Checkpoints: RUN/checkpoints/step-00000100/, each written whole or not at all.

model.safetensors      the weights; their moving average where the run keeps one
training.safetensors   optimiser, critics, weights that are averaged: the tensors that an exact resume needs besides
about.json             configuration, the model's recipe, the data's fingerprint, counters, and the files' SHA-256
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cibr import models
from cibr.config import RunConfig
from cibr.errors import UsageError, missing_extra
from cibr.run import first_format
from cibr.run.atomic import atomic_directory, remove_partial

FORMAT = 2
FILES = ("model.safetensors", "training.safetensors")


@dataclass(frozen=True)
class LoadedRun:
    model: models.Model  # in evaluation mode, on the CPU
    config: RunConfig
    step: int
    about: dict[str, Any]  # as about.json holds it


class Unwritable(UsageError):
    """A checkpoint could not be written: a full disk, for one."""


def save(
    run: Path,
    step: int,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    about: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Writes the checkpoint of `step`; removes all but the last `keep` and the best one, whose step RUN/best.json has.

    A step already saved is left as it is.  Raises Unwritable in words; earlier checkpoints are then still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = run / "checkpoints" / f"step-{step:08d}"
    if not path.exists():
        try:
            with atomic_directory(path) as work:
                for name, tensors in zip(FILES, (weights, training), strict=True):
                    save_file({key: t.detach().contiguous() for key, t in tensors.items()}, work / name)
                sums = {name: sha256(work / name) for name in FILES}
                text = json.dumps({"format": FORMAT, "step": step, **about, "sha256": sums})
                (work / "about.json").write_text(text)
        except (OSError, SafetensorError) as error:
            raise Unwritable(
                f"the checkpoint of step {step} could not be written: {error}; earlier ones are whole. "
                "Make room, and --resume goes on from the last one"
            ) from error
    best = read_best(run)
    for old in sorted(path.parent.glob("step-*"))[:-keep]:
        if best is None or old.name != f"step-{best:08d}":
            shutil.rmtree(old)
    return path


def read_best(run: Path) -> int | None:
    """The step of the best checkpoint; None before the first evaluation."""
    try:
        return json.loads((run / "best.json").read_text())["step"]
    except (OSError, ValueError, KeyError):
        return None


def candidates(path: Path) -> Iterator[Path]:
    """The checkpoint at `path`, or those of the run at `path`, the newest first."""
    if any((path / name).is_file() for name in ("about.json", "model.json")):
        yield path
    else:
        yield from sorted((path / "checkpoints").glob("step-*"), reverse=True)


def find(path: Path) -> Path | None:
    """The checkpoint at `path`, or the newest undamaged one of the run at `path`; None if there is none.

    Says on stderr which ones are damaged.
    """
    for found in candidates(path):
        problem = damage(found)
        if problem is None:
            return found
        print(f"cibr: {found} is damaged ({problem}); the one before it is used instead", file=sys.stderr)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        if first_format.holds(path):
            return first_format.damage(path)
        about = json.loads((path / "about.json").read_text())
        changed = [name for name, digest in about["sha256"].items() if sha256(path / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{changed[0]} is not what was written" if changed else None


def clean(run: Path) -> None:
    """Removes what a killed run left half-written."""
    remove_partial(run)
    remove_partial(run / "checkpoints")


def read_about(path: Path) -> dict[str, Any]:
    if first_format.holds(path):
        return first_format.read_about(path)
    return json.loads((path / "about.json").read_text())


def load_weights(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise missing_extra(error) from error
    weights = load_file(path / "model.safetensors")
    return first_format.rename(weights) if first_format.holds(path) else weights


def load_training(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "training.safetensors")


def load_run(path: Path) -> LoadedRun:
    """The model of the checkpoint at `path`, or of the run's last one.  Raises UsageError if there is none."""
    found = find(path)
    if found is None:
        raise UsageError(f"there is no checkpoint at {path}")
    about = read_about(found)
    config = RunConfig.from_dict(about["config"])
    model = models.rebuild(config.model, about["recipe"])
    model.load_state_dict(load_weights(found))
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise UsageError(f"{found}: weights that are not finite, {broken[0]} and {len(broken) - 1} more")
    return LoadedRun(model.eval(), config, about["step"], about)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
