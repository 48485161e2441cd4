"""What a run tells: log.jsonl, TensorBoard and the bar on the terminal."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

SHOWN = ("loss", "contrastive_loss", "image_cmi", "text_cmi", "lam", "scale")


class Journal:
    """Goes on after `step` steps of `total`; a context.  Needs TensorBoard."""

    def __init__(self, run: Path, step: int, total: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        trim_log(run / "log.jsonl", step)
        self.log = (run / "log.jsonl").open("a", buffering=1)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=total, initial=step, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self.board, self.bar, self.log):
            part.close()

    def step(self) -> None:
        """One step more on the bar."""
        self.bar.update()

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        self.bar.write(text, sys.stderr)

    def write(self, counters: dict[str, float], entry: dict[str, float]) -> None:
        """One entry of the log; `counters` holds "step"."""
        self.log.write(json.dumps({**counters, **entry}) + "\n")
        for name, value in entry.items():
            self.board.add_scalar(name, value, counters["step"])
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in entry.items() if name in SHOWN})


def trim_log(path: Path, step: int) -> None:
    """Drops the entries after `step`, which a killed run wrote beyond its last checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    trimmed = path.with_suffix(".tmp")
    trimmed.write_text("".join(kept))
    os.replace(trimmed, path)
