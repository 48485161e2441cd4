"""From a run to numbers and pictures, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import toyset
from PIL import Image
from runs import flags, tiny_clip

from cibr.cli import main
from cibr.demo import demo
from cibr.errors import UsageError
from cibr.evaluate import evaluate_run, named
from cibr.train import train

pytestmark = pytest.mark.filterwarnings("ignore:.* queries score a candidate of another group", "ignore:noise_std")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toyset.build(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def trained(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / "clip", folder / "cibr"]
    for path, more in zip(paths, ({}, runs.CIBR), strict=True):
        held: dict[str, Any] = {"hold_out": "frame-house", "unseen_fraction": 0.25, "val_split": "held_out"}
        train(runs.config(path, data=f"emoji:{emoji}", log_every=2, eval_every=3, **held, **more))
    return paths


def succeed(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0


def test_evaluate_prints_a_table_and_writes_json(trained: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    file = trained[0] / "evaluation.json"
    succeed("evaluate", "--checkpoint", trained[0], "--probe", "--json", file)
    report = json.loads(file.read_text())
    assert report["step"] == 6 and report["objective"] == "clip"
    assert set(report["zero_shot"]) == {"held_out", "unseen", "unseen_held_out", "train"}
    printed = capsys.readouterr().out
    assert "held-out vendor, seen concepts" in printed and "style probe on unseen concepts" in printed
    succeed("evaluate", "--checkpoint", trained[0], "--zero-shot", "a=synthetic:40", "--retrieval", "b=synthetic:40")
    assert "retrieval, per cent" in capsys.readouterr().out


def test_plot_draws_runs_side_by_side(trained: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("plot", *trained, "--out", tmp_path / "pictures", "--grad-cam")
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["curves.png", "parts.png", "recall.png", "final.png", "tsne.png", "grad_cam.png"]
    assert all((tmp_path / "pictures" / name).stat().st_size > 5000 for name in names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "--checkpoint", "nowhere"], "there is no checkpoint at nowhere"),
        (["evaluate", "--checkpoint", "x", "--json", "no/such/file"], "there is no folder no/such"),
        (["evaluate", "--checkpoint", "x", "--zero-shot", "pets"], "--zero-shot 'pets' is not NAME=SPEC"),
        (["evaluate"], "--checkpoint is missing"),
        (
            ["plot", "nowhere", "--out", "x"],
            "it is not the folder of a run",
        ),
        (["demo"], "--out is missing"),
    ],
)
def test_words_for_what_cannot_be_done(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_name_is_given_once() -> None:
    assert named(["a=csv:x=y.csv"], "--retrieval") == {"a": "csv:x=y.csv"}
    with pytest.raises(UsageError, match="two sets named a"):
        named(["a=b:c", "a=d:e"], "--retrieval")


def test_the_demo_goes_on_where_it_was(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the toy set: rendering npm's packages is the business of another test."""
    built = {"images": 96, "concepts": 24, "styles": toyset.STYLES, "built": False}
    monkeypatch.setattr("cibr.data.emoji_build.build", lambda out, tarballs: built)
    monkeypatch.setattr("cibr.demo.HELD_OUT", "frame-house")
    small = {**runs.CONV, **runs.RUN, "unseen_fraction": 0.25}
    del small["data"], small["steps"]
    monkeypatch.setattr("cibr.demo.MORE", {"clip": small, "cibr": {**small, **runs.CIBR}})
    (tmp_path / "emoji").symlink_to(emoji)
    written = demo(tmp_path, steps=4)
    assert {path.name for path in written} == {"curves.png", "parts.png", "recall.png", "final.png", "tsne.png"}
    table = (tmp_path / "table.txt").read_text()
    assert "clip" in table and "cibr" in table and "held-out vendor, seen concepts" in table
    capsys.readouterr()
    monkeypatch.setattr("cibr.demo.train", None)  # nothing is trained or evaluated again
    monkeypatch.setattr("cibr.demo.evaluate_run", None)
    demo(tmp_path, steps=4)
    assert "there already" in capsys.readouterr().out and (tmp_path / "table.txt").read_text() == table
    with pytest.raises(UsageError, match="has 4 steps already, more than 3"):
        demo(tmp_path, steps=3)


def test_pairs_of_ones_own_from_a_table_to_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An open_clip model on a CSV: every command that the one before it names works as it stands."""
    for name, first in (("train", 0), ("val", 30)):
        lines = ["filepath,title"]
        for k in range(first, first + 30):
            Image.new("RGB", (20, 20), (k * 4, 90, 200 - k)).save(tmp_path / f"{k}.png")
            lines.append(f"{k}.png,picture number {k}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    run, model = tmp_path / "run", tiny_clip(tmp_path)
    common = {"model": model, "data": f"csv:{tmp_path / 'train.csv'}", "objective": "cibr", "workers": 0, "threads": 1}
    common |= {"steps": 4, "batch_size": 10, "critic_hidden": 8, "precision": "fp32"}

    def said(*arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        assert end.value.code == 0
        return capsys.readouterr()

    out = said("train", *flags(**common, out=run, val_data=f"csv:{tmp_path / 'val.csv'}", eval_every=2))[0]
    assert out.splitlines()[-1] == f"next: cibr evaluate --checkpoint {run}"
    out = said("evaluate", "--checkpoint", str(run), "--json", str(run / "evaluation.json"))[0]
    assert "retrieval, per cent" in out and "validation" in out and "zero-shot" not in out
    out, err = said("plot", str(run), "--out", str(tmp_path / "pictures"), "--grad-cam")
    assert "tsne.png is left out: csv:" in err and "no classes" in err
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"curves.png", "parts.png", "recall.png", "final.png", "grad_cam.png"}

    out = said("train", *flags(**common, out=tmp_path / "blind"))[0]
    assert out.splitlines()[-1].endswith("blind --retrieval NAME=SPEC, or --zero-shot NAME=SPEC")
    with pytest.raises(UsageError, match="say what to evaluate on"):
        evaluate_run(tmp_path / "blind")


def test_plot_without_checkpoints_leaves_the_models_out(
    trained: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `cibr compare` leaves its runs, which is no failure."""
    bare = Path(shutil.copytree(trained[0], tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints")))
    succeed("plot", bare, "--out", tmp_path / "pictures")
    printed = capsys.readouterr()
    assert "curves.png" in printed.out and "tsne.png is left out: there is no checkpoint at" in printed.err
