"""`cibr compare`: statistics against references, scores against the evaluation's, runs that resume, bad files."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forks import process
from runs import ROOT
from safetensors.torch import save_file
from scipy import stats

from cibr import models
from cibr.cli import main
from cibr.compare import run_comparison, runs
from cibr.compare.scores import score
from cibr.compare.spec import read_spec
from cibr.compare.statistics import Counts, bootstrap, holm, paired
from cibr.compare.table import counts
from cibr.data import DataOptions
from cibr.data.features import save_strings
from cibr.data.strings import Strings
from cibr.errors import UsageError
from cibr.evaluate.report import Set, score_classes, score_retrieval
from cibr.models.model import Facts

CLASSES, EACH = 10, 8


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eighty images of ten classes, or as many with two captions each: a mean of the class or image, and noise."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for kind in ("classes", "captions"):
        n, labels = CLASSES * EACH, torch.arange(CLASSES * EACH) % CLASSES
        of = labels if kind == "classes" else torch.arange(n)
        several = 1 if kind == "classes" else 2
        mean = torch.randn(n, 6, generator=generator)[of]
        tensors = {"image_features": mean + torch.randn(n, 6, generator=generator)}
        text = mean if kind == "classes" else mean + 0.3 * torch.randn(n, 6, generator=generator)
        tensors["text_features"] = text.repeat_interleave(several, 0).contiguous()
        tensors["caption_starts"] = torch.arange(n + 1) * several
        tensors["group_ids"] = of.repeat_interleave(several)
        save_strings(tensors, "keys", Strings(f"image {row}" for row in range(n)))
        if kind == "classes":
            tensors["labels"] = labels
            save_strings(tensors, "class_names", Strings(f"class {c}" for c in range(CLASSES)))
        made[kind] = tmp_path_factory.mktemp("features") / f"{kind}.safetensors"
        save_file(tensors, made[kind])
    return made


def spec(features: Path, folder: Path, **changes: Any) -> Path:
    """A file of two configurations on two seeds."""
    base = {
        "model": "heads",
        "embed_dim": 4,
        "data": f"features:{features}",
        "split_by": "classes",
        "val_split": "val",
        "val_share": 0.2,
        "batch_size": 16,
        "steps": 4,
        "eval_every": 2,
        "save_every": 2,
        "threads": 1,
        "device": "cpu",
        "precision": "fp32",
        "lr_warmup_steps": 1,
    }
    given = {
        "base": base,
        "configurations": {"clip": {"objective": "clip"}, "slow": {"objective": "clip", "lr": 1e-5}},
        "baseline": "clip",
        "seeds": 2,
        "sets": {"unseen": "test", "seen": {"split": "seen"}},
        "metrics": ["unseen/top1", "unseen/nuisance"],
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({**given, **changes}, sort_keys=False))
    return path


def quiet(text: str) -> None:
    pass


def test_holm_by_hand() -> None:
    """Of 4: .005 * 4, .01 * 3, .03 * 2, and .04 takes the .06 before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
    with_nan = holm([0.02, float("nan"), 0.03])
    assert with_nan[0] == pytest.approx(0.04) and np.isnan(with_nan[1]) and with_nan[2] == pytest.approx(0.04)


def test_paired_is_the_t_test_of_related_samples() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(1, 1, 9), rng.normal(0, 1, 9)
    found, expected = paired(ours, theirs), stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(expected.pvalue) and found.mean == pytest.approx((ours - theirs).mean())
    assert found.mean / found.se == pytest.approx(expected.statistic)
    assert np.isnan(paired([1.0], [2.0]).p) and paired([1.0, 2.0], [1.0, 2.0]).p == 1
    assert np.isnan(paired([1.0, 2.0], [3.0, 4.0]).p)
    assert np.isnan(paired([34.1, 27.4], [41.4, 34.7]).p)  # equal but for rounding


def test_the_bootstrap_has_the_width_of_its_units() -> None:
    """One question a unit: the standard error of the mean of u paired differences.  A pool seen by ten seeds is one."""
    rng = np.random.default_rng(1)
    ours, theirs = (rng.random((1, 500)) < p for p in (0.7, 0.4))
    asked = np.ones((1, 500))
    low, high = bootstrap(Counts(ours, asked), Counts(theirs, asked), draws=4000)
    difference = 100 * (ours.astype(float) - theirs)[0]
    width = 2 * 1.96 * difference.std() / np.sqrt(500)
    assert low < difference.mean() < high and high - low == pytest.approx(width, rel=0.08)
    again = bootstrap(*(Counts(np.repeat(one, 10, 0), np.repeat(asked, 10, 0)) for one in (ours, theirs)), draws=4000)
    assert again == pytest.approx((low, high))


def test_units_of_seeds_are_put_together_by_name() -> None:
    one = {"units t": np.array(["a", "b"]), "hits best t/m": np.array([1, 0]), "asked best t/m": np.array([2, 1])}
    two = {"units t": np.array(["c", "a"]), "hits best t/m": np.array([3, 1]), "asked best t/m": np.array([3, 1])}
    found = counts([one, two], "best", "t/m")
    assert found.hits.tolist() == [[1, 0, 0], [1, 0, 3]] and found.asked.tolist() == [[2, 1, 0], [1, 0, 3]]
    assert found.scores(np.ones((1, 3)))[0] == pytest.approx([100 / 3, 100])
    assert np.isnan(found.scores(np.array([[0.0, 0.0, 1.0]]))[0, 0])  # nothing of the first seed's is drawn


@pytest.mark.parametrize("kind", ["classes", "captions"])
def test_scores_are_the_evaluations(features: dict[str, Path], kind: str) -> None:
    torch.manual_seed(0)
    model = models.build(models.options_type("heads")(embed_dim=4), Facts((), 6, 6)).eval()
    chosen = Set(DataOptions(data=f"features:{features[kind]}"), "test")
    found = score(model, chosen)
    expected = score_retrieval(model, chosen)
    if kind == "classes":
        expected = {**score_classes(model, chosen), "text_to_image@1": expected["text_to_image@1"]}
        del expected["mean_per_class"]
    percent = found.percent()
    share = percent.pop("nuisance")
    assert percent == pytest.approx(expected) and 0 < share < 100
    assert len(found.units) == (CLASSES if kind == "classes" else CLASSES * EACH)


def finished(out: Path) -> list[Path]:
    return sorted(out.glob("*/*/result.json"))


def test_a_comparison_that_was_killed_goes_on(features: dict[str, Path], tmp_path: Path) -> None:
    """Killed after its first run; the second call does the others, from where they were, and nothing again."""
    file, out = spec(features["classes"], tmp_path), tmp_path / "out"
    child = process(run_comparison, file, out)
    child.start()
    while not finished(out) and child.is_alive():
        time.sleep(0.002)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    before = {path: path.stat().st_mtime_ns for path in finished(out)}
    assert 1 <= len(before) < 4
    found = run_comparison(file, out, say=quiet)
    assert len(finished(out)) == 4 and all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert len((out / "log.jsonl").read_text().splitlines()) in (3, 4)  # the killed one may not have noted its first
    again = run_comparison(file, out, say=quiet)
    whole = run_comparison(file, tmp_path / "whole", say=quiet)
    assert again == found and whole["rows"] == found["rows"]
    assert not list(out.glob("*/*/checkpoints"))


def test_the_table(
    features: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two processes, by the command; its numbers are those of the runs' results; then its pictures."""
    monkeypatch.setattr(runs, "START", "forkserver")  # a new interpreter imports torch for ten seconds
    file = spec(features["classes"], tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "4 runs, 0 of them done" in said and "unseen/top1 (primary), per cent" in said
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    scores = {
        name: [
            json.loads(path.read_text())["scores"]["best"]["unseen/top1"]
            for path in (tmp_path / "out" / name).glob("*/result.json")
        ]
        for name in ("clip", "slow")
    }
    row = next(
        r for r in found["rows"] if (r["configuration"], r["metric"], r["point"]) == ("slow", "unseen/top1", "best")
    )
    assert row["difference"] == pytest.approx(np.mean(scores["slow"]) - np.mean(scores["clip"]))
    assert row["pairs"] == 2 and row["against"] == "clip" and len(row["interval"]) == 2
    assert f"| slow | 2 | {np.mean(scores['slow']):.1f} (" in said
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path / "out"), "--out", str(tmp_path / "pictures"), "--no-tsne"])
    assert {"comparison.png", "curves.png", "final.png"} <= {path.name for path in (tmp_path / "pictures").iterdir()}


def test_grids_controls_and_seeds(features: dict[str, Path], tmp_path: Path) -> None:
    configurations = {
        "clip": {"objective": "clip", "grid": {"lr": [0.1, 0.2], "weight_decay": [0.0]}},
        "ours": {"objective": "variance", "against": "clip2"},
        "clip2": {"objective": "clip2"},
    }
    turns = {"hold_out": ["a", "b", "c"]}
    made = read_spec(
        spec(
            features["classes"], tmp_path, configurations=configurations, baseline="clip2", seeds=[5, 3], by_seed=turns
        )
    )
    assert [one.name for one in made.configurations] == [
        "clip lr=0.1 weight_decay=0.0",
        "clip lr=0.2 weight_decay=0.0",
        "ours",
        "clip2",
    ]
    config = made.config(made.configurations[1], 5, tmp_path)
    assert (config.optim.lr, config.run.seed, config.data.split_seed, config.data.hold_out) == (0.2, 5, 5, "c")
    assert made.configurations[2].against == "clip2" and made.seeds == (5, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 3}, "has the unknown key seed; known are base, configurations"),
        ({"baseline": "siglip"}, "there is no configuration 'siglip' to compare with; there are clip, slow"),
        ({"configurations": {"clip": {"objektive": "clip"}}}, "unknown option objektive"),
        ({"configurations": {"clip": {"seed": 3}}}, "seed of clip: the comparison sets that itself"),
        ({"metrics": ["top1"]}, "the metric 'top1' is not SET/METRIC; the sets are unseen, seen"),
        ({"seeds": [-1]}, "must be a number of seeds or a list"),
        ({"sets": {"unseen": {"splt": "test"}}}, "the set unseen has the unknown key splt"),
        ({"by_seed": {"hold_out": "noto"}}, "must be a list, a value for each seed in turn"),
        ({"sets": {}}, "lacks sets"),
        ({"base": {"stepps": 4, "split_by": "rows"}}, "base has the unknown option stepps: no configuration here"),
    ],
)
def test_mistakes_in_the_file(features: dict[str, Path], tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run_comparison(spec(features["classes"], tmp_path, **changes), tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


def test_results_of_other_options_are_not_taken(features: dict[str, Path], tmp_path: Path) -> None:
    only = {"configurations": {"clip": {"objective": "clip"}}, "seeds": 1}
    run_comparison(spec(features["classes"], tmp_path, **only), tmp_path / "out", say=quiet)
    other = spec(features["classes"], tmp_path, **{**only, "configurations": {"clip": {"lr": 0.5}}})
    with pytest.raises(UsageError, match="is a run of other options"):
        run_comparison(other, tmp_path / "out", say=quiet)


FILES = sorted((ROOT / "bench" / "evidence").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_of_the_evidence_are_comparisons(file: Path) -> None:
    made = read_spec(file)
    assert len(made.configurations) > 1 and len(made.seeds) > 1


RESULTS = ROOT / "bench" / "results" / "evidence"
TABLE = re.compile(r"^(`?)(\w+/[\w@]+)\1[^\n|]*per cent:?\n\n((?:\|[^\n]*\n)+)", re.MULTILINE)
LINE = re.compile(r"\| (.+?) \| (\d+) \| (\S+) \(\S+\) \| (?:(\S+) \((\S+)\) to (.+?))? \|")


def tables(text: str) -> list[tuple[str, str]]:
    """(metric, the lines of its table) of each."""
    return [(metric, lines.strip()) for _, metric, lines in TABLE.findall(text)]


def test_the_tables_of_the_evidence_are_those_that_were_printed() -> None:
    printed = {table for file in RESULTS.glob("*.md") for table in tables(file.read_text())}
    shown = tables((ROOT / "docs" / "evidence.md").read_text())
    assert len(shown) > 10
    assert [table for table in shown if table not in printed] == []


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.md")), ids=lambda file: file.stem)
def test_the_tables_are_of_the_runs_that_were_logged(file: Path) -> None:
    runs = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
    scores = {(run["configuration"], run["seed"]): run["scores"]["best"] for run in runs}
    found = tables(file.read_text())
    assert found
    for metric, table in found:
        rows = LINE.findall(table)
        assert len(rows) == table.count("\n") - 1
        for name, seeds, mean, difference, se, against in rows:
            ours = {seed: found[metric] for (of, seed), found in scores.items() if of == name}
            assert len(ours) == int(seeds) and f"{np.mean(list(ours.values())):.1f}" == mean
            if against:
                d = np.array([ours[seed] - scores[against, seed][metric] for seed in ours])
                assert f"{d.mean():+.1f}" == difference and f"{d.std(ddof=1) / len(d) ** 0.5:.1f}" == se
