"""Processes that work together over gloo: started once, given one task after another."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import CONTEXT, process

MOST = 4
GROUPS: dict[int, dist.ProcessGroup] = {}  # in a worker: the group of the first so many ranks


class Ranks:
    """`run(function, world, ...)` calls function(group, ...) on the first `world` processes, rank by rank."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.tasks = [CONTEXT.SimpleQueue() for _ in range(MOST)]
        self.pipes = [CONTEXT.Pipe(duplex=False) for _ in range(MOST)]
        store = str(Path(self.folder.name) / "store")
        self.processes = [
            process(_work, rank, store, self.tasks[rank], self.pipes[rank][1], daemon=True) for rank in range(MOST)
        ]
        for started in self.processes:
            started.start()

    def run(self, function: Callable[..., Any], world: int, *args: Any, timeout: float = 120, **options: Any) -> list:
        """-> what each rank returned.  Raises AssertionError with the tracebacks if any raised or kept silent."""
        for tasks in self.tasks[:world]:
            tasks.put((function, world, args, options))
        answers = []
        for rank, (receiver, _) in enumerate(self.pipes[:world]):
            deadline = time.monotonic() + timeout
            while not receiver.poll(1):
                assert self.processes[rank].is_alive(), f"rank {rank} has died"
                assert time.monotonic() < deadline, f"rank {rank} gave no answer in {timeout} s"
            answers.append(receiver.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]

    def close(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for started in self.processes:
            started.join(10)
            started.kill()
        self.folder.cleanup()


def _work(rank: int, store: str, tasks: Any, sender: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=MOST, timeout=timedelta(seconds=60)
    )
    GROUPS.update({world: dist.new_group(range(world)) for world in range(1, MOST + 1)})
    while (task := tasks.get()) is not None:
        function, world, args, options = task
        torch.manual_seed(0)
        try:
            answer = None, function(GROUPS[world], *args, **options)
        except Exception:
            answer = traceback.format_exc(), None
        sender.send(answer)
    dist.destroy_process_group()
