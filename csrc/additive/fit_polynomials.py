"""Writes the numbers of polynomials.h: fitted pieces of Phi, where t Phi(t) = phi(t) is gelu or gelu_tanh, and logs.

Piece i in [-15, 15] is the polynomial P of degree 5 in r = t - i step whose largest error is least, over 80 Chebyshev
nodes of the t in [-bound, bound] with per_unit t nearest to i.  Two errors count alike: that of the value,
t P - phi, divided by max(1, |phi|), and that of the slope, P + t P' - phi'.  Lawson's algorithm: least squares, each
error weighted by the product of its earlier sizes; the best of 400 rounds.

The outermost pieces are bound to P = 0 or 1 and P' = 0 at r = 0, that is at t = bound, to which the kernel clamps t.
The middle piece's even coefficients are 0 but for the constant: Phi - 1/2 is odd.  The step is a multiple of 2^-18, so
that i step is exact.  A larger bound costs digits everywhere, a smaller one at the ends: BOUNDS are good compromises.

    python csrc/additive/fit_polynomials.py           # writes its numbers; its comment is written by hand
    python csrc/additive/fit_polynomials.py --check   # writes nothing

Both print, per activation, the fit's largest error before rounding, and the largest errors of value and slope with the
numbers of polynomials.h in the kernel's float32 arithmetic, at 300 001 t in [-6.5, 6.5].  Both exit with 1 if these
exceed those that its comment states, or if the numbers differ from the fit's by more than rounding.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Function = Callable[[Array], tuple[Array, Array]]  # t -> Phi, Phi'

HEADER = Path(__file__).with_name("polynomials.h")
BOUNDS = {"gelu": 5.64, "gelu_tanh": 5.34}
LAST, DEGREE, NODES, ROUNDS = 15, 5, 80, 400
ULPS = 4  # by which a coefficient may differ from the fit's, of its piece's largest term


def gelu(t: Array) -> tuple[Array, Array]:
    return np.vectorize(math.erfc)(-t / math.sqrt(2)) / 2, np.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(t: Array) -> tuple[Array, Array]:
    c = 2 * math.sqrt(2 / math.pi)
    y = c * t + c * 0.044715 * t**3
    sigma = 1 / (1 + np.exp(-y))
    return sigma, sigma / (1 + np.exp(y)) * (c + 3 * c * 0.044715 * t * t)


def minimax(a: Array, y: Array) -> tuple[Array, float]:
    """The c of least max |a c - y|, for each of a stack of a (n, k) and y (n), and the largest of these errors."""
    weight, least, best = np.ones(y.shape), np.full(len(y), np.inf), np.zeros((len(y), a.shape[2]))
    for _ in range(ROUNDS):
        root = np.sqrt(weight)[..., None]
        q, r = np.linalg.qr(a * root)
        c = np.linalg.solve(r, q.swapaxes(1, 2) @ (y[..., None] * root))
        error = abs((a @ c)[..., 0] - y)
        better = error.max(1) < least
        least[better], best[better] = error.max(1)[better], c[better, :, 0]
        weight = weight * (error + 1e-30)
        weight /= weight.max(1, keepdims=True)
    return best, float(least.max())


def fit(function: Function, target: float) -> tuple[Floats, float]:
    """bound, per_unit, step and c[6][32] in a row, and the largest error."""
    step = round(target / LAST * 2**18) / 2**18
    bound = LAST * step
    per_unit = float(np.float32((LAST + 0.4995) / bound))  # at the bound, piece 15 and not 16
    table, errors, powers = np.zeros((DEGREE + 1, 32)), [], np.arange(DEGREE + 1)
    for pieces in (np.arange(1 - LAST, LAST), np.array([-LAST, LAST])):
        low, high = (np.clip((pieces + side) / per_unit, -bound, bound)[:, None] for side in (-0.5, 0.5))
        t = (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)
        outermost = pieces[-1] == LAST
        if outermost:
            t = np.append(t, bound * np.sign(pieces)[:, None], 1)
        cdf, density = function(t)
        r, scale = t - pieces[:, None] * step, np.maximum(1, abs(t * cdf))
        p = np.stack([r**m for m in range(DEGREE + 1)], 2)
        slope = p + t[..., None] * (powers * p[..., np.maximum(powers - 1, 0)])
        a = np.concatenate([p * (t / scale)[..., None], slope], 1)
        y = np.concatenate([t * cdf / scale, cdf + t * density], 1)
        free = powers[2:] if outermost else powers
        if outermost:
            table[0, pieces % 32] = pieces > 0
            y -= a[..., 0] * (pieces > 0)[:, None]
        unit = (1 / per_unit) ** free
        c, error = minimax(a[..., free] / unit, y)
        table[free[:, None], pieces % 32] = (c / unit).T
        errors.append(error)
    table[2::2, 0] = 0
    return np.concatenate([[bound, per_unit, step], table.ravel()]).astype(np.float32), max(errors)


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def simulate(numbers: Floats, function: Function) -> tuple[float, float]:
    """The largest errors of value and slope in float32, computed as activations.h does."""
    (bound, per_unit, step), table, magic = numbers[:3], numbers[3:].reshape(-1, 32), np.float32(12582912)
    t = np.linspace(-6.5, 6.5, 300_001).astype(np.float32)
    x = np.clip(t, -bound, bound)
    index = fma(x, per_unit, magic) - magic
    r, piece = fma(-index, step, x), index.astype(int) % 32
    slope = table[DEGREE][piece]
    p = fma(slope, r, table[DEGREE - 1][piece])
    for m in range(DEGREE - 2, -1, -1):
        slope, p = fma(slope, r, p), fma(p, r, table[m][piece])
    exact = t.astype(np.float64)
    cdf, density = function(exact)
    phi, true_slope = exact * cdf, cdf + exact * density
    return (abs(t * p - phi) / np.maximum(1, abs(phi))).max(), abs(fma(t, slope, p) - true_slope).max()


def written(numbers: Floats, single: int) -> str:
    """As in polynomials.h, between the braces of a constant: some single numbers, then rows of 32."""
    short = [f"{x:.9g}" for x in numbers.tolist()]
    text = [(x if "." in x or "e" in x else x + ".0") + "f," for x in short]
    rows: list[str] = []
    for row in range(single, len(text), 32):
        rows += ["{", *(" ".join(text[i : i + 8]) for i in range(row, row + 32, 8)), "},"]
    lines = [*text[:single], "{", *rows, "},"] if single else rows  # an array of rows, or members of their own
    return "\n" + "".join(f"  {line}\n" for line in lines)


def logarithms() -> Floats:
    """1 / c in float32 and log c, for the middle c of each 32nd of [1, 2)."""
    reciprocal = (1 / (1 + (np.arange(32) + 0.5) / 32)).astype(np.float32)
    return np.concatenate([reciprocal, -np.log(reciprocal.astype(np.float64))]).astype(np.float32)


def constant(header: str, name: str) -> tuple[str, str, str]:
    """A constant of the header: what comes before its numbers, they themselves, and what follows."""
    before, declaration, after = header.partition(f" {name} = {{")
    text, end, after = after.partition("};")
    return before + declaration, text, end + after


def main() -> int:
    """-> exit status: 0, or 1 where errors exceed the comment's or the numbers are not the fit's."""
    header, failed = HEADER.read_text(), False
    # two fits' errors, then value's and slope's of each
    stated = [float(x) for x in re.findall(r"\d\.\de-7", header.split("#pragma")[0])]
    for name, function, limits in (("gelu", gelu, stated[2:4]), ("gelu_tanh", gelu_tanh, stated[4:6])):
        fitted, error = fit(function, BOUNDS[name])
        before, text, after = constant(header, f"{name}_pieces")
        if "--check" not in sys.argv:
            text = written(fitted, 3)
            header = before + text + after
        numbers = np.array(re.findall(r"(\S+)f,", text), np.float32)
        reach = float(fitted[2]) ** np.arange(DEGREE + 1)[:, None]
        ours, theirs = (x[3:].astype(np.float64).reshape(-1, 32) * reach for x in (fitted, numbers))
        rounding = ULPS * 2.0**-23 * abs(ours).max(0)
        same = (numbers[:3] == fitted[:3]).all() and (abs(ours - theirs) <= rounding).all()
        value, slope = simulate(numbers, function)
        failed |= not same or value > limits[0] or slope > limits[1]
        print(f"{name}: fit {error:.3g}; value {value:.3g} of {limits[0]}, slope {slope:.3g} of {limits[1]}", end="")
        print("" if same else "; the numbers are not the fit's")
    before, text, after = constant(header, "logarithms")
    numbers = np.array(re.findall(r"(\S+)f,", text), np.float32)
    if "--check" not in sys.argv:
        HEADER.write_text(before + written(logarithms(), 0) + after)
    elif abs(numbers - logarithms()).max() > 2.0**-24:
        failed = True
        print("logarithms: the numbers are not those of 1 / c")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
