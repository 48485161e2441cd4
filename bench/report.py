"""Results as text, as JSON and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.floor import DOT_FAMILY
from bench.measure import Result, Row
from bench.peers import gigabytes

HEADER = (
    f"  {'':<18}{'time ms':>9}  {'min .. max':<19}{'vs fused':>9}{'memory':>10}{'vs fused':>9}"
    f"{'passes':>8}{'floor':>8}{'logits, sums':>14}{'loss diff':>11}{'grad diff':>11}"
)
Predicted = Mapping[tuple[str, str], float]  # milliseconds by case and implementation


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.3g}x" if value is not None and base else "-"


def _shown(value: Any, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _line(row: Row, fused: Row, predicted: str) -> str:
    ms = [1e3 * s for s in row.seconds]
    spread = f"{min(ms):.4g} .. {max(ms):.4g}" if ms else "-"
    line = (
        f"  {row.implementation:<18}{_shown(row.time and 1e3 * row.time, '.4g'):>9}  {spread:<19}"
        f"{_ratio(row.time, fused.time):>9}{gigabytes(row.extra_bytes) if row.extra_bytes is not None else '-':>10}"
        f"{_ratio(row.extra_bytes, fused.extra_bytes):>9}{_shown(row.passes and row.passes.total, 'd'):>8}"
        f"{_shown(row.floor_percent, '.0f') + (' %' if row.floor_percent else ''):>8}"
        f"{row.numerics:>14}{_shown(row.loss_diff, '.1e'):>11}{_shown(row.grad_diff, '.1e'):>11}{predicted}"
    )
    wrong = "  WRONG: fails" if row is fused else "  WRONG: differs from fused"
    return line + (f"  {row.note}" if row.note else "") + (wrong if row.wrong else "")


def table(result: Result, predicted: Predicted | None = None) -> str:
    """A case's block; ratios are this row over the fused one, percents of the floor (bench/floor.py), best of both.

    predicted: a last column of milliseconds that nobody measured.
    """
    case, unit = result.case, result.unit
    rates = result.rates if result.rates and case.op in DOT_FAMILY else ()
    names = ("X Y^T", "G Y", "G^T X") if len(rates) > 1 or case.device == "cpu" else ("",)
    shown = ", ".join(f"{what} {rate / 1e9:.0f}".strip() for what, rate in zip(names, rates, strict=False))
    head = f"{case.name}  (width {case.width})" if case.device == "cpu" else case.name
    lines = [head + (f"   {unit}: {shown} GF/s" if rates else ""), HEADER]
    if predicted is not None:
        lines[1] += f"{'PREDICTED':>11}"
    for row in result.rows:
        cell = "" if predicted is None else f"{_shown(predicted.get((case.name, row.implementation)), '.4g'):>11}"
        lines.append(_line(row, result.rows[0], cell))
    notes = [f"  {result.floor_note}"] if result.floor_note else []
    return "\n".join([*lines, *notes, *targets(result)])


def targets(result: Result) -> list[str]:
    """A line with marks for a case that has a target."""
    target = result.case.target
    if target is None:
        return []
    fused = result.rows[0]
    peer = next(row for row in result.rows if row.implementation == target.baseline)
    if fused.time is None or peer.time is None or not fused.extra_bytes or not peer.extra_bytes:
        return [f"  target against {target.baseline}: not measured"]
    speed, memory = peer.time / fused.time, fused.extra_bytes / peer.extra_bytes
    fast, small = ("PASS" if met else "FAIL" for met in (speed >= target.speed, memory <= target.memory))
    return [
        f"  target against {target.baseline}: {fast} {speed:.2f}x as fast (>= {target.speed:g}x), "
        f"{small} 1/{1 / memory:.1f} of its memory (<= 1/{1 / target.memory:g})"
    ]


def write_json(path: Path, machine: dict[str, Any], results: Sequence[Result], extra: dict[str, Any]) -> None:
    """Everything measured."""
    write(path, {"machine": machine, "results": as_json(results), **extra})


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [{**asdict(result), "name": result.case.name, "targets": targets(result)} for result in results]


def write(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """As JSON."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The path to write to, beside `path`, onto which it is renamed at the end."""
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    yield partial
    os.replace(partial, path)


def require_matplotlib() -> None:
    """Raises ModuleNotFoundError, saying what to install, before hours of measuring are spent."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install matplotlib") from None


def plot(path: Path, machine: dict[str, Any], results: Sequence[Result]) -> None:
    """Time and extra memory against N, one column per op, dtype and direction with at least one row."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str, bool], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case.op, result.case.dtype, result.case.backward), []).append(result)
    if not groups:
        return
    figure = Figure(figsize=(3.6 * len(groups), 6.4), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharex="col")
    for (time_axis, memory_axis), ((op, dtype, backward), group) in zip(axes.T, groups.items(), strict=True):
        for name in dict.fromkeys(row.implementation for result in group for row in result.rows):
            measured = [
                (result.case.n, row)
                for result in sorted(group, key=lambda r: r.case.n)
                for row in result.rows
                if row.implementation == name and row.time
            ]
            sizes, rows = [n for n, _ in measured], [row for _, row in measured]
            style = {"marker": "o", "label": name, "linewidth": 2.5 if name == "fused" else 1.2}
            time_axis.plot(sizes, [row.time for row in rows], **style)
            memory_axis.plot(sizes, [max(row.extra_bytes or 0, 1e5) / 1e6 for row in rows], **style)
        time_axis.set_title(f"{op}\n{dtype}, {'forward + backward' if backward else 'forward'}")
        for axis, label in ((time_axis, "seconds"), (memory_axis, "extra peak memory, MB")):
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.grid(alpha=0.3, which="both")
        memory_axis.set_xlabel("N")
        time_axis.legend(fontsize="small")
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}")
    with whole(path) as partial:
        figure.savefig(partial, dpi=130)
