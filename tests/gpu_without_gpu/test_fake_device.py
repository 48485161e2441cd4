"""The fake device counts what a process does to a GPU, and the ops do no more than bench/results/host.json says."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import fake_device
import pytest

from bench.guards import host
from bench.processes import LEAVE

UPDATE = "python bench/ gpu --host --update"
KNOWN = """
import json, torch
from fake_device.counters import Counters
from triton_program import copy_block
from triton.tools.tensor_descriptor import TensorDescriptor

counters = Counters()
x = torch.empty(256, 128, device="cuda", dtype=torch.bfloat16)

def counted(run):
    run()  # cuBLAS has a handle, Triton a kernel
    counters.reset()
    run()
    return {name: count for name, count in counters.read().items() if count}

maps = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (x, torch.empty_like(x))]
print(json.dumps({
    "add": counted(lambda: x + x),
    "matmul": counted(lambda: x @ x.T),
    "float32 matmul": counted(lambda: torch.mm(x, x.T, out_dtype=torch.float32)),
    "item": counted(x.sum().item),
    "synchronize": counted(torch.cuda.synchronize),
    "to the host": counted(lambda: x[0].cpu()),
    "triton": counted(lambda: copy_block[(4,)](*maps, BLOCK=64)),
    "names": counters.launched(lambda: copy_block[(4,)](*maps, BLOCK=64)),
    "device": [torch.cuda.get_device_name(), torch.cuda.get_device_capability()],
}))
"""
OBJECTIVES = """
import json, torch
import cibr_kernels as ck
from fake_device.counters import Counters

counters, n, d = Counters(), 256, 64
zv, zt, zv2 = (torch.empty(n, d, device="cuda").requires_grad_() for _ in range(3))
x = torch.empty(n, 48, device="cuda")
ids = torch.empty(n, device="cuda", dtype=torch.int64)
scale = torch.empty((), device="cuda")
made = {
    "critics": (ck.nn.CIBRLoss(d, 48, 48, hidden=32), {"image_inputs": x, "text_inputs": x}),
    "views": (ck.nn.CIBRLoss.recommended(d, total_steps=9), {"image_features2": zv2}),
    "groups": (ck.nn.CIBRLoss.recommended(d, total_steps=9, accumulation_steps=2), {"group_ids": ids}),
}
found = {}
ck.losses.diagnostics.capacities = lambda *_: {}  # cuSOLVER's, which this device has not; cholesky_ex checks nothing
for name, (module, inputs) in made.items():
    module.cuda()
    for call in range(4):  # training calls 1, 2 and 4 look at the covariances
        if call:
            counters.reset()
        module(zv, zt, scale, **inputs, output_dict=True, diagnostics=call == 3)["loss"].backward()
        if call:
            found[f"{name} {call}"] = counters.read()["synchronisations"]
print(json.dumps(found))
"""
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def copy_block(source, target, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    target.store([row, 0], source.load([row, 0]))
"""


def test_launches_maps_copies_and_waits_are_counted(device: Path, tmp_path: Path) -> None:
    (tmp_path / "triton_program.py").write_text(KERNEL)
    environment = fake_device.environment(device) | {"PYTHONPATH": f"{host.ROOT}:{host.FAKE_DEVICE}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", KNOWN + LEAVE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "add": {"aten": 1},
        "matmul": {"cublas": 1},
        "float32 matmul": {"cublas": 1},
        "item": {"memcpys": 1, "synchronisations": 1},
        "synchronize": {"synchronisations": 1},
        "to the host": {"memcpys": 1, "synchronisations": 1},
        "triton": {"triton": 1, "tensor_maps": 2},
        "names": ["copy_block"],
        "device": ["Fake H200", [9, 0]],
    }


def test_objectives_their_warnings_and_diagnostics_wait_for_nothing(device: Path) -> None:
    environment = fake_device.environment(device) | {"PYTHONPATH": f"{host.ROOT}:{host.FAKE_DEVICE}"}
    done = subprocess.run([sys.executable, "-c", OBJECTIVES + LEAVE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 9 and not any(found.values()), found


@pytest.fixture(scope="module")
def counts(device: Path) -> host.Counts:
    return host.count(host.CASES)


def test_a_step_launches_allocates_and_keeps_no_more_than_is_recorded(counts: host.Counts) -> None:
    record = host.read()
    found = host.differences(record, {"counts": counts, "versions": host.versions()})
    assert not found, "\n".join([*found, f"if that is meant: {UPDATE}"])
    assert {case for case in counts if not case.startswith(host.NEEDS_CUDA_CPP)} == {
        case for case in record["counts"] if not case.startswith(host.NEEDS_CUDA_CPP)
    }


@pytest.mark.parametrize(
    ("case", "megabytes"),
    [
        ("clip_loss 65536x512", 500),
        ("clip_loss 65536x768", 600),
        ("clip_loss 32768x512", 260),
        ("siglip_loss 65536x512", 520),
    ],
)
def test_the_recorded_peaks_are_within_what_is_promised(case: str, megabytes: int) -> None:
    peak = host.read()["counts"][case]["peak_bytes"]
    n, d = map(int, case.split(" ")[1].split("x"))
    assert 4 * n * d < peak <= megabytes * 10**6, "the gradients alone, and the target"


def test_host_instructions_are_within_their_targets() -> None:
    """As recorded, for every case that has a target or more rows: measuring takes minutes and valgrind."""
    ratios = host.read()["ratios"]
    assert ratios.keys() == host.RATIOS.keys() and host.TARGETS.keys() <= ratios.keys()
    assert host.above(ratios) == []
    assert set(host.growths(ratios)) > {
        f"{loss} {n}x512" for loss in ("clip_loss", "siglip_loss") for n in (32768, 65536)
    }
    said = host.above({"siglip_loss 1024x512": 0.6, "siglip_loss 65536x512": 1.3})
    assert said == [
        "siglip_loss 1024x512: 0.60 of open_clip.SigLipLoss 1024x512's host instructions, 0.59 at most",
        "siglip_loss 65536x512: 2.17 of 1024x512's, 2.0 at most",
    ]


def test_nothing_waits_for_the_device(counts: host.Counts) -> None:
    assert {case: row["waits"] for case, row in counts.items() if row["waits"]} == {}


def test_what_changed_is_said() -> None:
    then = host.read()
    now = copy.deepcopy(then)
    now["counts"]["clip_loss 1024x512"]["triton"] += 1
    now["counts"]["clip_loss 1024x512"]["aten"] += 1
    now["counts"]["another 1x1"] = now["counts"]["clip_loss 1024x512"]
    row = then["counts"]["clip_loss 1024x512"]
    said = [f"triton {row['triton']} -> {row['triton'] + 1}", f"aten {row['aten']} -> {row['aten'] + 1}"]
    assert host.differences(then, then) == []
    assert host.differences(then, now) == [f"clip_loss 1024x512: {', '.join(said)}", "another 1x1: not recorded"]
    now["versions"] = {"torch": "1.0"}
    assert host.differences(then, now)[0] == f"clip_loss 1024x512: {said[0]}", "aten's launches are the version's"


def test_a_launch_around_tritons_own_path_passes_the_same_bytes_and_compiles_no_more(device: Path) -> None:
    environment = fake_device.environment(device) | {"PYTHONPATH": f"{host.ROOT}:{host.FAKE_DEVICE}"}
    command = [sys.executable, "-m", "fake_device.launches"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["different"] == [] and found["launches"] > 30
    assert found["seen"] == 13, "hooks are told of every launch"
    assert found["compiled"][-1] <= 22, found
    assert found["compiled"][1:8] == [found["compiled"][1]] * 7, f"a new number of rows compiles: {found}"
    assert found["warm"][0] == found["warm"][1], "after a warmup nothing compiles"
