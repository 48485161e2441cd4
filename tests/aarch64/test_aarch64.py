"""The operators' own tests on the kernels of aarch64: cross-compiled, run by qemu-user, held to the same float64.

It proves that the code is right there, with and without products of bf16; it proves nothing about its speed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import aarch64
import pytest

ROOT = Path(__file__).parents[2]
CASES = (
    "tests/losses/test_native_gradients.py::test_equals_float64_whatever_the_upstream_gradient",
    "tests/primitives/test_additive_moments.py::test_kernel_matches_float64",
    "tests/primitives/test_additive_moments.py::test_half_precision_storage",
    "tests/primitives/test_additive_scores.py::test_kernel_matches_float64",
    "tests/primitives/test_additive_shifts.py::test_kernel_matches_float64",
    "tests/primitives/test_dot_lse.py::test_any_weights",
    "tests/primitives/test_dot_lse.py::test_groups",
    "tests/primitives/test_dot_lse.py::test_features_that_are_not_finite_give_nan",
    "tests/primitives/test_dot_softplus.py::test_sums_and_gradients",
    "tests/primitives/test_dot_softplus.py::test_each_term_keeps_its_digits",
    "tests/primitives/test_log_mean_exp.py::test_kernel_matches_float64",
)
AT_LEAST = 200  # tests of the two instruction sets


@pytest.fixture(scope="module")
def driver() -> Path:
    if why := aarch64.missing():
        pytest.skip(why)
    return aarch64.build()


def test_the_operators_on_aarch64(driver: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, aarch64.DRIVER: str(driver), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-p", "aarch64", "-q", "-n", "0", "--durations=5", *CASES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(passed[1]) >= AT_LEAST and "skipped" not in done.stdout, done.stdout[-3000:]


def test_a_processor_without_bf16_takes_the_other_copy(driver: Path) -> None:
    assert aarch64.Machine(driver, "cortex-a72").supported_isas() == ["generic"]
    assert aarch64.Machine(driver, "max").supported_isas() == ["generic", "neonbf16"]


def test_what_the_driver_does_not_know_is_said(driver: Path) -> None:
    machine = aarch64.Machine(driver)
    params = aarch64.Params()
    params.fill({"n": 3, "no_such_field": 1})
    with pytest.raises(RuntimeError, match="log_mean_exp_forward has no field n"):
        machine.call("log_mean_exp_forward", params.fields)
    with pytest.raises(RuntimeError, match="there is no kernel sum"):
        machine.call("sum", {})
