"""One graded answer: a supervisor, and below it the process of the tests and that of the answer.

    parent ── supervisor ── tests (first of its process namespace) ── answer
              limits, kills  alone knows the expected values           executes the code

Reads three frames from its input (settings, code, tests), writes one line of JSON to its output.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

# All of it now: after a change of user or of the files in view nothing may be found any more.
from t2runtime.isolate import answer, kernel, tests, wire

#: Seconds between two looks at what the processes use.
_TICK = 0.02
_KIND_USER_BASE = 2_000_000_000


def main() -> NoReturn:
    """The supervisor."""
    settings = json.loads(wire.receive_bytes(0))
    outcome: dict[str, Any]
    try:
        outcome = _supervise(settings)
    except (OSError, ValueError) as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(outcome).encode() + b"\n")
    os._exit(0)


def _supervise(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["own_user"]:
        _become_nobody_else(settings["folder"])
    kernel.die_with_parent(settings["parent"])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the kernel takes this before anything else
    if settings["level"] == "namespaces":
        kernel.new_namespaces()
    else:
        kernel.adopt_orphans()
    settings["most_tasks"] = _most_tasks(settings)
    verdicts, verdict = os.pipe()
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(verdicts)
        _run_tests(settings, supervisor, verdict)
    os.close(verdict)
    os.close(0)
    try:
        return _watch(child, verdicts, settings)
    finally:
        _kill(child, settings["level"])


def _become_nobody_else(folder: str) -> None:
    """From root to a user that owns nothing but the folder, so that limits on processes hold."""
    uid = _KIND_USER_BASE + os.getpid() % 100_000_000
    os.chown(folder, uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    kernel.set_dumpable(True)  # the change of user took it, and with it /proc/self


def _most_tasks(settings: dict[str, Any]) -> int | None:
    """RLIMIT_NPROC: counted per user, since Linux 5.14 per user and namespace; not for root."""
    most: int = settings["processes"]
    if os.getuid() == 0:
        return None
    if settings["own_user"]:
        return most + 1
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if settings["level"] == "namespaces":
        return most if release >= (5, 14) else None
    others = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                others += len(os.listdir(f"/proc/{entry.name}/task"))
    return others + most + 16


def _run_tests(settings: dict[str, Any], supervisor: int, verdict: int) -> NoReturn:
    """The process of the tests: shuts itself in, starts the answer, runs the tests, says once what
    came of it.
    """
    said: dict[str, Any]
    try:
        kernel.die_with_parent(supervisor)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # the first of a namespace is then immune
        _shut_in(settings)
        said = _ask_and_test(settings, verdict)
    except BaseException as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(OSError):
        os.write(verdict, json.dumps(said).encode() + b"\n")
    os._exit(0)


def _shut_in(settings: dict[str, Any]) -> None:
    folder, level = settings["folder"], settings["level"]
    if level == "namespaces":
        kernel.read_only_files(folder, settings["file_bytes"])
    elif level == "landlock":
        kernel.write_only_below(folder)
    os.chdir(folder)
    limits = {
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_CPU: int(settings["seconds"]) + 1,
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_NOFILE: settings["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    if level != "none":
        kernel.drop_capabilities()
        kernel.forbid_system_calls(also_outside=level != "namespaces")
    kernel.set_dumpable(False)  # the answer cannot look into this process


def _ask_and_test(settings: dict[str, Any], verdict: int) -> dict[str, Any]:
    code = wire.receive_bytes(0, 1 << 26).decode()
    sys.path += settings["path"]  # the packages of this interpreter, last
    requests, replies = os.pipe(), os.pipe()
    parent = os.getpid()
    if os.fork() == 0:
        try:
            kernel.die_with_parent(parent)
            _run_answer(settings, code, requests[0], replies[1])
        finally:
            os._exit(1)
    os.close(requests[0])
    os.close(replies[1])
    # Only now, so that the answer's copy of this process has never held them.
    programs = json.loads(wire.receive_bytes(0, 1 << 28))
    reason = tests.run(tests.Channel(requests[1], replies[0]), programs)
    return {"right": reason is None, "reason": reason or ""}


def _run_answer(settings: dict[str, Any], code: str, requests: int, replies: int) -> NoReturn:
    """The process of the answer: nothing open but its two pipes."""
    nowhere = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    keep = sorted((requests, replies))
    os.closerange(3, keep[0])
    os.closerange(keep[0] + 1, keep[1])
    os.closerange(keep[1] + 1, 1024)
    if settings["most_tasks"] is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (settings["most_tasks"],) * 2)
    answer.Answer(requests, replies).run(code)


def _watch(child: int, verdicts: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Wait for the verdict, or for the first limit that is passed."""
    deadline = time.monotonic() + settings["seconds"]
    said = b""
    while True:
        if select.select([verdicts], [], [], _TICK)[0]:
            part = os.read(verdicts, 1 << 16)
            said += part
            if not part or said.endswith(b"\n"):
                break
        excess = _excess(child, deadline, settings)
        if excess is not None:
            return {"right": False, "reason": excess}
    if not said.endswith(b"\n"):
        return {"right": False, "reason": "the process of the tests was killed"}
    outcome: dict[str, Any] = json.loads(said)
    return outcome


def _excess(child: int, deadline: float, settings: dict[str, Any]) -> str | None:
    """The limit that is passed, if one is."""
    if time.monotonic() > deadline:
        return f"more than {settings['seconds']} seconds"
    inside = [child, *_descendants(child, settings["processes"])]
    if settings["level"] != "namespaces":
        inside = _descendants(os.getpid(), settings["processes"])
    if len(inside) > settings["processes"]:
        return f"more than {settings['processes']} processes"
    if sum(map(_resident, inside)) > settings["memory_bytes"]:
        return f"more than {settings['memory_bytes']} bytes of memory"
    if settings["level"] != "namespaces" and _size(settings["folder"]) > settings["file_bytes"]:
        return f"more than {settings['file_bytes']} bytes of files"
    return None


def _descendants(pid: int, enough: int | None = None) -> list[int]:
    """Processes below `pid`; the search ends where more than `enough` are found."""
    found: list[int] = []
    queue = [pid]
    while queue:
        parent = queue.pop()
        try:
            threads = os.listdir(f"/proc/{parent}/task")
        except OSError:
            continue
        for thread in threads:
            with contextlib.suppress(OSError), open(f"/proc/{parent}/task/{thread}/children") as f:
                children = [int(word) for word in f.read().split()]
                found += children
                queue += children
        if enough is not None and len(found) > enough:
            break
    return found


def _resident(pid: int) -> int:
    """Bytes of memory that a process occupies; what it shares counts for each."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _size(folder: str) -> int:
    """Bytes of the files below a folder; a kilobyte more for every entry."""
    total = 0
    with contextlib.suppress(OSError):
        for path, folders, files in os.walk(folder):
            total += 1024 * (len(folders) + len(files))
            for name in files:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(path, name)).st_size
    return total


def _kill(child: int, level: str) -> None:
    """End everything below. In a process namespace the first takes all others with it; else the
    descendants are killed until there are none, orphans being this process's children.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    if level == "namespaces":
        os.waitpid(child, 0)
        return
    while True:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)
