"""Tritons older than the installed one: the oldest compiles every kernel, and launches pass what plans pass."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fake_device
import pytest

from bench.guards import host
from cibr_kernels.dispatch import plans, triton_relaunch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OLDEST = re.findall(r"triton>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[0]
VERSIONS = (f"{OLDEST}.0", "3.4.0", "3.6.0")  # before descriptors, before chains of hooks, with two scratch pointers
CASES = ("arguments", "clip_loss 1000x512")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info >= (3, 14), reason=f"triton {OLDEST} has no wheel for this Python"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the versions that were installed."""
    return {"": tmp_path_factory.mktemp("tritons")}


def installed(version: str, folders: dict[str, Path]) -> Path:
    """A folder with this Triton, in front of the environment's for a process that has it first on its path."""
    if version not in folders:
        folder = folders[""] / version
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
        folders[version] = folder
    return folders[version]


def test_every_kernel_compiles_with_the_oldest_triton(folders: dict[str, Path], tmp_path: Path) -> None:
    """That of PyTorch 2.6, which knows no capability above 9.0; what has another key than in the table is compiled."""
    paths = os.pathsep.join(map(str, (installed(VERSIONS[0], folders), ROOT, ROOT / "tests/support")))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(HERE / "compile_with.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found, table = json.loads(done.stdout), json.loads((HERE / "oldest_triton.json").read_text())
    assert found["versions"] == table["versions"] == {"triton": VERSIONS[0]}
    shared, expected = ({name: row["shared"] for name, row in rows["kernels"].items()} for rows in (found, table))
    assert shared == expected, "if that is meant: compile_with.py --update"
    for target in ("sm_80", "sm_90"):
        names = {name.split()[1] for name in found["kernels"] if name.startswith(target)}
        assert names >= {"clip_loss", "dot_lse", "dot_softplus", "additive_moments", "additive_scores", "log_mean_exp"}


@pytest.mark.parametrize("version", VERSIONS)
def test_replays_and_launches_around_triton_pass_what_it_passes(
    device: Path, folders: dict[str, Path], tmp_path: Path, version: str
) -> None:
    if plans._native() is None:
        pytest.skip("cibr_kernels._plans is not built")
    paths = os.pathsep.join(map(str, (installed(version, folders), host.ROOT, host.FAKE_DEVICE)))
    environment = fake_device.environment(device) | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    assert tuple(map(int, version.split(".")[:2])) in triton_relaunch.COMPARED
    command = [sys.executable, "-m", "fake_device.replays", *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"][1] == version
    assert found["different"] == found["around"] == found["names"] == [] and found["refused"] == {}
    assert found["bytes"] > 3000
