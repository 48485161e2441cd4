"""Every GPU kernel as compiled for every target: it fits, spills nothing, uses the tensor cores, and got no worse.

The numbers are in static_table.json; `python tests/gpu_without_gpu/static_table.py --update` rewrites it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

triton = pytest.importorskip("triton")

import compile_with  # noqa: E402
import disk_cache  # noqa: E402
import nvcc  # noqa: E402
import static_table  # noqa: E402
import triton.language as tl  # noqa: E402

import cibr_kernels  # noqa: E402
from bench.static import record  # noqa: E402

UPDATE = "python tests/gpu_without_gpu/static_table.py --update"
TENSOR = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}


@pytest.fixture(scope="session")
def computed(tmp_path_factory):
    """Computed once, by the first worker that asks: what has another key than in the table is compiled."""
    table = static_table.load()["kernels"]
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return static_table.compute_all(table)
    shared = tmp_path_factory.getbasetemp().parent / "static-table.json"  # the run's folder, above the worker's
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            shared.write_text(json.dumps(static_table.compute_all(table)))
        return json.loads(shared.read_text())


@pytest.mark.slow
def test_every_kernel_can_be_launched_and_spills_nothing(computed):
    problems = [line for name, row in computed["kernels"].items() for line in static_table.limits(name, row)]
    assert len(computed["kernels"]) > 100 and not problems, "\n".join(problems)


@pytest.mark.slow
def test_the_contrastive_kernels_use_the_tensor_cores_of_each_target(computed):
    for target, kind in TENSOR.items():
        rows = {n: r for n, r in computed["kernels"].items() if n.startswith(f"{target} clip_loss bf16 D=512")}
        for kernel in ("dot_lse_scores_kernel", "dot_lse_gradient_kernel"):
            hot = [row["loop"] for name, row in rows.items() if name.split(": ")[1].split()[0] == kernel]
            assert hot and all(loop["kind"] == kind and loop["tensor"] > 0 for loop in hot), (target, kernel, hot)
    matrix = {n: r["matrix"] for n, r in computed["kernels"].items() if n.startswith("gfx") and "bf16" in n}
    matrix = {name: count for name, count in matrix.items() if "dot_lse_scores_kernel" in name}
    assert matrix and min(matrix.values()) > 0, matrix


@pytest.mark.slow
def test_no_kernel_got_worse(computed):
    table = static_table.load()
    if table["versions"] != computed["versions"]:
        pytest.skip(f"the table is of {table['versions']}, here are {computed['versions']}")
    found = static_table.differences(table["kernels"], computed["kernels"])
    assert not found, "\n".join([*found, f"if that is meant: {UPDATE}"])


def test_the_table_is_whole_and_within_the_limits():
    table = static_table.load()
    assert {name.split()[0] for name in table["kernels"]} == {*TENSOR, "gfx942", "gfx1100"}
    assert {"triton", "ptxas"} <= set(table["versions"])
    assert not [line for name, row in table["kernels"].items() for line in static_table.limits(name, row)]


def test_every_kernel_of_the_package_is_in_the_table():
    files = Path(cibr_kernels.__file__).parent.rglob("triton*.py")
    kernels = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    rows = static_table.load()["kernels"]
    for target in (*TENSOR, "gfx942", "gfx1100"):
        known = {name.split(": ")[1].split()[0] for name in rows if name.startswith(f"{target} ")}
        assert len(kernels) > 40 and kernels <= known, (target, kernels - known)


ROW = {"registers": 100, "spills": 0, "stack": 0, "shared": 65536, "threads": 256, "blocks": 2}
LOOP = {"length": 100, "tensor": 4, "mufu": 8, "kind": "HGMMA"}


@pytest.mark.parametrize(
    ("change", "loop", "message"),
    [
        ({"registers": 101}, {}, "registers 100 -> 101"),
        ({"spills": 2}, {}, "spills 0 -> 2"),
        ({"blocks": 1}, {}, "blocks per processor 2 -> 1"),
        ({"threads": 128}, {}, "threads 256 -> 128"),
        ({}, {"length": 106}, "hot loop 100 -> 106 instructions"),
        ({}, {"mufu": 9}, "mufu in the hot loop 8 -> 9"),
        ({}, {"kind": "HMMA"}, "kind in the hot loop HGMMA -> HMMA"),
        ({}, {"length": 105}, None),
        ({"registers": 90, "blocks": 3}, {"length": 50}, None),
    ],
)
def test_what_counts_as_worse(change, loop, message):
    old = {"sm_90 k": {**ROW, "loop": LOOP}}
    new = copy.deepcopy(old)
    new["sm_90 k"] |= change
    new["sm_90 k"]["loop"] |= loop  # type: ignore[operator]
    assert static_table.differences(old, new) == ([f"sm_90 k: {message}"] if message else [])


def test_a_kernel_that_comes_or_goes_is_reported():
    assert static_table.differences({}, {"sm_90 k": ROW}) == ["sm_90 k: not in the table"]
    assert static_table.differences({"sm_90 k": ROW}, {}) == ["sm_90 k: no longer compiled"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sm_90 k", {}, None),
        ("sm_120 k", {"shared": 101377}, "101377 bytes of shared memory, a block has 101376"),
        ("gfx942 k", {"shared": 65537}, "65537 bytes of shared memory, a block has 65536"),
        ("sm_100 k", {"tensor_memory": 576}, "576 columns of tensor memory, there are 512"),
        ("sm_80 k", {"stack": 8}, "8 stack"),
        ("gfx1100 k", {"scratch": 4}, "4 scratch"),
        ("sm_90 k", {"blocks": 0}, "no block fits on a processor"),
    ],
)
def test_limits_of_the_targets(name, change, message):
    assert static_table.limits(name, ROW | change) == ([f"{name}: {message}"] if message else [])


def test_the_table_is_written_one_kernel_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(static_table, "TABLE", tmp_path / "table.json")
    table = {"versions": {"triton": "3"}, "kernels": {"sm_90 a": ROW, "sm_90 b": {**ROW, "loop": LOOP}}}
    static_table.save(table)
    assert static_table.load() == table == json.loads(static_table.TABLE.read_text())
    assert [line.strip()[:9] for line in static_table.TABLE.read_text().splitlines()].count('"sm_90 a"') == 1
    assert not list(tmp_path.glob("*.partial"))


def kernels() -> tuple[Any, Any]:
    """Two of the same name, arguments and constants, that differ in a number."""

    @triton.jit
    def copy(x, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at) + 1)

    one = copy

    @triton.jit
    def copy(x, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at) + 2)

    return one, copy


@pytest.mark.parametrize("key", [static_table.launch_key, compile_with.launch_key], ids=["installed", "oldest"])
def test_a_row_is_kept_under_everything_that_decides_it(key):
    one, other = kernels()
    pointer = record.Argument("*fp32", True)
    launch = record.Launch(one, (1,), {"x": pointer, "out": pointer}, {"BLOCK": 32}, {"num_warps": 4})
    changed = [
        dataclasses.replace(launch, kernel=other),
        dataclasses.replace(launch, args={"x": pointer, "out": record.Argument("*fp16", True)}),
        dataclasses.replace(launch, args={"x": pointer, "out": record.Argument("*fp32", False)}),
        dataclasses.replace(launch, constants={"BLOCK": 64}),
        dataclasses.replace(launch, options={"num_warps": 8}),
    ]
    keys = [key(found, 80) for found in (launch, *changed)]
    keys += [key(launch, target) for target in (90, "gfx942")]
    assert len({tuple(key) for key in keys}) == len(keys)
    assert key(launch, 80) == keys[0]


def test_the_key_of_a_cuda_file_is_what_nvcc_is_given(tmp_path):
    """Code of the file and of headers that it includes, from whichever folder; not comments, layout, other headers."""

    def meaning(folder: str, code: str = "int a; // one\n", header: str = "int b;\n", other: str = "") -> list[str]:
        place = tmp_path / folder
        (place / "common").mkdir(parents=True, exist_ok=True)
        source = place / "k.cu"
        source.write_text(f'#include <cmath>\n#include "common/b.h"\n#include "of_the_toolkit.h"\n{code}')
        (place / "common/b.h").write_text('#pragma once\n#include "common/c.h"\n' + header)
        (place / "common/c.h").write_text('const char* c = "a // is no comment";\n')
        (place / "common/d.h").write_text(other)
        return nvcc.meaning(source, [place])

    first = meaning("a")
    assert len(first) == 3 and "a // is no comment" in first[2] and "one" not in first[0]
    assert first == meaning("b") == meaning("a", code="/* of\n two lines */ int  a;\n\n", other="int d;")
    assert first not in (meaning("a", code="int a2;"), meaning("a", header="int b2;"))


@pytest.fixture
def one_case(tmp_path, monkeypatch):
    """No cache, and the kernels of one op."""
    monkeypatch.setattr(disk_cache, "FOLDER", tmp_path)
    monkeypatch.setattr(static_table, "CASES", {"log_mean_exp": static_table.CASES["log_mean_exp fp32"]})
    monkeypatch.setattr(static_table, "SOURCES", ())


def test_what_was_compiled_is_read_again(one_case, monkeypatch):
    rows = static_table.compute({}, 80)
    monkeypatch.setattr(static_table, "launch_rows", lambda *launch: pytest.fail("compiled again"))
    assert static_table.compute({}, 80) == rows and len(rows) > 1


@pytest.mark.parametrize("checked", [1, 1 << 64], ids=["all checked", "none checked"])
def test_a_row_of_the_table_is_taken_where_its_key_is_the_same(one_case, monkeypatch, checked):
    made = []
    monkeypatch.setattr(static_table, "CHECKED", checked)
    monkeypatch.setattr(static_table, "cached", lambda key, make: make())
    monkeypatch.setattr(static_table, "launch_rows", lambda name, *launch: made.append(name) or {name: dict(ROW)})
    first = static_table.compute({}, 80)
    names = made.copy()
    assert [*first] == names and len(names) > 1
    table = {name: {**row, "registers": 7} for name, row in first.items()}
    table[names[0]]["key"] = "another"
    made.clear()
    found = static_table.compute(table, 80)
    assert made == (names if checked == 1 else names[:1])
    assert {name for name, row in found.items() if row["registers"] == ROW["registers"]} == {*made}
