"""Kills processes that write a store, and looks at what they leave.

``python -m tests.store_crashes FOLDER`` runs all of it in FOLDER; any fault ends it with an
``AssertionError``. A process of its own, because it forks.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from ehrseq_fast.data import EventStore, PartWriter, SubjectChunk, read_meds, write_store
from ehrseq_fast.data.store import atomic

from .generated_meds import write_generated_meds

STEPS = ("rename", "fsync", "mkdir", "unlink", "rmdir", "open")  # of os, before each a crash


def small_part(folder: Path, code: str) -> Path:
    writer = PartWriter(folder)
    writer.add(
        SubjectChunk(np.array([1, 2]), np.array([0, 1]), np.zeros(2, "M8[us]"), [code, code])
    )
    writer.finish()
    return folder


def in_child(work: Callable[[], None]) -> int:
    """Fork, do the work, and return the child's process id."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_before_step(number: int, work: Callable[[], None]) -> bool:
    """Whether a child that does the work was killed before its ``number``-th step."""

    def killed() -> None:
        taken = 0

        def counted(step: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal taken
                taken += 1
                if taken == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*arguments, **options)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        work()

    code = ended(in_child(killed))
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def leftovers(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def at_every_step(folder: Path, *, can_exchange: bool) -> int:
    """A crash before every step of replacing a store: the old one or the new one is there, and the
    next writer cleans up. Returns how many steps there are."""
    if not can_exchange:
        atomic._exchange = lambda one, other: False
    folder.mkdir()
    old, new = (small_part(folder / "parts" / code, code) for code in ("old", "new"))
    place = folder / "here"
    place.mkdir()
    out = place / "store"
    step, seen = 0, {"new"}
    while True:
        step += 1
        if "new" in seen:
            write_store(out, [old], source={}, split={"train": 1.0}, overwrite=True)
            assert leftovers(place) == [], leftovers(place)

        def replace() -> None:
            write_store(out, [new], source={}, split={"train": 1.0}, overwrite=True)

        died = dies_before_step(step, replace)
        store = EventStore(out, verify=True)  # brings back what lies between two renames
        assert store.codes_of in (("old",), ("new",)), store.codes_of
        seen = set(store.codes_of)
        if not died:
            break
    assert seen == {"new"}, seen
    write_store(out, [old], source={}, split={"train": 1.0}, overwrite=True)
    assert leftovers(place) == [], leftovers(place)
    return step


def at_random_moments(folder: Path, kills: int, seed: int) -> int:
    """Kills while a MEDS dataset is read over a store; returns how many hit."""
    folder.mkdir()
    write_generated_meds(folder / "meds", 2000, shards=2)
    out = folder / "store"

    def read() -> None:
        read_meds(folder / "meds", out, visits="time", overwrite=True)

    begin = time.monotonic()
    first = read_meds(folder / "meds", out).header["content_sha256"]
    assert ended(in_child(read)) == 0
    length = (time.monotonic() - begin) / 2
    second = EventStore(out, verify=True).header["content_sha256"]
    assert first != second
    choose, hits = random.Random(seed), 0
    for _ in range(kills):
        read_meds(folder / "meds", out, overwrite=True)
        child = in_child(read)
        time.sleep(choose.random() * length)
        os.kill(child, signal.SIGKILL)
        hits += ended(child) != 0
        assert EventStore(out, verify=True).header["content_sha256"] in (first, second)
    read()
    assert EventStore(out, verify=True).header["content_sha256"] == second
    assert leftovers(folder) == [], leftovers(folder)
    return hits


def with_workers(folder: Path) -> int:
    """A kill of the reader alone: the processes that it has started end too."""
    folder.mkdir()
    write_generated_meds(folder / "meds", 300, shards=2)
    out = folder / "store"
    reader = psutil.Process(in_child(lambda: read_meds(folder / "meds", out, workers=2) and None))
    deadline = time.monotonic() + 60
    while len(started := reader.children(recursive=True)) < 2:
        assert time.monotonic() < deadline, "no process was started"
        time.sleep(0.02)
    time.sleep(1)
    started = reader.children(recursive=True) or started
    reader.kill()
    ended(reader.pid)
    gone, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, alive
    read_meds(folder / "meds", out, overwrite=True)
    assert leftovers(folder) == [], leftovers(folder)
    return len(gone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    hits = at_random_moments(given.folder / "random", given.kills, given.seed)
    print(f"killed {hits} of {given.kills} readers before they were done")
    ended_too = with_workers(given.folder / "workers")
    print(f"killed a reader: the {ended_too} processes that it had started ended")
    exchanged = at_every_step(given.folder / "exchanged", can_exchange=True)
    print(f"crashed before each of {exchanged} steps of replacing a store in one rename")
    renamed = at_every_step(given.folder / "renamed", can_exchange=False)
    print(f"crashed before each of {renamed} steps of replacing a store in two renames")


if __name__ == "__main__":
    main()
