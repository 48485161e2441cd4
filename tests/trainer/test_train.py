"""Training: it learns, it tells what it does, and what is not finite changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toyset
from runs import CIBR, TINY_CLIP, config, flags, log_of, state, tiny_clip

from cibr.cli import main
from cibr.errors import UsageError
from cibr.models import Output
from cibr.objectives import OBJECTIVES
from cibr.objectives.contrastive import Clip
from cibr.run.checkpoint import load_run
from cibr.run.journal import read_log
from cibr.train import train

pytestmark = pytest.mark.filterwarnings("ignore:the estimate", "ignore:cibr_kernels")


def test_it_learns_and_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Concepts drawn by vendors it was trained on, and by one it never saw."""
    data = toyset.build(tmp_path / "toy", size=16)
    settings = config(
        tmp_path / "run",
        data=f"emoji:{data}",
        hold_out="little-house",
        steps=100,
        conv_width=4,
        lr=3e-3,
        augment="none",
        eval_every=50,
        val_split="held_out",
    )
    outcome = train(settings)
    assert (outcome.step, outcome.skipped_steps, outcome.stopped_by) == (100, 0, None)
    log = log_of(tmp_path / "run")
    assert log[-1]["step"] == 100 and log[-1]["contrastive_loss"] < 0.6 * log[0]["contrastive_loss"]
    assert outcome.last["loss"] == log[-1]["loss"]
    marks = [entry["eval"] for entry in read_log(tmp_path / "run" / "log.jsonl") if "eval" in entry]
    assert (
        len(marks) == 2 and marks[-1]["zero_shot"]["val"]["top5"] > 100 * 5 / 22 * 1.5
    )  # half as much again as chance
    printed = capsys.readouterr().out
    for said in (
        "66 samples",
        "conv: ",
        "parameters",
        "cpu, 1 threads, fp32",
        "100 steps, batches of 16",
        "validation loss",
    ):
        assert said in printed
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_an_entry_is_the_mean_since_the_last_one_and_says_where_time_went(tmp_path: Path) -> None:
    for every in (1, 3):
        train(config(tmp_path / str(every), steps=6, log_every=every, lr_warmup_steps=1, **CIBR))
    single, means = (log_of(tmp_path / str(every)) for every in (1, 3))
    assert [entry["step"] for entry in means] == [1, 3, 6]
    for name in ("loss", "gradient_norm", "image_own"):
        assert means[-1][name] == pytest.approx(sum(entry[name] for entry in single[3:]) / 3)
    shares = means[-1]["share_of_time"]
    assert set(shares) >= {"data", "towers", "loss", "critics", "update"} and sum(shares.values()) == pytest.approx(1)
    assert all(shares[name] > 0 for name in ("data", "towers", "loss", "critics"))
    assert means[-1]["samples_per_second"] > 0 and 0 < means[-1]["lr"] < means[-2]["lr"]


def test_cibr_follows_its_warm_up(tmp_path: Path) -> None:
    train(config(tmp_path / "run", steps=8, log_every=1, **CIBR))
    log = log_of(tmp_path / "run")
    assert [round(entry["lam"], 4) for entry in log] == [0, 0, 0.1667, 0.3333, 0.5, 0.5, 0.5, 0.5]
    for entry in log:
        penalty = entry["image_cmi"] + entry["text_cmi"]
        assert entry["loss"] == pytest.approx(entry["contrastive_loss"] + entry["lam"] * penalty, rel=1e-4)


@pytest.mark.parametrize(("steps", "said"), [(4, True), (5, False)])
def test_a_run_too_short_for_its_weight_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, said: bool
) -> None:
    train(config(tmp_path / "run", steps=steps, **CIBR))
    assert ("--lam only grows to 67% in these steps" in capsys.readouterr().out) == said


class NotFinite(Clip):
    """CLIP's loss, but NaN at some calls."""

    calls = range(3, 6)

    def __init__(self, options: Any, model: Any) -> None:
        super().__init__(options, model)
        self.call = 0

    def forward(self, output: Output, batch: Any) -> dict[str, torch.Tensor]:
        parts = super().forward(output, batch)
        self.call += 1
        return {**parts, "loss": parts["loss"] * math.nan} if self.call in self.calls else parts


def test_steps_that_are_not_finite_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OBJECTIVES, "clip", NotFinite)
    outcome = train(config(tmp_path / "a", steps=8, log_every=1))
    assert (outcome.skipped_steps, outcome.step) == (3, 8)
    assert "step 3 skipped: loss or gradient not finite (loss nan" in capsys.readouterr().out
    assert log_of(tmp_path / "a")[-1]["skipped"] == 3
    assert all(value.isfinite().all() for value in state(tmp_path / "a").values())
    monkeypatch.setattr(NotFinite, "calls", range(3, 1000))
    with pytest.raises(RuntimeError, match="50 steps in a row without a finite loss"):
        train(config(tmp_path / "b", steps=100))


def test_a_skipped_step_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights nor running statistics: the run is that of fewer steps, but for its batches."""
    monkeypatch.setitem(OBJECTIVES, "clip", NotFinite)
    monkeypatch.setattr(NotFinite, "calls", range(2, 4))
    train(config(tmp_path / "skipped", steps=3, schedule="constant", lr_warmup_steps=0))
    train(config(tmp_path / "short", steps=1, schedule="constant", lr_warmup_steps=0))
    one, other = state(tmp_path / "skipped"), state(tmp_path / "short")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_budget_in_seconds_ends_the_run(tmp_path: Path) -> None:
    outcome = train(config(tmp_path / "run", seconds=0.3, steps=None))
    assert outcome.step >= 1 and 0.3 <= outcome.seconds < 20
    assert log_of(tmp_path / "run")[-1]["step"] == outcome.step


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run"))
    with pytest.raises(UsageError, match="holds a run already"):
        train(config(tmp_path / "run"))


def test_temperature(tmp_path: Path) -> None:
    """Fixed, clamped, or neither; SigLIP begins at scale 10 and bias -10."""
    common = {"steps": 3, "schedule": "constant", "lr_warmup_steps": 0, "lr": 0.1}
    train(config(tmp_path / "fixed", temperature="fixed", initial_scale=30.0, **common))
    assert load_run(tmp_path / "fixed").model.logits()[0].item() == pytest.approx(30)
    train(config(tmp_path / "clamped", initial_scale=99.0, max_scale=99.5, objective="siglip", **common))
    scale, bias = load_run(tmp_path / "clamped").model.logits()
    assert scale.item() <= 99.5 * 1.001 and bias is not None and bias.item() == pytest.approx(-10, abs=0.5)


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16", "pure_bf16"])
def test_precisions(tmp_path: Path, precision: str) -> None:
    model = tiny_clip(tmp_path)
    outcome = train(config(tmp_path / "run", model=model, precision=precision, steps=12, log_every=4, **CIBR))
    log = log_of(tmp_path / "run")
    assert outcome.step == 12 and log[-1]["contrastive_loss"] < log[1]["contrastive_loss"]
    assert outcome.skipped_steps <= (4 if precision == "amp_fp16" else 0)  # GradScaler finds its scale
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    weights = state(tmp_path / "run")
    assert weights["clip.visual.proj"].dtype == dtype and weights["clip.logit_scale"].dtype == torch.float32
    assert load_run(tmp_path / "run").model.encode_text(torch.ones(2, 12, dtype=torch.int64)).embedding.isfinite().all()


def test_any_model_on_anyones_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`cibr train --model open_clip:... --data csv:... --objective cibr`, validated on another file."""
    rows = ["filepath\ttitle"]
    for number, concept in enumerate(toyset.CONCEPTS):
        (tmp_path / f"{number}.png").write_bytes(toyset.draw(concept, "plain", 20))
        rows.append(f"{number}.png\ta {concept.replace('-', ' ')}")
    for name, part in (("train.csv", rows), ("val.csv", rows[:9])):
        (tmp_path / name).write_text("\n".join(part))
    given = flags(
        model=tiny_clip(tmp_path),
        data=f"csv:{tmp_path / 'train.csv'}",
        val_data=f"csv:{tmp_path / 'val.csv'}",
        out=tmp_path / "run",
        steps=4,
        batch_size=8,
        eval_every=4,
        workers=1,
        threads=1,
        device="cpu",
        **CIBR,
    )
    with pytest.raises(SystemExit, match="0"):
        main(["train", *given])
    printed = capsys.readouterr().out
    assert "24 samples" in printed and "critics of" in printed and "next: cibr evaluate" in printed
    report = read_log(tmp_path / "run" / "log.jsonl")[-1]["eval"]
    assert report["loss"] > 0 and "zero_shot" not in report and report["retrieval"]["val"]["image_to_text@10"] == 100


@pytest.mark.slow
def test_compiled_towers_take_the_same_steps(tmp_path: Path) -> None:
    """One transformer block, in the text tower: the compiler takes a second for each kernel."""
    for compiled in (False, True):
        model = tiny_clip(tmp_path, vision_cfg={**TINY_CLIP["vision_cfg"], "layers": 0})
        train(config(tmp_path / str(compiled), model=model, steps=3, eps=1e-3, compile=compiled))
    one, other = state(tmp_path / "False"), state(tmp_path / "True")
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_ema_stages_and_learning_rates(tmp_path: Path) -> None:
    """The average is what is saved; a stage moves what it names only; locked towers stay."""
    model = tiny_clip(tmp_path)
    common = {"model": model, "schedule": "constant", "lr_warmup_steps": 0}
    train(config(tmp_path / "ema", steps=4, ema=0.9, **common))
    train(config(tmp_path / "plain", steps=4, **common))
    averaged, plain = state(tmp_path / "ema"), state(tmp_path / "plain")
    assert torch.equal(averaged["model.clip.visual.proj"], plain["clip.visual.proj"])
    assert not torch.equal(averaged["clip.visual.proj"], plain["clip.visual.proj"])

    train(config(tmp_path / "staged", steps=4, stages=("2:proj:0.5", "2:logit_scale"), **common))
    train(config(tmp_path / "locked", steps=4, lock_image=True, lock_text=True, unlock_text=1, **common))
    train(config(tmp_path / "begin", steps=4, stages=("4:^$",), **common))
    begin, staged, locked = state(tmp_path / "begin"), state(tmp_path / "staged"), state(tmp_path / "locked")
    weights = [name for name in begin if name.startswith("clip.")]
    moved = {name for name in weights if not torch.equal(begin[name], staged[name])}
    assert "clip.logit_scale" in moved and moved <= {n for n in weights if "proj" in n} | {"clip.logit_scale"}
    moved = {name for name in weights if not torch.equal(begin[name], locked[name])}
    assert moved == {"clip.logit_scale", "clip.text_projection"}
