"""Programs that misbehave come back as wrong, and nothing outside has changed."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from t2runtime import sandbox
from t2runtime.sandbox import Isolation, Limits, Verdict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")
#: On a busy machine everything takes long; what is endless is stopped by this.
PATIENT = Limits(seconds=60)
RIGHT = "\ndef f(x):\n    return x + 1\n"
TESTS = ["assert f(1) == 2", "assert f(-1) == 0"]


@functools.cache
def refused(level: str, own_user: bool) -> str:
    """Why a level cannot be had here, "" if it can."""
    try:
        with sandbox._folder() as folder:
            how = Isolation(level, own_user)
            verdict = sandbox._run_one(RIGHT, TESTS, PATIENT, how, folder)
    except sandbox.SandboxError as error:
        return str(error)
    return verdict.reason


def levels() -> list[tuple[str, bool]]:
    """Those of root's own users only where they can be had at all."""
    own = sys.platform == "linux" and os.geteuid() == 0 and sandbox._readable_by_all()
    names = ("namespaces", "landlock")
    return [(name, user) for user in (False, *[True] * own) for name in names]


@pytest.fixture(
    params=levels(),
    ids=lambda how: how[0] + (", own user" if how[1] else ""),
)
def how(request: pytest.FixtureRequest) -> Isolation:
    reason = refused(*request.param)
    if reason:
        pytest.skip(f"{request.param[0]}: {reason}")
    return Isolation(*request.param)


def processes_in(folder: str) -> list[str]:
    """Processes of the run in `folder`; all carry it on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def run(how: Isolation, code: str, limits: Limits = PATIENT, tests: list[str] = TESTS) -> Verdict:
    """Run at one level; nothing that it started may be left."""
    with sandbox._folder() as folder:
        verdict = sandbox._run_one(code, tests, limits, how, folder)
        assert not processes_in(folder)
    assert not os.path.exists(folder)
    return verdict


def test_right_and_wrong(how: Isolation) -> None:
    assert run(how, RIGHT) == Verdict(True)
    assert run(how, "def f(x): return 2") == Verdict(False, "test 2: AssertionError: ")
    assert "IndentationError" in run(how, "def f(x):\nreturn").reason
    assert "NameError" in run(how, "def g(x): return 2").reason


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "def f(x):\n    import os; os._exit(0)",
        "print('1 passed'); print('{\"right\": true}')",
        "import os\nfor d in range(64):\n"
        "  try: os.write(d, b'{\"right\": true, \"reason\": 1}\\n')\n"
        "  except OSError: pass",
        "import builtins\nbuiltins.AssertionError = builtins.Exception = None\ndef f(x): return 0",
        "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = print\ndef f(x): return 0",
        "class Same:\n  def __eq__(self, o): return True\ndef f(x): return Same()",
        "class Same(int):\n  def __eq__(self, o): return True\n  __hash__ = None\n"
        "def f(x): return Same(7)",
        "import sys\ndef f(x):\n  for m in list(sys.modules.values()):\n"
        "    for n in ('run', 'Channel'):\n      if hasattr(m, n): setattr(m, n, lambda *a: None)\n"
        "  return 0",
    ],
    ids=["exit", "_exit", "SystemExit", "late exit", "markers", "descriptors", "builtins",
         "trace", "equal", "equal int", "modules"],
)  # fmt: skip
def test_pretending(how: Isolation, code: str) -> None:
    assert not run(how, code).right


def test_membership_is_not_decided_by_the_answer(how: Isolation) -> None:
    code = "class All:\n  def __contains__(self, o): return True\ndef f(x): return All()"
    assert not run(how, code, tests=["assert 3 in f(1)"]).right


def test_what_is_expected_is_nowhere_to_be_found(how: Isolation) -> None:
    code = """
def f(x):
    import gc, sys
    seen = [repr(o) for o in gc.get_objects() if isinstance(o, (str, list, tuple, dict))]
    frame = sys._getframe()
    while frame:
        seen.append(repr(frame.f_locals))
        frame = frame.f_back
    for text in seen:
        place = text.find("need" + "le")
        if place >= 0:
            return text[place:place + 10]
    return "nothing"
"""
    verdict = run(how, code, tests=["assert f(1) == 'needle-417'", "assert 0"])
    assert verdict.reason.startswith("test 1: AssertionError")
    code = "import os\ndef f(x): return open(f'/proc/{os.getppid()}/mem', 'rb').read(1)"
    reason = run(how, code).reason
    assert "Error" in reason and "AssertionError" not in reason


def test_an_endless_loop(how: Isolation) -> None:
    start = time.monotonic()
    verdict = run(how, "while True: pass", Limits(seconds=1))
    assert verdict.reason == "more than 1 seconds" and time.monotonic() - start < 31
    code = "def f(x):\n  try:\n    while True: pass\n  except BaseException: return f(x)"
    assert not run(how, code, Limits(seconds=1)).right


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        "import threading, time\nwhile True:\n"
        "  threading.Thread(target=time.sleep, args=(99,)).start()",
    ],
    ids=["fork", "stubborn fork", "threads"],
)
def test_a_bomb(how: Isolation, code: str) -> None:
    assert not run(how, code, Limits(seconds=3, processes=8)).right


def test_what_was_left_running_ends(how: Isolation) -> None:
    """Forked twice, in a session of its own, deaf to signals, while the answer itself is right."""
    code = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (1, 2, 3, 15):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(1000)
    os._exit(0)
"""
    assert run(how, code + RIGHT).right


def test_ten_gigabytes(how: Isolation) -> None:
    assert "MemoryError" in run(how, "x = bytearray(10 << 30)").reason
    assert not run(how, "x = []\nwhile True: x.append(bytearray(1 << 20))").right


def test_memory_of_all_together(how: Isolation) -> None:
    code = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        break
block = bytearray(os.urandom(1) * (60 << 20))
time.sleep(1000)
"""
    verdict = run(how, code, Limits(seconds=60, memory_bytes=160 << 20))
    assert "bytes of memory" in verdict.reason


def test_nothing_outside_is_written(how: Isolation, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    kept.chmod(0o666)
    before = kept.stat()
    for deed in (
        f"open({str(kept)!r}, 'w')",
        f"open({str(kept)!r}, 'a').write('more')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.truncate({str(kept)!r}, 0)",
        f"import os; os.chmod({str(kept)!r}, 0)",
        f"import os; os.utime({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, {str(tmp_path / 'moved')!r})",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
        f"import os; os.link({str(kept)!r}, 'linked'); open('linked', 'w')",
        f"import os; os.symlink({str(kept)!r}, 'linked'); open('linked', 'w')",
    ):
        verdict = run(how, deed + RIGHT)
        assert not verdict.right and "loading" in verdict.reason, deed
    after = kept.stat()
    assert kept.read_text() == "as it was" and list(tmp_path.iterdir()) == [kept]
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_its_own_folder_is_there_and_bounded(how: Isolation) -> None:
    code = "open('mine', 'w').write('1')\nassert open('mine').read() == '1'\n"
    assert run(how, code + "open('/dev/null', 'w').write('x')" + RIGHT).right
    code = (
        "for i in range(64): open(str(i), 'wb').write(bytes(1 << 20))\nimport time; time.sleep(9)"
    )
    verdict = run(how, code + RIGHT, Limits(seconds=60, file_bytes=8 << 20))
    assert not verdict.right and ("space" in verdict.reason or "files" in verdict.reason)


def test_attributes_of_files_stay(how: Isolation, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("x")
    code = f"""
import fcntl
def f(x):
    with open({str(kept)!r}) as file:
        fcntl.ioctl(file, 0x40086602, b"\\x80" + bytes(7))
"""
    reason = run(how, code, tests=["f(1)"]).reason
    assert "PermissionError" in reason or "OSError" in reason


def test_others_cannot_be_signalled(how: Isolation) -> None:
    for target in ("os.getppid()", "1", "-1", "0", str(os.getpid())):
        code = f"import os\nos.kill({target}, 9)"
        assert not run(how, code + RIGHT).right, target


def test_no_network(how: Isolation, tmp_path: Path) -> None:
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}))"
        assert not run(how, code + RIGHT).right
        name = os.path.relpath(tmp_path / "s")
        local.bind(name)
        local.listen()
        (tmp_path / "s").chmod(0o777)
        tmp_path.chmod(0o777)
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})"
        assert not run(how, code + RIGHT).right
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_killed_caller_takes_all_with_it(how: Isolation) -> None:
    with sandbox._folder() as folder:
        caller = subprocess.Popen([
            sys.executable, "-c",
            "from t2runtime import sandbox as s\n"
            f"s._run_one('while True: pass', ['f()'], s.Limits(seconds=600), {how!r}, {folder!r})"
            .replace("Isolation(", "s.Isolation("),
        ])  # fmt: skip
        try:
            wait_until(lambda: len(processes_in(folder)) >= 4)
        finally:
            caller.kill()
            caller.wait()
        wait_until(lambda: not processes_in(folder))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_privileges_do_not_come_back(how: Isolation) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
    done = [libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, b""),
            libc.ptrace(16, 1, 0, 0), libc.memfd_create(b"m", 0), libc.setuid(0) * (x == 0)]
    caps = [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")]
    return done[:4], caps
"""
    assert run(how, code, tests=["assert f(1) == ([-1] * 4, ['0' * 16])"]).right


def test_a_clean_environment(how: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2_TEST_SECRET", "secret")
    code = "import os, sys\ndef f(x):\n  return 'T2_TEST_SECRET' in os.environ, sys.stdin.read()"
    code += "\nfor _ in range(200): print('x' * 10_000)"
    assert run(how, code, tests=["assert f(1) == (False, '')"]).right


@pytest.fixture
def here() -> Iterator[None]:
    if sandbox.isolation().level == "none":
        pytest.skip(f"no isolation here: {'; '.join(sandbox.isolation().refused)}")
    yield


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("def f(x): x.append(1)", "a = []; f(a); assert a == [1]"),
        ("def f(x): return x", "for v in (1.5, float('inf'), 1j, b'x', {1: (2,)}, {3}, None, 'ü',"
         " -10**50, [True], range(3), frozenset('a')):\n"
         "    assert f(v) == v and type(f(v)) is type(v)"),
        ("from collections import *\ndef f(): return Counter('aab')",
         "assert f() == {'a': 2, 'b': 1}"),
        ("from fractions import Fraction as F\ndef f(): return F(1, 3)",
         "from fractions import Fraction\nassert f() == Fraction(1, 3)"),
        ("def f(n):\n  while True: yield n; n += 1",
         "g = f(3); assert [next(g), next(g)] == [3, 4]"),
        ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2] and sum(f(3)) == 3"),
        ("class P:\n  def __init__(self, a): self.a = a\ndef f(p): return p.a",
         "p = P(2); p.a = p.a + 1; assert f(p) == f(p=p) == 3"),
        ("def f(x): return [x, lambda y: x + y]", "assert f(1)[1](2) == 3"),
        ("def f(g, x): return g(x)", "import math\nassert f(math.sqrt, 4) == f(len, 'ab') == 2"),
        ("def f(x): raise KeyError(x)",
         "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert 0"),
        ("def sum(a, b): return 6", "assert sum(1, 2) == 6"),
        ("def check(x): return x", "def test(c):\n    assert c(2) == 2\ntest(check)"),
        ("from dataclasses import dataclass\n@dataclass\nclass D:\n  x: 'int'",
         "assert D(1) == D(1)"),
    ],
)  # fmt: skip
def test_tests_see_the_answer_as_if_in_one_process(code: str, test: str) -> None:
    assert sandbox.run(code, [test], PATIENT) == Verdict(True)


@pytest.mark.usefixtures("here")
def test_packages_of_the_interpreter() -> None:
    pytest.importorskip("numpy")
    code = "import numpy\ndef f(x): return numpy.sqrt(numpy.array(x)), numpy.int64(3)"
    test = "import numpy\na, b = f([1.0, 4.0]); assert numpy.allclose(a, [1, 2]) and b == 3"
    assert sandbox.run(code, [test], PATIENT) == Verdict(True)


@pytest.mark.usefixtures("here")
def test_what_cannot_be_passed_is_said() -> None:
    verdict = sandbox.run("def f(g): return g(1)", ["assert f(lambda x: x) == 1"], PATIENT)
    assert "plain values" in verdict.reason


@pytest.mark.usefixtures("here")
def test_many_at_once_within_a_bound(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = (RIGHT, TESTS), ("def f(x): return 0", TESTS)
    verdicts = sandbox.run_all([good, bad, good], PATIENT, workers=2)
    assert [verdict.right for verdict in verdicts] == [True, False, True]
    assert sandbox.run_all([]) == []
    late = sandbox.run_all([good], PATIENT, total_seconds=-1)
    assert not late[0].right and "1 of 1 programs were not run" in caplog.text


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least one program"):
        sandbox.run(RIGHT, [])
    with pytest.raises(ValueError, match="processes must be at least 3"):
        Limits(processes=1)
    with pytest.raises(sandbox.SandboxError, match="no supervisor could be started"):
        sandbox._run_one(RIGHT, TESTS, PATIENT, Isolation("none", False), "/nowhere")
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation("none", False, ("not allowed",)))
    with pytest.raises(sandbox.SandboxError, match="not allowed.*unsafe=True"):
        sandbox.run(RIGHT, TESTS)
    assert sandbox.run(RIGHT, TESTS, PATIENT, unsafe=True).right
    assert not sandbox.run("while True: pass", TESTS, Limits(seconds=1), unsafe=True).right
