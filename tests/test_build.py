"""What an installation contains, what the native module must not need, what an import may do."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from t2kernels._version import __version__

ROOT = Path(__file__).resolve().parents[1]

needs_tools = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None,
    reason="a C++ compiler and ninja are needed to build the package",
)


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built without isolation into the usual build folder, so most of it is there already."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    done = run(*pip, "--no-index", "-w", str(folder), str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def native(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (name,) = [n for n in wheel.namelist() if re.fullmatch(r"t2kernels/_native\..*\.so", n)]
    return Path(wheel.extract(name, tmp_path_factory.mktemp("native")))


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"t2kernels-{__version__}.dist-info/{name}").decode()


@needs_tools
def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    top = {name.split("/")[0] for name in names}
    assert top == {"t2kernels", "t2runtime", f"t2kernels-{__version__}.dist-info"}
    for folder, package in ((ROOT / "t2kernels", ""), (ROOT / "python" / "t2runtime", "python/")):
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".typed", ".safetensors", ".json"):
                assert str(path.relative_to(ROOT)).removeprefix(package) in names
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".cuh", ".h", ".pyc"))]


@needs_tools
def test_metadata(wheel: zipfile.ZipFile) -> None:
    message = Parser().parsestr(metadata(wheel, "METADATA"))
    assert message["Name"] == "t2kernels" and message["Version"] == __version__
    needed = [r for r in message.get_all("Requires-Dist", []) if "extra ==" not in r]
    names = {re.split(r"[<>=! ;]", requirement)[0] for requirement in needed}
    assert names == {"torch", "safetensors", "numpy", "tqdm"}
    scripts = configparser.ConfigParser()
    scripts.read_string(metadata(wheel, "entry_points.txt"))
    assert scripts["console_scripts"]["t2"] == "t2runtime.cli:main"
    assert [n for n in wheel.namelist() if n.endswith("LICENSE")]


@needs_tools
def test_source_archive_holds_what_a_build_needs(tmp_path: Path) -> None:
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert len(sources) > 10
    for path in [*sources, ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "pyproject.toml"]:
        assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.endswith(".so") or "__pycache__" in name]


def test_build_requires_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    assert requires is not None and "torch" not in requires[1]
    for source in (ROOT / "csrc").rglob("*"):
        if source.is_file() and source.suffix != ".md":
            included = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", source.read_text())
            assert not [i for i in included if i.startswith(("torch/", "ATen/", "c10/"))], source


@needs_tools
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_native_module_needs_no_torch_no_cuda_library(native: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", str(native)).stdout)
    assert needed
    foreign = re.compile(r"torch|c10|cuda|cublas|gomp|iomp|python")
    assert not [library for library in needed if foreign.search(library)], needed
    symbols = run("nm", "-D", "--undefined-only", str(native)).stdout
    assert "PyModule" in symbols or "PyObject" in symbols
    assert not re.findall(r"\b(?:_ZNK?(?:2at|3c10|5torch)\S*|GOMP_\S*|omp_\S*|cuda\S*)", symbols)


@needs_tools
def test_build_info(native: Path) -> None:
    """The module of the wheel, loaded by its path in a process without torch."""
    program = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('_native', {str(native)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps([module.build_info(), hasattr(module, 'cuda_svf_decode')]))"
    )
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    info, has_cuda = json.loads(done.stdout)
    assert info["version"] == __version__
    assert "scalar" in info["cpu_isas"] and info["compiler"]
    assert info["cuda"] is has_cuda is bool(info["cuda_archs"])
    if has_cuda and "T2_CUDA_ARCHS" not in os.environ:
        assert {"sm_80", "sm_90a"} <= set(info["cuda_archs"])


@needs_tools
@pytest.mark.parametrize(
    ("hidden", "reason"),
    [({"CUDACXX": "/nowhere/nvcc"}, "no working nvcc"), ({"T2_CUDA": "0"}, "T2_CUDA=0")],
)
def test_required_but_missing_cuda_is_an_error(hidden, reason: str, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = run(*command, T2_REQUIRE_CUDA="1", T2_BUILD_DIR=str(tmp_path / "cmake"), **hidden)
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "T2_REQUIRE_CUDA=1, but the CUDA kernels cannot be built" in message
    assert reason in message and "Install the CUDA toolkit" in message
    assert not (tmp_path / "lib").exists()


IMPORT_PROGRAM = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import t2kernels
milliseconds = 1e3 * (time.perf_counter() - start)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([milliseconds, sorted(new), torch.cuda.is_initialized()]))
"""


def test_import_is_light(record_property) -> None:
    results = []
    for _ in range(3):
        done = run(sys.executable, "-c", IMPORT_PROGRAM)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    milliseconds, new, cuda = min(results)
    print(f"\nimport t2kernels adds {milliseconds:.0f} ms to import torch (goal: under 150)")
    record_property("import_ms", milliseconds)
    assert not {"transformers", "triton", "peft", "matplotlib", "t2runtime"} & set(new), new
    assert cuda is False
