"""The levels of docs/from-ehrsequencing.md: its diffs lead from one program to the next, and all of
these train alike; the script that measures them compares before it times."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

from benchmarks import migration

PAGE = (Path(__file__).parent.parent / "docs" / "from-ehrsequencing.md").read_text()


def patched(program: str, diff: str) -> str:
    """The program after a diff, whose hunks are parted by ``@@``."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(x[1:] for x in lines if x[0] in " " + sign) for sign in "-+")
        assert program.count(before) == 1, before
        program = program.replace(before, after)
    return program


def test_each_diff_of_the_page_trains_alike():
    blocks = re.findall(r"```(python|diff)\n(.*?)```", PAGE, re.DOTALL)
    program = blocks[0][1]
    expected: dict = {}
    exec(program, expected)
    diffs = [text for kind, text in blocks if kind == "diff"]
    assert len(diffs) == 4
    assert expected["losses"][4] < expected["losses"][0]  # of the same patients
    for diff in diffs:
        program = patched(program, diff)
        found: dict = {}
        exec(program, found)
        torch.testing.assert_close(
            torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-4, atol=1e-5
        )
    assert "model.loss(batch)" in program


def test_the_script_measures_the_levels_of_the_page(capsys):
    migration.main(["--quick", "--threads", str(torch.get_num_threads())])
    said = capsys.readouterr().out
    assert "found equal within" in said
    titles = re.findall(r"^\| (.+?) \| [\d.,]+ ms", said, re.MULTILINE)
    assert titles == re.findall(r"^\| (.+?) \| [\d.,]+ ms", PAGE, re.MULTILINE)
    assert len(titles) == 6


def test_a_level_that_computes_something_else_is_refused():
    data = migration.Data.of(migration.WORKLOADS["B"].draw(6, 0))
    plain, *_, last = migration.levels(data)
    wrong = replace(last, title="wrong", loss=lambda m, b: m.loss(b, censored_visit="included"))
    of = migration.batches(6, 3)
    size = migration.Size(len(data.records.vocabulary), 4, 8)
    assert migration.refuse_differences([plain, last], size, of) <= migration.TOLERANCE
    with pytest.raises(AssertionError, match=r"^wrong: max. relative difference"):
        migration.refuse_differences([plain, wrong], size, of)
