"""Order between those that read and those that write one piece of memory: streams and threads.

``StreamOrder``: work that streams enqueue. Reads may run beside each other; a write waits on the
device for every read and write before it, and a read for the last write. Nobody waits on the host.
On other devices, and inside a capture (whose order is that of the captured stream), nothing is
done.

``ThreadOrder``: the enqueueing itself. A thread that writes waits on the host until no other thread
is inside a block that reads, so that such a block sees one state from its begin to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, RLock, get_ident
from typing import Any

import torch
from torch import Tensor

# The tests put a record of calls in its place.
_cuda: Any = torch.cuda
_DEVICE = "cuda"


def ordered(device: torch.device) -> bool:
    """Whether work on ``device`` has streams that must be kept in order now."""
    return device.type == _DEVICE and not _cuda.is_current_stream_capturing()


def sent(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``values`` on ``device``, in the order of the current stream; nobody waits."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return host.to(device)
    # torch's allocator keeps the pinned memory until the copy has run.
    return host.pin_memory().to(device, non_blocking=True)


class OwnLock:
    """A reentrant lock; the copy of an object that has one gets a lock of its own."""

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[OwnLock], tuple[()]]:
        return OwnLock, ()


class ThreadOrder:
    """Threads that read side by side and threads that write alone; a copy is of other memory.

    A thread may write inside a block of its own that reads, and read while it writes: what one
    thread does has an order. Threads that want to write go before threads that begin to read.
    """

    #: Seconds until a thread that cannot go on raises: two may wait for each other for ever.
    PATIENCE = 60.0

    def __init__(self) -> None:
        self._changed = Condition()
        self._reading: dict[int, int] = {}  # open blocks of each thread
        self._writer: int | None = None
        self._depth = 0  # of the writer's blocks
        self._waiting = 0  # threads that want to write

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Inside, no other thread writes. what: for the message."""
        me = get_ident()
        with self._changed:
            if me not in self._reading and self._writer != me:
                self._wait(lambda: self._writer is None and not self._waiting, what)
            self._reading[me] = self._reading.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._reading[me] -= 1
                if not self._reading[me]:
                    del self._reading[me]
                self._changed.notify_all()

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Inside, no other thread reads or writes. what: for the message."""
        me = get_ident()
        with self._changed:
            if self._writer != me:
                self._waiting += 1
                try:
                    self._wait(lambda: self._writer is None and self._reading.keys() <= {me}, what)
                finally:
                    self._waiting -= 1
                    self._changed.notify_all()
            self._writer, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._changed.notify_all()

    def _wait(self, free: Callable[[], bool], what: str) -> None:
        if not self._changed.wait_for(free, self.PATIENCE):
            raise RuntimeError(
                f"{what}: waited {self.PATIENCE:g} seconds for another thread, which is inside a "
                "`slots.use` block (or writes). Leave the block between steps, or write from the "
                "thread that is inside it."
            )

    def __reduce__(self) -> tuple[type[ThreadOrder], tuple[()]]:
        return ThreadOrder, ()


class StreamOrder:
    """The last write and the reads since, of one piece of memory; a copy is of other memory."""

    def __init__(self) -> None:
        self._lock = OwnLock()
        self._written: Any = None
        self._reads: dict[int, Any] = {}  # by stream
        self._open: list[Any] = []  # streams of the blocks that read

    @contextmanager
    def reading(self, device: torch.device) -> Iterator[None]:
        """Inside, the current stream may enqueue reads. A write by another stream meanwhile comes
        after what was enqueued before it, and before what is enqueued later."""
        if not ordered(device):
            yield
            return
        stream = _cuda.current_stream(device)
        with self._lock:
            if self._written is not None:
                stream.wait_event(self._written)
            self._open.append(stream)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(stream)
                self._note_read(stream)

    def _note_read(self, stream: Any) -> None:
        event = _cuda.Event()
        event.record(stream)
        self._reads[stream.cuda_stream] = event

    @contextmanager
    def writing(self, device: torch.device) -> Iterator[None]:
        """Inside, the current stream may enqueue writes; one writer at a time."""
        if not ordered(device):
            yield
            return
        stream = _cuda.current_stream(device)
        with self._lock:
            others = {s.cuda_stream: s for s in self._open if s.cuda_stream != stream.cuda_stream}
            for other in others.values():
                self._note_read(other)
            for event in (self._written, *self._reads.values()):
                if event is not None:
                    stream.wait_event(event)
            try:
                yield
            finally:
                self._written = _cuda.Event()
                self._written.record(stream)
                self._reads.clear()
                for other in others.values():
                    other.wait_event(self._written)

    def __reduce__(self) -> tuple[type[StreamOrder], tuple[()]]:
        return StreamOrder, ()

    def wait_on_host(self) -> None:
        """Return when everything so far has run."""
        with self._lock:
            for event in (self._written, *self._reads.values()):
                if event is not None:
                    event.synchronize()


def replaced(old: Tensor, order: StreamOrder) -> StreamOrder:
    """The order of the memory that takes the place of ``old``, which is given back: to the stream
    that it was allocated on, so only when the others have read it."""
    if ordered(old.device):
        order.wait_on_host()
    return StreamOrder()
