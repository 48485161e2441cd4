"""What an import costs, what works without the compiled module, and which way the arrows point."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import cibr_kernels
from cibr_kernels.dispatch import backends

PACKAGE = Path(cibr_kernels.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_adds_nothing_to_torch():
    loaded = python(
        "import sys, torch; before = set(sys.modules)\nimport cibr_kernels; print(*sorted(set(sys.modules) - before))"
    ).split()
    tops = {name.partition(".")[0] for name in loaded}
    assert tops - set(sys.stdlib_module_names) <= {"cibr_kernels", "torch", "numpy"}
    assert "torch._inductor" not in loaded and "torch._dynamo" not in loaded


WITHOUT_KERNELS = """
import sys, warnings
sys.modules["cibr_kernels._C"] = None
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import cibr_kernels as ck
assert len(seen) == 1 and "pip install -e ." in str(seen[0].message), [str(w.message) for w in seen]
assert seen[0].filename == "<string>", seen[0].filename  # the line that imported it
import torch
assert not ck.native_available()
x = torch.randn(6, 4, requires_grad=True)
loss = ck.clip_loss(x, x, 5.0) - ck.mutual_information(x, x, ck.nn.ConcatCritic(4, 4, 8)) + ck.log_mean_exp(x)
loss = loss - ck.mutual_information(x, x, ck.nn.SeparableCritic(4, 4, 8, 3))
loss.backward()
assert x.grad.isfinite().all()
critic = ck.nn.ConcatCritic(4, 4, 8)
for call in (
    lambda: ck.clip_loss(x, x, 5.0, backend="native"),
    lambda: ck.log_mean_exp(x, backend="native"),
    lambda: ck.critic_moments(x, x, critic, backend="native"),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


def test_everything_works_without_the_compiled_module():
    refusals = python(WITHOUT_KERNELS).strip().splitlines()
    assert len(refusals) == 3
    for line, op in zip(refusals, ("dot_lse", "log_mean_exp", "additive_moments"), strict=True):
        assert line.startswith(f"no backend can run {op}: native: the compiled module") and "pip install -e ." in line


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(path: Path, *modules: str) -> list[str]:
    return [name for name in imports(path) if any(name == m or name.startswith(m + ".") for m in modules)]


# From the ground up; a module imports its own floor and those before it.
FLOORS = ("dispatch", "facts", "primitives", "distributed", "information", "losses", "nn", "testing")
FACTS = ("checks", "numerics")


def floor(parts: Sequence[str]) -> str:
    """Of a module of the package, by its path or dotted name from there."""
    name = parts[0].removesuffix(".py")
    return "facts" if name in FACTS else name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    inside = path.relative_to(PACKAGE)
    kernels = inside.name.startswith("triton")  # imported only when a Triton kernel is about to run
    assert not reaches(path, "cibr", "open_clip", "bench", "numpy", *(() if kernels else ("triton",)))
    if inside.name == "__init__.py" and len(inside.parts) == 1:
        return  # the package's own front shows what all floors have
    here = FLOORS.index(floor(inside.parts))
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "cibr_kernels":
            assert FLOORS.index(floor(rest)) <= here, f"{inside} imports {name}, which stands above it"
            if here == FLOORS.index("primitives") and rest[0] == "primitives" and len(inside.parts) > 2:
                own, other = inside.parts[1], rest[1]
                assert other in (own, "triton_sums"), f"{inside} imports {name}, another family of primitives"
    if inside.name == "native.py":
        # tables of names may be shared; functions of another backend may not
        taken = [n for n in imports(path) if ".reference." in n or ".triton." in n]
        assert all(name.rpartition(".")[2].isupper() for name in taken), taken
    if inside.name == "reference.py":
        assert not reaches(path, "cibr_kernels.dispatch")
        assert not [n for n in imports(path) if ".native" in n or ".op." in n]


def test_every_op_has_its_files():
    expected = {"__init__.py", "op.py", "reference.py", "native.py"}
    for op in ("dot_lse", "dot_softplus", "additive_moments", "additive_scores", "additive_shifts", "log_mean_exp"):
        home = PACKAGE.joinpath(*backends.home(op).split(".")[1:])
        assert {p.name for p in home.glob("*.py")} >= expected, op


def test_public_names_are_documented():
    import cibr_kernels as ck

    for name in ck.__all__:
        assert getattr(ck, name).__doc__, name
    for name in ck.nn.__all__:
        assert getattr(ck.nn, name).__doc__, name
