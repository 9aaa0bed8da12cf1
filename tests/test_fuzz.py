"""The fuzzer knows each operator, repeats itself, and tells a defect, a crash and a hang."""

from __future__ import annotations

import sys

import pytest
import torch

from ehrseq_fast import operations

from .fuzz import __main__ as fuzz
from .fuzz import batches, operators, runner
from .fuzz.arguments import Call, Draw, change

pytestmark = pytest.mark.usefixtures("compiled")


def test_every_operator_is_fuzzed():
    names = {operator.name for operator in operations.operators()}
    assert names == set(operators.known_operators())
    assert names == {*runner.TARGETS} - {*batches.BUILDERS}


def judged(run, *arguments, expected=None, **options):
    return runner.judged(Call(run, list(arguments), expected, **options), is_builder=False)


def test_what_is_no_users_error_is_a_defect():
    def refuses(_):
        raise ValueError("x: must be y, got z")

    assert judged(refuses, 1, changes=["argument 0 changed"]) == "refused"
    with pytest.raises(runner.Defect, match="valid arguments are refused"):
        judged(refuses, 1)
    with pytest.raises(runner.Defect, match="KeyError"):
        judged(lambda x: {}[x], 1, changes=["argument 0 changed"])


def test_a_wrong_result_is_a_defect():
    assert judged(lambda: torch.ones(3), expected=lambda: torch.ones(3)) == "right"
    with pytest.raises(runner.Defect, match="result 0"):
        judged(lambda: torch.ones(3), expected=lambda: torch.tensor([1.0, 1.0, 1.01]))


def test_unwritten_memory_in_a_result_is_a_defect():
    unwritten = torch.full((3,), -1, dtype=torch.int32).view(torch.float32)
    changed = {"changes": ["argument 0 changed"], "values_kept": False}
    assert judged(lambda x: x * float("nan"), torch.ones(3), **changed) == "computed"
    with pytest.raises(runner.Defect, match="unwritten memory"):
        judged(lambda x: unwritten, torch.ones(3), **changed)


def test_a_case_is_the_same_every_time():
    for name in operators.known_operators():
        described = set()
        for _ in range(2):
            draw = Draw(7)
            call = operators.call_of(name, draw)
            change(draw, call)
            described.add(call.describe())
        assert len(described) == 1


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("import os; input(); os.abort()", "crashed (exit status -6)"),
        ("import os; print('case right', flush=True); input(); os._exit(3)", None),
        ("import time; input(); time.sleep(60)", "did not return within 1 s"),
    ],
)
def test_a_crash_and_a_hang_are_told(monkeypatch, program, how):
    monkeypatch.setattr(fuzz, "HANGS_AFTER_S", 1.0)
    monkeypatch.setattr(fuzz, "environment", lambda: None)
    child = fuzz.Child((sys.executable, "-c", program))
    outcome = child.run("visit_pool:0")
    assert outcome == "right" if how is None else how in outcome
    child.close()
