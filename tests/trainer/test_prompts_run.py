"""`cibr prompts` from a base to evaluation.json: few shots, base and new classes, going on, transfer to other sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import TINY_CLIP, config, log_of, require_same_state, state, tiny_clip

from cibr import prompts
from cibr.cli import main
from cibr.data import DataOptions
from cibr.errors import UsageError
from cibr.evaluate import evaluate_run
from cibr.export import export
from cibr.prompts import PromptsOptions, harmonic_mean, run
from cibr.run import checkpoint
from cibr.train import train

COLOURS = {
    "blue": (20, 30, 220),
    "green": (20, 200, 40),
    "red": (230, 20, 20),
    "white": (250, 250, 250),
    "yellow": (240, 220, 30),
}
TEXT = {**TINY_CLIP["text_cfg"], "context_length": 16, "layers": 2}
FAST: dict[str, Any] = {"threads": 1, "batch_size": 4, "epochs": 2, "lr": 0.05}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny CLIP, two steps long."""
    folder = tmp_path_factory.mktemp("base")
    train(config(folder / "run", model=tiny_clip(folder, text_cfg=TEXT), steps=2))
    return folder / "run"


@pytest.fixture
def swatches(tmp_path: Path) -> str:
    for split in ("train", "test"):
        for name, colour in COLOURS.items():
            (tmp_path / "swatches" / split / name).mkdir(parents=True)
            for k in range(4):
                image = Image.new("RGB", (16, 16), tuple(max(0, part - 5 * k) for part in colour))
                image.save(tmp_path / "swatches" / split / name / f"{k}.png")
    return f"folder:{tmp_path / 'swatches'}"


def done(out: Path, model: str, data: str, *, choice: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    options = PromptsOptions(out=str(out), **{**FAST, **{k: v for k, v in more.items() if k in vars(PromptsOptions())}})
    rest = {k: v for k, v in more.items() if k not in vars(PromptsOptions())}
    return run(options, DataOptions(data=data, workers=0, **(choice or {})), {"model": model, **rest})


def row(out: Path) -> dict[str, Any]:
    return json.loads((out / "row.json").read_text())


def test_coop_learns_on_a_frozen_run_and_zero_shot_stands_beside_it(base: Path, swatches: str, tmp_path: Path) -> None:
    zero = done(tmp_path / "zero", str(base), swatches)
    assert row(tmp_path / "zero")["method"] == "clip"
    direct = evaluate_run(base, zero_shot={"swatches": swatches})
    assert zero["zero_shot"] == direct["zero_shot"] and list(zero["zero_shot"]) == ["swatches"]
    found = done(
        tmp_path / "coop", f"coop:{base}", swatches, choice={"shots": 4, "augment": "none"}, context_tokens=4, epochs=12
    )
    assert checkpoint.load_run(tmp_path / "coop").step == 12 * (20 // 4)
    assert row(tmp_path / "coop")["method"] == "coop" and row(tmp_path / "coop")["setting"]["shots"] == 4
    assert row(tmp_path / "coop")["setting"]["base"] == row(tmp_path / "zero")["setting"]["base"]
    losses = [entry["loss"] for entry in log_of(tmp_path / "coop")]
    assert losses[-1] < losses[0]
    before, after = (
        checkpoint.load_run(base).model.state_dict(),
        checkpoint.load_run(tmp_path / "coop").model.state_dict(),
    )
    assert set(after) == {f"base.{name}" for name in before} | {"context"}
    assert all(torch.equal(after[f"base.{name}"], value) for name, value in before.items())
    rates = {entry["step"]: entry["lr"] for entry in log_of(tmp_path / "coop")}
    assert rates[1] == pytest.approx(1e-5) and rates[10] == pytest.approx(0.05)  # the second epoch is at the peak
    assert evaluate_run(tmp_path / "coop", zero_shot={"swatches": swatches})["zero_shot"] == found["zero_shot"]
    with pytest.raises(UsageError, match="only open_clip's can be exported"):
        export(tmp_path / "coop", tmp_path / "out")


def test_base_to_new_tests_both_halves(base: Path, swatches: str, tmp_path: Path) -> None:
    found = done(
        tmp_path / "maple", f"maple:{base}", swatches, choice={"shots": 2}, base_to_new=True, depth=2, phrase="a photo"
    )
    halves = found["base_to_new"]["swatches"]
    assert list(found["zero_shot"]) == ["swatches, base classes", "swatches, new classes"]
    assert halves["base"] == found["zero_shot"]["swatches, base classes"]["top1"]
    assert halves["harmonic_mean"] == pytest.approx(harmonic_mean(halves["base"], halves["new"]))
    sets = found["sets"]
    assert [sets[f"swatches, {half} classes"]["images"] for half in ("base", "new")] == [12, 8]
    assert [sets[f"swatches, {half} classes"]["classes"] for half in ("base", "new")] == [3, 2]
    model = checkpoint.load_run(tmp_path / "maple").model
    assert model.recipe["classes"] == ["blue", "green", "red"]
    assert harmonic_mean(80.0, 20.0) == 32.0 and harmonic_mean(0.0, 0.0) == 0.0


def test_the_same_command_goes_on(base: Path, swatches: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = {"shots": 2}
    whole = done(tmp_path / "whole", f"coop:{base}", swatches, choice=choice, context_tokens=2, save_every=2)
    assert checkpoint.load_run(tmp_path / "whole").step == 4

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cibr.train.save", killed)
        with pytest.raises(KeyboardInterrupt):
            done(tmp_path / "cut", f"coop:{base}", swatches, choice=choice, context_tokens=2, save_every=2)
    again = done(tmp_path / "cut", f"coop:{base}", swatches, choice=choice, context_tokens=2, save_every=2)
    assert again["zero_shot"] == whole["zero_shot"]
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004", ignore_errors=True)
    assert done(tmp_path / "cut", f"coop:{base}", swatches, choice=choice, context_tokens=2, save_every=2) == again
    contexts = [state(tmp_path / name)["context"] for name in ("whole", "cut")]
    assert torch.equal(*contexts)
    with pytest.raises(UsageError, match="was started with context_tokens = 2"):
        done(tmp_path / "cut", f"coop:{base}", swatches, choice=choice, context_tokens=3, epochs=3)


def test_a_resumed_run_is_an_unbroken_one(base: Path, swatches: str, tmp_path: Path) -> None:
    export(base, tmp_path / "exported")
    options = {
        "model": f"coop:open_clip:local-dir:{tmp_path / 'exported'}",
        "objective": "classes",
        "data": swatches,
        "shots": 3,
        "context_tokens": 2,
        "optimizer": "sgd",
        "schedule": "epochs",
        "epoch_steps": 3,
        "batch_size": 5,
        "lr_warmup_steps": 0,
        "lr": 0.01,
        "save_every": 4,
    }
    train(config(tmp_path / "one", **options, steps=9))
    train(config(tmp_path / "two", **options, steps=9))
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000009")
    train(config(tmp_path / "two", **options, steps=9), resume=True)
    require_same_state(tmp_path / "one", tmp_path / "two")


def test_other_sets_and_captions_by_the_learned_context(base: Path, swatches: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in ("black", "grey"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), name).save(other / name / "a.png")
    (tmp_path / "pairs.csv").write_text(
        f"filepath,title\n{other}/black/a.png,{'a very long caption ' * 9}\n{other}/grey/a.png,grey\n"
    )
    found = done(
        tmp_path / "coop",
        f"coop:{base}",
        swatches,
        choice={"shots": 1},
        context_tokens=2,
        name="eurosat",
        zero_shot=(f"other=folder:{other}",),
        retrieval=(f"pairs=csv:{tmp_path / 'pairs.csv'}",),
    )
    assert list(found["zero_shot"]) == ["eurosat", "other"] and list(found["retrieval"]) == ["pairs"]
    assert found["sets"]["other"]["images"] == 2  # whole: the shots are of the run's own data


def test_classes_are_called_as_in_training(base: Path, swatches: str, tmp_path: Path) -> None:
    """A zero-shot test of "eurosat" would say "highway or road", and this context would refuse it."""
    for split in ("train", "test"):
        folder = tmp_path / "swatches" / split
        (folder / "red").rename(folder / "Highway")
    model = f"coop:{base}"
    choice = {"shots": 1}
    more = {"context_tokens": 2, "class_specific": True, "epochs": 1}
    found = done(tmp_path / "own", model, swatches, choice=choice, name="eurosat", **more)
    assert list(found["zero_shot"]) == list(found["sets"]) == ["eurosat"]


def test_the_command(base: Path, swatches: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prompts", "--data", swatches, "--out", str(tmp_path / "coop"), "--workers", "0", "--threads", "1"]
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                *command,
                "--model",
                f"coop:{base}",
                "--shots",
                "1",
                "--epochs",
                "1",
                "--context-tokens",
                "2",
                "--base-to-new",
            ]
        )
    printed = capsys.readouterr().out
    assert "swatches, new classes" in printed and "swatches: base " in printed and ", H " in printed
    written = json.loads((tmp_path / "coop" / "evaluation.json").read_text())
    assert list(written["base_to_new"]) == ["swatches"] and row(tmp_path / "coop")["method"] == "coop"
    for arguments, message in (
        (
            ["--model", f"coop:{base}", "--class-specific", "--base-to-new"],
            "--class-specific prompts have none for them",
        ),
        (["--model", f"coop:{base}", "--classes", "new", "--base-to-new"], "leave --classes out"),
        (["--model", str(base), "--zero-shot", f"swatches={swatches}"], "a set named swatches, as the data are"),
        (["--model", str(base), "--out", str(base)], "holds a run, and its configuration would be replaced"),
        (["--model", "coop:conv"], "prompts are for open_clip models with weights"),
        (["--model", f"coop:{tmp_path}"], "there is no checkpoint at"),
        ([], "--model is missing"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*command[:3], "--out", str(tmp_path / "refused"), *arguments])
        assert message in capsys.readouterr().err


def test_epochs_are_coops_by_shots() -> None:
    assert [prompts.EPOCHS.get(shots, 200) for shots in (1, 2, 4, 8, 16)] == [50, 100, 100, 200, 200]
