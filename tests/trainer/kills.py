"""The campaign of kills: a run is killed at random moments and resumed until it ends, bit for bit the unkilled one.

    python tests/trainer/kills.py --kills 50        # in each mode; prints a line for each

A moment is drawn from the seed:

    time    SIGKILL from outside, so many seconds after the start
    loop    SIGKILL at the k-th call of a function, Python's or C's, after the start; in the process or in a worker
    save    the same, of calls that write checkpoints
    byte    the kernel ends the process in the middle of a file, at its k-th byte (RLIMIT_FSIZE and SIGXFSZ)
    full    writing fails there instead, as on a full disk

Counted are processes that such a moment ended; one that had finished before it is not.  With two ranks one of them is
killed, or both.  Who is not killed must end with words: a rank or a worker that is alone, a disk that is full.
`test_resume.py` holds a short campaign.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]  # as a script

import forks  # noqa: E402
from runs import CIBR, config, log_of, require_same_state  # noqa: E402
from torch.utils.data._utils import worker  # noqa: E402

from cibr.config import RunConfig  # noqa: E402
from cibr.errors import UsageError  # noqa: E402
from cibr.run import checkpoint  # noqa: E402
from cibr.train import train  # noqa: E402

trainer = sys.modules["cibr.train"]  # the module

RUN: dict[str, Any] = {**CIBR, "steps": 18, "save_every": 4, "log_every": 3, "keep": 3}  # an epoch has 12 steps
TIMES = ("seconds", "samples_per_second", "share_of_time")
WORDS = 2  # the exit status of a process that stopped with words
ENDS = (-signal.SIGKILL, -signal.SIGXFSZ, WORDS)
PLACES: dict[str, tuple[Any, str]] = {"loop": (trainer, "loop"), "save": (checkpoint, "save")}
MODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "alone": ({}, ("time", "loop")),
    "2 workers": ({"workers": 2}, ("time", "loop")),
    "2 ranks": ({"rank_timeout": 15.0}, ("time", "loop")),
    "in a checkpoint": ({}, ("save", "byte")),
    "full disk": ({}, ("full",)),
}


def child(settings: RunConfig, *, before: Callable[[], None] | None = None, **environment: str) -> BaseProcess:
    """A process that goes on with the run, and ends with 2 for a UsageError, with 128 + n after signal n."""
    process = forks.process(_go_on, settings, before, environment)
    process.start()
    return process


def _go_on(settings: RunConfig, before: Callable[[], None] | None, environment: dict[str, str]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.environ |= environment
    worker.MP_STATUS_CHECK_INTERVAL = 0.5  # workers look so often for a parent that was killed; a join awaits them
    try:
        if before is not None:
            before()
        stopped_by = train(settings, resume=True).stopped_by
    except UsageError as error:
        say(settings, str(error))
        os._exit(WORDS)
    except BaseException:
        say(settings, traceback.format_exc())
        os._exit(1)
    os._exit(0 if stopped_by is None else 128 + stopped_by)


def say(settings: RunConfig, text: str) -> None:
    """Into RUN/said.txt, also where the disk is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(settings.run.out, "said.txt").write_text(text)


def said(run: Path) -> str:
    return (run / "said.txt").read_text() if (run / "said.txt").exists() else ""


def two_ranks(settings: RunConfig, before: Callable[[], None] | None = None, on: int = 0) -> list[BaseProcess]:
    """`before` is called on one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    hooks = [before if rank == on else None for rank in range(2)]
    return [child(settings, before=hook, RANK=str(r), LOCAL_RANK=str(r), **common) for r, hook in enumerate(hooks)]


def finish(settings: RunConfig, **more: Any) -> None:
    process = child(settings, **more)
    process.join(120)
    assert process.exitcode == 0


def require_same_run(run: Path, whole: Path) -> None:
    require_same_state(run, whole)
    shown = [[{k: v for k, v in e.items() if k not in TIMES} for e in log_of(r)] for r in (run, whole)]
    assert shown[0] == shown[1]
    assert not list((run / "checkpoints").glob(".*.partial-*"))


def unhurried() -> None:
    """Steps of this process wait, so that what is to happen between two of them does on a busy machine too."""
    own = trainer.take_step

    def later(*given: Any, **more: Any) -> Any:
        time.sleep(0.05)
        return own(*given, **more)

    trainer.take_step = later  # type: ignore[attr-defined]


class Calls:
    """Counts the calls of functions, Python's and C's, within one of PLACES; may kill the process at one."""

    def __init__(self, place: str, kill_at: int | None = None) -> None:
        self.place, self.count, self.kill_at = place, 0, kill_at

    def begin(self) -> None:
        """From now on, in this process and its workers."""
        module, name = PLACES[self.place]
        own = getattr(module, name)

        def counted(*given: Any, **more: Any) -> Any:
            sys.setprofile(self._called)
            try:
                return own(*given, **more)
            finally:
                sys.setprofile(None)

        setattr(module, name, counted)

    def _called(self, frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


@dataclass
class Unkilled:
    """The run to compare with, and how many moments there are in it."""

    run: Path
    seconds: float
    calls: dict[str, int]  # within each of PLACES
    largest: int  # bytes of a file
    ranks: bool = False  # whether there are two

    @classmethod
    def of(cls, run: Path) -> Unkilled:
        """Trains in this process, and once more for each count."""
        train(config(run, **RUN))
        calls, again = {}, run.with_name(f"{run.name}-counted")
        for place, (module, name) in PLACES.items():
            counter, own = Calls(place), getattr(module, name)
            counter.begin()
            train(config(again, **RUN))
            setattr(module, name, own)
            shutil.rmtree(again)
            calls[place] = counter.count
        began = time.monotonic()
        finish(config(again, **RUN))
        seconds = time.monotonic() - began
        largest = max(file.stat().st_size for file in (run / "checkpoints").rglob("*"))
        return cls(run, seconds, calls, largest)

    def two_ranks(self, run: Path) -> Unkilled:
        """Its weights differ from one process's by rounding."""
        began = time.monotonic()
        for process in two_ranks(config(run, **RUN)):
            process.join(120)
            assert process.exitcode == 0
        return Unkilled(run, time.monotonic() - began, self.calls, self.largest, ranks=True)


def disk_ends(size: int, *, killed: bool) -> None:
    """No file can be larger than `size` from now on; who tries is killed, or told."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def go_on(settings: RunConfig, kind: str | None, whole: Unkilled, rng: random.Random) -> list[int]:
    """Goes on with the run until it ends, or a random moment of this `kind`; returns each rank's exit status."""
    began, wait = time.monotonic(), rng.random() * whole.seconds
    before: Callable[[], None] | None = None
    if kind in PLACES:
        before = Calls(kind, rng.randrange(whole.calls[kind])).begin
    elif kind in ("byte", "full"):
        size = int(whole.largest ** rng.random())  # small files, too
        before = partial(disk_ends, size, killed=kind == "byte")
    on = rng.randrange(2)
    ranks = two_ranks(settings, before, on) if whole.ranks else [child(settings, before=before)]
    if kind == "time":
        for p in rng.choice((ranks, ranks[:1], ranks[-1:])):
            p.join(max(0.0, began + wait - time.monotonic()))
            p.kill()
    for p in ranks:
        p.join(120)
        assert p.exitcode is not None, f"a process is still there two minutes after a moment of {kind}"
    return [p.exitcode or 0 for p in ranks]


def campaign(mode: str, kills: int, whole: Unkilled, folder: Path, seed: int = 0) -> Counter[str]:
    """Kills one run after another, `kills` times in all, compares each with `whole` when it ends; returns the counts.

    Raises AssertionError for a process that ended otherwise than killed, with words or done, and for other bits.
    """
    options, kinds = MODES[mode]
    rng, found = random.Random(f"{mode} {seed}"), Counter[str]()
    for _ in range(20 * kills + 20):
        kind = rng.choice(kinds) if sum(found[one] for one in kinds) < kills else None
        run = folder / f"run-{found['runs']}"
        statuses = go_on(config(run, **{**RUN, **options}), kind, whole, rng)
        assert set(statuses) <= {0, *ENDS}, (kind, statuses, said(run))
        if any(statuses):
            assert kind is not None, said(run)
            found[kind] += 1
            found["words"] += WORDS in statuses
            continue
        require_same_run(run, whole.run)
        shutil.rmtree(run)
        found["runs"] += 1
        if kind is None:
            return found
    raise AssertionError(f"moments come after the end: {dict(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in each mode")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
            whole = Unkilled.of(Path(folder, "whole"))
        ranks = whole.two_ranks(Path(folder, "ranks"))
        for mode in given.modes:
            found = campaign(mode, given.kills, ranks if mode == "2 ranks" else whole, Path(folder, mode), given.seed)
            kinds = ", ".join(f"{found[kind]} by {kind}" for kind in MODES[mode][1])
            words = f"{found['words']} of them ended with words"
            print(f"{mode:16} {kinds}; {words}; {found['runs']} runs the same bit for bit", flush=True)


if __name__ == "__main__":
    main()
