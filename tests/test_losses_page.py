"""docs/losses.md names every public loss, and what it says of pycox is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ehrseq_fast

from . import pycox_files

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "losses.md").read_text()
# how names of losses end
_LOSS = re.compile(r"(_(nll|loss|bce|entropy)|Loss)$")


def public_losses():
    """The package's functions and modules, and those of ``ehrseq_fast.losses``."""
    losses = vars(ehrseq_fast.losses)
    own = [n for n, v in losses.items() if getattr(v, "__module__", "") == "ehrseq_fast.losses"]
    found = {*ehrseq_fast.__all__, *own}
    return sorted(n for n in found if _LOSS.search(n) and not n.startswith("_"))


@pytest.mark.parametrize("name", public_losses())
def test_every_public_loss_is_named(name):
    assert re.search(rf"`(losses\.)?{name}`", PAGE), f"docs/losses.md: add {name}"


def test_the_logistic_hazard_of_pycox(monkeypatch):
    nll = pycox_files.load(monkeypatch, "models.loss").nll_logistic_hazard
    logits = torch.randn(50, 7) * 3
    times, seen = torch.randint(7, (50,)), torch.rand(50) < 0.4
    ours = ehrseq_fast.discrete_time_survival_nll(
        logits, times, seen, from_logits=True, censored_visit="included", reduction="none"
    )
    torch.testing.assert_close(ours, nll(logits, times, seen, reduction="none"))


@pytest.mark.parametrize("name", ["nll_pmf", "nll_mtlr", "nll_pmf_cr"])
def test_the_masses_over_time_of_pycox(monkeypatch, name):
    """With an epsilon of 0 the formulas are the same."""
    theirs = getattr(pycox_files.load(monkeypatch, "models.loss"), name)
    causes = name == "nll_pmf_cr"
    logits = torch.randn(50, 3, 7) if causes else torch.randn(50, 7)
    times, types = torch.randint(7, (50,)), torch.randint(4 if causes else 2, (50,))
    expected = theirs(logits, times, types, reduction="none", epsilon=0.0)
    if causes:
        function, given = ehrseq_fast.pmf_competing_risks_nll, logits.transpose(1, 2)
    else:
        function = ehrseq_fast.pmf_nll
        given = logits.flip(1).cumsum(1).flip(1) if name == "nll_mtlr" else logits
    torch.testing.assert_close(function(given, times, types, reduction="none"), expected)
