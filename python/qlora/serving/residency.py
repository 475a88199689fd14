"""Which adapters are in memory: names, slots, the requests that use them, eviction by least recent use."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qlora.serving.adapter_files import AdapterFile
from qlora.serving.layers import BASE
from qlora.serving.logs import log_event


class UnknownAdapterError(KeyError):
    """A request names a model that is not served."""


class AdapterChangedError(ValueError):
    """An adapter's files are not those that were loaded under its name."""


@dataclass
class Entry:
    """A served adapter. ``slot`` is None while it is only on disk; ``serial`` differs for each loading into a slot."""

    name: str
    folder: Path
    digest: str
    created: int  # seconds since 1970
    slot: int | None = None
    serial: int = 0
    users: int = 0  # requests that run with it
    last_use: int = 0
    removed: bool = False
    draining: bool = False  # its slot is wanted: new requests wait until it has been put out
    loading: asyncio.Task[None] | None = None


class Residency:
    """Names of adapters and the slots that they occupy. All methods run on one event loop.

    Args:
        slots: how many adapters fit into memory at a time.
        max_serial: serial numbers are below it.
        read: reads and checks an adapter folder; runs in a thread.
        put: writes an adapter into a slot between two batches; runs in a thread, one call at a time.
    """

    def __init__(
        self, slots: int, max_serial: int, read: Callable[[Path], AdapterFile], put: Callable[[int, AdapterFile], None]
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self._max_serial = max_serial
        self._read, self._put = read, put
        self._writer = ThreadPoolExecutor(1, "qlora-adapters")  # of its own: a write waits for the running batch
        self._occupant: list[Entry | None] = [None] * slots
        self._changed = asyncio.Event()
        self._clock = 0
        self._serial = 0
        self._waiting = 0  # loadings without a slot
        self.loads = 0
        self.evictions = 0

    async def add(self, name: str, folder: Path, created: int) -> Entry:
        """Serves the adapter of a folder under a name. Raises ValueError if the name is taken or the files are bad.

        It is brought into a free slot, if there is one, else by its first request.
        """
        if name in self.entries:
            raise ValueError(f"an adapter named '{name}' is served already: unload it first, or choose another name")
        file = await asyncio.to_thread(self._read, folder)
        if name in self.entries:
            raise ValueError(f"an adapter named '{name}' was added meanwhile")
        entry = Entry(name, folder, file.digest, created)
        self.entries[name] = entry
        if any(occupant is None for occupant in self._occupant):
            try:
                await self._loaded(entry, file)
            except BaseException:
                if self.entries.get(name) is entry:
                    self.remove(name)
                raise
        return entry

    def remove(self, name: str) -> None:
        """Stops serving a name; requests that run finish, and the last frees its slot. Raises UnknownAdapterError."""
        entry = self.entries.pop(name, None)
        if entry is None:
            raise UnknownAdapterError(name)
        entry.removed = True
        self._let_go(entry)

    async def acquire(self, name: str) -> Entry:
        """Counts a request as user of an adapter, which is brought into a slot if necessary.

        Waits while every slot is in use. Raises UnknownAdapterError, and AdapterChangedError if the files on disk are
        not those that were loaded before.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise UnknownAdapterError(name)
        while entry.draining:
            await self._change()
        entry.users += 1  # from now on it is not evicted
        try:
            if entry.slot is None:
                await self._loaded(entry)
        except BaseException:
            self.release(entry)
            raise
        self._clock += 1
        entry.last_use = self._clock
        return entry

    def release(self, entry: Entry) -> None:
        """Ends the use that :meth:`acquire` began. It never waits, so that a cancelled request cannot skip it."""
        entry.users -= 1
        self._let_go(entry)

    def _let_go(self, entry: Entry) -> None:
        if entry.removed and entry.users == 0 and entry.slot is not None:
            self._occupant[entry.slot] = None
            entry.slot = None
        self._changed.set()

    async def _loaded(self, entry: Entry, file: AdapterFile | None = None) -> None:
        """Waits until an adapter is in a slot. The loading is shared by all who wait, and outlives each of them."""
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load(entry, file))
        await asyncio.shield(entry.loading)

    async def _load(self, entry: Entry, file: AdapterFile | None) -> None:
        try:
            content = await asyncio.to_thread(self._read_again, entry) if file is None else file
            if self._serial + 1 >= self._max_serial:
                raise RuntimeError(f"adapters were loaded {self._serial} times since the start: restart the server")
            slot = await self._free_slot()
            self._occupant[slot] = entry
            try:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._put, slot, content)
            except BaseException:
                self._occupant[slot] = None
                raise
            self._serial += 1
            self.loads += 1
            entry.slot, entry.serial = slot, self._serial
        finally:
            entry.loading = None
            self._let_go(entry)

    async def _free_slot(self) -> int:
        """Waits for a slot and puts out who is in it.

        While it waits, one adapter in memory takes no new requests: else a steady load would never let another one in.
        """
        self._waiting += 1
        try:
            while (slot := self._choose()) is None:
                self._drain()
                await self._change()
        finally:
            self._waiting -= 1
            self._drain()
        previous = self._occupant[slot]
        if previous is not None:
            previous.slot, previous.draining = None, False
            self.evictions += 1
            self._changed.set()
        return slot

    def _drain(self) -> None:
        """Lets as many adapters drain as loadings wait: those whose last use is oldest."""
        resident = [entry for entry in self._occupant if entry is not None and entry.slot is not None]
        resident.sort(key=lambda entry: (not entry.draining, entry.last_use))
        for place, entry in enumerate(resident):
            was, entry.draining = entry.draining, place < self._waiting
            if was and not entry.draining:
                self._changed.set()  # for requests that wait for it

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _read_again(self, entry: Entry) -> AdapterFile:
        try:
            file = self._read(entry.folder)
        except (OSError, ValueError) as error:
            log_event("adapter_unreadable", adapter=entry.name, error=str(error))
            raise AdapterChangedError(
                f"the files of '{entry.name}' can no longer be read: unload it and load it again"
            ) from error
        if file.digest != entry.digest:
            log_event("adapter_changed", adapter=entry.name, folder=str(entry.folder))
            raise AdapterChangedError(
                f"the files of '{entry.name}' have changed since it was loaded: unload it and load it again"
            )
        return file

    def _choose(self) -> int | None:
        """A free slot, or that of the adapter whose last use is oldest among those without users."""
        best: tuple[int, int] | None = None
        for slot, occupant in enumerate(self._occupant):
            if occupant is None:
                return slot
            if occupant.users == 0 and occupant.slot is not None and (best is None or occupant.last_use < best[0]):
                best = (occupant.last_use, slot)
        return None if best is None else best[1]


def routing_of(entry: Entry | None) -> tuple[int, int]:
    """(slot, serial) of an adapter in memory; the base has (-1, 0)."""
    if entry is None:
        return BASE, 0
    assert entry.slot is not None
    return entry.slot, entry.serial
