"""Where the time goes, as shares of phases; and signals that ask a run to end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """From `mark(phase)` on, time counts as that phase's, until the next mark.

    On a GPU marks are events in its stream, read when the shares are asked for: nothing waits meanwhile.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, time.perf_counter()))

    def shares(self) -> dict[str, float]:
        """Each phase's share of the time since the last call; the last phase is open and goes on."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (phase, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            taken = begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
            seconds[phase] = seconds.get(phase, 0.0) + taken
        self.marks = self.marks[-1:]
        total = sum(seconds.values()) or 1.0
        return {phase: value / total for phase, value in seconds.items()}


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that a SIGINT, SIGTERM or SIGHUP puts its number into; a second one acts as usual."""
    stop: list[int] = []
    previous: dict[int, Any] = {}

    def ask(number: int, frame: object) -> None:
        stop.append(number)
        signal.signal(number, previous[number])

    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        previous[asked] = signal.signal(asked, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
