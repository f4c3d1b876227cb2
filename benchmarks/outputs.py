"""What the calls of ``gpu.py`` leave in their folder: results, pictures of them, one archive.

A call may end with more files than can be carried away, so all but the summary go into
results.tar.gz. What an earlier call put there is kept, and replaced only by a file of its name.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ARCHIVE = "results.tar.gz"
SUMMARY = "summary.json"
MAX_FILES = 8
PICTURE_SECONDS = 60
_PLOT = Path(__file__).resolve().parent / "plot.py"


def _unpack(folder: Path, into: Path, suffix: str = "") -> None:
    """The archive's files that have no newer namesake in ``folder``."""
    if not (folder / ARCHIVE).is_file():
        return
    with tarfile.open(folder / ARCHIVE) as archive:
        for member in archive:
            name = member.name
            plain = member.isfile() and name == Path(name).name and name.endswith(suffix)
            source = archive.extractfile(member)
            if plain and source is not None and not (folder / name).exists():
                (into / name).write_bytes(source.read())
                os.utime(into / name, (member.mtime, member.mtime))


@contextmanager
def result_files(folder: Path) -> Iterator[list[Path]]:
    """Every JSON file of all calls so far, loose or packed; paths that last inside only."""
    with tempfile.TemporaryDirectory() as temporary:
        _unpack(folder, Path(temporary), ".json")
        packed = Path(temporary).glob("*.json")
        yield sorted([*folder.glob("*.json"), *packed], key=lambda path: path.name)


def pack(folder: Path) -> None:
    """Put all but the summary into one file where there are more than may travel back."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if len(found) <= MAX_FILES:
        return
    part = folder / f"{ARCHIVE}.part"
    rest = [path for path in found if path.name not in (SUMMARY, ARCHIVE, part.name)]
    with tempfile.TemporaryDirectory() as temporary:
        _unpack(folder, Path(temporary))
        earlier = list(Path(temporary).iterdir())
        with tarfile.open(part, "w:gz") as archive:
            for path in sorted([*rest, *earlier], key=lambda path: path.name):
                archive.add(path, arcname=path.name)
    os.replace(part, folder / ARCHIVE)
    for path in rest:
        path.unlink()
    print(f"gpu: {len(rest) + len(earlier)} files are in {folder / ARCHIVE}")


def draw(folder: Path, env: dict[str, str]) -> None:
    """A PNG beside every loose result that ``plot.py`` can draw and that has none of its age."""
    if importlib.util.find_spec("matplotlib") is None:
        print("pictures: none, matplotlib is missing here; later: python benchmarks/plot.py")
        return
    for path in sorted(folder.glob("*.json")):
        png = path.with_suffix(".png")
        if path.name == SUMMARY or (png.exists() and png.stat().st_mtime >= path.stat().st_mtime):
            continue
        command = [sys.executable, str(_PLOT), str(path), str(png)]
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=PICTURE_SECONDS
            )
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        except subprocess.TimeoutExpired:
            done, said = None, f"not drawn within {PICTURE_SECONDS} s"
        print(f"picture: {png.name if done and not done.returncode else f'{path.name}: {said}'}")
