"""Where the vectors of experts live: one tensor with a row each, so that mixing takes an address
and row numbers, however many there are.

fp32 rows hold z and are exact. bf16 rows hold z − 1, half the memory, with an error of d of at most
σ Σ_k |α_k| |z_k − 1| / 256. Rows live on the model's device, or in the host's memory (pinned beside
a GPU) with a cache of the rows used last on the device.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from . import streams
from .ops.mixing import DEVIATION_DTYPE
from .streams import OwnLock, StreamOrder

DTYPES = (torch.float32, DEVIATION_DTYPE)
_FIRST_ROWS = 8


class ExpertTable:
    """Rows of R values; a row that was freed holds NaN until it is used again.

    Args:
        width: R, the ranks of all layers together.
        dtype: torch.float32 (z, exact) or torch.bfloat16 (z − 1).
        host: keep the rows in the host's memory, and the last ``cache`` of them on the device.
        capacity: rows to make room for at first. The table doubles when it is full; while it does,
            the old and the new one exist side by side.
    """

    def __init__(
        self, width: int, *, dtype: torch.dtype, host: bool, cache: int, capacity: int
    ) -> None:
        if dtype not in DTYPES:
            raise TypeError(f"ExpertBank: dtype must be one of {DTYPES}, got {dtype}.")
        if not isinstance(host, bool):
            raise TypeError(f"ExpertBank: host must be True or False, got {host!r}.")
        for name, value, least in (("cache", cache, 1), ("capacity", capacity, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"ExpertBank: {name} must be an int of at least {least}, got {value!r}."
                )
        self.width, self.dtype, self.host = width, dtype, host
        self._cache_rows, self._capacity = cache, capacity
        self._rows = torch.empty(0, width, dtype=dtype, device="cpu")
        self._used = 0  # rows that were ever used; no mixture may name one beyond
        self._free: list[int] = []
        self._order, self._lock = StreamOrder(), OwnLock()
        self.cache: RowCache | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the table, the cache left aside."""
        return self._rows.numel() * self._rows.element_size()

    def __len__(self) -> int:
        return self._used - len(self._free)

    @torch.no_grad()
    def put(self, z: Tensor, device: torch.device, row: int | None = None) -> int:
        """The row that now holds the multipliers z (R,): ``row``, else one that was free."""
        with self._lock:
            self._follow(device)
            if row is None:
                row = self._next_row(device)
            self._leave_cache(row)
            with self._order.writing(self._rows.device):
                self._rows[row].copy_(z if self.dtype == torch.float32 else z - 1)
            return row

    def _next_row(self, device: torch.device) -> int:
        if self._free:
            return heapq.heappop(self._free)
        if self._used == self._rows.shape[0]:
            self._grow(device)
        self._used += 1
        return self._used - 1

    @torch.no_grad()
    def remove(self, row: int) -> None:
        """Free a row. Its values are gone at once."""
        with self._lock:
            self._leave_cache(row)
            with self._order.writing(self._rows.device):
                self._rows[row].fill_(float("nan"))
            heapq.heappush(self._free, row)

    @torch.no_grad()
    def vectors(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Multipliers (K, R) in fp32 on ``device``: a copy."""
        with self._lock:
            self._follow(device)
            with self._order.reading(self._rows.device):
                index = torch.tensor(list(rows), dtype=torch.int64, device="cpu")
                z = self._rows[index].to(device)
            return z if self.dtype == torch.float32 else z.float() + 1

    @contextmanager
    def resident(
        self, rows: Sequence[int], device: torch.device
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """(Z, place of each row in Z) on ``device``, for work that the block enqueues.

        Raises ValueError where the cache of a host table is too small for all of them at once.
        """
        with self._lock:
            self._follow(device)
            if not self.host:
                with self._order.reading(device):
                    yield self._rows[: self._used], list(rows)
                return
            cache = self._cache_on(device)
            with cache.holding(self._rows, rows) as places:
                yield cache.rows, places

    def prefetch(self, rows: Sequence[int], device: torch.device) -> None:
        """Bring rows of a host table to the device, beside whatever runs there."""
        with self._lock:
            if self.host:
                self._cache_on(device).prefetch(self._rows, rows)

    # -- where the rows are --------------------------------------------------------------------

    def _new(self, rows: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):
            if not self.host:
                return torch.empty(rows, self.width, dtype=self.dtype, device=device)
            pinned = device.type == "cuda"
            return torch.empty(rows, self.width, dtype=self.dtype, device="cpu", pin_memory=pinned)

    @torch.no_grad()
    def _grow(self, device: torch.device) -> None:
        """Twice the rows. Mixing that is under way keeps the old ones alive."""
        room = max(_FIRST_ROWS, self._capacity, 2 * self._rows.shape[0])
        grown = self._new(room, device)
        self._wait_for_copies()
        with self._order.writing(grown.device):
            grown[: self._used].copy_(self._rows[: self._used])
        self._retire(self._rows)
        self._rows = grown

    @torch.no_grad()
    def _follow(self, device: torch.device) -> None:
        """A table on the device goes where the model goes."""
        if not self.host and self._rows.device != device:
            moved = self._new(self._rows.shape[0], device)
            with self._order.reading(self._rows.device):
                moved[: self._used].copy_(self._rows[: self._used])
            self._retire(self._rows)
            self._rows, self._order = moved, StreamOrder()

    def _retire(self, rows: Tensor) -> None:
        """Give memory back only when the streams that read it have."""
        if rows.is_cuda:
            self._order.wait_on_host()

    def _cache_on(self, device: torch.device) -> RowCache:
        if self.cache is None or self.cache.rows.device != device:
            with torch.inference_mode(False):
                room = torch.empty(self._cache_rows, self.width, dtype=self.dtype, device=device)
            self.cache = RowCache(room)
        return self.cache

    def _leave_cache(self, row: int) -> None:
        if self.cache is not None:
            self._wait_for_copies()
            self.cache.forget(row)

    def _wait_for_copies(self) -> None:
        """A pinned row must stand until the copies that read it have run."""
        if self.cache is not None:
            self.cache.wait_on_host()


class RowCache:
    """The rows of a host table that were used last, on the device.

    Attributes:
        rows: (cache, R), at one address for ever.
        hits, misses: rows found and rows that had to be copied, prefetches left aside.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.hits, self.misses = rows, 0, 0
        self._places: OrderedDict[int, int] = OrderedDict()  # row of the table → place, old first
        self._orders = [StreamOrder() for _ in range(rows.shape[0])]
        self._side: Any = None

    def __contains__(self, row: object) -> bool:
        return row in self._places

    @contextmanager
    def holding(self, table: Tensor, rows: Sequence[int]) -> Iterator[list[int]]:
        """The places of ``rows``, copied on the current stream where they are missing."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._places]
        self.misses += len(missing)
        self.hits += len(set(rows)) - len(missing)
        self._load(table, rows, missing)
        places = [self._places[row] for row in rows]
        with ExitStack() as reading:
            for place in set(places):
                reading.enter_context(self._orders[place].reading(self.rows.device))
            yield places

    def prefetch(self, table: Tensor, rows: Sequence[int]) -> None:
        """The same ahead of time, on a stream of its own."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._places]
        if not streams.ordered(self.rows.device):
            self._load(table, rows, missing)
            return
        if self._side is None:
            self._side = streams._cuda.Stream(self.rows.device)
        with streams._cuda.stream(self._side):
            self._load(table, rows, missing)

    def forget(self, row: int) -> None:
        """The row is about to change; its place is the next to be used again."""
        place = self._places.pop(row, None)
        if place is not None:
            self._places[-1 - place] = place  # no row of a table has such a number
            self._places.move_to_end(-1 - place, last=False)

    def wait_on_host(self) -> None:
        """Return when no copy out of the table is under way."""
        for order in self._orders:
            order.wait_on_host()

    @torch.no_grad()
    def _load(self, table: Tensor, rows: Sequence[int], missing: list[int]) -> None:
        if len(set(rows)) > self.rows.shape[0]:
            raise ValueError(
                f"ExpertBank: {len(set(rows))} experts are wanted at once, the cache has room for "
                f"{self.rows.shape[0]}. Make the bank with a larger cache=."
            )
        for row in rows:
            if row in self._places:
                self._places.move_to_end(row)
        for row in missing:
            place = len(self._places)
            if place == self.rows.shape[0]:
                _, place = self._places.popitem(last=False)
            with self._orders[place].writing(self.rows.device):
                self.rows[place].copy_(table[row], non_blocking=True)
            self._places[row] = place
