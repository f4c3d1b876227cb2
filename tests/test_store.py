"""A checkpoint's factors on disk: choice of weights, resume after a kill, damage, memory."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from t2kernels import lapack
from t2kernels import store as store_module
from t2kernels.checkpoint import Checkpoint
from t2kernels.files import CorruptFileError, SaveError, file_sha256
from t2kernels.store import FactorStore, decompose_checkpoint
from t2kernels.svd import accuracy, decompose, fingerprint, reconstruct

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and limits are POSIX")


def _llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens": (20, 16), "lm_head": (20, 16), "model.norm": (16,)}
    for i in range(2):
        shapes[f"model.layers.{i}.self_attn.q_proj"] = (16, 16)
        shapes[f"model.layers.{i}.mlp.up_proj"] = (24, 16)
        shapes[f"model.layers.{i}.mlp.down_proj"] = (16, 24)
        shapes[f"model.layers.{i}.input_layernorm"] = (16,)
    return {f"{n}.weight": torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}


def _folder(path: Path, tensors: dict[str, torch.Tensor], config: Any = None) -> Path:
    path.mkdir()
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return path


def _hashes(out: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in out.glob("*.safetensors")}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrices are tiny here: a second thread only waits for the first. Also in subprocesses."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return _folder(tmp_path / "model", _llama())


def test_whole_way(source: Path, tmp_path: Path) -> None:
    tensors = _llama()
    made = decompose_checkpoint(source, tmp_path / "out", device="cpu")
    assert len(made) == 6 and all("proj" in n for n in made.names)
    store = FactorStore(tmp_path / "out")
    assert store.names == made.names and repr(store).endswith("6 weights)")
    for name in store.names:
        weight = tensors[f"{name}.weight"]
        info, factors = store.info(name), store.load(name)
        assert accuracy(weight, factors).relative_error <= 5e-6
        assert info["accuracy"]["relative_error"] <= 5e-6
        assert info["accuracy"]["orthogonality_u"] <= 1e-5
        assert info["fingerprint"] == fingerprint(weight) and info["shape"] == list(weight.shape)
        assert all(torch.equal(a, b) for a, b in zip(factors, decompose(weight), strict=True))
        store.verify(name, weight.bfloat16().float())
    store.check()
    assert "model.layers.0.mlp.up_proj.weight" in store and "lm_head" not in store
    assert store.find("layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert store.find("lm.model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert store.find("mlp.up_proj") is None  # of which layer?
    assert store.load("layers.1.mlp.up_proj", "cpu", torch.bfloat16).U.dtype == torch.bfloat16
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["version"] == 1 and manifest["source"] == str(source)
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_the_manifest_says_what_made_a_weight(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods in one folder; of the second, one result that misses its bounds."""
    decompose_checkpoint(source, tmp_path / "out", targets="mlp", device="cpu")
    gram, calls = lapack._gram, []

    def sloppy(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        calls.append(weight)
        U, S, Vh = gram(weight)
        return U, S * (1 + 1e-5 * (len(calls) == 1)), Vh

    monkeypatch.setattr(lapack, "_gram", sloppy)
    store = decompose_checkpoint(source, tmp_path / "out", device="cpu", method="gram")
    by = [(store.info(n)["method"], store.info(n)["repeated"]) for n in store.made]
    assert by == [("svd fp64", True)] + [("gram", False)] * (len(store.made) - 1)
    assert len(by) >= 2
    assert all(store.info(n)["accuracy"]["relative_error"] <= 2e-7 for n in store.made)
    others = [n for n in store.names if n not in store.made]
    assert others and all(store.info(n)["method"] == "svd fp32" for n in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = _folder(tmp_path / "model", _llama(dtype))
    store = decompose_checkpoint(folder, tmp_path / "out", targets="mlp", device="cpu")
    name = store.names[0]
    reached = store.info(name)["accuracy"]
    assert store.load(name).U.dtype == dtype and len(store) == 4
    assert reached["relative_error"] <= 5e-6
    assert reached["relative_error_stored"] <= (1e-14 if dtype == torch.float64 else 6e-3)
    wide = decompose_checkpoint(
        folder, tmp_path / "wide", dtype=torch.float32, precision="fp64", rank=20, device="cpu"
    )
    assert wide.info(name)["accuracy"]["relative_error_stored"] <= 1.2e-7
    assert wide.load(name).U.dtype == torch.float32


def test_shards_and_single_file(source: Path, tmp_path: Path) -> None:
    tensors = _llama()
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    half = len(tensors) // 2
    weight_map = {}
    for i, part in enumerate((list(tensors)[:half], list(tensors)[half:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, str(sharded / file))
        weight_map |= dict.fromkeys(part, file)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    decompose_checkpoint(sharded, tmp_path / "a", device="cpu")
    decompose_checkpoint(source, tmp_path / "b", device="cpu")
    decompose_checkpoint(source / "model.safetensors", tmp_path / "c", device="cpu")
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b") == _hashes(tmp_path / "c")

    index.write_text(json.dumps({"weight_map": {"a.weight": "../model/model.safetensors"}}))
    with pytest.raises(ValueError, match="file must consist of"):
        Checkpoint(sharded)
    index.write_text(json.dumps({"weight_map": weight_map | {"gone.weight": file}}))
    with pytest.raises(CorruptFileError, match=r"lacks 'gone\.weight'"):
        Checkpoint(sharded)
    index.write_text(json.dumps({"weight_map": weight_map | {"x.weight": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="gone"):
        Checkpoint(sharded)
    index.write_text("{}")
    with pytest.raises(CorruptFileError, match="weight_map"):
        Checkpoint(sharded)


@pytest.mark.parametrize("with_config", [True, False])
def test_conv1d_is_transposed(tmp_path: Path, with_config: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 24, generator=g), torch.zeros(24)
    tensors = {"h.0.attn.c_attn.weight": weight, "h.0.attn.c_attn.bias": bias}
    folder = _folder(tmp_path / "model", tensors, {"decoder": {"model_type": "gpt2"}})
    if not with_config:
        (folder / "config.json").unlink()
    store = decompose_checkpoint(folder, tmp_path / "out", device="cpu")
    info = store.info("h.0.attn.c_attn")
    assert info["transposed"] and info["shape"] == [24, 8]
    store.verify("transformer.h.0.attn.c_attn", weight.t())
    assert torch.allclose(reconstruct(store.load("h.0.attn.c_attn")), weight.t(), atol=1e-5)
    (folder / "config.json").write_text('{"model_type": "gpt_bigcode"}')
    plain = decompose_checkpoint(folder, tmp_path / "plain", device="cpu")
    assert plain.info("h.0.attn.c_attn")["shape"] == [8, 24]


def test_choice(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    store = decompose_checkpoint(source, out, targets=["q_proj"], device="cpu")
    assert len(store) == 2
    before = _hashes(out)
    store = decompose_checkpoint(
        source, out, targets="all-linear", exclude="down_proj", device="cpu"
    )
    assert len(store) == 4 and before.items() <= _hashes(out).items()
    with pytest.raises(ValueError, match=r"'upproj' matches none .* Did you mean 'up_proj'"):
        decompose_checkpoint(source, out, targets=["q_proj", "upproj"], device="cpu")
    with pytest.raises(ValueError, match="nothing left"):
        decompose_checkpoint(source, out, targets="mlp", exclude="mlp", device="cpu")


def test_what_cannot_be_decomposed_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = _llama()
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.ones(2, 3, 4)
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.ones(4, 4, dtype=torch.int8)
    folder = _folder(tmp_path / "model", tensors)
    with caplog.at_level(logging.WARNING):
        store = decompose_checkpoint(folder, tmp_path / "out", device="cpu")
    assert len(store) == 6
    skipped = store.manifest["skipped"]
    assert "stack of matrices" in skipped["model.layers.0.mlp.experts.gate_up_proj"]
    assert "dtype I8" in skipped["model.layers.0.mlp.experts.0.up_proj.weight"]
    assert len(caplog.records) == 2


# Where in a run the process is killed: inside the n-th call of the named function of files.py.
# Every weight makes two atomic writes (its file, the manifest); the first write is the manifest.
KILL = """
import os, signal, sys
from t2kernels import files, store
function, number, source, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
method = sys.argv[5]
owner = files if function == "save_file" else os
original, calls = getattr(owner, function), [0]

def killed(*args, **kwargs):
    calls[0] += 1
    if calls[0] == number:
        if function == "save_file":
            open(args[1], "wb").write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, function, killed)
store.decompose_checkpoint(source, out, device="cpu", method=method)
"""


@POSIX
@pytest.mark.parametrize(
    ("function", "number", "method"),
    [("save_file", 3, "svd"), ("replace", 6, "svd"), ("replace", 7, "gram")],
)
def test_kill_and_resume(
    source: Path,
    tmp_path: Path,
    function: str,
    number: int,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", KILL, function, str(number), str(source), str(out), method],
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    half = json.loads((out / "manifest.json").read_text())
    assert not half["complete"] and 0 < len(half["weights"]) < 6
    assert list(out.glob(".*.t2tmp"))
    with pytest.raises(ValueError, match="unfinished"):
        FactorStore(out)
    assert len(FactorStore(out, partial=True)) == len(half["weights"])

    done = []
    inner = store_module._decompose_one
    monkeypatch.setattr(
        store_module, "_decompose_one", lambda f, w, *a: done.append(w.name) or inner(f, w, *a)
    )
    resumed = decompose_checkpoint(source, out, device="cpu", method=method)
    assert len(done) == 6 - len(half["weights"]) and not set(done) & set(half["weights"])
    decompose_checkpoint(source, whole, device="cpu", method=method)
    assert _hashes(out) == _hashes(whole) and resumed.names == FactorStore(whole).names
    assert not list(out.glob(".*.t2tmp"))
    for name, entry in half["weights"].items():
        assert resumed.info(name) == entry


def test_what_is_computed_is_kept_when_the_next_weight_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight is written while the next is made: an error in that one must not lose the first."""
    inner, calls = store_module._decompose_one, []

    def third_fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(*arguments)

    monkeypatch.setattr(store_module, "_decompose_one", third_fails)
    with pytest.raises(KeyboardInterrupt):
        decompose_checkpoint(source, tmp_path / "out", device="cpu")
    assert len(FactorStore(tmp_path / "out", partial=True)) == 2

    def full(*arguments: Any) -> Any:
        raise SaveError("no room")

    monkeypatch.setattr(store_module, "_decompose_one", inner)
    with monkeypatch.context() as patch, pytest.raises(SaveError, match="no room"):
        patch.setattr(store_module, "_write_one", full)
        decompose_checkpoint(source, tmp_path / "out", device="cpu")
    assert len(decompose_checkpoint(source, tmp_path / "out", device="cpu")) == 6


def test_finished_weights_are_checked_on_resume(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    store = decompose_checkpoint(source, out, device="cpu")
    good = _hashes(out)
    first, second, third = (out / store.info(n)["file"] for n in store.names[:3])
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    data = bytearray(third.read_bytes())
    data[-3] ^= 1
    third.write_bytes(data)
    with pytest.raises(CorruptFileError, match="sha256"):
        store.check(store.names[2])
    decompose_checkpoint(source, out, device="cpu").check()
    assert _hashes(out) == good


def test_other_settings_or_other_weights(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose_checkpoint(source, out, device="cpu")
    good = _hashes(out)
    for changed in ({"rank": 3}, {"dtype": torch.bfloat16}, {"precision": "fp64"}):
        with pytest.raises(ValueError, match=rf"was made with .*{next(iter(changed))}.*overwrite"):
            decompose_checkpoint(source, out, device="cpu", **changed)
    other = _folder(tmp_path / "other", _llama(seed=1))
    with pytest.raises(ValueError, match="another checkpoint"):
        decompose_checkpoint(other, out, device="cpu")
    assert _hashes(out) == good
    (out / "notes.safetensors").write_text("theirs")
    store = decompose_checkpoint(source, out, rank=3, targets="mlp", overwrite=True, device="cpu")
    assert len(store) == 4 and all(store.info(n)["rank"] == 3 for n in store.names)
    assert (out / "notes.safetensors").read_text() == "theirs"
    assert len(list(out.glob("*.safetensors"))) == 5


def test_one_store_one_checkpoint(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose_checkpoint(source, out, targets="q_proj", device="cpu")
    before = (out / "manifest.json").read_bytes()
    unrelated = {"net.a.weight": torch.randn(8, 8), "net.b.weight": torch.randn(8, 8)}
    with pytest.raises(ValueError, match="another checkpoint .* none of its 2 weights"):
        decompose_checkpoint(_folder(tmp_path / "b", unrelated), out, device="cpu")
    # The same names with other values, asked for by targets that are not in the store yet.
    other = _folder(tmp_path / "c", _llama(seed=1))
    with pytest.raises(ValueError, match="another checkpoint"):
        decompose_checkpoint(other, out, targets="up_proj", device="cpu")
    assert (out / "manifest.json").read_bytes() == before
    moved = source.rename(tmp_path / "moved")
    assert len(decompose_checkpoint(moved, out, targets="up_proj", device="cpu")) == 4


def test_foreign_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"cat\.jpg.*not a factor store"):
            decompose_checkpoint(source, tmp_path / "photos", overwrite=overwrite, device="cpu")
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"
    with pytest.raises(SaveError, match="cannot make the folder"):
        decompose_checkpoint(source, source / "config.json" / "out", device="cpu")


def test_bad_arguments(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="rank must be"):
        decompose_checkpoint(source, out, rank=0)
    with pytest.raises(TypeError, match="dtype must be"):
        decompose_checkpoint(source, out, dtype=torch.int8)
    with pytest.raises(ValueError, match="precision"):
        decompose_checkpoint(source, out, precision="fp16")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        decompose_checkpoint(tmp_path / "gone", out)
    with pytest.raises(FileNotFoundError, match="must hold"):
        decompose_checkpoint(tmp_path, out)
    (tmp_path / "pytorch_model.bin").write_text("pickle")
    with pytest.raises(FileNotFoundError, match="never read"):
        decompose_checkpoint(tmp_path, out)
    with pytest.raises(ValueError, match="never read"):
        decompose_checkpoint(tmp_path / "pytorch_model.bin", out)
    assert not out.exists()


def test_a_weight_with_nan_is_named(tmp_path: Path) -> None:
    tensors = _llama()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    folder = _folder(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*inf or NaN"):
        decompose_checkpoint(folder, tmp_path / "out", device="cpu")


def test_no_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SaveError, match="GiB are free"):
        decompose_checkpoint(source, tmp_path / "out", device="cpu")


def test_damaged_store(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        FactorStore(tmp_path)
    store = decompose_checkpoint(source, out, device="cpu")
    name, other = store.names[:2]
    with pytest.raises(ValueError, match=r"no factors for 'lm_head'"):
        store.load("lm_head")
    with pytest.raises(ValueError, match=r"near are \['model\.layers\.0\.mlp\.up_proj'"):
        store.info("model.layers.0.mlp.upproj")
    weight = _llama()[f"{name}.weight"]
    with pytest.raises(ValueError, match="fingerprint"):
        store.verify(name, weight + 1)
    with pytest.raises(ValueError, match="shape"):
        store.verify(name, weight[1:])

    path = out / store.info(name)["file"]
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(CorruptFileError, match="truncated"):
        store.load(name)
    for place in (20, -41):  # in the header, among the values
        flipped = bytearray(good)
        flipped[place] ^= 0x40
        path.write_bytes(flipped)
        with pytest.raises(CorruptFileError, match=rf"{name}\.safetensors.*(sha256|damaged)"):
            store.load(name)
    path.write_bytes((out / store.info(other)["file"]).read_bytes())
    with pytest.raises(CorruptFileError):
        store.load(name)
    save_file({"S": -torch.ones(3)}, str(path))
    with pytest.raises(CorruptFileError, match="kind"):
        store.load(name)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        store.load(name)
    path.write_bytes(good)

    manifest_path = out / "manifest.json"
    text = manifest_path.read_text()
    manifest = json.loads(text)
    entry = manifest["weights"][name]
    cases: list[tuple[Any, str]] = [
        (manifest | {"version": 9}, "version 1, got 9"),
        (manifest | {"kind": "x"}, "kind"),
        (manifest | {"weights": []}, "damaged"),
        (manifest | {"weights": {name: entry | {"file": "../x.safetensors"}}}, "damaged"),
        (manifest | {"weights": {"../x": entry | {"file": "../x.safetensors"}}}, "damaged"),
        (manifest | {"weights": {name: {"file": f"{name}.safetensors"}}}, "damaged"),
    ]
    for value, message in cases:
        manifest_path.write_text(json.dumps(value))
        with pytest.raises(CorruptFileError, match=message):
            FactorStore(out)
    manifest_path.write_text(text[: len(text) // 2])
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        FactorStore(out)


def test_bar_is_silent_without_a_terminal(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    decompose_checkpoint(source, tmp_path / "out", device="cpu")
    assert capfd.readouterr() == ("", "")


@POSIX
def test_bar_on_a_terminal(source: Path, tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    script = "import sys; from t2kernels.store import decompose_checkpoint as d; d(*sys.argv[1:])"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")], stderr=slave
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # the terminal's other end has closed
        pass
    os.close(master)
    assert run.wait() == 0
    assert b"6/6" in shown and b"100%" in shown and b"model.layers.1" in shown


MEMORY = """
import re, sys, torch
from t2kernels.store import decompose_checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)
decompose_checkpoint(sys.argv[1], sys.argv[3], rank=2, device="cpu")
before = peak()
decompose_checkpoint(sys.argv[2], sys.argv[4], rank=2, device="cpu")
sys.stdout.write(str(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_that_of_one_weight(tmp_path: Path) -> None:
    """A checkpoint of 32 weights of 8 MiB may take hardly more memory than one of three."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.mlp.up_proj.weight": torch.randn(32768, 64, generator=g) for i in range(32)
    }
    few = _folder(tmp_path / "few", dict(list(tensors.items())[:3]))
    many = _folder(tmp_path / "many", tensors)
    arguments = [str(p) for p in (few, many, tmp_path / "a", tmp_path / "b")]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True
    )
    # Keeping the weights would take 232 MiB more, their factors besides. The C library may open an
    # arena of 64 MiB of its own when the machine is busy.
    assert float(run.stdout) < 128, f"256 MiB of weights took {run.stdout} MiB more than 24 MiB"


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the small real model is not at {STORIES}")
def test_a_real_model(tmp_path: Path) -> None:
    store = decompose_checkpoint(STORIES, tmp_path / "out", device="cpu")
    assert len(store) == 35
    checkpoint, _ = Checkpoint(STORIES).weights("all-linear", None)
    for weight in checkpoint:
        reached = accuracy(weight.read(), store.load(weight.name))
        assert reached.relative_error <= 5e-6
        assert max(reached.orthogonality_u, reached.orthogonality_v) <= 1e-5
        store.verify(weight.name, weight.read().bfloat16())
