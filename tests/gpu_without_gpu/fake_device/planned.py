"""A program for the fake device: when plans serve.

    python -m fake_device.planned

Prints JSON: after each situation, [replays, plans that are kept], where a step of clip_loss has two directions; "waits"
for the device of a replayed step; "old addresses" that a replay passes after all memory was given back; "streams" of
launches that several threads replayed at once, and what their runs of launches leave of whole forwards: nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs

import cibr_kernels as ck
from bench.processes import leave
from cibr_kernels.dispatch import plan, plans
from fake_device.counters import Counters
from fake_device.launches import passed

D = 256
NAME, HEAD = 120, 156  # bytes of a launch in fake_bytes: its name, then sizes and stream at the end
addresses: list[list[int]] = []  # by slot, of each replay


def watch(step: Any) -> Any:
    """A step of a plan that tells its addresses."""

    def run(device: int, stream: int, handle: int, here: list[int]) -> None:
        addresses.append(here)
        step(device, stream, handle, here)

    return run


def features(n: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    flat = torch.empty(n * D + offset, device="cuda", dtype=dtype)
    return flat[offset:].view(n, D).requires_grad_()


def step(
    n: int = 256, dtype: torch.dtype = torch.bfloat16, offset: int = 0, same: bool = False, backward: bool = True
) -> None:
    scale = torch.ones((), device="cuda", requires_grad=True)
    x = features(n, dtype, offset)
    y = x if same else features(n, dtype, offset)
    loss = ck.clip_loss(x, y, scale)
    if backward:
        torch.autograd.grad(loss, [x, scale] if same else [x, y, scale])


@contextmanager
def hooked() -> Iterator[None]:
    """As a profiler of Triton's hooks itself in."""
    knobs.runtime.launch_enter_hook.add(repr)
    yield
    knobs.runtime.launch_enter_hook.remove(repr)


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def switched_off() -> Iterator[None]:
    with patch.dict(os.environ, {plans.SWITCH: "0"}):
        plans.refusal.cache_clear()
        yield
    plans.refusal.cache_clear()


def capturing() -> Any:
    return patch.object(torch.cuda, "is_current_stream_capturing", lambda: True)


def threads(counters: Counters, count: int = 4) -> list[list[Any]]:
    """Runs of launches of one stream, when each thread replays the forward several times on its own."""
    streams = [torch.cuda.Stream() for _ in range(count)]

    def work(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(backward=False)

    workers = [threading.Thread(target=work, args=(stream,)) for stream in streams]
    data = passed(counters.library, lambda: [w.start() for w in workers] + [w.join() for w in workers])
    launches = [data[i : i + HEAD] for i in range(0, len(data), HEAD)]
    known = {stream.cuda_stream: k for k, stream in enumerate(streams)}
    seen = [known[int.from_bytes(launch[-8:], "little")] for launch in launches]
    names = [launch[:NAME].rstrip(b"\0").decode() for launch in launches]
    runs = [len(list(group)) for _, group in itertools.groupby(seen)]
    first = names.index("dot_lse_statistics_kernel")
    forward = names.index("dot_lse_statistics_kernel", first + 1) - first
    return [sorted(set(seen)), sorted({length % forward for length in runs})]


def main() -> None:
    torch.autograd.set_multithreading_enabled(False)
    counters, found = Counters(), dict[str, Any]()
    situations: list[tuple[str, Any, dict[str, Any]]] = [
        ("first step", nullcontext, {}),
        ("second step", nullcontext, {}),
        ("another size", nullcontext, {"n": 255}),
        ("that size again", nullcontext, {"n": 255}),
        ("misaligned", nullcontext, {"offset": 4}),
        ("one tensor twice", nullcontext, {"n": 254, "same": True}),
        ("then two", nullcontext, {"n": 254}),
        ("disabled", plans.disabled, {}),
        ("a hook", hooked, {}),
        ("switched off", switched_off, {}),
        ("float32", nullcontext, {"dtype": torch.float32}),
        ("tf32", tf32, {"dtype": torch.float32}),
        ("another stream", lambda: torch.cuda.stream(torch.cuda.Stream()), {}),
        ("capturing", capturing, {}),
        ("capturing what is new", capturing, {"n": 253}),
        ("few are kept", lambda: patch.object(plans, "MOST", 3), {"n": 252}),
        ("what was let go", nullcontext, {}),
    ]
    native = plan._native
    plan._native = lambda of: watch(native(of))
    for name, context, options in situations:
        counters.reset()
        with context():
            step(**options)
        found[name] = [len(addresses), sum(isinstance(p, plan.Plan) for p in plans.kept().values())]
    found["waits"] = counters.read()["synchronisations"]
    torch.cuda.empty_cache()
    new = torch.empty(64 << 20, dtype=torch.uint8, device="cuda").data_ptr()
    step()
    found["old addresses"] = sum(0 < address < new for call in addresses[-2:] for address in call)
    found["streams"] = threads(counters)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
    leave()
