"""The kernels compile with the oldest Triton that pyproject.toml allows; test_static.py compiles them with this one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OLDEST = re.findall(r"triton>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 14), reason=f"triton {OLDEST} has no wheel for this Python")
def test_every_kernel_compiles_with_the_oldest_triton(tmp_path):
    """That of PyTorch 2.6, which knows no capability above 9.0."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "old")]
    subprocess.run([*pip, f"triton=={OLDEST}.0"], check=True)
    paths = os.pathsep.join(map(str, (tmp_path / "old", ROOT, ROOT / "tests/support")))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(HERE / "compile_with.py"), "80", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    version, *kernels = done.stdout.splitlines()
    assert version.split() == ["triton", f"{OLDEST}.0"]
    for target in ("sm_80", "sm_90"):
        names = {line.split()[1] for line in kernels if line.startswith(target)}
        assert names >= {"clip_loss", "dot_lse", "dot_softplus", "additive_moments", "additive_scores", "log_mean_exp"}
