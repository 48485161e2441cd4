"""`bench gpu --search`: configurations around those in the kernels' tables, timed on the GPU or predicted without one.

From the table's configuration it goes to the best neighbour (one field doubled or halved) until none is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from bench import measure
from bench.cases import Case
from bench.devices import Device
from bench.inputs import make_inputs
from bench.peers import fused
from bench.processes import reason
from bench.static import predict, predictions, record
from bench.static.gpus import GPUS

Config = TypeVar("Config")
LIMITS = {"num_warps": (2, 16), "num_stages": (2, 5), "block_k": (16, 128)}  # others: 16 ... 256


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations one step away: a size doubled or halved, one stage more or less."""
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        low, high = LIMITS.get(field.name, (16, 256))
        steps = (value - 1, value + 1) if field.name == "num_stages" else (value // 2, value * 2)
        yield from (replace(config, **{field.name: step}) for step in steps if low <= step <= high)  # type: ignore[type-var]


def climb(start: Config, seconds: Callable[[Config], float]) -> tuple[Config, dict[Any, float]]:
    """-> the best configuration reached, and the seconds of all that were tried (inf: does not run)."""
    tried: dict[Any, float] = {start: seconds(start)}
    best = start
    while True:
        for config in neighbours(best):
            if config not in tried:
                tried[config] = seconds(config)
        better = min(tried, key=lambda config: tried[config])
        if tried[better] >= tried[best]:
            return best, tried
        best = better


@dataclass(frozen=True)
class Choice:
    """A configuration in the table of dot_lse: of one target, itemsize and kernel."""

    target: str
    itemsize: int
    kernel: str  # a field of triton_configs.Configs

    def get(self) -> Any:
        from cibr_kernels.primitives.dot.lse.triton_configs import CONFIGS

        return getattr(CONFIGS[self.target, self.itemsize], self.kernel)

    def set(self, config: Any) -> None:
        from cibr_kernels.primitives.dot.lse.triton_configs import CONFIGS

        key = self.target, self.itemsize
        CONFIGS[key] = CONFIGS[key]._replace(**{self.kernel: config})


def search(choice: Choice, seconds: Callable[[], float], label: str) -> str:
    """Climbs from the table's entry, which is put back -> what was found, in a line or two.

    Raises what the table's own entry raises; others that fail are counted.
    """
    start, reasons = choice.get(), []

    def of(config: Any) -> float:
        choice.set(config)
        try:
            return seconds()
        except Exception as error:  # too much shared memory, a compiler that gives up: not a configuration
            if config == start:
                raise
            reasons.append(reason(error))
            return math.inf
        finally:
            choice.set(start)

    best, tried = climb(start, of)
    text = f"{label}: the table's {start} takes {1e3 * tried[start]:.3f} ms"
    if best == start:
        text += f"; none of {len(tried) - 1} around it is faster"
    else:
        text += f"\n  faster: {best} {1e3 * tried[best]:.3f} ms ({len(tried)} tried)"
    return text + (f"\n  {len(reasons)} do not run, the last for {reasons[-1]}" if reasons else "")


def _choices(target: str, cases: Sequence[Case]) -> Iterator[tuple[Case, Choice]]:
    for case in cases:
        if case.op == "clip_loss":
            itemsize = 4 if case.dtype == "float32" else 2
            yield case, Choice(target, itemsize, "gradient" if case.backward and case.tier != "stash" else "scores")


def measured(device: Device, cases: Sequence[Case]) -> int:
    """Times every configuration on this GPU and prints the better ones."""
    from cibr_kernels.primitives.dot.lse.triton_configs import target_name

    target = target_name(torch.device(device.name, 0))
    for case, choice in _choices(target, cases):
        inputs, loss = make_inputs(case, device.name), fused(case, "triton")

        def seconds(case: Case = case, inputs: Any = inputs, loss: Any = loss) -> float:
            def run() -> Any:
                return measure.run(loss, inputs, case.backward)

            run()  # compiles
            return min(device.timed(run)[0] for _ in range(5))

        print(search(choice, seconds, f"{case.name}, {choice.kernel}"), flush=True)
    return 0


def predicted(cases: Sequence[Case], targets: Sequence[int] = tuple(GPUS)) -> int:
    """The same with predictions in the place of measurements, for every target."""
    print(predictions.assumptions())
    for capability in targets:
        for case, choice in _choices(f"sm_{capability}", cases):

            def seconds(case: Case = case, capability: int = capability) -> float:
                every = predictions.record_step(case, "fused", capability)
                events = [e for e in every if isinstance(e, record.Launch)]
                if spills := [e.name for e in events if not predict.compiled(e, capability).fits]:
                    raise RuntimeError(f"{spills[0]} spills or needs more than a processor has")
                return predict.predict(events, capability, predictions.MEMORY).total("seconds")

            print(
                search(choice, seconds, f"PREDICTED {GPUS[capability].name} {case.name}, {choice.kernel}"), flush=True
            )
    return 0
