"""What the compilers make of every GPU kernel, configuration and target: static_table.json, recomputed by a test.

    python tests/gpu_without_gpu/static_table.py            what would change
    python tests/gpu_without_gpu/static_table.py --update   writes the table
    python tests/gpu_without_gpu/static_table.py --all      compiles rows of the same key, too

Kernels and their configurations are those that the launchers ask for in CASES; nothing is listed by hand.  A row has a
key, the hash of everything that decides it: source, configuration, compilers, the code that reads what they make.  The
test takes a row from the table where the key is the same, and compiles the others, and one in CHECKED of those too.
What was compiled is kept on disk (tests/support/disk_cache.py).
"""

from __future__ import annotations

import ast
import inspect
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import nvcc  # noqa: E402
import torch  # noqa: E402
from disk_cache import cached, digest  # noqa: E402

import cibr_kernels as ck  # noqa: E402
from bench.static import compiled, gpus, record, sass  # noqa: E402
from bench.static.gpus import AMD, GPUS  # noqa: E402
from cibr_kernels.losses.penalty import TERMS  # noqa: E402
from cibr_kernels.nn.statistics import Standardize  # noqa: E402

TABLE = Path(__file__).with_name("static_table.json")
TARGETS: tuple[int | str, ...] = (*GPUS, *AMD)
SOURCES = ("csrc/additive/moments/cuda.cu", "csrc/additive/shifts/cuda.cu")
ARCHITECTURES = {80: "80", 90: "90a", 100: "100a", 120: "120"}  # nvcc's names
SLACK = 1.05  # of a hot loop's length
CHECKED = 16
Facts = dict[str, Any]


# ------------------------------------------------------------------------------------------------ what is launched
def _contrastive(dtype: torch.dtype, d: int, stash: bool = False, n: int = 4096) -> None:
    x, y = (torch.empty(n, d, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    scale = torch.empty((), device="cuda", requires_grad=True)
    before = ck.stash_budget()
    ck.set_stash_budget(1 << 40 if stash else 0)
    try:
        record.backward(ck.clip_loss(x, y, scale, backend="triton"))
    finally:
        ck.set_stash_budget(before)


def _siglip(dtype: torch.dtype) -> None:
    x, y = (torch.empty(4096, 512, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    scale, bias = (torch.empty((), device="cuda", requires_grad=True) for _ in range(2))
    record.backward(ck.siglip_loss(x, y, scale, bias, backend="triton"))


def _sums(dtype: torch.dtype, d: int, stash: bool = False, ids: bool = False, maxima: bool = False) -> None:
    from cibr_kernels.primitives.dot.lse.op import dot_lse

    x, y = (torch.empty(4096, d, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    scale = torch.empty((), device="cuda", requires_grad=True)
    groups = torch.empty(4096, device="cuda", dtype=torch.int64) if ids else None
    before = ck.stash_budget()
    ck.set_stash_budget(1 << 40 if stash else 0)
    try:
        found = dot_lse(x, y, scale, row_ids=groups, col_ids=groups, need_max=maxima, backend="triton")
        record.backward(found[0].mean() + found[1].mean() - found[2].mean())
    finally:
        ck.set_stash_budget(before)


def _softplus(dtype: torch.dtype, ids: bool = False, attract: bool = False, sums: bool = False) -> None:
    from cibr_kernels.primitives.dot.softplus.op import dot_softplus, dot_softplus_sums

    x, y = (torch.empty(4096, 512, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    scale, bias = (torch.empty((), device="cuda", requires_grad=True) for _ in range(2))
    weights = torch.empty(4096, device="cuda")
    groups = torch.empty(4096, device="cuda", dtype=torch.int64) if ids else None
    how = {"row_ids": groups, "col_ids": groups, "attract": attract, "backend": "triton"}
    if sums:
        rows, cols = dot_softplus_sums(x, y, scale, bias, **how)
        record.backward(rows.mean() + cols.mean())
    else:
        record.backward(dot_softplus(x, y, scale, bias, weights, **how))


def _scores(activation: str) -> None:
    from cibr_kernels.primitives.additive.scores.op import additive_scores

    a, b = (torch.empty(4096, 512, device="cuda", requires_grad=True) for _ in range(2))
    w = torch.empty(512, device="cuda", requires_grad=True)
    record.backward(additive_scores(a, b, w, activation=activation, backend="triton").mean())


def _critic(activation: str) -> None:
    from cibr_kernels.primitives.additive.moments.op import additive_moments

    a, b = (torch.empty(4096, 512, device="cuda", requires_grad=True) for _ in range(2))
    w = torch.empty(512, device="cuda", requires_grad=True)
    j, el = additive_moments(a, b, w, activation=activation, backend="triton")
    record.backward(j - el)


def _concat_critic() -> None:
    x, z = (torch.empty(4096, 512, device="cuda", requires_grad=True) for _ in range(2))
    with torch.device("cuda"):
        critic = ck.nn.ConcatCritic(512, 512, 512)
    j, el = ck.critic_moments(x, z, critic, backend="triton")
    record.backward(j - el)


def _objective() -> None:
    features = [torch.empty(4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    scale = torch.empty((), device="cuda", requires_grad=True)
    data = {name: torch.empty(4096, 512, device="cuda") for name in ("image_inputs", "text_inputs")}
    with torch.device("cuda"):
        critics = {name: ck.nn.ConcatCritic(512, 512, 512) for name in TERMS}
    record.backward(ck.cibr_loss(*features, scale, critics=critics, backend="triton", **data))


def _standardize(dtype: torch.dtype) -> None:
    with torch.device("cuda"):
        module = Standardize(512)
    module(torch.empty(4096, 512, device="cuda", dtype=dtype))


def _shifts(activation: str) -> None:
    from cibr_kernels.primitives.additive.shifts.op import additive_shifts

    a, b = (torch.empty(4096, 512, device="cuda", requires_grad=True) for _ in range(2))
    w = torch.empty(512, device="cuda", requires_grad=True)
    record.backward(additive_shifts(a, b, w, 8, activation=activation, backend="triton").mean())


def _log_mean_exp(dtype: torch.dtype) -> None:
    scores = torch.empty(4096, 4096, device="cuda", dtype=dtype, requires_grad=True)
    record.backward(ck.log_mean_exp(scores, backend="triton"))


CASES: dict[str, Callable[[], None]] = {
    "clip_loss bf16 D=512": lambda: _contrastive(torch.bfloat16, 512),
    "clip_loss bf16 D=512 N=65536": lambda: _contrastive(torch.bfloat16, 512, n=65536),
    "clip_loss bf16 D=512 stash": lambda: _contrastive(torch.bfloat16, 512, stash=True),
    "clip_loss bf16 D=100": lambda: _contrastive(torch.bfloat16, 100),
    "clip_loss fp32 D=512": lambda: _contrastive(torch.float32, 512),
    "siglip_loss bf16 D=512": lambda: _siglip(torch.bfloat16),
    "dot_lse bf16 D=512 ids": lambda: _sums(torch.bfloat16, 512, ids=True),
    "dot_lse bf16 D=512 maxima": lambda: _sums(torch.bfloat16, 512, maxima=True),
    "dot_lse bf16 D=512 ids maxima stash": lambda: _sums(torch.bfloat16, 512, stash=True, ids=True, maxima=True),
    "dot_lse bf16 D=100 ids": lambda: _sums(torch.bfloat16, 100, ids=True),
    "dot_lse fp32 D=512 ids maxima": lambda: _sums(torch.float32, 512, ids=True, maxima=True),
    "dot_softplus bf16 D=512": lambda: _softplus(torch.bfloat16),
    "dot_softplus bf16 D=512 attract": lambda: _softplus(torch.bfloat16, ids=True, attract=True),
    "dot_softplus bf16 D=512 sums": lambda: _softplus(torch.bfloat16, sums=True),
    "dot_softplus bf16 D=512 ids sums": lambda: _softplus(torch.bfloat16, ids=True, sums=True),
    "dot_softplus fp32 D=512": lambda: _softplus(torch.float32),
    "dot_softplus fp32 D=512 ids sums": lambda: _softplus(torch.float32, ids=True, sums=True),
    "additive_moments relu H=512": lambda: _critic("relu"),
    "additive_moments gelu H=512": lambda: _critic("gelu"),
    "additive_scores relu H=512": lambda: _scores("relu"),
    "additive_scores gelu H=512": lambda: _scores("gelu"),
    "additive_shifts relu H=512": lambda: _shifts("relu"),
    "additive_shifts gelu H=512": lambda: _shifts("gelu"),
    "critic_moments relu H=512": _concat_critic,
    "cibr_loss bf16 D=512": _objective,
    "Standardize fp32": lambda: _standardize(torch.float32),
    "Standardize bf16": lambda: _standardize(torch.bfloat16),
    "log_mean_exp fp32": lambda: _log_mean_exp(torch.float32),
}


def launches(target: int | str) -> Iterator[tuple[str, record.Launch]]:
    """(name, launch) of every kernel that CASES compile on a target, each once."""
    seen: set[Any] = set()
    for case, run in CASES.items():
        with record.recording(target) as recorder:
            run()
        count: Counter[str] = Counter()
        for event in recorder.events:
            if isinstance(event, record.Launch) and event.key not in seen:
                seen.add(event.key)
                count[event.name] += 1
                yield f"{case}: {event.name}{f' {count[event.name]}' if count[event.name] > 1 else ''}", event


# ------------------------------------------------------------------------------------------------ what it compiles to
def facts(kernel: compiled.Compiled) -> Facts:
    """A kernel's row; "loop" is its hot loop: instructions, those of the tensor cores, those of the MUFU pipe."""
    row: Facts = {
        "registers": kernel.registers,
        "spills": kernel.spills,
        "stack": kernel.stack,
        "shared": kernel.shared,
        "threads": kernel.threads,
        "blocks": kernel.blocks,
    }
    if kernel.tensor_memory:
        row["tensor_memory"] = kernel.tensor_memory
    loop = sass.hot_loop(kernel.code)
    if loop:
        inside = [kernel.code.instructions[i] for i in loop.all]
        count = sass.mix(inside)
        row["loop"] = {"length": len(inside), "tensor": count["tensor"], "mufu": count["mufu"]}
        kinds = sorted({i.base for i in inside if i.group == "tensor"})
        if kinds:
            row["loop"]["kind"] = " ".join(kinds)
    return row


def compute(table: dict[str, Facts], target: int | str, doing: str = os.devnull) -> dict[str, Facts]:
    """{name: row} of every kernel on one target; the file `doing` says which is being compiled.

    table: the rows that need not be compiled where their key is the same.
    """
    rows: dict[str, Facts] = {}
    label = target if isinstance(target, str) else f"sm_{target}"
    for name, launch in launches(target):
        Path(doing).write_text(f"{target} {name}")
        make = partial(launch_rows, f"{label} {name}", launch, target)
        rows |= settled([f"{label} {name}"], launch_key(launch, target), table, make)
    if isinstance(target, int) and nvcc.find():
        for source in SOURCES:
            begin = f"sm_{target} {source}: "
            names = [name for name in table if name.startswith(begin)]
            rows |= settled(names, cuda_key(source, target), table, partial(cuda_file_rows, begin, source, target))
    return rows


def settled(names: list[str], key: list[str], table: dict[str, Facts], make: Callable[[], Any]) -> dict[str, Facts]:
    """{name: row} of what is compiled at once: the table's rows if all of them have this key, else what make() says."""
    short = digest(key)[:16]
    known = bool(names) and all(table.get(name, {}).get("key") == short for name in names)
    if known and int(short, 16) % CHECKED:
        return {name: table[name] for name in names}
    return {name: {**row, "key": short} for name, row in cached(key, make).items()}


def launch_rows(name: str, launch: record.Launch, target: int | str) -> dict[str, Facts]:
    if isinstance(target, str):
        return {name: dict(compiled.amd_facts(launch, target))}
    return {name: facts(compiled.compile_launch(launch, target))}


@lru_cache
def judges() -> tuple[str, ...]:
    """What, besides a kernel, decides its row: compilers, disassemblers, and the code that reads what they print.

    Of code its meaning, without comments and layout.
    """
    tools = [sass.run(sass.tool(name), "--version") for name in ("ptxas", "nvdisasm", "cuobjdump")]
    code = [inspect.getsource(part) for part in (facts, launch_rows, cuda_rows, compiled, gpus, sass)]
    return json.dumps(versions()), *tools, *(ast.dump(ast.parse(text)) for text in code)


def launch_key(launch: record.Launch, target: int | str) -> list[str]:
    """Triton's hash of the kernel, of what it calls and how it is specialised; the options; the target."""
    return [compiled.source(launch).hash(), json.dumps(launch.options, sort_keys=True), str(target), *judges()]


def cuda_key(source: str, capability: int) -> list[str]:
    """What nvcc is given, of the .cu file and its headers; the options; the target."""
    text = nvcc.meaning(ROOT / source, [ROOT / "csrc"])
    return [*text, json.dumps(nvcc.OPTIONS), nvcc.version(), ARCHITECTURES[capability], *judges()]


def cuda_file_rows(begin: str, source: str, capability: int) -> dict[str, Facts]:
    ptx = nvcc.compile_ptx(ROOT / source, ARCHITECTURES[capability], include=[ROOT / "csrc"])
    return cuda_rows(begin, ptx, capability)


def cuda_rows(begin: str, ptx: str, capability: int) -> dict[str, Facts]:
    """{begin + kernel: row} of a .cu file; dynamic shared memory, which only a launch knows, is not in "shared"."""
    arch = ARCHITECTURES[capability]
    threads = {m[1]: int(m[2]) for m in re.finditer(r"\.entry (\w+)\([^)]*\)[^{]*?\.maxntid (\d+)", ptx)}
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        text.write_text(ptx)
        sass.run(str(nvcc.find()), f"-arch=sm_{arch}", "-cubin", str(text), "-o", str(cubin))
        return {begin + k: facts(v) for k, v in compiled.examine_all(cubin, capability, threads).items()}


def compute_all(table: dict[str, Facts]) -> dict[str, Any]:
    """The whole table, two targets at a time; see compute."""
    context = multiprocessing.get_context("spawn")
    rows: dict[str, Facts] = {}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(max_workers=2, mp_context=context) as pool:
        files = [f"{folder}/{target}" for target in TARGETS]
        try:
            for some in pool.map(partial(compute, table), TARGETS, files):
                rows |= some
        except BrokenProcessPool:
            last = [path.read_text() for path in Path(folder).iterdir()]
            raise RuntimeError(f"a compiler crashed on the last kernel of one of these: {last}") from None
    return {"versions": versions(), "kernels": rows}


def versions() -> dict[str, str]:
    """Of the compilers: another one may allocate registers differently."""
    import triton

    ptxas = re.search(r"V[\d.]+", sass.run(sass.tool("ptxas"), "--version"))
    found = {"triton": triton.__version__, "ptxas": ptxas[0] if ptxas else "?"}
    if nvcc.find():
        build = re.search(r"V[\d.]+|release [\d.]+|cuda_[\d.]+", nvcc.version())
        found["nvcc"] = build[0] if build else "?"
    return found


# ------------------------------------------------------------------------------------------------ comparing
def differences(old: dict[str, Facts], new: dict[str, Facts]) -> list[str]:
    """What became worse or another thing: rows that came or went, more registers, a longer loop, fewer blocks."""
    found = [f"{name}: not in the table" for name in new if name not in old]
    found += [f"{name}: no longer compiled" for name in old if name not in new]
    for name in sorted(set(old) & set(new)):
        a, b = old[name], new[name]
        for key in ("registers", "spills", "stack", "scratch", "shared", "tensor_memory"):
            if b.get(key, 0) > a.get(key, 0):
                found.append(f"{name}: {key} {a.get(key, 0)} -> {b[key]}")
        for key in ("threads", "matrix"):
            if b.get(key) != a.get(key):
                found.append(f"{name}: {key} {a.get(key)} -> {b.get(key)}")
        if b.get("blocks", 0) < a.get("blocks", 0):
            found.append(f"{name}: blocks per processor {a['blocks']} -> {b['blocks']}")
        before, after = a.get("loop", {}), b.get("loop", {})
        for key in ("tensor", "mufu", "kind"):
            if before.get(key) != after.get(key):
                found.append(f"{name}: {key} in the hot loop {before.get(key)} -> {after.get(key)}")
        if after.get("length", 0) > SLACK * before.get("length", 0):
            found.append(f"{name}: hot loop {before.get('length')} -> {after['length']} instructions")
    return found


def limits(name: str, row: Facts) -> list[str]:
    """Why a kernel cannot run, or runs out of registers, whatever the table says."""
    found = [f"{name}: {row[key]} {key}" for key in ("spills", "stack", "scratch") if row.get(key)]
    if row.get("tensor_memory", 0) > 512:
        found.append(f"{name}: {row['tensor_memory']} columns of tensor memory, there are 512")
    most = 65536 if name.startswith("gfx") else GPUS[int(name.split()[0][3:])].shared_block
    if row["shared"] > most:
        found.append(f"{name}: {row['shared']} bytes of shared memory, a block has {most}")
    if row.get("blocks") == 0:
        found.append(f"{name}: no block fits on a processor")
    return found


def load(path: Path | None = None) -> dict[str, Any]:
    path = path or TABLE
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"versions": {}, "kernels": {}}
    return table


def save(table: dict[str, Any], path: Path | None = None) -> None:
    """One kernel a line, so that a change reads as one."""
    path = path or TABLE
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table["kernels"].items())
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{\n "versions": {json.dumps(table["versions"])},\n "kernels": {{\n{rows}\n }}\n}}\n')
    os.replace(partial, path)


def main() -> int:
    old = load()
    new = compute_all({} if "--all" in sys.argv[1:] else old["kernels"])
    problems = [line for name, row in new["kernels"].items() for line in limits(name, row)]
    print("\n".join(["versions: " + ", ".join(f"{k} {v}" for k, v in new["versions"].items()), *problems]))
    print("\n".join(differences(old["kernels"], new["kernels"])))
    if "--update" in sys.argv[1:]:
        save(new)
        print(f"wrote {len(new['kernels'])} kernels to {TABLE.relative_to(ROOT)}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
