"""Verdicts that are kept, in cpu_verdicts.json and gpu_verdicts.json, each under the hash of what decides it.

That is the fault, the sources it is compiled with, compilers, and the code that judges: of Python and C++ what it
means, without comments and layout.  A test takes a verdict whose key is the same, and judges the other faults anew, and
one in CHECKED of those too.  mutations.py judges all, and --update writes what it found.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType

from disk_cache import digest, meaning
from mutations import HERE, ROOT, Fault

SUPPORT, PACKAGE = ROOT / "tests/support", ROOT / "cibr_kernels"
SHARED = "testing.py", "numerics.py", "checks.py"  # files of the package that judge or serve every op
CHECKED = 16
Rows = dict[str, dict[str, str]]  # by "suite: fault"; verdict, by, key
CPU, GPU = HERE / "cpu_verdicts.json", HERE / "gpu_verdicts.json"


def name(fault: Fault) -> str:
    return f"{fault.suite}: {fault.name}"


def load(table: Path) -> Rows:
    rows: Rows = json.loads(table.read_text()) if table.exists() else {}
    return rows


def save(table: Path, found: Rows, faults: Sequence[Fault]) -> None:
    """Adds what was found; the rows are of these faults, in their order, one a line."""
    rows = load(table) | found
    lines = [f" {json.dumps(name(f))}: {json.dumps(rows[name(f)])}" for f in faults if name(f) in rows]
    partial = table.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(partial, table)


def row(verdict: str, by: str, key: str) -> dict[str, str]:
    return {"verdict": verdict, "by": by, "key": key}


def unsettled(faults: Sequence[Fault], rows: Rows, key: Callable[[Fault], str]) -> tuple[list[Fault], list[Fault]]:
    """The faults without a verdict of their key, and those to be judged though they have one."""
    keys = {name(f): key(f) for f in faults}
    changed = [f for f in faults if rows.get(name(f), {}).get("key") != keys[name(f)]]
    return changed, [f for f in faults if f not in changed and int(keys[name(f)], 16) % CHECKED == 0]


# ------------------------------------------------------------------------------------------------ keys
def short(parts: Iterable[str]) -> str:
    return digest(parts)[:16]


def of_fault(fault: Fault) -> list[str]:
    """What it changes; of an edit of PTX, which one and with what."""
    cells = fault.ptx.__closure__ or () if fault.ptx else ()
    edit = [fault.ptx.__qualname__, *(repr(cell.cell_contents) for cell in cells)] if fault.ptx else []
    return [fault.suite, fault.name, fault.path, fault.old, fault.new, fault.kernel, *edit]


@cache
def python(path: Path, test: str = "") -> str:
    """The hash of a file's name and meaning; with a test's name, without the file's other tests."""
    tree = ast.parse(path.read_text())
    if test:
        others = lambda n: isinstance(n, ast.FunctionDef) and n.name.startswith("test_") and n.name != test  # noqa: E731
        tree.body = [node for node in tree.body if not others(node)]
    return digest([str(path.relative_to(ROOT)), meaning(tree)])


@cache
def package(places: tuple[str, ...]) -> list[Path]:
    """The Python files of the package that these places are or have in them, and those that serve every op."""
    found = {p for place in (*SHARED, *places) for p in (PACKAGE / place, *(PACKAGE / place).rglob("*.py"))}
    return sorted(p for p in found if p.suffix == ".py")


@cache
def tests(*files: Path) -> list[Path]:
    """These files of tests/, and what they import at their beginning that lies beside them or in tests/support/."""
    found: set[Path] = set()
    todo = list(files)
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        names: list[str] = []
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names += [node.module] if node.module else [alias.name for alias in node.names]
        at = [folder / n for folder in (path.parent, SUPPORT) for name in names for n in (f"{name}.py", name)]
        todo += [p / "__init__.py" if p.is_dir() else p for p in at if p.exists()]
    return sorted(found)


@cache
def cpp(csrc: Path, *sources: str) -> list[str]:
    """The hashes of these sources and of all they include of csrc/: name and text, without comments and layout."""
    found: dict[Path, str] = {}
    todo = [csrc / source for source in sources]
    while todo:
        path = todo.pop().resolve()
        if path in found:
            continue
        text = re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', lambda m: m[1] or " ", path.read_text(), flags=re.S)
        found[path] = " ".join(text.split())
        for included in re.findall(r'#\s*include\s+"([^"]+)"', text):
            todo += [p for p in (path.parent / included, csrc / included) if p.exists()][:1]
    return [digest([str(path.relative_to(csrc)), found[path]]) for path in sorted(found)]


@contextmanager
def within(files: Collection[Path]) -> Iterator[None]:
    """Raises AssertionError where a function of a file of the repository ran inside that is not among these.

    So a key misses no code.  What is at the beginning of a module that is imported inside does not count.
    """
    ran: set[CodeType] = set()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: event == "call" and ran.add(frame.f_code))
    try:
        yield
    finally:
        sys.setprofile(before)
    ran_in = {code.co_filename for code in ran if code.co_name != "<module>"}
    ours = {Path(p) for p in ran_in if p.startswith((f"{PACKAGE}/", f"{ROOT / 'tests'}/"))}
    if missing := sorted(str(p.relative_to(ROOT)) for p in ours - {*files, Path(__file__)}):
        raise AssertionError(f"not in the key, but they ran: {', '.join(missing)}")
