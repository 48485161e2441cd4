"""`python bench/ gpu --host`: what a step costs the host and the allocator of a GPU, measured without one.

A child process runs each op's forward and backward on the fake device of tests/gpu_without_gpu/fake_device and counts
launches (by who makes them), tensor maps, allocations, waits for the device, and the allocator's peak beyond inputs.
Where valgrind is installed a second child counts host instructions under callgrind, as a ratio to open_clip's loss in
the same process: they do not depend on what else the machine does.  Counts are compared with results/host.json;
after a change that is meant: `python bench/ gpu --host --update`.

    python -m bench.guards.host --counts CASE ...        the child, on the fake device
    python -m bench.guards.host --instructions CASE ...  the same under callgrind
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import report
from bench.guards import RESULTS
from bench.processes import leave

ROOT = RESULTS.parents[1]
RECORD = RESULTS / "host.json"
FAKE_DEVICE = ROOT / "tests" / "gpu_without_gpu"
COLUMNS = ("triton", "cpp", "aten", "cublas", "copies", "tensor_maps", "allocations", "waits", "peak_bytes")
LAUNCHES = COLUMNS[:5]
OURS = ("triton", "cpp", "tensor_maps", "waits")  # the others depend on PyTorch's version too
NEEDS_CUDA_CPP = ("critic_moments ", "CIBRLoss ")
# nn.CIBRLoss has its four critics; "cpp" are kernels of CUDA C++, where they are built
CASES = (
    "clip_loss 1024x512",
    "clip_loss 8192x512",
    "clip_loss 32768x512",
    "clip_loss 65536x512",
    "clip_loss 65536x768",
    "siglip_loss 1024x512",
    "siglip_loss 8192x512",
    "siglip_loss 32768x512",
    "siglip_loss 65536x512",
    "critic_moments 1024x512",
    "critic_moments-triton 1024x512",
    "CIBRLoss 1024x256",
    "CIBRLoss-triton 1024x256",
    "open_clip.ClipLoss 1024x512",
    "open_clip.SigLipLoss 1024x512",
)
# host instructions over open_clip's: what is counted, and over what
RATIOS = {
    "clip_loss 1024x512": "open_clip.ClipLoss 1024x512",
    "clip_loss 8192x512": "open_clip.ClipLoss 1024x512",
    "clip_loss 32768x512": "open_clip.ClipLoss 1024x512",
    "clip_loss 65536x512": "open_clip.ClipLoss 1024x512",
    "siglip_loss 1024x512": "open_clip.SigLipLoss 1024x512",
    "siglip_loss 32768x512": "open_clip.SigLipLoss 1024x512",
    "siglip_loss 65536x512": "open_clip.SigLipLoss 1024x512",
    "critic_moments-triton 1024x512": "open_clip.ClipLoss 1024x512",
    "CIBRLoss-triton 1024x256": "open_clip.ClipLoss 1024x512",
}
SMALL = " 1024x512"  # the size of the step that those of a loss's more rows are compared with
# at most, and over the ratio of a loss's 1024 rows that of any number of them
TARGETS = {
    "clip_loss 1024x512": 0.5,
    "siglip_loss 1024x512": 0.59,
    "critic_moments-triton 1024x512": 1.0,
    "CIBRLoss-triton 1024x256": 3.0,
}
GROWTH = 2.0
STEPS, WARM = 4, 8  # counted under callgrind, and before them: CIBRLoss looks at covariances in steps 1, 2, 4 and 8
Counts = dict[str, dict[str, int]]  # by case, by column


class Uncountable(RuntimeError):
    """Nothing can be counted here; the message says why."""


def main(only: Sequence[str] = (), update: bool = False) -> int:
    """Prints counts, ratios and what changed since the record -> 0; 1 when something did; 2 when nothing is counted."""
    cases = [case for case in CASES if not only or case.startswith(tuple(only))]
    try:
        counts = count(cases)
        ratios = host_ratios(cases)
    except Uncountable as error:
        print(error, file=sys.stderr)
        return 2
    print(table(counts, ratios))
    then, now = read(), {"versions": versions(), "counts": counts}
    changed = [*differences(then, now), *above(ratios)]
    print("\n" + ("\n".join(changed) or "no count changed"))
    if update:
        now = {**now, "counts": then["counts"] | counts, "ratios": then["ratios"] | ratios}
        report.write(RECORD, now)
        print(f"recorded in {RECORD.name}")
    return 1 if changed and not update else 0


def read() -> dict[str, Any]:
    """The record: {"versions", "counts": by case and column, "ratios": by case}."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"versions": {}, "counts": {}, "ratios": {}}


def versions() -> dict[str, str]:
    return {"torch": metadata.version("torch").split("+")[0]}


def count(cases: Sequence[str]) -> Counts:
    """Runs the cases on the fake device; those whose kernels are not built are missing.  Raises Uncountable."""
    with tempfile.TemporaryDirectory() as folder:
        done = _child(Path(folder), [sys.executable], ["--counts", *cases])
    return dict(map(json.loads, done.splitlines()))


def host_ratios(cases: Sequence[str]) -> dict[str, float]:
    """Host instructions of a step over open_clip's, for those of RATIOS among `cases`.  {} without valgrind."""
    wanted = [case for case in RATIOS if case in cases]
    if not wanted or shutil.which("valgrind") is None:
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        client(folder)
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        done = _child(folder, [*valgrind, sys.executable], ["--instructions", *wanted])
        counted = totals(folder)
    return {case: round(counted[case] / counted[RATIOS[case]], 3) for case in done.split("\n") if case in wanted}


def _child(folder: Path, python: list[str], arguments: list[str]) -> str:
    """What this module prints as a program on the fake device, which is built into `folder`."""
    sys.path.insert(0, str(FAKE_DEVICE))
    import fake_device

    try:
        fake_device.build(folder)
    except fake_device.Unavailable as error:
        raise Uncountable(f"no fake device: {error}") from None
    environment = fake_device.environment(folder)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(FAKE_DEVICE)])
    done = subprocess.run(
        [*python, "-m", "bench.guards.host", *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"bench.guards.host {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


CLIENT = """#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(const char* label) { CALLGRIND_DUMP_STATS_AT(label); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def totals(folder: Path) -> dict[str, int]:
    """Instructions by label, of what callgrind left in `folder`."""
    found = {}
    for file in sorted(folder.glob("out.*"), key=lambda file: int(file.suffix[1:])):
        text = file.read_text(errors="replace")
        label = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if label and total:
            found[label[1]] = int(total[1])
    return found


def client(folder: Path) -> None:
    """Builds what tells callgrind where a step begins and ends.  Raises Uncountable."""
    (folder / "client.c").write_text(CLIENT)
    command = ["gcc", "-O1", "-shared", "-fPIC", str(folder / "client.c"), "-o", str(folder / "client.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Uncountable(f"valgrind's headers are not there: {done.stderr[:200]}")


def table(counts: Counts, ratios: dict[str, float]) -> str:
    """One line a case: launches and what they are, and the rest."""
    lines = [
        f"{'forward and backward, bfloat16 (critics float32)':<48}{'launches':>9}"
        + "".join(f"{name:>12}" for name in COLUMNS)
        + f"{'host ratio':>12}{'over' + SMALL.removesuffix('x512'):>12}"
    ]
    grown = growths(ratios)
    for case, row in counts.items():
        total = sum(row[name] for name in LAUNCHES)
        cells = [*(row[name] for name in COLUMNS), *(f"{of[case]:.2f}" if case in of else "" for of in (ratios, grown))]
        lines.append(f"{case:<48}{total:>9}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def growths(ratios: dict[str, float]) -> dict[str, float]:
    """Host instructions of a step over those of the same loss's step of 1024 rows."""
    small = {case.split(" ")[0]: ratio for case, ratio in ratios.items() if case.endswith(SMALL)}
    return {case: ratio / small[case.split(" ")[0]] for case, ratio in ratios.items() if case.split(" ")[0] in small}


def above(ratios: dict[str, float]) -> list[str]:
    """Host instructions that are more than they may be, a line each."""
    found = [f"{case}: {ratios[case]:.2f} of {RATIOS[case]}'s host instructions, {most} at most"
             for case, most in TARGETS.items() if ratios.get(case, 0) > most]  # fmt: skip
    grown = growths(ratios).items()
    return found + [f"{case}: {g:.2f} of{SMALL}'s, {GROWTH} at most" for case, g in grown if g > GROWTH]


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as recorded, a line each; with another PyTorch only what is ours."""
    found = []
    columns = COLUMNS if then["versions"] == now["versions"] else OURS
    for case, row in now["counts"].items():
        known = then["counts"].get(case)
        if known is None:
            found.append(f"{case}: not recorded")
            continue
        changed = [f"{name} {known[name]} -> {row[name]}" for name in columns if row[name] != known[name]]
        found += [f"{case}: {', '.join(changed)}"] if changed else []
    return found


# ---- the child, on the fake device


def _step(case: str) -> Callable[[], Any]:
    """Forward and backward of one case, leaves and all."""
    import torch

    import cibr_kernels as ck

    name, size = case.split(" ")
    name, float32 = name.removesuffix("-triton"), name.endswith("-float32")
    name = name.removesuffix("-float32")
    n, d = map(int, size.split("x"))

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype).requires_grad_()

    scale, bias = (leaf(dtype=torch.float32) for _ in range(2))
    leaves: list[torch.Tensor]
    if name in ("critic_moments", "CIBRLoss"):
        with torch.device("cuda"):
            module: Any = ck.nn.ConcatCritic(512, d, d) if name == "critic_moments" else ck.nn.CIBRLoss(d, 768, 512)
    if name == "critic_moments":
        x, z = leaf(n, 512, dtype=torch.float32), leaf(n, d, dtype=torch.float32)
        leaves = [x, z, *module.parameters()]

        def loss() -> torch.Tensor:
            joint, marginal = ck.critic_moments(x, z, module)
            return joint - marginal

    elif name == "CIBRLoss":
        images, texts = leaf(n, d, dtype=torch.float32), leaf(n, d, dtype=torch.float32)
        inputs = [torch.empty(n, width, device="cuda") for width in (768, 512)]
        leaves = [images, texts, scale, *module.parameters()]

        def loss() -> torch.Tensor:
            return module(images, texts, scale, *inputs)

    else:
        x, y = (leaf(n, d, dtype=torch.float32 if float32 else torch.bfloat16) for _ in range(2))
        leaves = [x, y, scale, *([bias] if "siglip" in name.lower() else [])]
        loss = _contrastive(name, leaves)

    def step() -> Any:
        return torch.autograd.grad(loss(), leaves, allow_unused=True)

    return step


def _contrastive(name: str, leaves: list[Any]) -> Callable[[], Any]:
    import cibr_kernels as ck

    if name.startswith("open_clip."):
        from open_clip import loss

        peer = getattr(loss, name.removeprefix("open_clip."))()
        return lambda: peer(*leaves)
    return lambda: getattr(ck, name)(*leaves)


def _row(step: Callable[[], Any], counters: Any) -> dict[str, int]:
    """The columns of one case, of its third step."""
    import torch

    step()
    step()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, allocations = torch.cuda.memory_allocated(), _allocations()
    counters.reset()
    kept = step()
    seen = counters.read()
    row = {name: seen[name] for name in ("triton", "cpp", "aten", "cublas", "tensor_maps")}
    row |= {"copies": seen["memcpys"] + seen["memsets"], "waits": seen["synchronisations"]}
    row |= {"allocations": _allocations() - allocations}
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    del kept
    return {name: row[name] for name in COLUMNS}


def _allocations() -> int:
    import torch

    return torch.cuda.memory_stats()["allocation.all.allocated"]


def _counts(cases: Sequence[str]) -> None:
    """Prints [case, columns] in json, a line each; leaves out what needs kernels of CUDA C++ that are not built."""
    import torch
    from fake_device.counters import Counters

    from cibr_kernels.dispatch import backends

    torch.autograd.set_multithreading_enabled(False)  # a process that ends with its threads may abort
    counters, names = Counters(), backends.NAMES
    with counters.planned_launches():
        for case in cases:
            if case.startswith(NEEDS_CUDA_CPP) and backends.cuda_missing():
                continue
            backends.NAMES = ("triton", "reference") if "-triton" in case else names
            gc.collect()
            print(json.dumps([case, _row(_step(case), counters)]), flush=True)


def _instructions(cases: Sequence[str]) -> None:
    """Steps of the cases and of what they are compared with, one label of callgrind's each."""
    import ctypes

    import torch

    torch.autograd.set_multithreading_enabled(False)
    client = ctypes.CDLL(str(Path(os.environ["FAKE_CUDA"]).with_name("client.so")))
    from cibr_kernels.dispatch import backends

    backends.NAMES = ("triton", "reference")  # the C++ kernels would need the device's own runtime
    for case in dict.fromkeys([*cases, *(RATIOS[case] for case in cases)]):
        step = _step(case)
        for _ in range(WARM):
            step()
        client.start()
        for _ in range(STEPS):
            step()
        client.stop(case.encode())
        print(case, flush=True)


if __name__ == "__main__":
    {"--counts": _counts, "--instructions": _instructions}[sys.argv[1]](sys.argv[2:])
    leave()
