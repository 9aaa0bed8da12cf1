"""Reading MEDS by several processes, in bounded memory, and through crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="pip install 'ehrseq_fast[meds]'")
pq = pytest.importorskip("pyarrow.parquet")

from ehrseq_fast.data import EventStore, read_meds  # noqa: E402  (after what may be missing)

from .generated_meds import write_generated_meds  # noqa: E402
from .test_event_store import contents  # noqa: E402

ROOT = Path(__file__).parent.parent
READS = """
import json, re, sys
import pyarrow.parquet
from ehrseq_fast.data import read_meds

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

before = peak()
store = read_meds(sys.argv[1], sys.argv[2])
print(json.dumps([store.header["counts"]["events"], before, peak()]))
"""


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    write_generated_meds(tmp_path / "meds", 500, shards=2)
    alone = read_meds(tmp_path / "meds", tmp_path / "alone")
    four = read_meds(tmp_path / "meds", tmp_path / "four", workers=4)
    assert contents(alone.path) == contents(four.path)


def test_ranks_give_the_same_bytes(tmp_path):
    write_generated_meds(tmp_path / "meds", 500, shards=2)
    alone = read_meds(tmp_path / "meds", tmp_path / "alone")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom ehrseq_fast.data import read_meds\n"
        "said = read_meds(sys.argv[1], sys.argv[2]).header['content_sha256']\n"
        "os.write(1, f'{said}\\n'.encode())\n"  # in one piece: both ranks write to one pipe
    )
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = run(*ranks, program, tmp_path / "meds", tmp_path / "ranks", PYTHONPATH=str(ROOT)).split()
    assert said == [alone.header["content_sha256"]] * 2
    assert contents(alone.path) == contents(tmp_path / "ranks")


def repeated(table, times, path):
    """The table's subjects again and again, under other identifiers, in one file."""
    path.parent.mkdir(parents=True)
    ids = table["subject_id"].to_numpy()
    with pq.ParquetWriter(path, table.schema) as writer:
        for number in range(times):
            writer.write_table(table.set_column(0, "subject_id", pa.array(ids + number * 2**41)))


def test_memory_does_not_grow_with_the_input(tmp_path):
    """Ten times the rows, in one file: at most 1.3 times the memory, that of the imports left out.
    Both are more than are held at a time."""
    write_generated_meds(tmp_path / "meds", 12_000, shards=1)
    table = pq.read_table(tmp_path / "meds" / "data" / "train" / "0.parquet")
    grown = []
    for times in (2, 20):
        repeated(table, times, tmp_path / str(times) / "data" / "0.parquet")
        said = run("-c", READS, tmp_path / str(times), tmp_path / f"store{times}")
        events, before, peak = json.loads(said)
        assert events > 200_000 * times
        grown.append(peak - before)
    assert grown[1] <= 1.3 * grown[0], grown


def test_a_large_subject_and_many_batches(tmp_path, monkeypatch):
    """One subject of more rows than a batch, between others."""
    n = 300_000
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "subject_id": np.repeat([1, 2, 3], [5, n, 5]),
            "time": pa.array(np.arange(n + 10) * 1_000_000).cast(pa.timestamp("us")),
            "code": pa.array(rng.integers(0, 50, n + 10).astype(str)).cast(pa.string()),
        }
    )
    (tmp_path / "meds" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "meds" / "data" / "0.parquet")
    store = read_meds(tmp_path / "meds", tmp_path / "store", visits="time")
    assert np.diff(store.patient_offsets).tolist() == [5, n, 5]
    codes = np.array(store.codes_of)[store.codes]
    assert (codes == table["code"].to_numpy()).all()


def test_a_crash_leaves_the_old_store_or_the_new_one(tmp_path):
    """Kills at random moments of reading, and before every step of replacing a store."""
    shared = Path("/dev/shm")  # fsync, of which there are many, is fast there
    folder = shared / f"ehrseq_fast-{os.getpid()}" if os.access(shared, os.W_OK) else tmp_path
    folder.mkdir(exist_ok=True)
    try:
        said = run("-W", "ignore", "-m", "tests.store_crashes", folder)
    finally:
        subprocess.run(["rm", "-rf", folder / "random", folder / "workers"], check=False)
        subprocess.run(["rm", "-rf", folder / "exchanged", folder / "renamed"], check=False)
        if folder != tmp_path:
            folder.rmdir()
    assert "crashed before each of" in said


def test_a_store_opens_where_nothing_can_be_written(tmp_path):
    write_generated_meds(tmp_path / "meds", 20)
    out = tmp_path / "place" / "store"
    store = read_meds(tmp_path / "meds", out)
    names = sorted(p.name for p in out.parent.iterdir())
    for path in (*out.iterdir(), out, out.parent):
        path.chmod(0o444 if path.is_file() else 0o555)
    try:
        assert EventStore(out, verify=True).n_patients == store.n_patients == 20
        assert sorted(p.name for p in out.parent.iterdir()) == names
    finally:
        out.parent.chmod(0o755)
        out.chmod(0o755)
