"""Which way the trainer's arrows point: models and data know neither each other nor what is done with them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from runs import ROOT

ABOVE = ("train", "session", "stages", "critics", "rates", "cli", "demo", "plots", "pictures", "export")
FORBIDDEN = {
    "data": ("models", "objectives", "evaluate", "step", *ABOVE),
    "models": ("data", "objectives", "evaluate", "run", "step", *ABOVE),
    "objectives": ("data", "evaluate", "run", "step", *ABOVE),
    "run": ("data", "objectives", "evaluate", "step", *ABOVE),
    "evaluate": ("objectives", "step", *ABOVE),
    "omib": ("data", "models", "objectives", "evaluate", "step", "session", "cli"),
}
FILES = [path for folder in FORBIDDEN for path in sorted((ROOT / "cibr" / folder).glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_arrows_point_down(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "cibr":
                assert rest.split(".")[0] not in FORBIDDEN[path.parent.name], f"{path.name} imports {name}"


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "cibr").rglob("*.py")}
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.__getitem__)
