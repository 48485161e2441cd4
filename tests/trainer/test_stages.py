"""How weights move: schedules, learning rates by depth and tower, weight decay, and the stages of a run."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY_CLIP, config, log_of, require_same_state, state, tiny_clip
from torch import nn

from cibr import models, objectives
from cibr.config import OptimOptions, read_options
from cibr.errors import UsageError
from cibr.models.open_clip import OpenClipOptions
from cibr.rates import make_optimizer, progress, rate, tower_factors
from cibr.run.sharding import like
from cibr.stages import Stage, StageOptions, stage_at, stages_of
from cibr.train import train


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


def test_a_fused_update_is_the_plain_one_in_any_memory_format(clip: models.Model) -> None:
    """Also where the states come from a checkpoint, which keeps them in the plain order."""
    ours = nn.Conv2d(3, 8, 3, bias=False).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(ours).to(memory_format=torch.contiguous_format)
    optimizer = make_optimizer(OptimOptions(steps=1, lr=1e-2, critic_lr=1e-2), clip, ours)
    expected = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, foreach=False, fused=False)
    assert all(group["fused"] for group in optimizer.param_groups)
    for seed in range(4):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        for conv, moves in ((ours, optimizer), (plain, expected)):
            moves.zero_grad()
            conv(images).square().sum().backward()
            moves.step()
        kept = {name: t.contiguous().clone() for name, t in optimizer.state[ours.weight].items()}
        optimizer.state[ours.weight] = {name: t if name == "step" else like(t, ours.weight) for name, t in kept.items()}
    torch.testing.assert_close(ours.weight, plain.weight)


def stages(tmp_path: Path, *texts: str, **options: Any) -> list[StageOptions]:
    return stages_of(config(tmp_path, stages=texts, **options))


def test_stages_of_patterns(tmp_path: Path) -> None:
    found = stages(tmp_path, "2:proj:0.5", "3:(?:a|b)", "1:")
    kept = [Stage(nn.Module(), s.steps, s.pattern, s.factor) for s in found]  # type: ignore[arg-type]
    at = [stage_at(kept, step) for step in (0, 1, 2, 4, 5, 99)]
    assert [(s.pattern.pattern, s.factor) for s, _ in at] == [("proj", 0.5)] * 2 + [("(?:a|b)", 1.0)] * 2 + [
        ("", 1.0)
    ] * 2
    assert [ends for _, ends in at] == [False, True, False, True, False, False]
    (one,) = stages(tmp_path)
    assert one.pattern.pattern == "" and one.steps == math.inf


def test_stages_of_objectives(tmp_path: Path) -> None:
    """Objects of a file and of the command line; the run's own options are where a stage of its objective begins."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "stages:\n- {steps: 2, objective: clip, label_smoothing: 0.1, lr: 2e-3}\n- 3:proj\n"
        "- {steps: 2, train: proj, lam: 0.2}\n- {objective: align}\n"
    )
    texts = read_options(file)["stages"]
    first, second, third, last = stages(tmp_path, *texts, objective="cibr", critic_hidden=4, lr=1e-3)
    assert (first.objective.objective, first.objective.label_smoothing, first.steps) == ("clip", 0.1, 2)
    assert first.factor == pytest.approx(2.0) and second.objective.lam == 0.5
    assert (third.objective.lam, third.objective.critic_hidden, third.pattern.pattern) == (0.2, 4, "proj")
    assert (last.objective.objective, last.objective.noise_std, last.steps) == ("align", 0.25, math.inf)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("proj", "steps is 'proj', but must be a positive whole number"),
        ("x:proj", "steps is 'x', but must be"),
        ("0:proj", "steps is 0, but must be"),
        ("3:(", r"missing \), unterminated subpattern"),
        ('{"steps": 2', "is not STEPS:PATTERN"),
        ('{"steps": 2.5}', "steps is 2.5, but must be"),
        ('{"steps": 2, "lr": "fast"}', "lr is 'fast', but must be a positive number"),
        ('{"steps": 2, "train": 3}', "train is 3, but must be a regular expression"),
        ('{"train": "a"}', "only the last stage can do without steps"),
        ('{"steps": 2, "objective": "clap"}', "--objective is 'clap'; known are clip, siglip"),
        ('{"steps": 2, "lam": 1}', "unknown lam; known are steps, train, lr, objective, label_smoothing"),
        ('{"steps": 2, "objective": "cibr", "lam": -1}', "--lam is -1, but must not be negative"),
    ],
)
def test_what_is_no_stage(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        stages(tmp_path, text, "9:")
    assert text in str(raised.value)


STAGED: dict[str, Any] = {
    "steps": 9,
    "schedule": "constant",
    "save_every": 4,
    "log_every": 2,
    "objective": "cibr",
    "critic_hidden": 8,
    "stages": (
        '{"steps": 2, "objective": "clip", "train": "projection"}',
        '{"steps": 3, "lam": 0.0, "lr": 3e-3}',
        '{"steps": 2, "objective": "siglip"}',
        '{"lam": 0.3}',
    ),
}


@pytest.mark.filterwarnings("ignore:the estimate")
def test_a_run_of_several_objectives_resumes_in_any(tmp_path: Path) -> None:
    """Bit for bit from a checkpoint within each stage; the critics of one objective are those of the stage before."""
    train(config(tmp_path / "whole", **STAGED))
    for steps in (1, 4, 6, 8, 9):
        train(config(tmp_path / "run", **{**STAGED, "steps": steps}), resume=True)
    require_same_state(tmp_path / "run", tmp_path / "whole")

    entries = log_of(tmp_path / "whole")
    assert [entry["step"] for entry in entries] == [1, 2, 4, 5, 6, 7, 8, 9]  # the last of each stage, too
    assert ["image_own" in entry for entry in entries] == [False, False, True, True, False, False, True, True]
    assert state(tmp_path / "whole")["objective.cibr.step"] == 5  # of the two stages together
    assert "logit_bias" in state(tmp_path / "whole")  # which the third stage's objective asks for


def test_stages_of_one_objective_have_critics_of_one_kind(tmp_path: Path) -> None:
    stages = ('{"steps": 2, "critic_hidden": 4}', '{"critic_hidden": 5}')
    with pytest.raises(UsageError, match=r"all stages of cibr share its parameters, .* critics\..* is another"):
        train(config(tmp_path / "run", objective="cibr", stages=stages))


def test_what_cannot_be_trained(clip: models.Model) -> None:
    with pytest.raises(UsageError, match="is no regular expression"):
        make_optimizer(OptimOptions(steps=1, no_decay="("), clip, nn.Module())
    for p in clip.parameters():
        p.requires_grad_(False)
    with pytest.raises(UsageError, match="every parameter is locked"):
        make_optimizer(OptimOptions(steps=1), clip, nn.Module())
