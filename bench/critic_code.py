"""What the critic's sweep costs in instructions, read from the machine code of the kernel that runs here.

A pair (i, j) of an additive critic costs, per hidden unit, a score and, in training, its share of the gradients.  The
kernel makes vectors of them: of 16 columns j or units h (8 or 4 on smaller instruction sets).  instructions / vectors
of one turn of a hot loop is the cost: loads, broadcasts and the loop's own instructions included, because they are
issued too.  Exponentials of the scores, packing and merging are outside (O(N^2 + N H), not N^2 H).

In the ReLU family (relu, leaky_relu) the loops tell themselves how many vectors one turn covers:

    scores      one maximum and one multiply-add a vector         vectors = maxima
    gradients   one comparison and two masked additions a vector  vectors = comparisons, of floats or integers

A smooth activation's loops (Smooth of csrc/additive/tiles.h) are a page of polynomial, one loop a function.
What they store tells the vectors, and what they multiply is held against it:

    gradients   a tile of 4 rows and C columns a turn, whose 4 + C sums and dw's are stored; three products a pair
    scores      a tile a turn (2 rows side by side on smaller instruction sets): a pair has at least one kept number and
                one product with w

This is of x86-64, and of the form in which an activation usually runs: wide inputs of silu, elu, softplus or tanh,
whose exponentials are no products of factors (csrc/additive/separable_exp.h), take more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bench.disassembly import Loop, Unreadable, functions, innermost_loops, listing
from cibr_kernels.dispatch import backends

KINKED = ("relu", "leaky_relu")
FUSED = ("avx2", "avx512")  # namespaces with a multiply-add
NAMESPACES = {"amx": "avx512", "avx512bf16": "avx512"}  # float kernels have no copies of their own there
ROWS = 4  # of a smooth tile


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
    """How many of its vector instructions are one of these operations, with or without the v of AVX."""
    names = [i.mnemonic.removeprefix("v") for i in loop if i.arithmetic]
    return sum(name.startswith(ends) for name in names)


def stores(loop: Loop) -> int:
    """How many vectors it writes, to the stack too."""
    moves = [i for i in loop if i.mnemonic.removeprefix("v").startswith("mov") and i.floats > 0]
    return sum(i.operands.endswith(")") for i in moves)


def score_vectors(loop: Loop) -> int:
    """Vectors of scores a turn covers in the ReLU family; 0 for another kind of loop."""
    maxima, products = count(loop, "maxps"), count(loop, "fmadd", "mulps")
    return maxima if maxima == products and not count(loop, "cmp", "pcmp") else 0


def gradient_vectors(loop: Loop) -> int:
    """Vectors of gradients a turn covers in the ReLU family; 0 for another kind of loop."""
    comparisons, sums = count(loop, "cmp", "pcmp"), count(loop, "addps")
    return comparisons if sums == 2 * comparisons and not count(loop, "fmadd", "mulps", "maxps") else 0


def smooth_score_vectors(loop: Loop, pairs: int) -> int:
    """Pairs that a turn covers, of a tile of so many; 0 for another kind of loop."""
    covered = pairs if max(i.floats for i in loop) == 16 else 2
    return covered if min(stores(loop), count(loop, "fmadd", "mulps")) >= covered else 0


def smooth_gradient_vectors(loop: Loop) -> int:
    """Pairs of the tile that a turn covers; 0 for another kind of loop."""
    columns = stores(loop) - ROWS - 1
    pairs = ROWS * columns if columns in (2, 4) else 0
    return pairs if count(loop, "fmadd", "mulps") >= 3 * pairs else 0


def cost(loops: list[Loop], vectors: Callable[[Loop], int], what: str) -> tuple[Cost, int]:
    """Of the loop that covers most vectors a turn, and how many: others are what is left over.  Raises Unreadable."""
    counted = [(vectors(loop), loop) for loop in loops]
    covered, loop = max(counted, key=lambda pair: (pair[0], len(pair[1])), default=(0, ()))
    if not covered:
        raise Unreadable(f"no loop of {what} was recognised in the critic's machine code")
    arithmetic = sum(i.arithmetic for i in loop)
    return Cost(len(loop) / covered, arithmetic / covered, max(i.floats for i in loop)), covered


def form(activation: str, namespace: str) -> str:
    """How the kernel's symbols name what a smooth activation is computed by."""
    name = activation.title().replace("_", "")
    factored = activation in ("silu", "softplus") or (activation in ("elu", "tanh") and namespace in FUSED)
    name = f"Factored{name}" if factored else name
    unit = "ILb1EE" if name == "FactoredElu" else ""  # the form for alpha = 1
    return f"{len(name)}{name}{unit}" if factored else f"6DirectINS1_{len(name)}{name}E"


def sweep(text: str, namespace: str, activation: str = "relu") -> Sweep:
    """Reads a listing; `namespace` is that of the kernel's copy.  Raises Unreadable."""
    kernel = f"2ck{len(namespace)}{namespace}"

    def loops(*parts: str) -> list[Loop]:
        return [loop for _, code in functions(text, kernel, *parts) for loop in innermost_loops(code)]

    if activation in KINKED:
        found = loops("6Kinked")
        scores, _ = cost(found, score_vectors, "scores")
        gradients, _ = cost(found, gradient_vectors, "gradients")
        return Sweep(scores, gradients)
    name = form(activation, namespace)
    direct = name.startswith("6Direct")
    own, same = ("6Direct", "16FactoredSoftplus") if direct else (name, "6Direct")  # compilers merge equal gradients
    found = loops("6Smooth", own, "9gradientsI") or loops("6Smooth", same, "9gradientsI")
    gradients, pairs = cost(found, smooth_gradient_vectors, "gradients")
    found = loops("6Smooth", name, "6scoresILb1E") + loops("6Smooth", name, "14scores_in_turnILb1E")
    scores, _ = cost(found, lambda x: smooth_score_vectors(x, pairs), "scores")
    return Sweep(scores, gradients)


@lru_cache
def chosen_sweep(activation: str = "relu") -> Sweep:
    """Of the kernel that runs on this machine.  Raises Unreadable, or RuntimeError without compiled kernels."""
    module = backends.compiled()
    isa = module.isa()
    return sweep(listing(Path(module.__file__ or "")), NAMESPACES.get(isa, isa), activation)
