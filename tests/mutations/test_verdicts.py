"""verdicts.py: which kept verdicts are taken, what their keys are made of, and that the tables are whole."""

from __future__ import annotations

import ast
import dataclasses
import shutil
from pathlib import Path

import cpu_faults
import pytest
import verdicts
from mutations import ROOT, Fault, delete, later

pytest.importorskip("triton")
import cpu_kernels
import cpu_keys
import gpu_faults
import gpu_suites

FAULTS = [Fault(f"fault {k}", "own", "setup.py", f"old {k}", "new") for k in range(100)]


def key(fault: Fault) -> str:
    return verdicts.short(verdicts.of_fault(fault))


def rows(faults: list[Fault]) -> verdicts.Rows:
    return {verdicts.name(f): verdicts.row("caught", "a test", key(f)) for f in faults}


def test_a_fault_is_judged_anew_without_a_verdict_of_its_key_and_a_share_of_the_others() -> None:
    table = rows(FAULTS[2:])
    table["own: fault 2"]["key"] = "another"
    changed, again = verdicts.unsettled(FAULTS, table, key)
    assert changed == FAULTS[:3]
    assert again == [f for f in FAULTS[3:] if int(key(f), 16) % verdicts.CHECKED == 0] and 0 < len(again) < 20


@pytest.mark.parametrize("checked", [1, 1 << 64], ids=["all checked", "none checked"])
def test_the_share_that_is_checked(monkeypatch: pytest.MonkeyPatch, checked: int) -> None:
    monkeypatch.setattr(verdicts, "CHECKED", checked)
    assert verdicts.unsettled(FAULTS, rows(FAULTS), key) == ([], FAULTS if checked == 1 else [])


def test_a_table_is_kept_one_fault_a_line_and_of_the_known_faults(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    assert verdicts.load(table) == {}
    verdicts.save(table, rows(FAULTS[:4]), FAULTS)
    verdicts.save(table, {"own: fault 2": verdicts.row("missed", "", "k")}, FAULTS[1:])
    assert list(verdicts.load(table)) == ["own: fault 1", "own: fault 2", "own: fault 3"]
    assert verdicts.load(table) == rows(FAULTS[1:4]) | {"own: fault 2": {"verdict": "missed", "by": "", "key": "k"}}
    assert len(table.read_text().splitlines()) == 5 and not list(tmp_path.glob("*.partial"))


def test_a_fault_is_all_that_it_says() -> None:
    fault = Fault("name", "suite", "path", "old", "new")
    changed = [
        dataclasses.replace(fault, **{field: "x"}) for field in ("name", "suite", "path", "old", "new", "kernel")
    ]
    edits = [delete("bar"), delete("bar", 1), delete("foo"), later("bar")]
    faults = [fault, *changed, *(dataclasses.replace(fault, ptx=edit) for edit in edits)]
    assert len({key(f) for f in faults}) == len(faults) == 11
    assert key(dataclasses.replace(fault, ptx=delete("bar", 1))) == key(faults[8])


# ------------------------------------------------------------------------------------------------ sources
def test_sources_are_what_is_included_without_comments(tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    texts = {
        "op/cpu.cpp": '#include "near.h"\n#include "common.h"\n#include <vector>\nint f();  // what\n',
        "op/near.h": "#pragma once\n",
        "common.h": '#include "op/near.h"\n/* two\nlines */ const char* s = "//";\n',
        "other.h": "",
    }

    def hashes(**changed: str) -> list[str]:
        verdicts.cpp.cache_clear()
        for name, text in (
            texts | {name.replace("__", "/").replace("_h", ".h"): t for name, t in changed.items()}
        ).items():
            (tmp_path / name).write_text(text)
        return verdicts.cpp(tmp_path, "op/cpu.cpp")

    before = hashes()
    assert len(before) == 3
    assert hashes(other_h="int x;") == before
    assert hashes(common_h='#include "op/near.h"  // near\nconst   char* s = "//";\n') == before
    assert hashes(common_h='#include "op/near.h"\nconst char* s = "//x";\n') != before
    assert hashes(op__near_h="#pragma once\nint y;\n") != before


def test_an_op_includes_its_own_sources() -> None:
    def of(*sources: str) -> set[str]:
        return {*verdicts.cpp(ROOT / "csrc", *sources)}

    assert of("dot/engine.h") < of("dot/lse/cpu.cpp") and of("common/simd.h") < of("additive/shifts/cpu.cpp")
    assert not of("dot/engine.h") <= of("additive/shifts/cpu.cpp")


def test_python_is_what_it_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "ROOT", tmp_path)
    path = tmp_path / "test_x.py"

    def hashed(text: str, test: str = "") -> str:
        verdicts.python.cache_clear()
        path.write_text(text)
        return verdicts.python(path, test)

    text = 'def test_a():\n    """Says."""\n    assert f(1)\n\n\ndef test_b():\n    pass\n'
    before, of_a = hashed(text), hashed(text, "test_a")
    assert hashed(text.replace("Says", "Tells").replace("(1)", "(1)  # one")) == before
    assert hashed(text.replace("1", "2")) != before
    assert hashed(text.replace("pass", "assert f(3)")) != before
    assert hashed(text.replace("pass", "assert f(3)"), "test_a") == of_a != hashed(text.replace("1", "2"), "test_a")


def test_tests_are_followed_to_what_they_share() -> None:
    found = {str(p.relative_to(ROOT / "tests")) for p in verdicts.tests(ROOT / "tests/primitives/test_log_mean_exp.py")}
    assert found == {
        "primitives/test_log_mean_exp.py",
        *(f"support/{n}.py" for n in ("log_mean_exp", "cases", "covering")),
    }
    names = {p.name for p in gpu_suites.code("dot")}
    assert {"gpu_checked.py", "executor.py", "machine.py", "mutations.py", "triton_forward.py"} <= names


def test_code_that_no_key_knows_is_an_error() -> None:
    tree = ast.parse("x = 1")
    with pytest.raises(AssertionError, match=r"ran: tests/support/disk_cache.py$"), verdicts.within([Path(__file__)]):
        verdicts.meaning(tree)
    with verdicts.within([ROOT / "tests/support/disk_cache.py"]):
        verdicts.meaning(tree)


# ------------------------------------------------------------------------------------------------ the package's faults
def test_kernels_of_a_suite_import_none_that_its_key_does_not_know() -> None:
    for suite in gpu_suites.SUITES:
        known = {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in gpu_suites.code(suite)}
        kernels = [p for p in gpu_suites.code(suite) if p.name.startswith("triton") and p.parent.name != "dispatch"]
        for node in [n for p in kernels for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.ImportFrom)]:
            if (node.module or "").rpartition(".")[2].startswith("triton_"):
                assert node.module in known, (suite, node.module)


def test_a_fault_is_in_code_of_its_key() -> None:
    for fault in gpu_faults.FAULTS:
        if fault.path.endswith(".py"):
            assert ROOT / fault.path in gpu_suites.code(fault.suite), fault
        elif fault.path:
            assert {*verdicts.cpp(ROOT / "csrc", fault.path.removeprefix("csrc/"))} <= {
                *verdicts.cpp(ROOT / "csrc", "additive/moments/cuda.cu")
            }, fault
    for fault in cpu_faults.FAULTS:
        unit = verdicts.cpp(ROOT / "csrc", *cpu_kernels.OPS[fault.suite].sources, "common/scratch.cpp")
        assert {*verdicts.cpp(ROOT / "csrc", fault.path.removeprefix("csrc/"))} <= {*unit}, fault


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_table_has_a_verdict_on_every_fault(kind: str) -> None:
    faults = cpu_faults.FAULTS if kind == "cpu" else gpu_faults.FAULTS
    table = verdicts.load(verdicts.CPU if kind == "cpu" else verdicts.GPU)
    assert list(table) == [verdicts.name(f) for f in faults]
    assert {found["verdict"] for found in table.values()} <= {"caught", "equivalent"}
    assert all(found["by"] and len(found["key"]) == 16 for found in table.values())


@pytest.fixture
def cpu_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if every fault's verdict were kept; none is checked all the same."""
    if not cpu_kernels.backends.native_available() or shutil.which("g++") is None:
        pytest.skip("the compiled kernels are not built, or g++ is not installed")
    table = tmp_path / "cpu.json"
    by = {name: found["by"] for name, found in verdicts.load(verdicts.CPU).items()}
    found = {
        n: verdicts.row("caught", by[n], cpu_keys.key(f, by[n])) for f in cpu_faults.FAULTS if (n := verdicts.name(f))
    }
    verdicts.save(table, found, cpu_faults.FAULTS)
    monkeypatch.setattr(cpu_keys, "CPU", table)
    monkeypatch.setattr(verdicts, "CHECKED", 1 << 64)
    return table


def test_faults_of_the_cpu_with_another_key_are_judged_and_of_many_one_of_each_file(
    cpu_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = cpu_faults.FAULTS
    assert cpu_keys.judged_anew(faults) == []
    table = verdicts.load(cpu_table)
    verdicts.save(cpu_table, {name: {**table[name], "key": ""} for name in map(verdicts.name, faults[:3])}, faults)
    assert cpu_keys.judged_anew(faults) == faults[:3]
    monkeypatch.setattr(cpu_keys, "compilers", lambda: ("another g++", "another torch"))
    with pytest.warns(UserWarning, match=f"^{len(faults)} faults have no verdict of this key"):
        sample = cpu_keys.judged_anew(faults)
    assert sorted(f.path for f in sample) == sorted({f.path for f in faults})
    one = faults[0]
    assert cpu_keys.key(one, table[verdicts.name(one)]["by"]) != table[verdicts.name(one)]["key"]
