"""Build the native module t2kernels._native by driving CMakeLists.txt with Ninja.

Metadata is in pyproject.toml; only what must be decided at build time is here. Variables:

    T2_CUDA=0             leave the CUDA kernels out even where nvcc is found
    T2_REQUIRE_CUDA=1     fail instead of building without them
    T2_CUDA_ARCHS         "80;90a;100" by default; the newest also gets PTX for later GPUs
    T2_CUDA_LINEINFO=1    line numbers in the CUDA kernels, for profilers
    T2_BUILD_DIR          folder of the CMake build (default build/cmake-<python tag>, kept for
                          incremental builds)
    T2_BUILD_JOBS         parallel compiler processes (default: all cores)
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OFF = {"0", "off", "no", "false"}


def flag(name: str, default: str) -> bool:
    return os.environ.get(name, default).strip().lower() not in OFF


def tool(name: str, folder: str) -> str:
    """Path of cmake or ninja: from its Python package (constant ``folder``), else on the PATH."""
    found = None
    if importlib.util.find_spec(name) is not None:
        package = importlib.import_module(name)
        found = shutil.which(name, path=getattr(package, folder, None) or os.devnull)
    found = found or shutil.which(name)
    if found is None:
        raise RuntimeError(
            f"t2kernels: building needs {name}, which is neither installed for {sys.executable} "
            f"nor on the PATH. Install it with `pip install {name}`."
        )
    return found


def pybind11_include() -> str:
    """pybind11's headers: the package, or else the copy that torch carries beside its own."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return str(pybind11.get_include())
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        include = Path(torch.origin).parent / "include"
        if (include / "pybind11" / "pybind11.h").is_file():
            # A folder of its own, so that no torch header is within the compiler's reach.
            alone = build_dir() / "pybind11-headers"
            alone.mkdir(parents=True, exist_ok=True)
            shutil.copytree(include / "pybind11", alone / "pybind11", dirs_exist_ok=True)
            return str(alone)
    raise RuntimeError(
        "t2kernels: building needs pybind11's headers; neither the package pybind11 nor torch is "
        "installed here. Install it with `pip install pybind11`, or build with isolation."
    )


def build_dir() -> Path:
    tag = f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    return Path(os.environ.get("T2_BUILD_DIR") or ROOT / "build" / tag).resolve()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two builds of one folder wait for each other (where the system has file locks)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ImportError:
            pass
        yield


def drop_foreign_cache(folder: Path) -> None:
    """CMake refuses a build folder that came along when the source tree was copied or moved."""
    cache = folder / "CMakeCache.txt"
    if cache.is_file():
        text = cache.read_text(errors="replace")
        places = {"CMAKE_HOME_DIRECTORY": ROOT, "CMAKE_CACHEFILE_DIR": folder}
        if not all(f"{name}:INTERNAL={path}\n" in text for name, path in places.items()):
            shutil.rmtree(folder)


class FreshBuild(build):
    """Empty build/lib first: a module that was removed from the source must not reach the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = build_dir()
        cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{folder}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DT2_VERSION={self.distribution.get_version()}",
            f"-DT2_PYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DT2_PYBIND11_INCLUDE={pybind11_include()}",
            f"-DT2_MODULE_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DT2_CUDA={'ON' if flag('T2_CUDA', '1') else 'OFF'}",
            f"-DT2_REQUIRE_CUDA={'ON' if flag('T2_REQUIRE_CUDA', '0') else 'OFF'}",
            f"-DT2_CUDA_LINEINFO={'ON' if flag('T2_CUDA_LINEINFO', '0') else 'OFF'}",
            f"-DT2_CUDA_ARCHS={os.environ.get('T2_CUDA_ARCHS', '')}",
        ]
        jobs = os.environ.get("T2_BUILD_JOBS") or str(os.cpu_count() or 1)
        with locked(folder):
            drop_foreign_cache(folder)
            for command in (configure, [cmake, "--build", str(folder), "--parallel", jobs]):
                if subprocess.run(command).returncode:
                    raise SystemExit(
                        f"t2kernels: the native build failed; the reason is above. "
                        f"Command: {' '.join(command)}"
                    )
            target.parent.mkdir(parents=True, exist_ok=True)
            # Not over the old file in place: a running process may have it mapped.
            fresh = target.with_name(target.name + ".new")
            shutil.copy2(folder / target.name, fresh)
            os.replace(fresh, target)


setup(
    ext_modules=[Extension("t2kernels._native", sources=[])],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
