"""Every `cibr` command that a page shows gets as far as its work: its options are there and their values make sense."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cibr import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORK = (
    "cibr.train.train",
    "cibr.evaluate.evaluate_run",
    "cibr.pictures.plot",
    "cibr.demo.demo",
    "cibr.export.export",
    "cibr.data.emoji_build.build",
    "cibr.data.check.check",
    "cibr.cache.towers",
    "cibr.prompts.run",
    "cibr.table.table",
    "cibr.omib.train.train",
    "cibr.compare.run_comparison",
)


class Reached(Exception):
    pass


def reach(*arguments: Any, **options: Any) -> None:
    raise Reached


def commands() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    lines = re.findall(r"^ {4}cibr (.+)$", text, re.MULTILINE)
    return sorted({re.sub(r" {2,}", " ", line.partition("#")[0]).strip() for line in lines})


def test_there_are_commands() -> None:
    shown = {command.split(" -")[0] for command in commands()}
    assert {"train", "evaluate", "data emoji", "data cache", "demo"} <= shown


@pytest.mark.parametrize("command", commands())
def test_a_command_on_a_page_reaches_its_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in WORK:
        monkeypatch.setattr(name, reach)
    arguments = shlex.split(command)
    if "--json" in arguments:
        Path(arguments[arguments.index("--json") + 1]).parent.mkdir(parents=True)
    with pytest.raises(Reached):
        cli.main(arguments)
