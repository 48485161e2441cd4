"""Checkpoints: RUN/checkpoints/step-00000100/, each written whole or not at all, the last two kept.

model.safetensors   the weights, all that evaluation needs besides
model.json          the run's options, its vocabulary, and the concepts and styles it was trained on
training.pt         optimiser, critics, random state and counters: what an exact resume needs
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cibr.config import TrainConfig
from cibr.errors import UsageError, missing_extra
from cibr.models import TwoTower
from cibr.models.text import Vocabulary
from cibr.run.atomic import atomic_directory, remove_partial

KEPT = 2


@dataclass(frozen=True)
class About:
    """What has to be known of a run to use its weights."""

    config: TrainConfig
    bpe_ids: list[int]
    seen: list[str]  # keys of the concepts trained on
    train_styles: list[str]
    test_styles: list[str]  # of the vendor held out


def save(run: Path, step: int, model: nn.Module, about: About, training: dict[str, Any]) -> Path:
    """Writes the checkpoint of `step` and removes all but the last two. A step already saved is left as it is."""
    from safetensors.torch import save_file

    path = run / "checkpoints" / f"step-{step:08d}"
    if not path.exists():
        with atomic_directory(path) as work:
            save_file(
                {name: value.contiguous() for name, value in model.state_dict().items()}, work / "model.safetensors"
            )
            (work / "model.json").write_text(json.dumps(asdict(about)))
            torch.save(training, work / "training.pt")
    for old in sorted(path.parent.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return path


def find(path: Path) -> Path | None:
    """The checkpoint at `path`, or the last one of the run at `path`; None if there is neither."""
    if (path / "model.json").is_file():
        return path
    return max((path / "checkpoints").glob("step-*"), default=None)


def clean(run: Path) -> None:
    """Removes what a killed run left half-written."""
    remove_partial(run / "checkpoints")


def read_about(path: Path) -> About:
    about = json.loads((path / "model.json").read_text())
    return About(**{**about, "config": TrainConfig.from_dict(about["config"])})


def load_weights(path: Path, model: nn.Module) -> None:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise missing_extra(error) from error
    model.load_state_dict(load_file(path / "model.safetensors"))


def load_training(path: Path) -> dict[str, Any]:
    return torch.load(path / "training.pt", map_location="cpu", weights_only=True)


def build_model(config: TrainConfig, vocabulary: Vocabulary) -> TwoTower:
    return TwoTower(
        len(vocabulary),
        config.context_length,
        image_width=config.image_width,
        text_width=config.text_width,
        text_layers=config.text_layers,
        embed_dim=config.embed_dim,
    )


def load_model(path: Path) -> tuple[TwoTower, Vocabulary, About]:
    """The model of a checkpoint or of a run's last one, in evaluation mode. Raises UsageError if there is none."""
    found = find(path)
    if found is None:
        raise UsageError(f"there is no checkpoint at {path}")
    about = read_about(found)
    vocabulary = Vocabulary(about.bpe_ids, about.config.context_length)
    model = build_model(about.config, vocabulary)
    load_weights(found, model)
    return model.eval(), vocabulary, about
