"""Small runs: tiny models on drawn shapes, in process or as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cibr.config import RunConfig
from cibr.run import checkpoint
from cibr.run.journal import read_log

ROOT = Path(__file__).parents[2]
CONV: dict[str, Any] = {
    "model": "conv",
    "image_size": 16,
    "conv_width": 2,
    "text_tower_width": 32,
    "text_layers": 1,
    "embed_dim": 16,
}
RUN: dict[str, Any] = {
    "data": "synthetic:200",
    "steps": 6,
    "batch_size": 16,
    "lr_warmup_steps": 5,
    "precision": "fp32",
    "device": "cpu",
    "threads": 1,
    "workers": 0,
}
CIBR: dict[str, Any] = {"objective": "cibr", "critic_hidden": 8, "lam_warmup_steps": 2, "lam_ramp_steps": 2}
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def config(out: Path, **options: Any) -> RunConfig:
    """A run of the small convolutional model, or of what `options` say."""
    model = CONV if options.get("model", "conv") == "conv" else {}
    return RunConfig.from_dict({**RUN, **model, "out": str(out), **options})


def quick_to_start(folder: Path) -> dict[str, Any]:
    """Options of a run that imports neither open_clip nor torchvision, for processes that import everything anew."""
    n = 200
    tensors = {f"{name}_features": torch.randn(n, 8) for name in ("image", "text")}
    path = folder / "features.safetensors"
    save_file({**tensors, "caption_starts": torch.arange(n + 1), "group_ids": torch.arange(n)}, path)
    return {**RUN, "model": "heads", "embed_dim": 16, "data": f"features:{path}"}


def tiny_clip(folder: Path, **parts: Any) -> str:
    """`--model` of an open_clip model of 1.6 million parameters; `parts` replace those of its configuration."""
    path = folder / "tiny.json"
    path.write_text(json.dumps({**TINY_CLIP, **parts}))
    return f"open_clip:{path}"


def log_of(run: Path) -> list[dict[str, Any]]:
    """The entries of training."""
    return [entry for entry in read_log(run / "log.jsonl") if "eval" not in entry]


def state(run: Path) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint holds."""
    found = checkpoint.find(run)
    assert found is not None
    return {**checkpoint.load_weights(found), **checkpoint.load_training(found)}


def require_same_state(one: Path, other: Path) -> None:
    """The same bits: weights, critics, optimiser."""
    states = state(one), state(other)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def flags(**options: Any) -> list[str]:
    """`batch_size=3` -> ["--batch-size", "3"]."""
    found = []
    for name, value in options.items():
        name = name.replace("_", "-")
        found += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return found


def start(*arguments: object, ranks: int = 1, **more: Any) -> subprocess.Popen[str]:
    """`python -m cibr ARGUMENTS`, under torchrun where there are several ranks."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, "-W", "ignore", *several, "-m", "cibr", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen(command, env=environment, text=True, **pipes)
