"""A program for the fake device: what plans launch, and whether it is what Triton's launcher and PyTorch launch.

    python -m fake_device.replays [CASE ...]

Prints JSON, a line: {"versions": [torch, triton], "different": cases in which a replay on the very same memory passes
other bytes, to the driver, to cuBLAS or to a kernel of CUDA C++, than the recorded step, "bytes": how many were
compared, "names": cases whose steps launch other kernels with plans than without, "around": cases whose launches around
Triton's own path pass other bytes than by it, "refused": why a case has no plan}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from bench.guards import host
from bench.processes import leave
from cibr_kernels.dispatch import backends, plan, plans, triton_recording, triton_relaunch
from fake_device import arguments
from fake_device.counters import Counters
from fake_device.launches import differs, passed, register

CASES = (
    "clip_loss 1024x512",
    "clip_loss 1000x512",
    "clip_loss 17x64",
    "clip_loss 16640x512",
    "siglip_loss 1024x512",
    "siglip_loss 999x512",
    "clip_loss-float32 100x96",
    "siglip_loss-float32 100x96",
    "critic_moments-triton 100x64",
    "CIBRLoss-triton 100x64",
    "critic_moments 100x64",
    "CIBRLoss 100x64",
    "arguments",
)


class Kept(triton_recording.Recorder):
    """A recorder that holds on to all memory, so that addresses stay what they are."""

    def __init__(self, inputs: Any) -> None:
        super().__init__(inputs)
        self.bases = [t.data_ptr() for t in inputs]
        self.alive: list[Any] = list(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.storages)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.storages) > before:
            self.alive.append(result)
            self.bases.append(result.untyped_storage().data_ptr())
        return result


def main(cases: Sequence[str]) -> None:
    counters = Counters()
    torch.autograd.set_multithreading_enabled(False)
    found: dict[str, Any] = {"versions": [torch.__version__, triton.__version__], "bytes": 0}
    found |= {"different": [], "names": [], "around": [], "refused": {}}
    names = backends.NAMES
    for case in cases:
        backends.NAMES = ("triton", "reference") if "-triton" in case else names
        with counters.planned_launches():
            recorded = recorded_directions(counters, case)
            for seen, theirs in recorded:
                if seen.refusal is not None:
                    found["refused"][case] = seen.refusal
                    continue
                ours = replayed(counters.library, seen)
                found["bytes"] += len(ours)
                found["different"] += [case] if ours != theirs or not ours else []
            with plans.disabled():
                found["around"] += [case] if differs(counters.library, step_of(case)) else []
            found["names"] += [] if len(recorded) and same_names(counters, case) else [case]
    print(json.dumps(found))


def step_of(case: str) -> Callable[[], Any]:
    return arguments.step if case == "arguments" else host._step(case)


def recorded_directions(counters: Counters, case: str) -> list[tuple[Kept, bytes]]:
    """Each direction of a step that can be replayed, and what its recording passed by Triton's own path."""
    found = []

    def record(key: Any, direction: Callable[..., Any], inputs: Any) -> Any:
        if triton_recording.active() is not None:  # a direction of a direction
            return direction(*inputs)
        with Kept(inputs) as first:
            direction(*inputs)
        for command in first.commands:
            if isinstance(command, triton_recording.Launch):
                register(counters.library, command.compiled)
        outputs: list[Any] = []
        with Kept(inputs) as seen, triton_relaunch.disabled():
            theirs = passed(counters.library, lambda: outputs.extend(direction(*inputs)))
        found.append((seen, theirs))
        return tuple(outputs)

    step, run = step_of(case), plans.run
    plans.run = record
    try:
        step()
    finally:
        plans.run = run
    return found


def replayed(library: Any, seen: Kept) -> bytes:
    """What the native replay passes, every storage being where it was."""
    at = {number: plan.Place(number, 0) for number in range(len(seen.bases))}
    steps = plan._steps(seen.commands, at, len(seen.bases), plans._native(), torch.device("cuda", 0))
    handle = torch._C._cuda_getCurrentBlasHandle()
    arguments = 0, torch._C._cuda_getCurrentRawStream(0), handle, seen.bases
    return passed(library, lambda: [step(*arguments) for step in steps])


def same_names(counters: Counters, case: str) -> bool:
    """Whether a replayed step launches what a step without plans does."""
    step = step_of(case)
    for _ in range(5):  # CIBRLoss looks at covariances in steps 1, 2, 4 and 8
        step()
    ours = counters.launched(step)
    with plans.disabled():
        return ours == counters.launched(step)


if __name__ == "__main__":
    main(sys.argv[1:] or CASES)
    leave()
