"""What a page tells somebody to run or to open is there.

A `cibr` command gets as far as its work, a `python bench/` command names cases and options that exist, and so do the
files of this repository that the map (DESIGN.md) and its neighbours name.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.cases import CASES
from bench.cli import parser
from bench.guards.host import CASES as HOST_CASES
from cibr import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAPS = [
    ROOT / "DESIGN.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("first_hour", "internals")),
]
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


def bench_commands() -> list[str]:
    text = "\n".join(page.read_text() for page in [*PAGES, *MAPS])
    lines = re.findall(r"^ {4}python bench/(.*)$", text, re.MULTILINE)
    inline = re.findall(r"`python\s+bench/([^`]*)`", text)
    return sorted({" ".join(command.partition("#")[0].split()) for command in [*lines, *inline]} - {"NAME"})


def test_there_are_bench_commands() -> None:
    assert {"toy", "gpu --host", "--quick", ""} <= set(bench_commands())


@pytest.mark.parametrize("command", bench_commands())
def test_a_bench_command_on_a_page_is_one(command: str) -> None:
    words = command.split()
    subcommands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    if not words or words[0] not in subcommands:
        words = ["cases", *words]
    try:
        given = parser().parse_args(words)
    except SystemExit as stop:
        assert stop.code == 0 and "--help" in words, command
        return
    names = [*HOST_CASES, *(case.name for case in CASES)]
    assert all(any(case.startswith(name) for case in names) for name in getattr(given, "names", ()))


def spelled_out(name: str) -> list[str]:
    """`a/{b,c}.h` -> a/b.h and a/c.h."""
    braces = re.search(r"\{([^}]*)\}", name)
    return [name] if braces is None else [name.replace(braces[0], part) for part in braces[1].split(",")]


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.stem)
def test_files_that_a_map_names_are_there(page: Path) -> None:
    """By their path or the end of it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("git does not know this folder")
    files = listed.stdout.split()
    named = re.findall(r"`([\w./{},*-]+\.(?:py|h|cpp|cu|cmake|txt|json|md))`", page.read_text())
    paths = [path for name in named for path in spelled_out(name)]
    assert paths and [p for p in paths if not any(fnmatch.fnmatch(f"/{file}", f"*/{p}") for file in files)] == []
