"""What the critic's sweep costs in instructions, read from the machine code of the kernel that runs here.

A pair (i, j) of an additive critic costs, per hidden unit, a score and, in training, its share of the gradients.  The
kernel makes vectors of them: of 16 columns j for the scores and of 16 units h for the gradients (8 or 4 on smaller
instruction sets).  So the hot loops tell themselves how many vectors one turn covers:

    scores      one maximum and one multiply-add a vector         vectors = maxima
    gradients   one comparison and two masked additions a vector  vectors = comparisons

and instructions / vectors of one turn is the cost: loads, broadcasts and the loop's own instructions included, because
they are issued too.  Exponentials of the scores, packing and merging are outside (O(N^2 + N H), not N^2 H).

This reads the ReLU family (relu, leaky_relu) on x86-64.  A smooth activation's loop is a page of polynomial in which
nothing says how many vectors a turn covers, so those rows have no floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bench.disassembly import Loop, Unreadable, functions, innermost_loops, listing
from cibr_kernels import backends

READABLE = ("relu", "leaky_relu")
NAMESPACES = {"amx": "avx512", "avx512bf16": "avx512"}  # float kernels have no copies of their own there


@dataclass(frozen=True)
class Cost:
    """Instructions per vector of pair-units, all and those that compute, and the floats of a vector."""

    instructions: float
    arithmetic: float
    floats: int


@dataclass(frozen=True)
class Sweep:
    """The two hot loops of one critic's kernel."""

    scores: Cost
    gradients: Cost


def count(loop: Loop, *ends: str) -> int:
    """How many of its packed instructions are one of these operations, with or without the v of AVX."""
    names = [i.mnemonic.removeprefix("v") for i in loop if i.mnemonic.endswith("ps")]
    return sum(name.startswith(ends) for name in names)


def score_vectors(loop: Loop) -> int:
    """Vectors of scores a turn covers; 0 for another kind of loop."""
    maxima, products = count(loop, "maxps"), count(loop, "fmadd", "mulps")
    return maxima if maxima == products and not count(loop, "cmp") else 0


def gradient_vectors(loop: Loop) -> int:
    """Vectors of gradients a turn covers; 0 for another kind of loop."""
    comparisons, sums = count(loop, "cmp"), count(loop, "addps")
    return comparisons if sums == 2 * comparisons and not count(loop, "fmadd", "mulps", "maxps") else 0


def cost(loops: list[Loop], vectors: Callable[[Loop], int], what: str) -> Cost:
    """Of the loop that covers most vectors a turn: the others are what is left over of it.  Raises Unreadable."""
    covered, loop = max(((vectors(loop), loop) for loop in loops), key=lambda pair: pair[0], default=(0, ()))
    if not covered:
        raise Unreadable(f"no loop of {what} was recognised in the critic's machine code")
    arithmetic = sum(i.arithmetic for i in loop)
    return Cost(len(loop) / covered, arithmetic / covered, max(i.floats for i in loop))


def sweep(text: str, namespace: str) -> Sweep:
    """Reads a listing; `namespace` is that of the kernel's copy.  Raises Unreadable."""
    parts = f"2ck{len(namespace)}{namespace}", "6Kinked"
    loops = [loop for _, code in functions(text, *parts) for loop in innermost_loops(code)]
    return Sweep(cost(loops, score_vectors, "scores"), cost(loops, gradient_vectors, "gradients"))


@lru_cache
def chosen_sweep() -> Sweep:
    """Of the kernel that runs on this machine.  Raises Unreadable, or RuntimeError without compiled kernels."""
    module = backends.compiled()
    isa = module.isa()
    return sweep(listing(Path(module.__file__ or "")), NAMESPACES.get(isa, isa))
