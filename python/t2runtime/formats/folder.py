"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from t2kernels.files import SaveError, folder_lock

_TEMPORARY = ".t2tmp"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``path``; on success it is flushed and renamed to ``path``.

    On any error it is removed; an ``OSError`` (a full disk) or a safetensors error becomes a
    ``SaveError``. What a killed writer of the same folder left behind is removed first.

    Raises ValueError where ``path`` holds something already.
    """
    check_free(path)
    path = Path(os.path.abspath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
        temporary.mkdir()
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}. Choose another place.") from error
    try:
        # Held while it is written: who finds the folder unlocked knows that its writer is gone.
        with folder_lock(temporary):
            yield temporary
            # Some writers make files for their owner alone; these obey the umask, as folders do.
            mode = temporary.stat().st_mode & 0o666
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                file.chmod(mode)
                _flush(file)
            os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(
            f"cannot write {path}: {error}. Nothing was left there; check the free space and the "
            "rights of its folder."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(path: Path) -> None:
    """Raises ValueError unless ``path`` is free for a new folder: absent, or an empty folder."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"--out {path} exists and is no folder. Choose another name.")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"--out {path} is a folder that is not empty. Choose another, or empty it."
        )


def _remove_stale(path: Path) -> None:
    for left in path.parent.glob(f".{path.name}.*{_TEMPORARY}"):
        try:
            with folder_lock(left):
                shutil.rmtree(left, ignore_errors=True)
        except (OSError, RuntimeError):
            continue  # its writer is at work


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # a folder on Windows
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
