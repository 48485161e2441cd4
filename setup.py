"""Builds cibr_kernels._C and _plans by driving CMake with ninja; everything about the build is in CMakeLists.txt."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent  # of all of them
        # kept, so that the next install compiles what has changed; pip's own build folders are new each time
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={kept_pybind11(build) / 'share/cmake/pybind11'}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", str(os.cpu_count() or 1)], check=True)


def kept_pybind11(build: Path) -> Path:
    """A copy of pybind11's headers and CMake files: pip has them in a new folder each time, and with a new path the
    bindings, half a minute of a core, would be compiled again."""
    import pybind11

    kept = build / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        partial = build / "pybind11.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for part in ("include", "share"):
            shutil.copytree(Path(pybind11.__file__).parent / part, partial / part)
        partial.rename(kept)
    return kept


class ManylinuxWheel(bdist_wheel):
    """A wheel for every Linux whose C library is not older than what the kernels ask of it.

    auditwheel finds the tag in the symbols' versions, a container of manylinux gives an older one.  libgomp stays out:
    torch brings it and is imported first, and a second copy would be a second pool of threads.
    """

    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)  # modules that are no more
        super().run()
        (wheel,) = (Path(file) for command, _, file in self.distribution.dist_files if command == "bdist_wheel")
        if sys.platform != "linux":
            return
        if importlib.util.find_spec("auditwheel") is None:  # with --no-build-isolation
            print(f"{wheel.name} is for this machine: auditwheel, which would say for which others, is not installed")
            return
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["repair", "--exclude", "libgomp.so.1", "--wheel-dir", folder, str(wheel)]
            subprocess.run([sys.executable, "-m", "auditwheel", *arguments], check=True)
            (repaired,) = Path(folder).iterdir()
            wheel.unlink()
            shutil.move(repaired, wheel.parent)
        self.distribution.dist_files[:] = [("bdist_wheel", "any", str(wheel.parent / repaired.name))]


setup(
    ext_modules=[Extension(f"cibr_kernels.{name}", sources=[]) for name in ("_C", "_plans")],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": ManylinuxWheel},
)
