"""Writing whole or not at all: a temporary file beside the target, flushed, then renamed."""

from __future__ import annotations

import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["SaveError", "atomic_path", "folder_lock", "remove_temporaries"]

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]

_TEMPORARY = ".t2tmp"


class SaveError(RuntimeError):
    """A file could not be written; what was at its path before is still there."""


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is flushed and replaces ``path``.

    A symlink is followed: its target is replaced. The file keeps the mode of the one it replaces;
    a new one has what the umask allows. Folders, devices and pipes are refused.
    On any error the temporary file is removed and ``path`` keeps what it held; an ``OSError`` or
    a safetensors error becomes a ``SaveError``.
    """
    path = Path(path)
    try:
        path = Path(os.path.realpath(path, strict=True)) if path.is_symlink() else path
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}. Does the link lead anywhere?") from error
    if path.is_dir():
        raise SaveError(f"cannot write {path}: it is a folder. Give the path of a file.")
    if mode is not None and not path.is_file():
        raise SaveError(
            f"cannot write {path}: it is a device or a pipe. Give the path of a regular file."
        )
    if not path.parent.is_dir():
        raise SaveError(f"cannot write {path}: the folder {path.parent} does not exist. Create it.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        # Made here, by open: other writers may give it 0600, whatever the umask.
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode) if mode is None else mode
        yield temporary
        _flush(temporary)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        raise SaveError(
            f"cannot write {path}: {error}. Nothing was changed there; "
            "check the free space and the rights of its folder."
        ) from error
    except BaseException:
        _remove(temporary)
        raise
    _flush_folder(path.parent)


def remove_temporaries(folder: StrPath) -> int:
    """Deletes what a killed writer left half-written in ``folder``; returns how many files."""
    found = [p for p in Path(folder).glob(f".*{_TEMPORARY}") if p.is_file()]
    for path in found:
        _remove(path)
    return len(found)


@contextmanager
def folder_lock(folder: StrPath) -> Iterator[None]:
    """One writer in ``folder`` at a time; a second one gets a RuntimeError at once.

    The lock is the operating system's and ends with its process, however that ends. Where there
    is no such lock (Windows, some network file systems) this does nothing.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"{folder} is being written by another process. Wait for it or use another folder."
            ) from error
        except OSError:
            logger.debug("no lock on %s: its file system has none", folder)
        yield
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    # The rename itself must reach the disk too; where folders cannot be opened (Windows, some
    # network file systems) the file is still whole, only perhaps the old one after a power cut.
    try:
        _flush(folder)
    except OSError:
        return


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        return
