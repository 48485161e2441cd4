"""`python bench/ calls`: how far one call travels inside the package, and what the tree costs a reader.

A call counts each Python function of `cibr_kernels` that it enters, and a file move each time the code that runs is in
another file than before.  Forward only, on the CPU; C++, PyTorch and comprehensions are not counted.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F

import cibr_kernels as ck

PACKAGE = Path(ck.__file__).parent
ROOT = PACKAGE.parent


def travel(call: Callable[[], Any]) -> tuple[int, int]:
    """-> calls and file moves inside the package of the second of two calls."""
    entered: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            entered.append(code.co_filename)

    call()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(entered), sum(a != b for a, b in itertools.pairwise(entered))


def examples() -> dict[str, Callable[[], Any]]:
    """The three calls that are followed, at 64 rows, with gradients."""
    torch.manual_seed(0)
    x, z = (F.normalize(torch.randn(64, 32), dim=1).requires_grad_() for _ in range(2))
    xv, xt, scale = torch.randn(64, 48), torch.randn(64, 40), torch.tensor(14.3, requires_grad=True)
    critic, objective = ck.nn.ConcatCritic(32, 32, 16), ck.nn.CIBRLoss(32, 48, 40, hidden=16)
    return {
        "clip_loss": lambda: ck.clip_loss(x, z, scale),
        "critic_moments": lambda: ck.critic_moments(x, z, critic),
        "nn.CIBRLoss": lambda: objective(x, z, scale, xv, xt),
    }


def floors() -> int:
    """Floors of the import graph: the longest chain of folders in which each imports the next."""
    graph: dict[Path, set[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue  # the package's own front
        below = graph.setdefault(path.parent, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cibr_kernels":
                below |= {_folder(f"{node.module}.{alias.name}") for alias in node.names}
        below.discard(path.parent)

    def depth(folder: Path, above: frozenset[Path] = frozenset()) -> int:
        inside = above | {folder}
        return 1 + max((depth(b, inside) for b in graph.get(folder, ()) if b not in inside), default=0)

    return max(map(depth, graph))


def _folder(name: str) -> Path:
    """Of the module that a dotted name is, or is in."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    while not path.is_dir() and not path.with_suffix(".py").is_file():
        path = path.parent
    return path if path.is_dir() else path.parent


def skipped_formatting() -> int:
    """Places where the formatter is told to look away."""
    files = (p for top in ("cibr_kernels", "cibr", "bench", "tests") for p in (ROOT / top).rglob("*.py"))
    return sum(path.read_text().count("# fmt: " + "skip") for path in files)


def main() -> int:
    print(f"{'':<16}{'calls':>8}{'file moves':>12}")
    for name, call in examples().items():
        calls, moves = travel(call)
        print(f"{name:<16}{calls:>8}{moves:>12}")
    print(f"floors of the import graph: {floors()}")
    print(f"formatting skipped: {skipped_formatting()}")
    return 0
