"""Checkpoints of version 0.1, whose runs were all of the small network on emoji: read to be evaluated, not resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

RENAMED = {"image_width": "conv_width", "text_width": "text_tower_width"}
PRECISIONS = {"auto": "auto", "float32": "fp32", "bfloat16": "amp_bf16"}
PENALTY = ("lam", "lam_warmup_steps", "lam_ramp_steps", "noise_std", "critic_hidden")  # clip had them too, unused


def holds(path: Path) -> bool:
    """Whether there is such a checkpoint at `path`."""
    return (path / "model.json").is_file()


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint, or None."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((path / "model.json").read_text())
        with safe_open(path / "model.safetensors", "pt"):
            return None
    except (OSError, ValueError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"


def read_about(path: Path) -> dict[str, Any]:
    """Its facts as about.json would hold them, with those of the split: "seen", "train_styles", "test_styles"."""
    old = json.loads((path / "model.json").read_text())
    given = old["config"]
    config = {RENAMED.get(name, name): value for name, value in given.items()}
    config |= {"data": f"emoji:{given['data']}", "model": "conv"}
    config |= {"precision": PRECISIONS[given["precision"]], "augment": "drawing" if given["augment"] else "none"}
    if given["objective"] == "clip":
        config = {name: value for name, value in config.items() if name not in PENALTY}
    recipe = {"bpe_ids": old["bpe_ids"], "logit_scale": 1 / 0.07, "logit_bias": None}
    split = {name: old[name] for name in ("seen", "train_styles", "test_styles")}
    return {"format": 1, "step": int(path.name.rpartition("-")[2]), "config": config, "recipe": recipe, **split}


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logit_scale" if name == "log_scale" else name: value for name, value in weights.items()}
