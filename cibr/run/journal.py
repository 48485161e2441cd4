"""What a run tells: log.jsonl, TensorBoard, Weights & Biases where asked, and the bar on the terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from cibr.run.atomic import write_text

SHOWN = ("loss", "contrastive_loss", "image_cmi", "text_cmi", "samples_per_second")
BAR = "{percentage:3.0f}%|{bar}| {elapsed} < {remaining} {desc}{postfix}"


class Terminal:
    """A stream that a closed pipe does not break: what is written to it then is dropped, and `gone` is set.

    Where it is no terminal, what a bar draws over itself is a line each time.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.gone = stream, False

    def write(self, text: str) -> int:
        shown = text if self.isatty() else text.strip("\r\n ") + "\n"
        if not self.gone and shown != "\n":
            try:
                self.stream.write(shown)
                self.stream.flush()
            except (BrokenPipeError, ValueError):
                self.gone = True
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())  # or Python's last flush fails
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return not self.gone and self.stream.isatty()


class Silent:
    """What ranks but the first have for a journal: nothing is written."""

    stopped = 0

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def step(self, step: int, done: float) -> None:
        """The run has come to `step`, and `done` of it is over."""

    def say(self, text: str) -> None:
        """A line on stdout, above the bar."""

    def write(self, step: int, entry: dict[str, Any]) -> None:
        """One entry of the log."""


class Journal(Silent):
    """The log of a run after `step` steps, of which the part `done` is over; a context.

    `about` is the configuration, for services that want to know it.
    """

    def __init__(self, run: Path, step: int, done: float, about: dict[str, Any], wandb_project: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        trim_log(run / "log.jsonl", step)
        self.log = (run / "log.jsonl").open("a", buffering=1)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.out, self.err = Terminal(sys.stdout), Terminal(sys.stderr)
        often = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=1.0, initial=min(done, 1.0), bar_format=BAR, file=self.err, mininterval=often)  # type: ignore[call-overload]
        self.service = None if wandb_project is None else open_wandb(wandb_project, run, about)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self.board, self.bar, self.log):
            part.close()
        if self.service is not None:
            self.service.finish()

    @property
    def stopped(self) -> int:  # type: ignore[override]
        """SIGPIPE where nobody reads the terminal's output any more, otherwise 0."""
        return signal.SIGPIPE if self.out.gone or self.err.gone else 0

    def step(self, step: int, done: float) -> None:
        self.bar.set_description_str(f"step {step}", refresh=False)
        self.bar.update(min(done, 1.0) - self.bar.n)

    def say(self, text: str) -> None:
        if self.err.isatty():
            self.bar.clear()
        self.out.write(text + "\n")

    def write(self, step: int, entry: dict[str, Any]) -> None:
        self.log.write(json.dumps({"step": step, **entry}) + "\n")
        numbers = flat(entry)
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        if self.service is not None:
            self.service.log(numbers, step=step)
        shown = {name: f"{value:.4g}" for name, value in numbers.items() if name in SHOWN}
        if shown:
            self.bar.set_postfix(shown, refresh=False)


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{"zero_shot": {"pets": {"top1": 5.0}}} -> {"zero_shot/pets/top1": 5.0}; what is no number is left out."""
    found: dict[str, float] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def open_wandb(project: str, run: Path, about: dict[str, Any]) -> Any:
    """Goes on with the run's own history there, whose name RUN/wandb.id keeps."""
    import wandb

    kept = run / "wandb.id"
    if not kept.is_file():
        write_text(kept, uuid.uuid4().hex)
    return wandb.init(project=project, name=run.name, id=kept.read_text(), resume="allow", dir=str(run), config=about)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a last line that a kill cut short is left out."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def trim_log(path: Path, step: int) -> None:
    """Drops the entries after `step`, which a killed run wrote beyond its last checkpoint."""
    if not path.exists():
        return
    kept = [json.dumps(entry) + "\n" for entry in read_log(path) if entry["step"] <= step]
    write_text(path, "".join(kept))
