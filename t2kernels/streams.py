"""Order between CUDA streams that read and streams that write one piece of memory.

Reads may run beside each other; a write waits on the device for every read and write before it,
and a read for the last write. Nobody waits on the host. On other devices, and inside a capture
(whose order is that of the captured stream), nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
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


class StreamOrder:
    """The last write and the reads since, of one piece of memory; a copy is of other memory."""

    def __init__(self) -> None:
        self._lock = OwnLock()
        self._written: Any = None
        self._reads: dict[int, Any] = {}  # by stream

    @contextmanager
    def reading(self, device: torch.device) -> Iterator[None]:
        """Inside, the current stream may enqueue reads."""
        if not ordered(device):
            yield
            return
        stream = _cuda.current_stream(device)
        with self._lock:
            if self._written is not None:
                stream.wait_event(self._written)
        try:
            yield
        finally:
            event = _cuda.Event()
            event.record(stream)
            with self._lock:
                self._reads[stream.cuda_stream] = event

    @contextmanager
    def writing(self, device: torch.device) -> Iterator[None]:
        """Inside, the current stream may enqueue writes; one writer at a time."""
        if not ordered(device):
            yield
            return
        stream = _cuda.current_stream(device)
        with self._lock:
            for event in (self._written, *self._reads.values()):
                if event is not None:
                    stream.wait_event(event)
            try:
                yield
            finally:
                self._written = _cuda.Event()
                self._written.record(stream)
                self._reads.clear()

    def __reduce__(self) -> tuple[type[StreamOrder], tuple[()]]:
        return StreamOrder, ()

    def wait_on_host(self) -> None:
        """Return when everything so far has run."""
        with self._lock:
            for event in (self._written, *self._reads.values()):
                if event is not None:
                    event.synchronize()
