"""Calls the C++ kernels once, small and on one thread: what instructions.py runs under valgrind.

clip_loss and siglip_loss are left out: they call dot_lse's and dot_softplus's kernels, whose ends cut the profile.

    python instructions_driver.py MODULE ISA [ISA ...]

Prints one line per call, `isa label`, in order.  No torch and no numpy: importing them under valgrind takes minutes,
and MODULE (cibr_kernels/_C*.so) takes plain addresses.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

N, D, H = 100, 64, 64  # pairs and widths: a number of rows that no tile divides
FLOAT, BF16 = 0, 1  # csrc/common/dtype.h
RELU, GELU = 0, 2  # csrc/additive/activation_names.h
BLOCK = 32  # columns of a block of the stash


def normal(count: int, scale: float = 1.0) -> array[float]:
    generator = random.Random(count)
    return array("f", (generator.gauss(0.0, scale) for _ in range(count)))


def zeros(count: int, kind: str = "f") -> array[Any]:
    return array(kind, bytes(array(kind).itemsize * count))


def bf16(values: array[float]) -> array[int]:
    """The upper halves: rounded towards zero, which is as good here."""
    halves = array("H", values.tobytes())
    return halves[1::2] if sys.byteorder == "little" else halves[::2]


def dot_calls(dtype: int) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(label, kernel, struct, fields) of the dot family."""
    name = {FLOAT: "float32", BF16: "bfloat16"}[dtype]
    x, y = normal(N * D, D**-0.5), normal(N * D + 1, D**-0.5)[1:]
    features: dict[str, Any] = {"x": x, "y": y} if dtype == FLOAT else {"x": bf16(x), "y": bf16(y)}
    problem = {**features, "dtype": dtype, "n": N, "m": N, "d": D, "scale": 14.0, "first_positive": 0}
    rows, cols, positives, shift = zeros(N), zeros(N), zeros(N), zeros(1)
    stash = zeros((N + BLOCK - 1) // BLOCK * N * BLOCK)
    sums = {"row_lse": rows, "col_lse": cols}
    forward = {**problem, **sums, "mask_positives": 1, "positives": positives, "stash_shift": shift}
    yield f"dot_lse forward {name}", "dot_lse_forward", "DotForward", forward
    kept = {"stash": stash, "stash_dtype": dtype}
    yield f"dot_lse forward {name} stash", "dot_lse_forward", "DotForward", {**forward, **kept}
    weights = {name: array("f", [0.5 / N]) * N for name in ("row_weight", "col_weight", "positive_grad")}
    gradients = {"dx": zeros(N * D), "dy": zeros(N * D), "dscale": zeros(1)}
    backward = {**problem, **sums, **weights, **gradients, "mask_positives": 1}
    yield f"dot_lse backward {name} panel", "dot_lse_backward", "DotBackward", backward
    stashed = {**backward, **kept, "stash_shift": shift}  # read when the call is made: the forward has run
    yield f"dot_lse backward {name} stash", "dot_lse_backward", "DotBackward", stashed
    softplus = {**problem, "bias": -10.0, "row_sum": rows, "col_sum": cols, "dbias": zeros(1)}
    yield f"dot_softplus {name}", "dot_softplus", "DotSoftplus", softplus
    weighted = {**softplus, **gradients, "row_weight": weights["row_weight"]}
    yield f"dot_softplus {name} gradients", "dot_softplus", "DotSoftplus", weighted


def additive_calls(activation: int) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    name = {RELU: "relu", GELU: "gelu"}[activation]
    shape = {"n": N, "m": N, "h": H, "activation": activation, "slope": 0.01}
    problem = {"a": normal(N * H), "b": normal(N * H + 1)[1:], "w": normal(H, H**-0.5), **shape}
    outputs = {"da": zeros(N * H), "db": zeros(N * H), "dw": zeros(H)}
    moments = {**problem, **outputs, "j": zeros(1), "el": zeros(1), "first_positive": 0, "include_diagonal": 0}
    needs = {"need_a": 1, "need_b": 1, "need_w": 1}
    yield f"additive_moments forward {name}", "additive_moments", "AdditiveMoments", moments
    yield f"additive_moments train {name}", "additive_moments", "AdditiveMoments", {**moments, **needs}
    scores = {**problem, **outputs, "scores": zeros(N * N), "grad": normal(N * N)}
    for way in ("forward", "backward"):
        yield f"additive_scores {way} {name}", f"additive_scores_{way}", "AdditiveScores", scores
    shifts = {**problem, **needs, "first": 1, "k": 16, "scores": zeros(16 * N), "g": normal(16 * N)}
    shifts |= {"da": outputs["da"], "db": outputs["db"], "dw": outputs["dw"]}
    for way in ("forward", "backward"):
        yield f"additive_shifts {way} {name}", f"additive_shifts_{way}", "AdditiveShifts", shifts


def mean_calls() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    count = 1 << 13
    fields = {"scores": normal(count), "dtype": FLOAT, "count": count, "el": zeros(1), "grad": array("f", [1.0])}
    for way in ("forward", "backward"):
        yield f"log_mean_exp {way}", f"log_mean_exp_{way}", "LogMeanExp", {**fields, "dscores": zeros(count)}


def calls() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for dtype in (FLOAT, BF16):
        yield from dot_calls(dtype)
    for activation in (RELU, GELU):
        yield from additive_calls(activation)
    yield from mean_calls()


def call(module: Any, kernel: str, struct: str, fields: dict[str, Any]) -> None:
    params = getattr(module, struct)()
    for name, value in fields.items():
        if struct == "DotBackward" and name == "stash_shift":
            value = value[0]
        setattr(params, name, value.buffer_info()[0] if isinstance(value, array) else value)
    params.threads = 1
    getattr(module, kernel)(params)


def main(path: str, isas: list[str]) -> None:
    spec = spec_from_file_location("cibr_kernels._C", path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for isa in isas:
        module.set_isa(isa)
        for label, kernel, struct, fields in calls():
            call(module, kernel, struct, fields)
            print(isa, label, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
