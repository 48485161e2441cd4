"""Training, resuming, evaluating and the command line, on the toy set."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toyset

from cibr.cli import main
from cibr.config import TrainConfig
from cibr.errors import UsageError
from cibr.evaluate import evaluate, recalls, style_probe, table
from cibr.models import MAX_LOG_SCALE, TwoTower
from cibr.objectives import OBJECTIVES, Clip
from cibr.run import checkpoint
from cibr.run.ranks import Ranks
from cibr.train import Players, make_optimizer, take_step, train

pytestmark = pytest.mark.filterwarnings("ignore:the estimate", "ignore:cibr_kernels")

SMALL: dict[str, Any] = {
    "hold_out": "little-house",
    "batch_size": 16,
    "image_size": 16,
    "image_width": 4,
    "text_width": 32,
    "text_layers": 1,
    "embed_dim": 16,
    "critic_hidden": 16,
    "lr_warmup_steps": 5,
    "lam_warmup_steps": 5,
    "lam_ramp_steps": 5,
    "precision": "float32",
    "threads": 1,
}


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toyset.build(tmp_path_factory.mktemp("toy"), size=16)


def config(directory: Path, out: Path, **options: Any) -> TrainConfig:
    return TrainConfig(data=str(directory), out=str(out), **{**SMALL, **options})


def read_log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> bytes:
    found = checkpoint.find(run)
    assert found is not None
    return (found / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    outcome = train(config(directory, run, steps=120, augment=False, lr=3e-3))
    assert outcome.step == 120 and outcome.skipped_steps == 0 and outcome.stopped_by is None
    return run


def test_training_learns_and_carries_over_to_the_vendor_held_out(trained: Path) -> None:
    log = read_log(trained)
    assert log[-1]["contrastive_loss"] < 0.6 * log[0]["contrastive_loss"]
    splits = evaluate(trained)["splits"]
    assert splits["train"]["image_to_text@1"] > 40
    assert splits["held_out"]["image_to_text@5"] > 100 * 5 / 22 * 1.5  # half as much again as chance
    assert list((trained / "tensorboard").iterdir())


def test_cibr_logs_every_part_and_follows_its_warm_up(directory: Path, tmp_path: Path) -> None:
    train(config(directory, tmp_path, objective="cibr", steps=12, log_every=1))
    log = read_log(tmp_path)
    estimates = ["image_cmi", "text_cmi", "image_own", "image_other", "text_own", "text_other"]
    parts = ["loss", "contrastive_loss", "lam", *estimates]
    assert all(math.isfinite(entry[part]) for entry in log for part in parts)
    assert [entry["lam"] for entry in log[:5]] == [0.0] * 5 and log[-1]["lam"] == 0.5
    assert log[3]["loss"] == pytest.approx(log[3]["contrastive_loss"])  # lam is 0
    penalty = log[-1]["image_cmi"] + log[-1]["text_cmi"]
    assert log[-1]["loss"] == pytest.approx(log[-1]["contrastive_loss"] + 0.5 * penalty, rel=1e-4)


def start(directory: Path, run: Path) -> subprocess.Popen[bytes]:
    given = {"data": directory, "out": run, **SMALL, "objective": "cibr", "steps": 90, "save_every": 7}
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-m", "cibr", "train", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def stop_midway(directory: Path, run: Path, number: int) -> int:
    """Starts the run, sends it the signal once it has a checkpoint, and returns its exit status."""
    process = start(directory, run)
    deadline = time.monotonic() + 120
    while checkpoint.find(run) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def test_a_killed_run_resumed_gives_the_weights_of_an_unbroken_one(directory: Path, tmp_path: Path) -> None:
    whole = config(directory, tmp_path / "whole", objective="cibr", steps=90, save_every=7)
    train(whole)

    killed = tmp_path / "killed"
    assert stop_midway(directory, killed, signal.SIGKILL) == -signal.SIGKILL
    (killed / "checkpoints" / ".step-00000001.partial-x").mkdir()  # as a kill in mid-write leaves it
    first = checkpoint.load_training(checkpoint.find(killed) or killed)["step"]
    assert 0 < first < 90
    assert train(dataclasses.replace(whole, out=str(killed)), resume=True).step == 90
    assert weights(killed) == weights(tmp_path / "whole")
    assert [entry["step"] for entry in read_log(killed)] == [entry["step"] for entry in read_log(tmp_path / "whole")]
    losses = [[entry["loss"] for entry in read_log(run)] for run in (killed, tmp_path / "whole")]
    assert losses[0] == losses[1]
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == ["step-00000084", "step-00000090"]

    asked = tmp_path / "asked"
    assert stop_midway(directory, asked, signal.SIGTERM) == 128 + signal.SIGTERM
    assert 0 < checkpoint.load_training(checkpoint.find(asked) or asked)["step"] < 90
    moved = asked.rename(tmp_path / "moved")
    outcome = train(dataclasses.replace(whole, out=str(moved)), resume=True)
    assert outcome.step == 90
    assert weights(moved) == weights(tmp_path / "whole")
    states = [checkpoint.load_training(checkpoint.find(run) or run) for run in (moved, tmp_path / "whole")]
    for name, value in states[0]["objective"].items():
        assert torch.equal(value, states[1]["objective"][name]), name


def test_a_run_is_not_overwritten_and_keeps_its_options(
    trained: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="holds a run already"):
        train(config(directory, trained, steps=5))
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--out", str(trained), "--resume", "--lr", "0.5"])
    assert "was started with lr = 0.003" in capsys.readouterr().err
    other = toyset.build(tmp_path / "other", size=16)
    (other / "framed.tar").unlink()
    with pytest.raises(UsageError, match="cannot be resumed"):
        train(config(other, trained, steps=120, augment=False, lr=3e-3), resume=True)


class NotFinite(Clip):
    """CLIP's loss, but NaN at some calls."""

    def __init__(self, calls: range) -> None:
        super().__init__()
        self.calls, self.call = calls, 0

    def forward(self, image: Any, text: Any, logit_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = super().forward(image, text, logit_scale)
        self.call += 1
        return {**parts, "loss": parts["loss"] * math.nan} if self.call in self.calls else parts


def test_steps_that_are_not_finite_are_skipped_and_counted(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OBJECTIVES, "clip", lambda config, model: NotFinite(range(3, 6)))
    outcome = train(config(directory, tmp_path / "a", steps=8, log_every=1))
    assert outcome.skipped_steps == 3 and outcome.step == 8
    assert "step 3 skipped: loss nan" in capsys.readouterr().err
    assert read_log(tmp_path / "a")[-1]["skipped"] == 3
    model, _, _ = checkpoint.load_model(tmp_path / "a")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    monkeypatch.setitem(OBJECTIVES, "clip", lambda config, model: NotFinite(range(3, 1000)))
    with pytest.raises(RuntimeError, match="50 steps in a row without a finite loss"):
        train(config(directory, tmp_path / "b", steps=100))


def tiny_model() -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(20, 6, image_width=4, text_width=32, text_layers=1, embed_dim=8)


def test_a_skipped_step_changes_nothing() -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(8, 3, 16, 16)
    images[3] = math.nan  # poisons the running statistics of batch norm
    tokens = torch.randint(1, 20, (8, 6))
    _, _, taken = take_step(Players(model, Clip()), optimizer, images, tokens, torch.float32)
    assert not taken
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    _, norm, taken = take_step(Players(model, Clip()), optimizer, torch.rand(8, 3, 16, 16), tokens, torch.float32)
    assert taken and norm > 0


def test_the_scale_stays_below_100() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.log_scale.fill_(7.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    take_step(Players(model, Clip()), optimizer, torch.rand(8, 3, 16, 16), torch.randint(1, 20, (8, 6)), torch.float32)
    assert model.log_scale.item() == pytest.approx(MAX_LOG_SCALE)


def test_embeddings_are_a_function_of_the_features_before_projection() -> None:
    model = tiny_model().eval()
    for features, projection in (
        (model.encode_image(torch.rand(5, 3, 16, 16)), model.image_projection),
        (model.encode_text(torch.randint(1, 20, (5, 6))), model.text_projection),
    ):
        assert features.inputs.shape == (5, 32) and features.embedding.shape == (5, 8)
        expected = features.inputs @ projection.weight.T
        torch.testing.assert_close(features.embedding, expected / expected.norm(dim=1, keepdim=True))


def test_critics_have_a_group_of_their_own(directory: Path, tmp_path: Path) -> None:
    options = config(directory, tmp_path, objective="cibr", steps=1)
    model = tiny_model()
    objective = OBJECTIVES["cibr"](options, model)
    groups = make_optimizer(options, model, objective).param_groups
    critics = {id(p) for p in objective.parameters()}
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len([*model.parameters(), *objective.parameters()])
    for group in groups:
        assert {id(p) in critics for p in group["params"]} in ({True}, {False})
        assert group["peak_lr"] == (options.lr * 2 if id(group["params"][0]) in critics else options.lr)
        assert group["weight_decay"] == 0 or all(p.ndim > 1 for p in group["params"])


def test_a_budget_in_seconds_ends_the_run(directory: Path, tmp_path: Path) -> None:
    outcome = train(config(directory, tmp_path, seconds=0.5, steps=None))
    assert outcome.step >= 1 and 0.5 <= outcome.seconds < 5


def test_corrupt_samples_are_reported(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    data = toyset.build(tmp_path / "data", size=16)
    whole = (data / "framed.tar").read_bytes()
    (data / "framed.tar").write_bytes(whole.replace(b"\x89PNG", b"\x89BAD", 2))
    options = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "2", *options])
    assert "2 unreadable samples skipped" in capsys.readouterr().out


# Evaluation


def test_recalls_of_a_case_worked_by_hand() -> None:
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0.8, 0.6, 0], [0, 0.6, 0.8]])
    scores = recalls(images, np.array([7, 7, 8, 9]), texts, np.array([7, 8, 9]))
    # Nearest texts: 7, 8 (wrong), 7 (wrong), 9. Nearest images: of text 7 the 1st, of 8 the 2nd (wrong), of 9 the last.
    assert scores["image_to_text@1"] == pytest.approx(50)
    assert scores["text_to_image@1"] == pytest.approx(200 / 3)
    assert scores["image_to_text@5"] == scores["text_to_image@5"] == 100


def test_recalls_count_ranks() -> None:
    d = 12
    ranked = torch.linspace(1, 0, d).unsqueeze(0)  # one image, nearest to text 0, then 1, ...
    for place in range(d):
        scores = recalls(ranked, np.array([place]), torch.eye(d), np.arange(d))
        assert [scores[f"image_to_text@{k}"] for k in (1, 5, 10)] == [100 * (place < k) for k in (1, 5, 10)]
        assert scores["text_to_image@1"] == 100  # eleven texts have no image and are not asked


def test_the_style_probe_finds_style_where_there_is_some() -> None:
    rng = np.random.default_rng(0)
    style = np.repeat([0, 1, 2], [60, 30, 10])
    plain = rng.normal(size=(100, 8))
    marked = plain + 6 * np.eye(8)[style]
    assert style_probe(marked, style, marked, style)["accuracy"] > 95
    blind = style_probe(rng.normal(size=(100, 8)), style, plain, style)
    assert blind["majority"] == pytest.approx(60) and blind["accuracy"] < 70


def test_evaluate_and_plot_from_the_command_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--checkpoint", str(trained), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    printed = capsys.readouterr().out
    assert printed.strip() == table(report).strip()
    counts = {name: (split["images"], split["classes"]) for name, split in report["splits"].items()}
    assert counts == {"held_out": (22, 22), "unseen": (6, 2), "unseen_held_out": (2, 2), "train": (66, 22)}
    assert set(report["style_probe"]) == {"accuracy", "majority"}
    assert report["style_probe"]["majority"] == pytest.approx(100 / 3)
    with pytest.raises(SystemExit, match="0"):
        main(["plot", "--run", str(trained)])
    for name in ("curves.png", "tsne.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")


def test_evaluate_on_another_folder(trained: Path, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "small.tar").write_bytes((directory / "small.tar").read_bytes())
    report = evaluate(trained, tmp_path)
    assert set(report["splits"]) == {"held_out", "unseen_held_out"} and "style_probe" not in report
    with pytest.raises(UsageError, match="no checkpoint"):
        evaluate(tmp_path)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps is 0, but must be positive"),
        ({"steps": None}, "say how long to train"),
        ({"steps": None, "seconds": -1.0}, "--seconds is -1.0"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"lr": math.nan}, "--lr is nan"),
        ({"lam": -0.1}, "--lam is -0.1, but must not be negative"),
        ({"batch_size": 1}, "at least 2"),
        ({"objective": "clap"}, "'clap'; known are clip, cibr"),
        ({"text_width": 100}, "multiple of 32"),
        ({"unseen_fraction": 1.0}, r"must lie in \[0, 1\)"),
        ({"precision": "float8"}, "known are auto, float32, bfloat16"),
        ({"device": "toaster"}, "known are auto, cpu, cuda"),
    ],
)
def test_options_that_make_no_sense(directory: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(directory, tmp_path, **{"steps": 5, **options})


def test_an_unknown_key_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "options.json").write_text(json.dumps({"data": "x", "out": "y", "steps": 3, "learning_rate": 1}))
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", str(tmp_path / "options.json")])
    assert "unknown option learning_rate; known are augment, batch_size" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--learning-rate", "1"])


@pytest.mark.parametrize("command", [["train"], ["train", "--out", "x", "--steps", "1"]])
def test_what_is_missing_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "--data is missing" in capsys.readouterr().err


def test_every_objective_can_be_chosen() -> None:
    for name in OBJECTIVES:
        assert TrainConfig(data="x", out="y", steps=1, objective=name).objective == name


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    code = (
        "import sys, cibr.cli; print([m for m in ('torch', 'sklearn', 'matplotlib', 'webdataset') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


# Several processes


def torchrun(ranks: int, *options: object) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node RANKS -m cibr train OPTIONS`."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--standalone", "-m", "cibr", "train", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_and_three_go_on_with_their_run(directory: Path, tmp_path: Path) -> None:
    """Steps 1 to 8 on two processes, 9 to 14 on three, uneven: the losses are those of one process."""
    given = {**SMALL, "objective": "cibr", "log_every": 1, "batch_size": 17, "save_every": 8, "steps": 14}
    train(config(directory, tmp_path / "one", **given))

    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    several = tmp_path / "several"
    stopped = torchrun(2, *options, "--data", directory, "--out", several)
    assert stopped.returncode == 0, stopped.stderr
    assert "14 steps in" in stopped.stdout and stopped.stdout.count("steps in") == 1
    shutil.rmtree(checkpoint.find(several) or several)  # as if killed after the checkpoint of step 8
    assert checkpoint.load_training(checkpoint.find(several) or several)["step"] == 8
    resumed = torchrun(3, "--resume", "--out", several)
    assert resumed.returncode == 0, resumed.stderr

    logs = [read_log(tmp_path / "one"), read_log(several)]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 15))
    for expected, entry in zip(*logs, strict=True):
        for name in ("loss", "contrastive_loss", "image_own", "text_other", "scale", "gradient_norm"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (entry["step"], name)
    states = [checkpoint.load_training(checkpoint.find(run) or run) for run in (tmp_path / "one", several)]
    assert torch.equal(states[0]["rng"], states[1]["rng"])


def test_more_ranks_than_pairs_are_refused(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "32")
    with pytest.raises(UsageError, match="--batch-size is 16, but there are 32 ranks"):
        train(config(directory, tmp_path / "run", steps=1))


def test_every_row_belongs_to_one_rank() -> None:
    for total, world in ((17, 3), (16, 4), (5, 5), (7, 4)):
        parts = [Ranks(rank, world).part(total) for rank in range(world)]
        assert [row for part in parts for row in range(total)[part]] == list(range(total))
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
