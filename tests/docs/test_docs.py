"""The pages of docs/: every Python block runs, every public name and argument is there, every link leads somewhere.

The blocks of a page share one namespace, in order; a ```text block right after one is what it prints.  A comment on the
line above a block changes what is done with it:

    <!-- needs: torch_mist, cuda -->    run where these can be imported (and CUDA is there), compiled everywhere
    <!-- ranks: 2 -->                   a script of its own, run by so many processes over gloo
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from scripts import run_script
from shown import assert_printed

import cibr_kernels as ck

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
BLOCK = re.compile(r"(?:^<!-- (needs|ranks): ([^\n]*?) -->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"\s*```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PUBLIC = [
    *(name for name in ck.__all__ if name not in ("nn", "distributed")),
    *(f"nn.{name}" for name in ck.nn.__all__),
    *(f"distributed.{name}" for name in ck.distributed.__all__),
]


@dataclass(frozen=True)
class Block:
    """A Python block; line: where in the file its code begins; prints: what the page shows of its output."""

    page: str
    line: int
    code: str
    needs: tuple[str, ...]
    ranks: int
    prints: str

    def compiled(self) -> Any:
        """The code, whose line numbers are the page's."""
        return compile(
            "\n" * (self.line - 1) + self.code, str(ROOT / "docs" / f"{self.page}.md"), "exec", dont_inherit=True
        )


def blocks(page: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(PAGES[page]):
        key, value, code = match.groups()
        line = PAGES[page][: match.start(3)].count("\n") + 1
        needs = tuple(re.split(r",\s*", value)) if key == "needs" else ()
        output = OUTPUT.match(PAGES[page], match.end())
        ranks = int(value) if key == "ranks" else 1
        found.append(Block(page, line, code, needs, ranks, output[1] if output else ""))
    return found


def here(need: str) -> bool:
    if need == "cuda":
        return torch.cuda.is_available()
    try:
        importlib.import_module(need)
    except ImportError:
        return False
    return True


TABLES = [("objectives", "OBJECTIVES"), ("models", "MODELS"), ("data", "SOURCES")]  # of the trainer, in `cibr`
SCRIPTS = [block for page in PAGES for block in blocks(page) if block.ranks > 1]


@pytest.fixture
def tables() -> Iterator[None]:
    """What a page's blocks add to the trainer's tables is gone afterwards."""
    with ExitStack() as stack:
        for module, table in TABLES:
            stack.enter_context(patch.dict(getattr(importlib.import_module(f"cibr.{module}"), table)))
        yield


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert PAGES[page].count("```python") == len(blocks(page))
    module = ModuleType(f"docs_{page}")  # a dataclass looks for its module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page):
        code = block.compiled()
        if block.ranks == 1 and all(here(need) for need in block.needs):
            exec(code, module.__dict__)
            assert_printed(block.prints, capsys.readouterr().out, tolerance=0.02)


@pytest.mark.parametrize("script", SCRIPTS, ids=[f"{block.page}:{block.line}" for block in SCRIPTS])
def test_a_script_for_several_ranks_runs(script: Block, tmp_path: Path) -> None:
    run_script(script.code, tmp_path, script.ranks)


def section(name: str) -> str:
    """What the pages say of a public name: its own page, its section of nn.md, or the page that names it in a title."""
    kind, _, short = name.rpartition(".")
    if kind == "nn":
        return re.split(r"^## ", PAGES["nn"].split(f"\n## {short}\n")[1], flags=re.MULTILINE)[0]
    if kind == "distributed":
        return PAGES["distributed"]
    titled = [text for text in PAGES.values() if name in text.partition("\n")[0].lstrip("# ").split(", ")]
    return titled[0] if titled else "\n".join(PAGES.values())


def public(name: str) -> Any:
    thing = ck
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def shown_signature(text: str, name: str) -> inspect.Signature | None:
    """Of the first `name(...)` in a block indented by four."""
    found = re.search(rf"^ {{4}}{name}\(((?:[^()]|\([^()]*\))*)\)", text, re.MULTILINE)
    if found is None:
        return None
    names = {"e": math.e}
    exec(f"def shown({found[1]}): pass", names)
    return inspect.signature(names["shown"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented_with_all_its_arguments(name: str) -> None:
    text, short = section(name), name.rpartition(".")[2]
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", text))))
    shown = shown_signature(text, short)
    assert short in words or shown
    if shown and name.startswith("nn."):  # its section says in words what the arguments are
        return
    missing = set(inspect.signature(public(name)).parameters) - words
    assert not missing, f"{name} has the arguments {missing}, of which its page says nothing"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_signature_on_a_page_is_that_of_the_code(name: str) -> None:
    shown, actual = (
        None if signature is None else [(p.name, p.kind, p.default) for p in signature.parameters.values()]
        for signature in (shown_signature(section(name), name.rpartition(".")[2]), inspect.signature(public(name)))
    )
    if shown is None:
        assert name not in PAGES and name.rpartition(".")[0] != "nn", f"{name} has a page without its signature"
    else:
        assert shown == actual


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}.md" for page in PAGES)])
def test_links_lead_somewhere(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page} links to {target}, which has {anchors}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_a_dot_product_in_words_is_code(page: Path) -> None:
    """A browser takes <x_i, y_j> for a tag and shows nothing."""
    words = re.sub(r"^```.*?^```$|^ {4}.*?$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"<[A-Za-z][^>\n]*,[^>\n]*>", words)


def test_every_page_can_be_reached_from_the_index() -> None:
    linked = re.findall(r"\]\((\w+)\.md[)#]", PAGES["index"])
    assert set(PAGES) - {"index"} == set(linked) - {"index"}


def test_every_record_has_its_command_and_date() -> None:
    results = ROOT / "bench" / "results"
    listed = re.findall(
        r"^\| \[([\w.-]+)\]\(\.\./bench/results/\1\) \| .+ \| [\d and]+ [A-Z][a-z]+ \|$",
        PAGES["benchmarks"],
        re.MULTILINE,
    )
    kept = {path.name for path in results.iterdir() if path.suffix in (".txt", ".md")} | {"evidence"}
    assert sorted(listed) == sorted(kept)


@pytest.mark.parametrize(("module", "table"), TABLES)
def test_the_trainers_page_names_what_its_tables_have(module: str, table: str) -> None:
    named = set(re.findall(r"`([\w]+)(?::[^`]*)?`", PAGES["trainer"]))
    assert set(getattr(importlib.import_module(f"cibr.{module}"), table)) <= named
