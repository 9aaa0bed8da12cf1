"""Reading OMOP databases by several processes, in bounded memory, and through crashes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ehrseq_fast.data import EventStore, read_omop
from ehrseq_fast.data.omop.ranges import person_ranges
from ehrseq_fast.data.omop.sources import find_sources
from ehrseq_fast.data.omop.tables import event_tables

from .omop_tables import READ, fill

duckdb = pytest.importorskip("duckdb", reason="pip install 'ehrseq_fast[omop]'")

READS = """
import json, os, resource, sys
from ehrseq_fast.data import read_omop
if __name__ == "__main__":
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    database, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    print("reading", flush=True)
    store = read_omop(database, out, tables=("condition", "measurement"), **options)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([store.header["content_sha256"], before, after]))
"""


def generate(path: Path, rows: int, *, seed: int = 0) -> Path:
    """A database of ``rows`` conditions and as many measurements, 40 of each person, with visits,
    periods, births and deaths; by no order."""
    persons = max(rows // 40, 1)
    event = (
        f"hash(i + {seed}) % {persons} + 1, hash(i + 11) % 2000 + 1,"
        " DATE '2000-01-01' + CAST(hash(i + 22) % 7000 AS INTEGER), NULL,"
        " hash(i + 33) % 50"
    )
    days = "DATE '2000-01-01' + CAST(hash(i + 44) % 3000 AS INTEGER)"
    with duckdb.connect(str(path)) as connection:
        connection.execute("SET threads = 1")
        fill(
            connection,
            {
                "condition_occurrence": [],
                "measurement": [],
                "person": [],
                "observation_period": [],
                "death": [],
                "visit_occurrence": [],
            },
        )
        for sql in (
            f"INSERT INTO condition_occurrence SELECT {event} FROM range({rows}) t(i)",
            f"INSERT INTO measurement SELECT {event}, hash(i) % 1000 / 7 FROM range({rows}) t(i)",
            "INSERT INTO person SELECT i + 1, 8507 + i % 2 * 25, 8527, 0, 1940 + i % 60, 2, 3, NULL"
            f" FROM range({persons}) t(i)",
            f"INSERT INTO observation_period SELECT i + 1, {days}, DATE '2019-01-01'"
            f" FROM range({persons}) t(i)",
            "INSERT INTO death SELECT i + 1, DATE '2019-01-01', NULL"
            f" FROM range(0, {persons}, 3) t(i)",
            f"INSERT INTO visit_occurrence SELECT hash(i + 1) % {persons} + 1, i % 50, {days},"
            f" NULL, NULL FROM range({persons * 20}) t(i)",
        ):
            connection.execute(sql)
    return path


def start(database: Path, out: Path, environment: dict[str, str] | None = None, **options):
    return subprocess.Popen(
        [sys.executable, "-c", READS, str(database), str(out), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        cwd=Path(__file__).parent.parent,
    )


def finished(process):
    """What the process printed last."""
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(printed.splitlines()[-1])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("omop") / "omop.duckdb", 40_000)


def test_any_number_of_workers_and_parts_gives_the_same_bytes(generated, tmp_path):
    options = {"tables": READ, "visits": "visit_occurrence"}
    alone = read_omop(generated, tmp_path / "alone", **options)
    assert alone.n_patients == 1000
    expected = files(alone.path)
    parts = read_omop(generated, tmp_path / "parts", rows_per_part=7000, **options)
    assert files(parts.path) == expected
    four = read_omop(generated, tmp_path / "four", rows_per_part=7000, workers=4, **options)
    assert files(four.path) == expected


def test_a_connection_gives_what_a_path_gives(generated, tmp_path):
    path = read_omop(generated, tmp_path / "path", tables=READ)
    with duckdb.connect(str(generated), read_only=True) as connection:
        given = read_omop(connection, tmp_path / "given", tables=READ)
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert given.header["content_sha256"] == path.header["content_sha256"]


def test_ranges_hold_every_row_and_no_more_than_they_may(tmp_path):
    few = [-(2**63) + 5, -7, *range(1000), 2**40, 2**40 + 1, 2**63 - 1]
    rows = [(person, 40, "2020-01-01") for person in few for _ in range(3)]
    rows += [(500, 41, "2020-01-02")] * 80
    with duckdb.connect() as connection:
        fill(connection, {"condition_occurrence": rows, "measurement": []})
        sources = find_sources(connection, event_tables(READ), None, by_visit=False).all()
        found = person_ranges(connection, sources, min(few), max(few), 50)
    persons = np.sort(np.array([row[0] for row in rows]))
    ends = np.array([[one.low, one.high] for one in found])
    assert (ends[1:, 0] > ends[:-1, 1]).all()
    inside = np.searchsorted(persons, ends[:, 1], "right") - np.searchsorted(persons, ends[:, 0])
    assert inside.tolist() == [one.rows for one in found]
    assert inside.sum() == len(rows)
    assert [one for one in found if one.rows > 50] == [(500, 500, 83)]
    assert len(found) < 2.5 * len(rows) / 50


def ranks(database: Path, out: Path, n: int, **options):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [
        start(
            database,
            out,
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(n),
                "LOCAL_WORLD_SIZE": str(n),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            },
            rows_per_part=7000,
            **options,
        )
        for rank in range(n)
    ]


def test_ranks_share_the_ranges_and_fail_together(generated, tmp_path):
    alone = read_omop(generated, tmp_path / "alone", tables=READ)
    started = ranks(generated, tmp_path / "ranks", 2)
    assert {finished(process)[0] for process in started} == {alone.header["content_sha256"]}
    assert files(tmp_path / "ranks") == files(alone.path)
    messages = []
    for process in ranks(generated, tmp_path / "ranks", 2):
        messages.append(process.communicate(timeout=120)[1])
        assert process.returncode != 0
    assert "FileExistsError" in messages[0]
    assert "RuntimeError: rank 0 failed: FileExistsError" in messages[1]
    assert files(tmp_path / "ranks") == files(alone.path)


@pytest.mark.parametrize(("workers", "kills"), [(1, 2), (2, 1)])
def test_killed_while_reading_the_old_store_or_nothing_is_there(
    generated, tmp_path, workers, kills
):
    out = tmp_path / "store"
    options = {"rows_per_part": 2000, "workers": workers, "overwrite": True}
    expected = read_omop(generated, tmp_path / "expected", tables=READ).header["content_sha256"]
    old = None
    for delay in np.random.default_rng(workers).uniform(0, 1.5 * workers, kills):
        process = start(generated, out, visits="day", **options)
        assert process.stdout.readline() == "reading\n"
        time.sleep(delay)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
        if old is None:
            if out.exists():  # it had ended
                assert EventStore(out, verify=True).header["content_sha256"] == expected
            old = read_omop(generated, out, tables=READ, visits="time", overwrite=True).header[
                "content_sha256"
            ]
        else:
            assert EventStore(out, verify=True).header["content_sha256"] in (old, expected)
    store = read_omop(generated, out, tables=READ, overwrite=True)
    assert store.header["content_sha256"] == expected
    assert EventStore(out, verify=True).header["content_sha256"] == expected
    assert [path.name for path in tmp_path.iterdir()] in (
        ["store", "expected"],
        ["expected", "store"],
    )


def test_memory_does_not_grow_with_the_database(tmp_path):
    peaks, grown = [], []
    for rows in (40_000, 400_000):
        path = generate(tmp_path / f"{rows}.duckdb", rows)
        options = {"rows_per_part": 20_000, "memory_limit": "100MB"}
        _, before, after = finished(start(path, tmp_path / f"{rows}", **options))
        peaks.append(after)
        grown.append(after - before)
    assert peaks[1] <= 1.3 * peaks[0]
    assert grown[1] <= grown[0] + 64 * 1024  # KiB; of what is there before reading, nothing grows
