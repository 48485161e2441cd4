"""`python bench/ calls --against CHECKOUT`: instructions of clip_loss at 64 rows, over those of another tree, built.

Counted by callgrind on one thread, after warm-up: the forward of features that require gradients, the same under
no_grad, and forward with backward.  "host" has a kernel that does nothing: Python, PyTorch and checks are left.  The
kernel is the one for what valgrind says the processor has (AVX2).  `--update` keeps the ratios and the other's commit.

    python bench/guards/against.py FOLDER    the child, under callgrind; FOLDER has client.so
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import cibr_kernels as ck

WARM, STEPS = 30, 8
WIDTHS = (256, 512)


def main(other: Path, update: bool) -> int:
    """Prints this tree's instructions over the other's -> 0; 1 where they are over 1 % more; 2 without valgrind."""
    from bench import report
    from bench.guards import RESULTS, host

    try:
        ours, theirs = (_counted(folder) for folder in (host.ROOT, other.resolve()))
    except (host.Uncountable, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    ratios = {case: round(ours[case] / theirs[case], 3) for case in ours}
    print(f"{'clip_loss, 64 rows, instructions':<36}{'here':>12}{'there':>12}{'ratio':>8}")
    for case, ratio in ratios.items():
        print(f"{case:<36}{ours[case]:>12}{theirs[case]:>12}{ratio:>8.3f}")
    if update:
        found = subprocess.run(
            ["git", "-C", str(other), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        report.write(RESULTS / "against.json", {"commit": found.stdout.strip(), "ratios": ratios})
    return 1 if max(ratios.values()) > 1.01 else 0


def _counted(tree: Path) -> dict[str, int]:
    """Instructions of a step of each case, of the package in `tree`."""
    from bench.guards import host

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        host.client(folder)
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [*valgrind, sys.executable, __file__, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise host.Uncountable(f"clip_loss of {tree} did not run:\n{done.stderr[-2000:]}")
        totals = host.totals(folder)
    nothing = totals.pop("nothing")
    return {case: (total - nothing) // STEPS for case, total in totals.items()}


def cases() -> dict[str, Callable[[], Any]]:
    """By name, what is counted."""
    return {f"{name} {d}": case for d in WIDTHS for name, case in _cases(d).items()}


def _cases(d: int) -> dict[str, Callable[[], Any]]:
    x, y = (F.normalize(torch.randn(64, d), dim=1).requires_grad_() for _ in range(2))
    leaves = x, y, torch.tensor(14.3, requires_grad=True)

    def forward() -> torch.Tensor:
        return ck.clip_loss(*leaves)

    return {
        "forward": forward,
        "forward, no_grad": torch.no_grad()(forward),
        "forward and backward": lambda: torch.autograd.grad(forward(), leaves),
    }


def _child(folder: str) -> None:
    torch.set_num_threads(1)
    client, steps = ctypes.CDLL(f"{folder}/client.so"), cases()

    def count(label: str, step: Callable[[], Any]) -> None:
        for _ in range(WARM):
            step()
        client.start()
        for _ in range(STEPS):
            step()
        client.stop(label.encode())

    count("nothing", lambda: None)
    for case, step in steps.items():
        count(case, step)
    importlib.import_module("cibr_kernels._C").clip_loss = lambda parameters: None  # type: ignore[attr-defined]
    for case, step in steps.items():
        if case.endswith(f" {WIDTHS[-1]}"):
            count(f"host: {case}", step)
    os._exit(0)  # valgrind and threads at exit


if __name__ == "__main__":
    _child(sys.argv[1])
