"""Runs that are stopped, at whatever moment, and resumed: bit for bit those that were not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import bad_data
import pytest
import torch
import toyset
from kills import RUN, WORDS, Unkilled, campaign, child, disk_ends, finish, require_same_run, said, two_ranks, unhurried
from runs import config, flags, log_of, quick_to_start, require_same_state, start, state, tiny_clip

from cibr.cli import main
from cibr.errors import UsageError
from cibr.run import checkpoint
from cibr.run.atomic import only_writer
from cibr.run.journal import read_log
from cibr.train import train

pytestmark = pytest.mark.filterwarnings("ignore:the estimate", "ignore:cibr_kernels")


def last_step(run: Path) -> int:
    """Of the log; 0 before it."""
    try:
        return max((entry["step"] for entry in read_log(run / "log.jsonl")), default=0)
    except OSError:
        return 0


def killed_at(run: Path, step: int, processes: list[BaseProcess], delay: float) -> None:
    """Kills the processes `delay` seconds after the log has come to `step`."""
    deadline = time.monotonic() + 120
    while last_step(run) < step and any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    for p in processes:
        p.kill()
        p.join()


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Unkilled:
    return Unkilled.of(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def whole(unkilled: Unkilled) -> Path:
    return unkilled.run


@pytest.mark.parametrize(("mode", "kills"), [("alone", 8), ("2 workers", 4), ("2 ranks", 4), ("in a checkpoint", 6)])
def test_killed_at_random_moments(tmp_path: Path, unkilled: Unkilled, mode: str, kills: int) -> None:
    """22 kills.  Counted are moments that ended a process; one that came after its end is drawn again."""
    campaign(mode, kills, unkilled.two_ranks(tmp_path / "whole") if mode == "2 ranks" else unkilled, tmp_path)


@pytest.mark.parametrize("size", [60_000, 300])
def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path, whole: Path, size: int) -> None:
    """A limit on the size of files stands for it: writing fails in the middle of the tensors, or of config.json."""
    settings = config(tmp_path / "run", **RUN)
    first = child(settings, before=unhurried)
    killed_at(tmp_path / "run", 6, [first], 0)
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    process = child(settings, before=partial(disk_ends, size, killed=False))
    process.join(120)
    assert process.exitcode == WORDS
    text = said(tmp_path / "run")
    assert "could not be written" in text and "Make room, and --resume goes on" in text
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == kept
    finish(settings)
    require_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_with_a_checkpoint(tmp_path: Path, whole: Path, number: int) -> None:
    settings = config(tmp_path / "run", **RUN)
    process = child(settings, before=unhurried)
    while last_step(tmp_path / "run") < 3:
        time.sleep(0.002)
    os.kill(process.pid or 0, number)
    process.join(120)
    assert process.exitcode == 128 + number
    stopped = checkpoint.read_about(checkpoint.find(tmp_path / "run") or tmp_path)["step"]
    assert 3 <= stopped < 18
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    finish(config(moved, **RUN))
    require_same_run(moved, whole)


def test_a_terminal_that_goes_away_ends_with_a_checkpoint(tmp_path: Path) -> None:
    """`cibr train ... | head -1`, with the bar on the pipe too."""
    options = {**quick_to_start(tmp_path), **RUN, "steps": 100_000, "log_every": 1, "out": str(tmp_path / "run")}
    (tmp_path / "run.json").write_text(json.dumps(options))
    process = start("train", "--config", tmp_path / "run.json", stderr=-2)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 128 + signal.SIGPIPE
    assert checkpoint.find(tmp_path / "run") is not None


def copy_of(whole: Path, to: Path) -> Path:
    return Path(shutil.copytree(whole, to))


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage in ("a byte", "cut", "gone"):
        run = copy_of(whole, tmp_path / damage)
        newest = run / "checkpoints" / "step-00000018"
        path = newest / "training.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content if damage == "a byte" else content[:-100])
        assert checkpoint.find(run) == run / "checkpoints" / "step-00000016"
        assert "step-00000018 is damaged" in capsys.readouterr().err
        shutil.rmtree(newest)
        train(config(run, **RUN), resume=True)
        require_same_run(run, whole)


def test_a_half_written_last_line_of_the_log_is_no_harm(tmp_path: Path, whole: Path) -> None:
    run = copy_of(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000018")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 19, "loss": 0.')
    train(config(run, **RUN), resume=True)
    require_same_run(run, whole)


def test_a_run_can_be_extended_and_told_to_say_more(tmp_path: Path) -> None:
    """At a constant rate the longer run is the one that was asked for at once; other options are kept."""
    common = {**RUN, "schedule": "constant"}
    train(config(tmp_path / "whole", **common))
    train(config(tmp_path / "run", **{**common, "steps": 10}))
    longer = config(tmp_path / "run", **{**common, "log_every": 1, "save_every": 5, "keep": 1, "threads": 1})
    assert train(longer, resume=True).step == 18
    require_same_state(tmp_path / "run", tmp_path / "whole")
    assert [entry["step"] for entry in log_of(tmp_path / "run")][-3:] == [16, 17, 18]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    with pytest.raises(UsageError, match=r"a resumed run keeps its options, and this one was started with lr = 0.001"):
        train(config(tmp_path / "run", **{**common, "lr": 0.5}), resume=True)


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", **{**RUN, "steps": 100_000})
    first = child(settings)
    while last_step(tmp_path / "run") < 3:
        time.sleep(0.002)
    with pytest.raises(UsageError, match=r"another process is writing to .*; wait for it"):
        train(settings, resume=True)
    assert first.is_alive()
    first.kill()
    first.join()
    with only_writer(tmp_path / "run"):  # which its end has let go
        pass


def test_other_data_are_refused(tmp_path: Path) -> None:
    data = toyset.build(tmp_path / "toy", size=16)
    common = {"data": f"emoji:{data}", "steps": 2}
    train(config(tmp_path / "run", **common))
    moved = data.rename(tmp_path / "elsewhere")
    assert train(config(tmp_path / "run", data=f"emoji:{moved}", steps=3), resume=True).step == 3
    (moved / "framed.tar").unlink()
    with pytest.raises(UsageError, match=r"is not the data that .* was started with"):
        train(config(tmp_path / "run", data=f"emoji:{moved}", steps=4), resume=True)


def test_others_can_read_checkpoints_and_the_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of the evaluations, by R@1, is not removed with the old ones."""
    from cibr import train as module

    marks = iter([3.0, 9.0, 4.0, 5.0])
    monkeypatch.setattr(module, "quality", lambda report: next(marks))
    old = os.umask(0o077)
    try:
        train(config(tmp_path / "run", steps=8, eval_every=2, save_every=2, keep=1, val_data="synthetic:20"))
    finally:
        os.umask(old)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000004", "step-00000008"]
    assert json.loads((tmp_path / "run" / "best.json").read_text()) == {"step": 4, "quality": 9.0}
    assert all(file.stat().st_mode & 0o777 == 0o644 for path in kept for file in path.iterdir())


def test_several_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    """On two processes, with 9 and 8 rows, as on one; `eps` keeps Adam from making steps of rounding.

    With seed 0 a ReLU is at its kink in the first step, and the rounding of a sum decides its side.
    """
    common = {**RUN, "steps": 6, "batch_size": 17, "log_every": 1, "eps": 1e-3, "seed": 1}
    train(config(tmp_path / "one", **common))
    for process in two_ranks(config(tmp_path / "two", **common)):
        process.join(120)
        assert process.exitcode == 0
    for one, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("loss", "contrastive_loss", "image_own", "text_other", "scale", "gradient_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (one["step"], name)
    for key, value in state(tmp_path / "one").items():
        if value.is_floating_point() and not key.startswith("optimizer."):
            assert (state(tmp_path / "two")[key] - value).abs().max() < 1e-5, key


def test_ranks_count_what_any_of_them_cannot_read(tmp_path: Path) -> None:
    """Each broken image once, in the log of the first rank, as in that of one process."""
    lines = ["filepath,title"]
    for k in range(40):
        path = tmp_path / f"{k}.png"
        path.write_bytes(bad_data.good(k % 6) if k % 5 else b"broken")
        lines.append(f"{path},caption {k}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    common = {"data": f"csv:{tmp_path / 'pairs.csv'}", "batch_size": 10, "steps": 12, "log_every": 6}
    train(config(tmp_path / "one", **common))
    for process in two_ranks(config(tmp_path / "two", **common)):
        process.join(120)
        assert process.exitcode == 0
    for run in ("one", "two"):
        assert [entry["skipped_samples"] for entry in log_of(tmp_path / run)][-1] == 8


@pytest.mark.parametrize("more", [{}, {"fsdp": True}])
def test_ranks_and_parts_and_shards_take_the_steps_of_one_process(tmp_path: Path, more: dict[str, Any]) -> None:
    """A ViT, which has no batch norm: DDP or FSDP2, in parts, resumed, weights averaged, gradients clipped."""
    common = {**RUN, "model": tiny_clip(tmp_path), "batch_size": 17, "eps": 1e-3, "ema": 0.9, "clip_gradient": 1.0}
    train(config(tmp_path / "one", **{**common, "steps": 6}))
    for steps in (3, 6):
        for process in two_ranks(config(tmp_path / "two", **{**common, "accumulate": 3, **more, "steps": steps})):
            process.join(120)
            assert process.exitcode == 0
    one, other = state(tmp_path / "one"), state(tmp_path / "two")
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def killed_by_its_save() -> None:
    checkpoint.save = lambda *given, **more: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def test_a_killed_first_save_asks_for_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config.json is there before the first step, so --resume alone goes on."""
    settings = config(tmp_path / "run", **RUN)
    process = child(settings, before=killed_by_its_save)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and checkpoint.find(tmp_path / "run") is None
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--resume", *flags(out=tmp_path / "run", steps=2, log_every=1)])
    out = capsys.readouterr().out
    assert "2 steps in" in out and f"next: cibr evaluate --checkpoint {tmp_path / 'run'}" in out


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The command of the documentation: one rank speaks, and a signal to the launcher ends in a checkpoint."""
    options = {**quick_to_start(tmp_path), **RUN, "steps": 100_000, "log_every": 1, "out": str(tmp_path / "run")}
    (tmp_path / "run.json").write_text(json.dumps(options))
    process = start("train", "--config", tmp_path / "run.json", ranks=2)
    while last_step(tmp_path / "run") < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert out.count("steps in") == 1 and out.count("objective  cibr") == 1, err
    assert checkpoint.find(tmp_path / "run") is not None


def test_a_rank_that_hangs_is_not_waited_for_without_end(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", **RUN, rank_timeout=3.0)
    first, second = two_ranks(settings, unhurried)
    while last_step(tmp_path / "run") < 3:
        time.sleep(0.002)
    os.kill(second.pid or 0, signal.SIGSTOP)
    first.join(60)
    assert first.exitcode == WORDS
    assert "another rank ended, or did not answer within 3 s" in said(tmp_path / "run")
    second.kill()
    second.join()
