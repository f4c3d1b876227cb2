"""Files: atomic writes under errors and full disks, strict reads, names without tricks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2kernels.files import (
    CorruptFileError,
    SaveError,
    atomic_path,
    check_name,
    file_sha256,
    folder_lock,
    load_tensors,
    read_header,
    read_json,
    remove_temporaries,
    save_tensors,
    write_json,
)

META = {"kind": "t2k-test", "version": 1, "names": ["b", "a"]}


def _tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.mark.parametrize("name", ["a", "math", "model.layers.0.q_proj", "A-b_9.x", "_x", "0"])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-flag",
        "a/b",
        "a\\b",
        "../a",
        "a..b",
        "a\0",
        "ä",
        "a b",
        "a\n",
        "a.",
    ]
    + ["con", "NUL.txt", "com1", "x" * 201, "C:", "a:b", "~", "$HOME"],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="expert name"):
        check_name(name, "expert name")


def test_name_type() -> None:
    with pytest.raises(TypeError, match="must be a str, got int"):
        check_name(3)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.text(max_size=30))
def test_a_good_name_stays_in_its_folder(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    assert Path("/base", name).resolve().parent == Path("/base") and "\0" not in name


def test_round_trip_and_bytes(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", _tensors(), META)
    got, meta = load_tensors(tmp_path / "x.safetensors", kind="t2k-test", version=1)
    assert meta == META
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in _tensors().items())
    reordered = dict(reversed(_tensors().items()))
    save_tensors(tmp_path / "y.safetensors", reordered, dict(reversed(META.items())))
    assert file_sha256(tmp_path / "x.safetensors") == file_sha256(tmp_path / "y.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "y.safetensors"]
    assert read_header(tmp_path / "x.safetensors").tensors["a"] == ("F32", (2, 3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.int8], ids=str)
def test_checksums_of_every_kind_of_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"m": torch.rand(3, 5), "one": torch.ones(()), "none": torch.zeros(0, 4)}
    tensors = {name: t.to(dtype) for name, t in tensors.items()} | {"wide": torch.rand(7)}
    for facts in (META | {"nested": {"1": 0.1, "b": [None, "ü"]}}, None):
        save_tensors(path, tensors, facts)
        got, meta = load_tensors(path, sha256=file_sha256(path))
        assert meta == (facts or {}) and got.keys() == tensors.keys()
        assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in tensors.items())
    with pytest.raises(CorruptFileError, match=r"x\.safetensors is damaged: its sha256"):
        load_tensors(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="metadata must not have a key 'digest'"):
        save_tensors(path, tensors, META | {"digest": "mine"})


def test_keys_that_are_numbers_do_not_spoil_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, _tensors(), META | {"steps": {2: "a", 10: "b"}})
    assert load_tensors(path)[1]["steps"] == {"2": "a", "10": "b"}


def test_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    save_tensors(tmp_path / "x.safetensors", {"t": base.t(), "a": base, "again": base})
    got, meta = load_tensors(tmp_path / "x.safetensors")
    assert meta == {} and torch.equal(got["t"], base.t()) and torch.equal(got["again"], base)


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, _tensors())
    got, _ = load_tensors(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(got["a"], _tensors()["a"])


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, _tensors(), META)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFileError, match=r"x\.safetensors is (truncated|not a safetensors)"):
        load_tensors(path)


def test_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, _tensors(), META)
    good = path.read_bytes()
    cases = {
        "followed by foreign bytes": good + b"more",
        "header is damaged": good[:8] + b"X" + good[9:],
        "not a safetensors file": b"\x80\x04pickle" * 40,
        "has 24 bytes for shape": good.replace(b'"shape":[2,3]', b'"shape":[2,9]'),
        "damaged metadata": good.replace(b'\\"kind\\"', b'\\"kind=='),
    }
    for message, data in cases.items():
        assert data != good
        path.write_bytes(data)
        with pytest.raises(CorruptFileError, match=message):
            load_tensors(path)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_clear_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(data)
        with pytest.raises(CorruptFileError):
            read_header(path)


def test_wrong_kind_version_contents(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, _tensors(), META)
    with pytest.raises(CorruptFileError, match="kind 't2k-expert', got 't2k-test'"):
        load_tensors(path, kind="t2k-expert")
    with pytest.raises(CorruptFileError, match="version 2, got 1"):
        load_tensors(path, version=2)
    with pytest.raises(CorruptFileError, match=r"must hold the tensors \['a'\]"):
        load_tensors(path, expect={"a": None})
    with pytest.raises(CorruptFileError, match=r"'b' must have shape \(5,\), got \(4,\)"):
        load_tensors(path, expect={"a": (2, 3), "b": (5,)})
    save_tensors(path, _tensors())
    with pytest.raises(CorruptFileError, match="got None"):
        load_tensors(path, kind="t2k-test")


def test_missing(tmp_path: Path) -> None:
    for reader in (load_tensors, read_header, read_json, file_sha256):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            reader(tmp_path / "no")
        with pytest.raises(IsADirectoryError, match="is a folder"):
            reader(tmp_path)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"kind": "k", "version": 1, "σ": [1.5]})
    assert read_json(path, kind="k", version=1)["σ"] == [1.5]
    with pytest.raises(CorruptFileError, match="kind"):
        read_json(path, kind="other")
    for text in ('{"a": ', "[1]", "\xff", ""):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(CorruptFileError, match=r"x\.json"):
            read_json(path)
    path.write_text("old")
    with pytest.raises(ValueError, match="as JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError, match="as JSON"):
        write_json(path, {"a": object()})
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError("boom")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_full_disk_at_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(SaveError, match=r"x\.json.*No space left.*Nothing was changed"):
        write_json(path, {"a": 1})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="limits of file size are POSIX")
@pytest.mark.parametrize("what", ["tensors", "json"])
def test_full_disk_while_writing(tmp_path: Path, what: str) -> None:
    """The kernel itself refuses to write past 8 KiB, as a full disk would."""
    path = tmp_path / "x"
    path.write_text("old")
    script = f"""
import resource, sys, torch
from t2kernels.files import SaveError, save_tensors, write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    if {what!r} == "json":
        write_json(sys.argv[1], {{"a": "x" * 100_000}})
    else:
        save_tensors(sys.argv[1], {{"a": torch.zeros(100_000)}})
except SaveError as error:
    sys.stdout.write(str(error))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert "Nothing was changed" in run.stdout and str(path) in run.stdout, run.stderr
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="does not exist"):
        write_json(tmp_path / "no" / "x.json", {})
    with pytest.raises(SaveError, match="is a folder"):
        write_json(tmp_path, {})
    with pytest.raises(TypeError, match="'a' must be a tensor"):
        save_tensors(tmp_path / "x", {"a": [1.0]})  # type: ignore[dict-item]


def test_temporaries_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".x.json.12ab34cd.t2tmp").write_text("half")
    (tmp_path / ".other").write_text("theirs")
    assert remove_temporaries(tmp_path) == 1
    assert [p.name for p in tmp_path.iterdir()] == [".other"]


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX only")
def test_lock(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path),
        pytest.raises(RuntimeError, match="another process"),
        folder_lock(tmp_path),
    ):
        pass
    with folder_lock(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_foreign_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(_tensors(), str(tmp_path / "x.safetensors"), metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.strings == {"format": "pt"} and header.metadata == {}
    assert json.dumps(sorted(header.tensors)) == '["a", "b"]'


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_modes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    before = os.umask(0o022)
    try:
        save_tensors(path, _tensors(), META)
        write_json(tmp_path / "a.json", {})
        assert path.stat().st_mode & 0o777 == 0o644
        assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
        path.chmod(0o640)
        save_tensors(path, _tensors(), META)
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "real.json", tmp_path / "link.json"
    target.write_text("{}")
    link.symlink_to(Path("store") / "real.json")
    write_json(link, {"new": 1})
    assert link.is_symlink() and read_json(target) == {"new": 1}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["link.json", "real.json", "store"]
    target.unlink()
    with pytest.raises(SaveError, match="link"):
        write_json(link, {})


@pytest.mark.skipif(os.name != "posix", reason="pipes have no path elsewhere")
def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(SaveError, match="regular file"):
            write_json(path, {})
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_endless_shape(tmp_path: Path) -> None:
    raw = b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(CorruptFileError, match="damaged"):
        read_header(path)


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_metadata_that_json_cannot_hold(tmp_path: Path, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match="metadata must be .* Replace NaN"):
        save_tensors(tmp_path / "a.safetensors", _tensors(), {**META, "loss": value})
    assert not list(tmp_path.iterdir())
