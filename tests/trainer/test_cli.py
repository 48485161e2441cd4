"""The command line and configuration files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import CONV, ROOT, RUN, config, flags, log_of

from cibr.cli import main
from cibr.config import RunConfig, read_options
from cibr.errors import UsageError
from cibr.objectives import OBJECTIVES


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_file_of_options_and_flags_that_come_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML or JSON; the run's config.json has everything and can be used again."""
    values = {**RUN, **CONV, "objective": "cibr", "critic-hidden": 8, "stages": ["1:projection", "9:"], "lr": 0.01}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--config", str(tmp_path / "run.yaml"), *flags(out=tmp_path / "a", steps=2, log_every=1)])
    assert f"next: cibr evaluate --checkpoint {tmp_path / 'a'}" in capsys.readouterr().out
    kept = read_options(tmp_path / "a" / "config.json")
    assert (kept["steps"], kept["lr"], kept["objective"], kept["critic_hidden"]) == (2, 0.01, "cibr", 8)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")])
    assert [entry["loss"] for entry in log_of(tmp_path / "a")] == [entry["loss"] for entry in log_of(tmp_path / "b")]
    machine = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert machine["torch"] and set(machine["git"]) == {"commit", "changed"}


def test_a_resumed_run_needs_no_options_and_keeps_those_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    with pytest.raises(SystemExit, match="0"):
        main(["train", *flags(**RUN, **CONV, out=out)])
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--resume", "--out", out, "--steps", "8", "--log-every", "1"])
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1, 6, 7, 8]
    for given in (["--lr", "0.5"], ["--objective", "cibr"], ["--embed-dim", "8"]):
        assert "keeps its options, and this one was started with" in fails(
            ["train", "--resume", "--out", out, *given], capsys
        )


def test_what_is_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"data": "synthetic:9", "out": "y", "steps": 3, "learning_rate": 1}))
    assert "unknown option learning_rate; known are accumulate, augment" in fails(
        ["train", "--config", str(path)], capsys
    )
    path.write_text(json.dumps({"data": "synthetic:9", "out": "y", "steps": 3, "mask_duplicates": "false"}))
    assert "--mask-duplicates is 'false', but must be true or false" in fails(["train", "--config", str(path)], capsys)
    path.write_text("{")
    assert "is not JSON" in fails(["train", "--config", str(path)], capsys)
    assert "--data is missing" in fails(["train", "--out", "x", "--steps", "1"], capsys)
    assert "did you mean --data csv:pairs.csv" in fails(
        ["train", "--data", "pairs.csv", "--out", str(tmp_path / "x"), "--steps", "1"], capsys
    )
    assert "known are clip, siglip" in fails(["train", "--objective", "clap"], capsys)
    assert "run" in fails(["export"], capsys)


@pytest.mark.parametrize("given", [["--learning-rate", "1"], ["--stpes", "1"], ["--ste", "1"], ["--lam", "1"]])
def test_abbreviations_and_other_objectives_options_are_refused(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Unrecognized options" in fails(
        ["train", "--data", "synthetic:9", "--out", "x", "--steps", "1", *given], capsys
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps is 0, but must be positive"),
        ({"steps": None}, "say how long to train"),
        ({"steps": None, "seconds": -1.0}, "--seconds is -1.0, but must be positive"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"lr": math.nan}, "--lr is nan"),
        ({"lr": "1e-3"}, "--lr is '1e-3', but must be a number"),
        ({"steps": True}, "--steps is True, but must be a whole number"),
        ({"objective": "cibr", "lam": -0.1}, "--lam is -0.1, but must not be negative"),
        ({"batch_size": 1}, "--batch-size is 1, but must be at least 2"),
        ({"objective": "clap"}, "'clap'; known are clip, siglip"),
        ({"precision": "float8"}, "but must be one of auto, fp32"),
        ({"device": "toaster"}, "but must be one of auto, cpu, cuda"),
        ({"schedule": "cooldown"}, "needs --cooldown-steps"),
        ({"eval_every": 5}, "needs data that training does not see"),
        ({"stages": [1]}, "--stages is .1,., but must be a list, each item a text"),
        ({"ema": 1.5}, "--ema is 1.5, but must be less than 1"),
        ({"temperature": "hot"}, "must be one of learnable, fixed"),
        ({"image_size": 4}, "--image-size is 4, but must be at least 8"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(tmp_path, **options)


def test_every_option_says_what_it_is_and_is_of_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    for objective in OBJECTIVES:
        for model in ("conv", "open_clip:RN50", "heads"):
            values = {"data": "x", "out": "y", "steps": 1, "objective": objective, "model": model}
            names = [name for section in RunConfig.from_dict(values).sections() for name in vars(section)]
            assert len(names) == len(set(names))
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--objective", "cibr", "--model", "open_clip:RN50", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--lam-ramp-steps", "--lock-image", "--accumulate", "--fsdp", "--val-data"))
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "train a model, or resume a run" in capsys.readouterr().out


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    """Nor do those of other commands, models and ranks come with training."""
    heavy = ("torch", "tyro", "sklearn", "matplotlib", "webdataset")
    others = ("open_clip", "torchvision", "sklearn", "matplotlib", "torch.distributed.fsdp", "torch.distributed.tensor")
    code = f"import sys, cibr.cli; print([m for m in {heavy} if m in sys.modules])"
    code += f"; import cibr.train; print([m for m in {others} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["[]", "[]"]
