"""Grading code by running it: each answer in processes of its own, shut in as far as the kernel
permits, and its verdict given by a process that never runs it.

Three processes per answer: a supervisor that holds the limits; one that runs the tests; one that
executes the answer's code and is asked, over a pipe, for what the tests call. Tests and expected
values never enter the latter, so leaving early, patching `builtins`, comparing equal to everything
or printing marks of success gain nothing: only right values do. `isolation()` says which level this
machine gives:

namespaces  (user, process, network, IPC and mount namespaces; Linux 5.12) No network. Nothing
            outside can be seen or signalled, everything started dies with the first process. All
            files are read-only but one temporary folder in memory, of bounded size.
landlock    (Linux 6.2, where namespaces are refused, as in most containers) Landlock: files are
            written below the temporary folder only. Signals and changes of mode, owner, times and
            attributes are refused. Other processes can be seen. What the program started is found
            by descent and killed, except where the calling process is itself killed: a program that
            has detached then ends with its processor time, or not at all if it sleeps.
none        Neither is there: `run` refuses. With `unsafe=True` only the limits hold, on time,
            memory, processes, files; the program can reach the network and write where its user
            can.

In both of the first two a system-call filter (x86-64 and AArch64; elsewhere the level is "none")
refuses sockets of every kind, new namespaces and mounts, tracing, shared memory that no limit
counts and kernel interfaces that go round the filter; capabilities are dropped.

What no level does: files that the user may read can be read by the program (nothing can leave but
right or wrong, yet a data file with the answers would be within reach). A fault of the kernel is
not held. Numbers of processes and memory as a sum are watched every 20 ms, so that they can be
passed for that long; for single processes the kernel holds limits besides. Started by root,
programs run as an unused user where the interpreter can be read by all, else as root without
capabilities.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import t2runtime

logger = logging.getLogger(__name__)
_ROOT = Path(t2runtime.__file__).parents[1]
_START = (
    "import sys; sys.path.pop(0); sys.path.append({root!r}); "
    "from t2runtime.isolate.inside import main; main()"
)
#: Seconds that starting and ending may take beyond the program's own, on a busy machine.
_GRACE = 30.0


class SandboxError(RuntimeError):
    """The sandbox itself failed; nothing is known about the program."""


@dataclass(frozen=True)
class Limits:
    """What one program may use: wall-clock seconds; bytes of memory, of each process and of all
    together; bytes of files; open files; processes and threads, the two of the sandbox included.
    """

    seconds: float = 10.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    open_files: int = 64
    processes: int = 16

    def __post_init__(self) -> None:
        least = {"seconds": 0.1, "memory_bytes": 64 << 20, "file_bytes": 4096,
                 "open_files": 16, "processes": 3}  # fmt: skip
        for name, value in asdict(self).items():
            if not value >= least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, got {value}")


@dataclass(frozen=True)
class Verdict:
    """Whether all tests passed, and if not, what stopped them."""

    right: bool
    reason: str = ""


@dataclass(frozen=True)
class Isolation:
    """What this machine gives: "namespaces", "landlock" or "none"; whether programs run as a user
    of their own; why better levels are not to be had.
    """

    level: str
    own_user: bool
    refused: tuple[str, ...] = ()


@functools.lru_cache(maxsize=1)
def isolation() -> Isolation:
    """The best level that works here, found by trying once per process."""
    refused: list[str] = []
    if sys.platform != "linux":
        return Isolation("none", False, (f"{sys.platform}: only Linux is supported",))
    users = [True, False] if os.geteuid() == 0 and _readable_by_all() else [False]
    for level in ("namespaces", "landlock"):
        for own_user in users:
            try:
                with _folder() as folder:
                    verdict = _run_one(
                        "def f():\n    return 1", ["assert f() == 1"], Limits(seconds=60),
                        Isolation(level, own_user), folder,
                    )  # fmt: skip
                if verdict.right:
                    return Isolation(level, own_user, tuple(refused))
                refused.append(f"{level}: {verdict.reason}")
            except SandboxError as error:
                refused.append(f"{level}: {error}")
    return Isolation("none", False, tuple(refused))


def run(
    code: str, tests: Sequence[str], limits: Limits | None = None, *, unsafe: bool = False
) -> Verdict:
    """Execute `code`, then the test programs against the names that it defines.

    The tests pass when all run to their end without an exception. Raises ValueError without
    tests; RuntimeError where the machine cannot isolate (`unsafe` runs all the same) or the sandbox
    itself fails.
    """
    tests = list(tests)
    if not tests:
        raise ValueError("tests must hold at least one program, got none")
    level = isolation()
    if level.level == "none" and not (unsafe and sys.platform == "linux"):
        raise SandboxError(
            "programs cannot be isolated on this machine ("
            f"{'; '.join(isolation().refused)}). Run on Linux 5.12 or later that permits user "
            "namespaces, or 6.2 or later with Landlock; unsafe=True runs them on Linux with limits "
            "only, able to write files and use the network"
        )
    with _folder() as folder:
        return _run_one(code, tests, limits or Limits(), level, folder)


def run_all(
    programs: Sequence[tuple[str, Sequence[str]]],
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    total_seconds: float | None = None,
    unsafe: bool = False,
) -> list[Verdict]:
    """`run` for many (code, tests), `workers` at a time (default: the processors of this process).

    Programs whose turn has not come after `total_seconds` are wrong, with a warning in the log.
    """
    count = workers or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    deadline = None if total_seconds is None else time.monotonic() + total_seconds

    def one(program: tuple[str, Sequence[str]]) -> Verdict:
        if deadline is not None and time.monotonic() > deadline:
            return Verdict(False, f"not run within {total_seconds} seconds")
        return run(program[0], program[1], limits, unsafe=unsafe)

    isolation()
    with ThreadPoolExecutor(max_workers=max(1, min(count, len(programs)))) as pool:
        verdicts = list(pool.map(one, programs))
    late = sum(verdict.reason.startswith("not run within") for verdict in verdicts)
    if late:
        logger.warning(
            "%d of %d programs were not run within %s seconds and count as wrong",
            late, len(programs), total_seconds,
        )  # fmt: skip
    return verdicts


def _run_one(
    code: str, tests: Sequence[str], limits: Limits, how: Isolation, folder: str
) -> Verdict:
    settings = {
        **asdict(limits), "level": how.level, "own_user": how.own_user, "folder": folder,
        "parent": os.getpid(), "path": [path for path in sys.path if os.path.isdir(path)],
    }  # fmt: skip
    # Text that is not Unicode is no program either.
    frames = [json.dumps(settings), code, json.dumps(list(tests))]
    data = b"".join(_frame(frame.encode("utf-8", "replace")) for frame in frames)
    environment = {
        "PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    # The folder at the end tells the processes of one run from those of another.
    command = [sys.executable, "-s", "-S", "-B", "-c", _START.format(root=str(_ROOT)), folder]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment, cwd=folder, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise SandboxError(f"no supervisor could be started: {error}") from error
    try:
        out, err = process.communicate(data, timeout=limits.seconds + _GRACE)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"more than {limits.seconds} seconds")
    finally:
        process.kill()
        process.communicate()
    try:
        outcome = json.loads(out)
    except ValueError:
        said = err.decode(errors="replace").strip().splitlines()[-1:]
        raise SandboxError(
            f"the supervisor ended with status {process.returncode}: {''.join(said)}"
        ) from None
    if "error" in outcome:
        raise SandboxError(outcome["error"])
    return Verdict(outcome["right"], outcome["reason"])


def _frame(data: bytes) -> bytes:
    return struct.pack(">Q", len(data)) + data


@contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder; removed with what programs may have put there."""
    path = os.path.realpath(tempfile.mkdtemp(prefix="t2-answer-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if os.path.exists(path):
            logger.warning("could not remove the temporary folder %s", path)


def _readable_by_all() -> bool:
    """Whether any user can run this interpreter and read its library and this package."""
    for start in (sys.executable, os.__file__, json.__file__, __file__, tempfile.gettempdir()):
        for path in (start, os.path.realpath(start)):
            place = Path(path).absolute()
            try:
                if not os.stat(place).st_mode & 0o004:
                    return False
                if any(not os.stat(folder).st_mode & 0o001 for folder in place.parents):
                    return False
            except OSError:
                return False
    return True
