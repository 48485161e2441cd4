"""A program for the fake device: plans on two devices, and warmups of two processes.

    FAKE_DEVICES=2 CUDA_VISIBLE_DEVICES=0,1 python -m fake_device.machines devices
    python -m fake_device.machines warmup
    python -m fake_device.machines critics

Prints JSON.  devices: after each of several steps, made while device 0 is current, [plans that are kept, the device of
each replay so far and that which was current].  warmup: [kernels that were compiled, kernels found in the cache].
critics: [kernels that a warmup of a CIBRLoss got, and with steps of other numbers of rows, what the warmup moved].
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton import knobs

import cibr_kernels as ck
from bench.processes import leave
from cibr_kernels.dispatch import backends, plan, plans

replays: list[list[int]] = []


def watch(step: Any) -> Any:
    """A step of a plan that tells its device and the current one."""

    def run(device: int, stream: int, handle: int, addresses: list[int]) -> None:
        replays.append([device, torch.cuda.current_device()])
        step(device, stream, handle, addresses)

    return run


def step(index: int) -> None:
    x, y = (torch.empty(256, 64, device=f"cuda:{index}", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    scale = torch.ones((), device=f"cuda:{index}", requires_grad=True)
    found = torch.autograd.grad(ck.clip_loss(x, y, scale), [x, y, scale])
    assert all(t.device.index == index for t in found)


def devices() -> list[Any]:
    native, found = plan._native, []
    plan._native = lambda of: watch(native(of))
    for index in (0, 1, 1, 0, 1):
        step(index)
        found.append([len(plans.kept()), list(replays)])
    return found


def critics() -> list[Any]:
    backends.NAMES = ("triton", "reference")
    counts = counted()
    module = ck.nn.CIBRLoss(64, 48, 32, hidden=64).cuda()
    random, versions = torch.cuda.get_rng_state(), [t._version for t in module.state_dict().values()]
    ck.warmup(256, 64, losses=(module,))
    moved = [] if versions == [t._version for t in module.state_dict().values()] else ["buffers"]
    moved += [] if torch.equal(random, torch.cuda.get_rng_state()) else ["random numbers"]
    moved += ["the count of batches"] if module._saturation.calls else []
    found = [sum(counts)]
    for n in (256, 200, 131, 7):
        for _ in range(3):
            batch = module.zeros(n, 64, torch.bfloat16, torch.device("cuda"))
            z = [batch.pop(name).requires_grad_() for name in ("image_features", "text_features")]
            torch.autograd.backward(module(*z, torch.ones((), device="cuda"), **batch))
    return [*found, sum(counts), moved]


def counted() -> list[int]:
    """From now on: kernels that are compiled, and found in Triton's cache."""
    counts = [0, 0]

    def listener(*, cache_hit: bool, **_: Any) -> None:
        counts[cache_hit] += 1

    knobs.compilation.listener = listener
    return counts


def warmup() -> list[int]:
    counts = counted()
    ck.warmup(256, 64)
    return counts


if __name__ == "__main__":
    torch.autograd.set_multithreading_enabled(False)
    print(json.dumps({"devices": devices, "warmup": warmup, "critics": critics}[sys.argv[1]]()))
    leave()
