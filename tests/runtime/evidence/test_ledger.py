"""A run that is killed goes on: finished units are not run again."""

import json
import os
import signal
import subprocess
import sys
import time

from t2runtime.evidence.ledger import Ledger

CHILD = """
import os, pathlib, sys, time
seed, marks = sys.argv[1], pathlib.Path(os.environ["MARKS"])
with (marks / seed).open("a") as file:
    file.write("x")
while seed == "1" and not (marks / "go").exists():
    time.sleep(0.05)
print('{"x": %s, "threads": %s}' % (seed, os.environ["OMP_NUM_THREADS"]))
"""
RUNNER = """
import pathlib, sys
from types import SimpleNamespace
from t2runtime.evidence.ledger import Ledger, finish
def run(seed):
    return SimpleNamespace(key=f"k{seed}", command=["child", str(seed)], named={"seed": seed})
runs = [run(seed) for seed in range(3)]
finish(runs, Ledger(pathlib.Path(sys.argv[1]) / "runs.jsonl"), 1, "test")
"""


def test_killed_in_the_middle_it_goes_on(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    env = {**os.environ, "MARKS": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", RUNNER, str(tmp_path)]
    ledger = tmp_path / "runs.jsonl"
    first = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not ((tmp_path / "1").exists() and ledger.exists() and ledger.read_text()):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert list(Ledger(ledger).rows) == ["k0"]
    (tmp_path / "go").touch()
    subprocess.run(command, env=env, check=True, timeout=600)
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(row["key"], row["seed"], row["x"], row["threads"]) for row in rows] == [
        ("k0", 0, 0, 1), ("k1", 1, 1, 1), ("k2", 2, 2, 1),
    ]  # fmt: skip
    assert [(tmp_path / str(seed)).read_text() for seed in range(3)] == ["x", "xx", "x"]
