"""`cibr table`: the paper's layout from runs' evaluations, mean and standard error, and what is absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cibr.cli import main
from cibr.errors import UsageError
from cibr.table import table


def scored(top1: float) -> dict[str, float]:
    return {"top1": top1, "top5": 90.0, "mean_per_class": top1 - 1}


def found(at1: float) -> dict[str, float]:
    return {f"{way}@{k}": at1 + k for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}


def write(folder: Path, method: str, *, config: Any = None, setting: Any = None, **evaluation: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"zero_shot": {}, "retrieval": {}, **evaluation}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (folder / "row.json").write_text(json.dumps({"method": method, "setting": setting}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three seeds of CLIP and CIBR as `cibr evaluate` leaves them, CoOp on a set each, MaPLe on both halves."""
    for seed, shift in enumerate((0.0, 2.0, 4.0)):
        for method, lam, gain in (("clip", None, 0.0), ("cibr", 0.1, 3.0)):
            config = {
                "model": "open_clip:vit.json",
                "objective": method,
                "seed": seed,
                "out": f"runs/{seed}",
                "steps": 9,
            }
            write(
                tmp_path / f"{method}-{seed}",
                method,
                config=config if lam is None else {**config, "lam": lam},
                zero_shot={"eurosat": scored(40 + shift + gain), "cifar100": scored(20 + gain)},
                retrieval={"flickr30k": found(30 + gain)},
            )
    for seed in (0, 1):
        setting = {"base": "open_clip:vit.json", "shots": 16}
        write(tmp_path / f"coop-{seed}", "coop", setting=setting, zero_shot={"eurosat": scored(70 + 2 * seed)})
    write(tmp_path / "coop-cifar", "coop", setting=setting, zero_shot={"cifar100": scored(33)})
    write(
        tmp_path / "maple",
        "maple",
        setting=setting,
        zero_shot={"emoji, base classes": scored(60), "emoji, new classes": scored(40)},
        base_to_new={"emoji": {"base": 60.0, "new": 40.0, "harmonic_mean": 48.0}},
    )
    return tmp_path


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of a table."""
    block = text.split(f"{title}, per cent\n\n")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    assert set("".join(lines[1])) == {"-"} and len({len(line) for line in block.splitlines()}) == 1
    return [lines[0], *lines[2:]]


def test_table_1_and_2(runs: Path) -> None:
    text = table([runs])
    assert rows(text, "Table 1: zero-shot classification, top-1") == [
        ["", "seeds", "CIFAR-100", "EuroSAT"],
        ["CLIP", "3", "20.0 (0.0)", "42.0 (1.2)"],  # of 40, 42, 44: 2 / sqrt(3)
        ["CoOp", "2", "33.0", "71.0 (1.0)"],
        ["CIBR", "3", "23.0 (0.0)", "45.0 (1.2)"],
    ]
    assert rows(text, "Table 2: retrieval, text to image") == [
        ["", "seeds", "Flickr30K R@1", "Flickr30K R@5", "Flickr30K R@10"],
        ["CLIP", "3", "31.0 (0.0)", "35.0 (0.0)", "40.0 (0.0)"],
        ["CIBR", "3", "34.0 (0.0)", "38.0 (0.0)", "43.0 (0.0)"],
    ]
    assert rows(text, "Base and new classes, top-1") == [
        ["", "seeds", "emoji base", "emoji new", "emoji H"],
        ["MaPLe", "1", "60.0", "40.0", "48.0"],
    ]
    assert "emoji, base classes" not in text
    missing = "ImageNet, OxfordPets, Caltech101, DTD, SUN397, COCO"
    assert text.endswith(f"Of the paper's sets there are no numbers for {missing}.")
    assert "standard error of the mean over seeds" in text and "standard error" not in table([runs / "maple"])
    assert (
        rows(table([runs], metric="mean_per_class"), "Table 1: zero-shot classification, mean per class")[1][2]
        == "19.0 (0.0)"
    )


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged(runs: Path) -> None:
    write(
        runs / "coop-4", "coop", setting={"base": "open_clip:vit.json", "shots": 4}, zero_shot={"eurosat": scored(50)}
    )
    config = {"model": "open_clip:vit.json", "objective": "cibr", "seed": 0, "steps": 9, "lam": 0.5}
    write(runs / "cibr-strong", "cibr", config=config, zero_shot={"eurosat": scored(10)})
    labels = [row[0] for row in rows(table([runs]), "Table 1: zero-shot classification, top-1")]
    model = "model open_clip:vit.json, objective cibr"
    assert labels == [
        "",
        "CLIP",
        "CoOp (shots 16)",
        "CoOp (shots 4)",
        f"CIBR (base {model}, lam 0.1, steps 9)",
        f"CIBR (base {model}, lam 0.5, steps 9)",
    ]


def test_further_evaluations_of_a_run_count(runs: Path) -> None:
    more = {"zero_shot": {"dtd": scored(12)}, "objective": "classes", "checkpoint": "runs/coop-0"}
    (runs / "coop-0" / "evaluation-transfer.json").write_text(json.dumps(more))
    first = rows(table([runs / "coop-0"]), "Table 1: zero-shot classification, top-1")
    assert first == [["", "seeds", "DTD", "EuroSAT"], ["CoOp", "1", "12.0", "70.0"]]


def test_bars(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "bars"
    text = table([runs], out=out)
    assert sorted(path.name for path in out.iterdir()) == ["base-to-new.png", "table-1.png", "table-2.png"]
    assert all(str(path) in text for path in out.iterdir())
    assert Image.open(out / "table-1.png").size[0] > 300


def test_what_is_no_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no evaluation\.json, nor does a folder in it"):
        table([runs, tmp_path / "empty"])
    for name, text in (
        ("evaluation", "{"),
        ("evaluation", "[]"),
        ("evaluation", '{"zero_shot": 3}'),
        ("config", None),
        ("config", "{}"),
        ("config", "[]"),
        ("row", '{"method": "clip"}'),
    ):
        if text is not None:
            (tmp_path / "empty" / f"{name}.json").write_text(text)
        with pytest.raises(UsageError, match=f"{name}.json is not what cibr prompts, train or evaluate writes"):
            table([tmp_path / "empty"])
        if name == "evaluation":
            (tmp_path / "empty" / "evaluation.json").write_text('{"zero_shot": {}}')
    with pytest.raises(SystemExit, match="2"):
        main(["table"])
    with pytest.raises(SystemExit, match="0"):
        main(["table", str(runs / "maple"), str(runs / "maple"), "--metric", "mean_per_class"])  # twice is once
    assert "| MaPLe | 1     |" in capsys.readouterr().out
