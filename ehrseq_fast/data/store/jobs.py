"""Parts of a store written by several processes: workers that this one starts, or the ranks of
``torchrun``.

A job writes one part. Which jobs there are depends on the input alone, and parts are merged in the
order of the jobs, so that any number of processes gives the same bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

Job = Callable[[Path], None]  # writes its part into that folder; pickled for other processes
Result = TypeVar("Result")

LONGEST_WAIT = timedelta(days=7)  # of a rank, until the others have done their share


class HasParts(Protocol):
    """A folder under construction (:class:`~.atomic.NewFolder`) with a place for parts."""

    parts: Path


Folder = TypeVar("Folder", bound=HasParts)


def by_processes(
    new_folder: Callable[[], AbstractContextManager[Folder]],
    plan: Callable[[], Sequence[Job]],
    finish: Callable[[Folder, list[Path]], object],
    opened: Callable[[], Result],
    *,
    workers: int,
) -> Result:
    """Write parts and merge them.

    In one process, or on rank 0 under ``torchrun`` (``RANK`` and ``WORLD_SIZE`` in the
    environment, all ranks calling this, on one file system): ``new_folder`` opens the folder,
    ``plan`` gives the jobs, ``finish`` merges the parts, which come in the order of the jobs. Every
    rank does its share of the jobs with ``workers`` processes, and ends with ``opened``.

    Raises:
        RuntimeError: a worker was killed, or another rank failed.
        Exception: what a job raises; the jobs that have not begun are not done.
    """
    with _ranks() as ranks:
        if ranks is None:
            with new_folder() as folder:
                paths = _do(plan(), folder.parts, workers, 0, 1)
                finish(folder, paths)
        elif ranks.rank == 0:
            with ranks.telling_others(), new_folder() as folder:
                jobs = plan()
                ranks.tell((folder.parts, jobs))
                with ranks.all_or_none():
                    paths = _do(jobs, folder.parts, workers, 0, ranks.size)
                finish(folder, paths)
                ranks.tell(None)
        else:
            parts, jobs = ranks.hear()
            with ranks.all_or_none():
                _do(jobs, parts, workers, ranks.rank, ranks.size)
            ranks.hear()
        return opened()


def _do(jobs: Sequence[Job], parts: Path, workers: int, rank: int, size: int) -> list[Path]:
    """Do every ``size``-th job from ``rank`` on; the paths of all parts."""
    paths = [parts / f"{index:08d}" for index in range(len(jobs))]
    mine = list(zip(jobs, paths, strict=True))[rank::size]
    if workers == 1 or len(mine) < 2:
        for job, path in mine:
            job(path)
        return paths
    # Not forked: the threads of torch and of a database do not survive a fork.
    executor = ProcessPoolExecutor(
        min(workers, len(mine)), multiprocessing.get_context("spawn"), _end_with_parent
    )
    try:
        futures = [executor.submit(job, path) for job, path in mine]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process ended before its part was written: it was killed (out of memory?), "
            "or the program that calls this has no `if __name__ == '__main__':`"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
    return paths


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Ranks:
    """What the ranks tell each other, over gloo."""

    def __init__(self, distributed: Any, group: Any) -> None:
        self._distributed, self._group = distributed, group
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._all_know = False  # of a failure

    def tell(self, value: Any) -> None:
        self._distributed.broadcast_object_list([None, value], src=0, group=self._group)

    def hear(self) -> Any:
        box: list[Any] = [None, None]
        self._distributed.broadcast_object_list(box, src=0, group=self._group)
        if box[0] is not None:
            raise RuntimeError(f"rank 0 failed: {box[0]}")
        return box[1]

    @contextmanager
    def telling_others(self) -> Iterator[None]:
        """Where rank 0 fails while the others wait for it, they hear of it."""
        try:
            yield
        except BaseException as error:
            if not self._all_know:
                box = [f"{type(error).__name__}: {error}", None]
                with suppress(
                    RuntimeError
                ):  # where a rank is lost, the others notice by themselves
                    self._distributed.broadcast_object_list(box, src=0, group=self._group)
            raise

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Go on where every rank got through; where one failed, raise on all."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        reasons: list[Any] = [None] * self.size
        text = None if failed is None else f"{type(failed).__name__}: {failed}"
        self._distributed.all_gather_object(reasons, text, group=self._group)
        self._all_know = any(reason is not None for reason in reasons)
        if failed is not None:
            raise failed
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise RuntimeError(f"rank {rank} failed: {reason}")


@contextmanager
def _ranks() -> Iterator[_Ranks | None]:
    """The ranks of ``torchrun``; None in a process on its own."""
    from torch import distributed

    available = distributed.is_available()
    if available and distributed.is_initialized():
        if distributed.get_world_size() == 1:
            yield None
            return
        group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        try:
            yield _Ranks(distributed, group)
        finally:
            distributed.destroy_process_group(group)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    if not available:
        raise RuntimeError("WORLD_SIZE is set, but this torch is built without torch.distributed")
    distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield _Ranks(distributed, None)
    finally:
        distributed.destroy_process_group()
