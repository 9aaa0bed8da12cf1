"""Results files: refused before the run where they cannot be written, never left half written."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import files
from benchmarks.__main__ import main


@pytest.fixture
def nothing_runs(monkeypatch):
    """A run that gets as far as measuring anything has noticed too late."""
    from benchmarks import main_job, suite

    def measured(*_, **__):
        raise AssertionError("it was measured before the file was known to be writable")

    monkeypatch.setattr(suite, "measure_sections", measured)
    monkeypatch.setattr(main_job, "eunomia_records", measured)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("command", [[], ["ops"], ["all", "--quick"]], ids=str)
@pytest.mark.parametrize("place", ["a folder", "under a file", "/proc/none/results.json"])
def test_an_out_that_cannot_be_written_is_refused_before_the_run(tmp_path, command, place):
    pytest.importorskip("tqdm")
    (tmp_path / "file").write_text("")
    out = {"a folder": tmp_path, "under a file": tmp_path / "file" / "x.json"}.get(place, place)
    with pytest.raises(SystemExit, match="cannot write") as refused:
        main([*command, "--out", str(out)])
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_file_or_folder_is_refused(tmp_path):
    path = tmp_path / "old.json"
    path.write_text("old")
    path.chmod(stat.S_IREAD)
    with pytest.raises(SystemExit, match="read-only"):
        files.refuse_unwritable(path)
    tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
    with pytest.raises(SystemExit, match="cannot write"):
        files.refuse_unwritable(tmp_path / "new.json")
    tmp_path.chmod(0o700)


def test_finding_out_leaves_no_trace(tmp_path):
    path = tmp_path / "new" / "results.json"
    files.refuse_unwritable(path)
    assert list(path.parent.iterdir()) == []
    path.write_text("old")
    files.refuse_unwritable(path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    files.refuse_unwritable(None)


# In a process of its own: pytest's own output may go to a file, which the limit would cut as well.
FULL_DISK = """
import pathlib, resource, sys
from benchmarks import results
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    results.write({"rows": [{"a": 1}] * 100}, pathlib.Path(sys.argv[1]))
except OSError as error:
    sys.exit(3 if "too large" in str(error) else 4)
"""


@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_the_old_file_or_none(tmp_path, old):
    path = tmp_path / "results.json"
    if old is not None:
        path.write_text(old)
    root = Path(__file__).parents[1]
    written = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], cwd=root, check=False)
    assert written.returncode == 3
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if old is None else [old])


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def interrupted():
        with files.replacing(path) as unfinished:
            unfinished.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_written_files_keep_their_mode_and_links(tmp_path):
    path, link = tmp_path / "results.json", tmp_path / "link.json"
    files.write_text(path, "one")
    assert path.stat().st_mode & 0o777 == 0o666 & ~files._umask()
    path.chmod(0o600)
    link.symlink_to(path)
    files.write_text(link, "two")
    assert link.is_symlink()
    assert path.read_text() == "two"
    assert path.stat().st_mode & 0o777 == 0o600


def test_devices_are_written_to_not_replaced():
    files.refuse_unwritable(files.Path("/dev/null"))
    files.write_text(files.Path("/dev/null"), "nothing")
    assert files._is_special(files.Path("/dev/null"))
