"""docs/losses.md: its Python runs as printed, it names every public loss, and what it says of
pycox is so."""

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


def test_the_python_runs():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(block, names)


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
