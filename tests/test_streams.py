"""Order between streams, with a record in the place of CUDA: who waits for whom."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import t2kernels as t2k
from t2kernels import streams
from t2kernels.streams import StreamOrder, ThreadOrder


@pytest.fixture
def bank() -> t2k.ExpertBank:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for name in ("math", "code", "prose"):
        bank.add(name, t2k.Expert({"0": 1 + 0.5 * torch.randn(8)}))
    return bank


class Recorder:
    """Streams and events that write down who waits for what."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = self.stream_named("a")
        self.events = 0
        self.capturing = False

    def stream_named(self, name: str) -> Any:
        wait = lambda event: self.log.append(f"{name} waits for {event.of}")  # noqa: E731
        return SimpleNamespace(name=name, cuda_stream=ord(name), wait_event=wait)

    def current_stream(self, device: torch.device) -> Any:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def Event(self) -> Any:
        event = SimpleNamespace(of="nothing")

        def record(stream: Any) -> None:
            self.events += 1
            event.of = f"{stream.name}{self.events}"

        event.record = record
        event.synchronize = lambda: self.log.append(f"host waits for {event.of}")
        return event

    def on(self, name: str) -> list[str]:
        """Go on as stream ``name``; returns and forgets what was written down."""
        self.current = self.stream_named(name)
        log, self.log = self.log, []
        return log


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(streams, "_cuda", recorder)
    monkeypatch.setattr(streams, "_DEVICE", "cpu")
    return recorder


def test_reads_wait_for_writes_and_writes_for_reads(recorder: Recorder) -> None:
    order, cpu = StreamOrder(), torch.device("cpu")
    with order.reading(cpu):
        pass
    recorder.on("b")
    with order.reading(cpu):  # beside the other
        assert recorder.log == []
    recorder.on("c")
    with order.writing(cpu):
        assert recorder.log == ["c waits for a1", "c waits for b2"]
    recorder.on("a")
    with order.reading(cpu):
        assert recorder.log == ["a waits for c3"]
    recorder.on("b")
    with order.writing(cpu):
        assert recorder.log == ["b waits for c3", "b waits for a4"]
    recorder.on("a")
    order.wait_on_host()
    assert recorder.on("a") == ["host waits for b5"]


def test_a_write_inside_an_open_read_comes_between(recorder: Recorder) -> None:
    """After what the block enqueued before, and before what it enqueues after."""
    order, cpu = StreamOrder(), torch.device("cpu")
    with order.reading(cpu), order.reading(cpu):
        recorder.on("b")
        with order.writing(cpu):
            assert recorder.on("b") == ["b waits for a1"]
        assert recorder.on("a") == ["a waits for b2"]
        with order.writing(cpu):  # its own stream is in order as it is
            assert recorder.on("a") == ["a waits for b2"]
    assert recorder.on("a") == []


def test_writers_go_before_readers_that_come_later() -> None:
    order, log, begun = ThreadOrder(), [], threading.Event()

    def read(name: str) -> None:
        with order.reading(name):
            log.append(name)

    def write() -> None:
        begun.set()
        with order.writing("w"), order.writing("w"), order.reading("w"):
            log.append("w")

    writer, reader = threading.Thread(target=write), threading.Thread(target=read, args=("r",))
    with order.reading("main"):
        writer.start()
        begun.wait()
        while not order._waiting:
            time.sleep(0.001)
        reader.start()
        with order.reading("main"), order.writing("main"):
            log.append("main")
        reader.join(0.1)
        assert log == ["main"] and reader.is_alive()
    writer.join()
    reader.join()
    assert log == ["main", "w", "r"]


def test_a_capture_is_left_alone(recorder: Recorder) -> None:
    order, cpu = StreamOrder(), torch.device("cpu")
    recorder.capturing = True
    with order.writing(cpu), order.reading(cpu):
        pass
    assert recorder.log == [] and recorder.events == 0


def test_admission_waits_for_the_replay_of_another_stream(
    bank: t2k.ExpertBank, recorder: Recorder
) -> None:
    slots = bank.slots(2)
    slots.admit(0, "math")
    recorder.on("r")
    with slots.use(1):
        pass
    read = recorder.events
    recorder.on("w")
    slots.admit(1, "code")
    assert f"w waits for r{read}" in recorder.on("w")
    slots.assign([1])
    written = recorder.events
    recorder.on("r")
    with slots.reading():
        assert f"r waits for w{written}" in recorder.log


def test_the_arena_of_use_is_written_when_other_streams_have_read_it(
    bank: t2k.ExpertBank, recorder: Recorder
) -> None:
    with bank.use("math"):
        pass
    read = recorder.events
    recorder.on("b")
    with bank.use({"code": 0.5}):
        assert f"b waits for a{read}" in recorder.log
        read = f"a waits for b{recorder.events}"
    assert not [line for line in recorder.on("a") if line.startswith("host")]
    slot = torch.zeros(1, dtype=torch.int32)
    with bank.use(torch.ones(1, 3), slot=slot):
        assert "a waits for b" in " ".join(recorder.log) and read in recorder.log


def test_a_larger_arena_takes_the_place_of_one_that_nobody_reads(
    bank: t2k.ExpertBank, recorder: Recorder
) -> None:
    with bank.use("math"):
        pass
    read = recorder.events
    recorder.on("b")
    with bank.use([{"math": i / 100} for i in range(1, 66)]):
        assert f"host waits for a{read}" in recorder.log


def test_sigma_is_put_together_before_other_streams_read_it(
    bank: t2k.ExpertBank, recorder: Recorder
) -> None:
    with bank._mixer.sigma() as S:
        written = recorder.events
    read, address = recorder.events, S.data_ptr()
    recorder.on("b")
    with bank._mixer.sigma():
        assert recorder.log == [f"b waits for a{written}"]
    with torch.no_grad():
        bank.model[0]._S.mul_(2)
    recorder.on("c")
    with bank._mixer.sigma() as S:
        assert f"c waits for a{read}" in recorder.log
        assert f"c waits for b{recorder.events - 1}" in recorder.log
    assert S.data_ptr() == address and torch.equal(S, bank.model[0]._S)


def test_rows_of_a_cache_wait_for_those_who_read_them(
    bank: t2k.ExpertBank, recorder: Recorder
) -> None:
    """A prefetch runs on a stream of its own; whoever uses its rows waits for it, nobody else."""
    host = t2k.ExpertBank(bank.model, host=True, cache=2)
    for name in bank.names:
        host.add(name, bank[name])
    recorder.Stream = lambda device: recorder.stream_named("s")  # type: ignore[attr-defined]

    class Current:
        def __init__(self, stream: Any) -> None:
            self.stream, self.before = stream, recorder.current

        def __enter__(self) -> None:
            recorder.current = self.stream

        def __exit__(self, *_: object) -> None:
            recorder.current = self.before

    recorder.stream = Current  # type: ignore[attr-defined]
    slots = host.slots(2)
    slots.admit(0, "math")
    recorder.on("a")
    host.prefetch(["code"])
    prefetched = recorder.events
    assert recorder.on("b") == []  # a place that nobody has read
    slots.admit(1, "code")
    assert f"b waits for s{prefetched}" in recorder.on("a")
    host.prefetch(["prose"])  # in the place of math, which stream a read last
    assert any(line.startswith("s waits for a") for line in recorder.log)
