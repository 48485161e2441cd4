"""How weights move: schedules, learning rates by depth and tower, weight decay, stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from runs import TINY_CLIP, tiny_clip
from torch import nn

from cibr import models, objectives
from cibr.config import OptimOptions
from cibr.errors import UsageError
from cibr.models.open_clip import OpenClipOptions
from cibr.stages import make_optimizer, progress, rate, stage_at, stages_of, tower_factors


def rates(**options: Any) -> list[float]:
    chosen = OptimOptions(**options)
    assert chosen.steps is not None
    return [rate(chosen, step, progress(chosen, step, 0.0)) for step in range(chosen.steps)]


def test_schedules() -> None:
    assert rates(steps=6, lr_warmup_steps=2, schedule="constant") == [0.5, 1, 1, 1, 1, 1]
    cooled = rates(steps=6, lr_warmup_steps=2, schedule="cooldown", cooldown_steps=4)
    assert cooled == [0.5, 1, 1, 0.75, 0.5, 0.25]
    cosine = [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]  # open_clip's
    assert rates(steps=6, lr_warmup_steps=2) == pytest.approx([0.5, 1, *cosine])
    budget = OptimOptions(seconds=10.0, lr_warmup_steps=2)
    assert rate(budget, 9, progress(budget, 9, 5.0)) == pytest.approx(0.5)
    both = OptimOptions(seconds=10.0, steps=100, lr_warmup_steps=0)
    assert progress(both, 10, 8.0) == 0.8 and progress(both, 90, 8.0) == 0.9


@pytest.fixture
def clip(tmp_path: Path) -> models.Model:
    vision = {**TINY_CLIP["vision_cfg"], "layers": 3}
    return models.build(OpenClipOptions(model=tiny_clip(tmp_path, vision_cfg=vision)))


def test_rates_fall_with_depth_and_differ_between_towers(clip: models.Model) -> None:
    factors = tower_factors(OptimOptions(steps=1, layer_decay=0.5, image_lr=0.1, text_lr=10.0), clip)
    expected = {
        "clip.visual.proj": 0.1,
        "clip.visual.ln_post.weight": 0.1,
        "clip.visual.transformer.resblocks.2.ln_1.weight": 0.05,
        "clip.visual.transformer.resblocks.0.mlp.c_fc.weight": 0.0125,
        "clip.visual.conv1.weight": 0.00625,
        "clip.visual.class_embedding": 0.00625,
        "clip.text_projection": 10,
        "clip.ln_final.bias": 10,
        "clip.transformer.resblocks.0.attn.in_proj_weight": 5,
        "clip.token_embedding.weight": 2.5,
        "clip.logit_scale": 1,
    }
    for name, factor in expected.items():
        assert factors[name] == pytest.approx(factor), name
    assert factors.keys() == dict(clip.named_parameters()).keys()


def test_groups(clip: models.Model) -> None:
    """Critics at their own rate; no weight decay in one dimension, nor where the names say so; each parameter once."""
    objective = objectives.build(objectives.options_type("cibr")(critic_hidden=4), clip)
    options = OptimOptions(steps=1, lr=1e-3, no_decay="token_embedding|positional", weight_decay=0.3)
    groups = make_optimizer(options, clip, objective).param_groups
    placed = {name: group for group in groups for name in group["names"]}
    everything = {f"model.{n}": p for n, p in clip.named_parameters()}
    everything |= {f"objective.{n}": p for n, p in objective.named_parameters()}
    assert placed.keys() == everything.keys() and sum(len(group["params"]) for group in groups) == len(everything)
    for name, p in everything.items():
        spared = p.ndim < 2 or "token_embedding" in name or "positional" in name
        assert placed[name]["weight_decay"] == (0 if spared else 0.3), name
        assert placed[name]["peak_lr"] == (2e-3 if name.startswith("objective.") else 1e-3)
    small = make_optimizer(OptimOptions(steps=1, lr=1e-5), clip, objective).param_groups
    assert {group["peak_lr"] for group in small} == {1e-5, 1e-4}


def test_stages() -> None:
    stages = stages_of(OptimOptions(steps=9, stages=("2:proj:0.5", "3:(?:a|b)", "1:")))
    found = [(stage_at(stages, step).pattern.pattern, stage_at(stages, step).factor) for step in (0, 1, 2, 4, 5, 99)]
    assert found == [("proj", 0.5)] * 2 + [("(?:a|b)", 1.0)] * 2 + [("", 1.0)] * 2
    assert stage_at(stages_of(OptimOptions(steps=1)), 10**9).pattern.pattern == ""
    for wrong in ("proj", "x:proj", "3:("):
        with pytest.raises(UsageError, match="is not STEPS:PATTERN"):
            stages_of(OptimOptions(steps=1, stages=(wrong,)))


def test_what_cannot_be_trained(clip: models.Model) -> None:
    with pytest.raises(UsageError, match="is no regular expression"):
        make_optimizer(OptimOptions(steps=1, no_decay="("), clip, nn.Module())
    for p in clip.parameters():
        p.requires_grad_(False)
    with pytest.raises(UsageError, match="every parameter is locked"):
        make_optimizer(OptimOptions(steps=1), clip, nn.Module())
