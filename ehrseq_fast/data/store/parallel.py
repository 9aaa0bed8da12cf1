"""One store from many processes: those started here, or the ranks of ``torchrun``.

The parts are defined by the input (a file, a range of identifiers), never by the number of
processes, and merged in their order: any number of processes gives the same bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ...arrays import integer
from .atomic import NewFolder
from .event_store import EventStore
from .merge import new_store

Item = TypeVar("Item")
LONGEST_WAIT = timedelta(days=7)  # of a rank, for the others to read their shares


def build_store(
    out: str | os.PathLike[str],
    items: Sequence[Item],
    write_part: Callable[[Path, Item], None],
    merge: Callable[[NewFolder, list[Path]], EventStore],
    *,
    workers: int = 1,
    overwrite: bool = False,
) -> EventStore:
    """Write a part for each item and merge them into ``out``.

    Under ``torchrun`` (``WORLD_SIZE`` above 1) every rank calls this with the same arguments and
    writes its share of the parts; rank 0 merges, and all open the store. An error of one rank is
    raised on all.

    Args:
        out: the store to make.
        items: what the parts are made from, in the order of the subjects.
        write_part: writes the part of one item into a folder; with ``workers`` above 1 both are
            pickled.
        merge: makes the store from the parts' folders, in the order of the items.
        workers: processes to start.
        overwrite: replace a store that is there.
    """
    workers = integer("workers", workers, 1, 4096)
    ranks = _Ranks.of_environment()
    if ranks is not None:
        return ranks.build(out, items, write_part, merge, workers, overwrite)
    with new_store(out, overwrite=overwrite) as folder:
        paths = [part_path(folder.parts, i) for i in range(len(items))]
        run(write_part, list(zip(paths, items, strict=True)), workers)
        return merge(folder, paths)


def part_path(parts: Path, i: int) -> Path:
    return parts / f"{i:08d}"


def run(function: Callable[..., None], calls: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Call the function with each of the arguments, in this process or in several. The first
    error, in the order of the calls, is raised."""
    workers = min(workers, len(calls))
    if workers <= 1:
        for arguments in calls:
            function(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        futures = [pool.submit(function, *arguments) for arguments in calls]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for future in futures:
            if not future.cancelled():
                future.result()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next call for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


class _Ranks:
    """The processes that ``torchrun`` has started."""

    def __init__(self, rank: int, size: int) -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self.own_group = not dist.is_initialized()
        if self.own_group:
            dist.init_process_group("gloo", timeout=LONGEST_WAIT)
            self.group = None
        else:
            self.group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    @classmethod
    def of_environment(cls) -> _Ranks | None:
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1" or "RANK" not in os.environ:
            return None
        return cls(int(os.environ["RANK"]), int(size))

    def build(
        self,
        out: str | os.PathLike[str],
        items: Sequence[Item],
        write_part: Callable[[Path, Item], None],
        merge: Callable[[NewFolder, list[Path]], EventStore],
        workers: int,
        overwrite: bool,
    ) -> EventStore:
        try:
            if self.rank:
                parts = self._agree(lambda: None)
                self._agree(lambda: self._write(parts, items, write_part, workers))
                path = self._agree(lambda: None)
                return EventStore(path)
            return self._first(out, items, write_part, merge, workers, overwrite)
        finally:
            self._leave()

    def _first(
        self,
        out: str | os.PathLike[str],
        items: Sequence[Item],
        write_part: Callable[[Path, Item], None],
        merge: Callable[[NewFolder, list[Path]], EventStore],
        workers: int,
        overwrite: bool,
    ) -> EventStore:
        context = new_store(out, overwrite=overwrite)
        entered: list[NewFolder] = []

        def enter() -> Path:
            entered.append(context.__enter__())
            return entered[0].parts

        try:
            parts = self._agree(enter)
            self._agree(lambda: self._write(parts, items, write_part, workers))
            paths = [part_path(parts, i) for i in range(len(items))]
            return EventStore(self._agree(lambda: merge(entered[0], paths).path))
        finally:
            if entered:
                context.__exit__(None, None, None)

    def _write(
        self,
        parts: Path,
        items: Iterable[Item],
        write_part: Callable[[Path, Item], None],
        workers: int,
    ) -> None:
        own = [
            (part_path(parts, i), item)
            for i, item in enumerate(items)
            if i % self.size == self.rank
        ]
        run(write_part, own, workers)

    def _agree(self, step: Callable[[], Any]) -> Any:
        """Do a step on every rank; rank 0's result on all, or the first rank's error on all."""
        import torch.distributed as dist

        error: Exception | None = None
        result = None
        try:
            result = step()
        except Exception as caught:
            error = caught
        failed = None if error is None else f"{type(error).__name__}: {error}"
        answers: list[Any] = [None] * self.size
        given = (failed, result if self.rank == 0 else None)
        dist.all_gather_object(answers, given, group=self.group)
        if error is not None:
            raise error
        for rank, (message, _) in enumerate(answers):
            if message is not None:
                raise RuntimeError(f"rank {rank} could not go on: {message}")
        return answers[0][1]

    def _leave(self) -> None:
        import torch.distributed as dist

        if self.own_group:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(self.group)
