"""`python -m bench.static.columns`: what cutting P by columns costs clip_loss at N = 65536, predicted for an H100.

Its training step as it is launched, and with panels of rows of all columns: launches, bytes of device memory and
the time that predict.py gives.  A prediction, never a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from bench import cases
from bench.static import predict, predictions
from bench.static.predict import Step

CAPABILITY, NAME = 90, "clip_loss-train-65536x512"


@contextmanager
def whole_columns() -> Iterator[None]:
    """P of 8192 rows and all columns, 1 GiB at N = 65536: how it was before."""
    from cibr_kernels.primitives.dot.lse import triton as dot_lse

    before = dot_lse.panels
    dot_lse.panels = replace(before, backward_cols=1 << 30, backward_bytes=1 << 40)
    try:
        yield
    finally:
        dot_lse.panels = before


def step() -> Step:
    case = next(case for case in cases.GPU_CASES if case.name == NAME)
    return predict.predict(predictions.record_step(case, "fused", CAPABILITY), CAPABILITY)


def main() -> None:
    print(f"{NAME}, {CAPABILITY}: {'launches':>9}{'GB':>8}{'PREDICTED ms':>14}")
    rows = [("columns cut", step())]
    with whole_columns():
        rows.append(("all columns", step()))
    for name, found in rows:
        milliseconds = 1e3 * found.total("seconds")
        print(f"{name:<32}{int(found.total('launches')):>9}{found.total('bytes') / 1e9:>8.1f}{milliseconds:>14.2f}")
    cut, whole = (found.total("seconds") for _, found in rows)
    print(f"the cut costs {100 * (cut / whole - 1):+.1f} %")


if __name__ == "__main__":
    main()
