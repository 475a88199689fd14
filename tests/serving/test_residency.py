"""Slots: who waits, who is put out, and that a request that goes leaves no slot behind."""

import asyncio
import time
from pathlib import Path

import pytest

from qlora.serving.adapter_files import AdapterFile
from qlora.serving.residency import Residency, UnknownAdapterError


class Disk:
    """Adapters by folder, and what was written into the slots; a write takes ``seconds``."""

    def __init__(self, slots, seconds=0.0):
        self.seconds = seconds
        self.written = {}
        self.writes = []
        self.residency = Residency(slots, 1 << 20, self.read, self.put)

    def read(self, folder):
        return AdapterFile(folder, {}, str(folder))

    def put(self, slot, file):
        time.sleep(self.seconds)
        self.written[slot] = file.folder.name
        self.writes.append((slot, file.folder.name))

    def consistent(self):
        """Whether each adapter in a slot is the one that was written there last."""
        entries = [e for e in self.residency.entries.values() if e.slot is not None]
        right = all(self.written[e.slot] == e.name for e in entries)
        return right and len({e.slot for e in entries}) == len(entries)

    def free(self):
        return sum(occupant is None for occupant in self.residency._occupant)


def test_the_least_recently_used_adapter_without_users_goes():
    async def main():
        disk = Disk(2)
        r = disk.residency
        for name in "abc":
            await r.add(name, Path(name), 0)
        a, b = await r.acquire("a"), await r.acquire("b")
        r.release(b)
        r.release(a)  # released later, but used before b
        c = await r.acquire("c")
        assert (a.slot, b.slot is None, c.slot is None) == (None, False, False)
        assert disk.consistent()
        return r.evictions

    assert asyncio.run(main()) == 1


def test_a_request_meanwhile_shares_the_loading_and_no_slot_is_lost():
    async def main():
        disk = Disk(2, seconds=0.05)
        r = disk.residency
        adding = asyncio.create_task(r.add("a", Path("a"), 0))
        await asyncio.sleep(0.02)
        entry, _ = await asyncio.gather(r.acquire("a"), adding)
        assert disk.writes == [(entry.slot, "a")]
        r.remove("a")
        assert disk.free() == 1  # the request still runs
        r.release(entry)
        assert disk.free() == 2

    asyncio.run(main())


def test_a_request_that_goes_while_its_adapter_is_written_leaves_a_right_slot():
    async def main():
        disk = Disk(1, seconds=0.1)
        r = disk.residency
        await r.add("a", Path("a"), 0)
        await r.add("b", Path("b"), 0)
        waiting = asyncio.create_task(r.acquire("b"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        a = await r.acquire("a")
        assert disk.consistent()
        r.release(a)
        assert [e.users for e in r.entries.values()] == [0, 0]
        assert disk.written == {0: "a"}

    asyncio.run(main())


def test_who_waits_for_a_slot_gets_it_when_it_is_free():
    async def main():
        disk = Disk(1)
        r = disk.residency
        for name in "abc":
            await r.add(name, Path(name), 0)
        a = await r.acquire("a")
        waiting = [asyncio.create_task(r.acquire(name)) for name in "bc"]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        r.release(a)
        done, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert disk.consistent()
        r.release(done.pop().result())
        assert (await left.pop()).slot == 0
        assert disk.consistent()

    asyncio.run(main())


@pytest.mark.parametrize("slots", [1, 3])
def test_a_steady_load_does_not_keep_another_adapter_out(slots):
    """Every resident adapter always has a user, because requests overlap."""

    async def main():
        disk = Disk(slots)
        r = disk.residency
        names = [f"a{i}" for i in range(slots)]
        for name in [*names, "late", "later"]:
            await r.add(name, Path(name), 0)
        done = asyncio.Event()
        served = dict.fromkeys(names, 0)

        async def client(name, delay):
            await asyncio.sleep(delay)
            while not done.is_set():
                entry = await r.acquire(name)
                assert disk.written[entry.slot] == name
                await asyncio.sleep(0.02)
                r.release(entry)
                served[name] += 1

        clients = [asyncio.create_task(client(name, 0.005 * i)) for name in names for i in range(4)]
        await asyncio.sleep(0.1)
        for name in ("late", "later", "late"):
            entry = await asyncio.wait_for(r.acquire(name), 5)
            assert disk.written[entry.slot] == name
            r.release(entry)
        before = dict(served)
        await asyncio.sleep(0.3)
        assert all(served[name] > before[name] for name in names)  # those that were put out came back
        done.set()
        await asyncio.gather(*clients)
        assert disk.consistent()
        assert not any(entry.draining for entry in r.entries.values())

    asyncio.run(main())


def test_waiting_does_not_keep_the_loop_busy():
    async def main():
        disk = Disk(1)
        r = disk.residency
        for name in "abcd":
            await r.add(name, Path(name), 0)
        a = await r.acquire("a")
        waiting = [asyncio.create_task(r.acquire(name)) for name in "bcda"]
        begun = time.process_time()
        await asyncio.sleep(0.3)
        busy = time.process_time() - begun
        for task in waiting:
            task.cancel()
        r.release(a)
        return busy

    assert asyncio.run(main()) < 0.1


def test_removing_while_loading_frees_the_slot():
    async def main():
        disk = Disk(1, seconds=0.05)
        r = disk.residency
        adding = asyncio.create_task(r.add("a", Path("a"), 0))
        await asyncio.sleep(0.02)
        r.remove("a")
        await adding
        assert disk.free() == 1
        with pytest.raises(UnknownAdapterError):
            await r.acquire("a")

    asyncio.run(main())


def test_a_write_that_fails_frees_its_slot():
    async def main():
        disk = Disk(1)
        r = disk.residency

        def fail(slot, file):
            raise MemoryError("no room")

        r._put = fail
        with pytest.raises(MemoryError):
            await r.add("a", Path("a"), 0)
        assert (disk.free(), r.entries) == (1, {})
        r._put = disk.put
        await r.add("a", Path("a"), 0)
        assert disk.consistent()

    asyncio.run(main())
