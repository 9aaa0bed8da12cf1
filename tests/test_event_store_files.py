"""A store's files: written whole or not at all, one writer at a time, refused where damaged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ehrseq_fast.data import EventStore, write_store
from ehrseq_fast.data.store import atomic, event_store, new_store

from .test_event_store import chunk, part, store_of


def test_a_store_is_not_written_over(tmp_path):
    store = store_of(tmp_path, chunk())
    again = part(tmp_path / "again", chunk(), rule="time")
    with pytest.raises(FileExistsError, match=r"store: exists; overwrite=True \(--overwrite\)"):
        write_store(store.path, [again], source={})
    assert EventStore(store.path).visit_rule == "day"
    assert write_store(store.path, [again], source={}, overwrite=True).visit_rule == "time"
    assert store.codes.tolist() == [0, 1, 0, 2]  # the old files are still mapped
    for name, make in (("file", Path.touch), ("folder", Path.mkdir)):
        path = tmp_path / name
        make(path)
        if name == "folder":
            (path / "precious").touch()
        with pytest.raises(FileExistsError, match="exists and is not an EventStore"):
            write_store(path, [again], source={}, overwrite=True)
        assert path.exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    write_store(empty, [again], source={})
    link = tmp_path / "link"
    link.symlink_to(empty)
    write_store(link, [again], source={"kind": "other"}, overwrite=True)
    assert link.is_symlink()
    assert EventStore(empty).header["source"] == {"kind": "other"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_one_writer_at_a_time(tmp_path):
    path = part(tmp_path / "part", chunk())
    with new_store(tmp_path / "store", overwrite=False) as folder:
        with pytest.raises(RuntimeError, match="another process is writing an EventStore there"):
            write_store(tmp_path / "store", [path], source={})
        write_store(folder, [path], source={})
    assert EventStore(tmp_path / "store").n_patients == 3


def test_what_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder.new / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_store(tmp_path / "store", overwrite=False) as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_lies_between_two_renames_is_found(tmp_path, monkeypatch):
    """Also where it cannot be renamed back."""
    store = store_of(tmp_path, chunk())
    store.path.rename(tmp_path / ".store.replaced-1")

    def no_lock(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_lock", no_lock)
        assert EventStore(tmp_path / "store").n_patients == 3
        assert not (tmp_path / "store").exists()
    assert EventStore(tmp_path / "store").path == tmp_path / "store"
    assert not (tmp_path / ".store.replaced-1").exists()


def edit_header(path, change):
    header = json.loads((path / "store.json").read_text())
    change(header)
    (path / "store.json").write_text(json.dumps(header))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change_array(path, at, value):
    array = np.load(path)
    array[at] = value
    np.save(path, array)


DAMAGES = {
    "no header": (lambda p: (p / "store.json").unlink(), FileNotFoundError, "has no store.json"),
    "half a header": (
        lambda p: (p / "store.json").write_bytes((p / "store.json").read_bytes()[:50]),
        ValueError,
        "store.json: expected an EventStore's header as JSON",
    ),
    "another format": (
        lambda p: edit_header(p, lambda h: h.update(format="x")),
        ValueError,
        "expected the format 'ehrseq_fast.EventStore', got 'x'",
    ),
    "a later version": (
        lambda p: edit_header(p, lambda h: h.update(version=2)),
        ValueError,
        "expected version 1 of the format, got 2",
    ),
    "an entry missing": (
        lambda p: edit_header(p, lambda h: h.pop("counts")),
        ValueError,
        "expected the entry 'counts'",
    ),
    "an array unlisted": (
        lambda p: edit_header(p, lambda h: h["arrays"].pop("codes")),
        ValueError,
        "expected the array 'codes', it lists none",
    ),
    "an array missing": (
        lambda p: (p / "codes.npy").unlink(),
        FileNotFoundError,
        "codes.npy: missing, but store.json lists it",
    ),
    "an array cut off": (
        lambda p: (p / "codes.npy").write_bytes((p / "codes.npy").read_bytes()[:-1]),
        ValueError,
        "codes.npy: expected 144 bytes, got 143",
    ),
    "an array cut off in its header": (
        lambda p: (p / "codes.npy").write_bytes(b"\x93NUMPY"),
        ValueError,
        "codes.npy: not a readable .npy file",
    ),
    "another dtype": (
        lambda p: np.save(p / "codes.npy", np.zeros(4)),
        ValueError,
        r"codes.npy: expected <i4 \[4\], as store.json has it, got <f8 \[4\]",
    ),
    "another length": (
        lambda p: np.save(p / "codes.npy", np.zeros(5, np.int32)),
        ValueError,
        r"got <i4 \[5\]",
    ),
    "an array of objects": (
        lambda p: np.save(p / "codes.npy", np.array([None] * 4), allow_pickle=True),
        ValueError,
        "codes.npy: expected <i4",
    ),
    "other offsets": (
        lambda p: flip(p / "visit_offsets.npy", -8),
        ValueError,
        "visit_offsets.npy: expected offsets from 0 to 4, the length of codes, got 0 to 5",
    ),
    "offsets that fall": (
        lambda p: change_array(p / "patient_offsets.npy", 1, 4),
        ValueError,
        r"patient_offsets.npy: expected offsets that do not fall, got \d after 4 \(patient 1\)",
    ),
    "periods' offsets that fall": (
        lambda p: change_array(p / "period_offsets.npy", 1, 9),
        ValueError,
        r"period_offsets.npy: expected offsets that do not fall, got \d after 9 \(patient 1\)",
    ),
    "a split that there is not": (
        lambda p: change_array(p / "splits.npy", 2, 77),
        ValueError,
        r"splits.npy: expected splits from -1 to 1, got 77 \(patient 2\)",
    ),
    "a split below none": (
        lambda p: change_array(p / "splits.npy", 0, -9),
        ValueError,
        r"splits.npy: expected splits from -1 to 1, got -9 \(patient 0\)",
    ),
    "splits without names": (
        lambda p: edit_header(p, lambda h: h.update(split={})),
        ValueError,
        "store.json: expected an EventStore's header, got one that was changed: KeyError 'names'",
    ),
    "splits that are none": (
        lambda p: edit_header(p, lambda h: h.update(split=None)),
        ValueError,
        "store.json: expected an EventStore's header, got one that was changed: TypeError",
    ),
    "another visit rule": (
        lambda p: edit_header(p, lambda h: h.update(visit_rule=48)),
        ValueError,
        "store.json: expected SHA-256 .*: the file was changed",
    ),
    "names of splits exchanged": (
        lambda p: edit_header(p, lambda h: h["split"]["names"].reverse()),
        ValueError,
        "store.json: expected SHA-256 .*: the file was changed",
    ),
    "another size of the vocabulary": (
        lambda p: edit_header(p, lambda h: h["vocabulary"].update(size=9999)),
        ValueError,
        "store.json: expected SHA-256 .*: the file was changed",
    ),
    "a dictionary cut off": (
        lambda p: (p / "dictionary.json").write_bytes(b"{}"),
        ValueError,
        "dictionary.json: expected .* bytes, got 2",
    ),
    "no dictionary": (
        lambda p: (p / "dictionary.json").unlink(),
        FileNotFoundError,
        "dictionary.json: missing",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_store_is_refused(tmp_path, damage, error, message):
    path = store_of(tmp_path, chunk()).path
    damage(path)
    with pytest.raises(error, match=message):
        EventStore(path)


@pytest.mark.parametrize("name", ["codes.npy", "visit_times.npy", "dictionary.json"])
def test_verify_finds_a_changed_byte(tmp_path, name):
    path = store_of(tmp_path, chunk()).path
    EventStore.open(path, verify=True)
    flip(path / name, -8)
    EventStore.open(path)
    with pytest.raises(ValueError, match=rf"{name}: expected SHA-256 .*: the file was changed"):
        EventStore.open(path, verify=True)


def test_nothing_to_open(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none"):
        EventStore(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no store\.json"):
        EventStore(tmp_path)


def test_an_error_of_the_disk_names_the_file(tmp_path):
    """Files may be no larger than 4,096 bytes: what cannot be written, and nothing is left."""
    program = tmp_path / "program.py"
    program.write_text(
        "import resource, signal, sys\n"
        "import numpy as np\n"
        "from ehrseq_fast.data import PartWriter, SubjectChunk, write_store\n"
        "n = 3000\n"
        "part = PartWriter(sys.argv[1] + '/part')\n"
        "part.add(SubjectChunk(np.arange(n), np.arange(n), np.zeros(n, 'M8[us]'), ['A'] * n))\n"
        "part.finish()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    write_store(sys.argv[1] + '/store', [sys.argv[1] + '/part'], source={})\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, program, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert re.search(r"File too large: '.*/new/\w+\.npy'", done.stdout), done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "program.py"]


def test_a_store_replaced_while_it_is_opened(tmp_path, monkeypatch):
    """The header of one and arrays of the other are never taken together."""
    store = store_of(tmp_path, chunk())
    other = part(tmp_path / "other", chunk(event_codes=["A", "B", "C", "D", "SEX", "C"]))
    opened, read = [], event_store.open_array

    def replacing(folder, name, entry):
        opened.append(name)
        if len(opened) == 3:
            write_store(store.path, [other], source={}, overwrite=True)
        return read(folder, name, entry)

    monkeypatch.setattr(event_store, "open_array", replacing)
    again = EventStore(store.path, verify=True)
    assert len(opened) > 30  # twice
    assert again.codes_of == ("A", "B", "C", "D", "SEX")
    with pytest.raises(ValueError, match="or the store replaced after it was opened"):
        store.codes_of  # noqa: B018  (reads the file)
