"""docs/migrate.md: its Python runs, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "migrate.md").read_text()


def test_the_python_runs_and_prints_what_the_page_says(capsys):
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    (printed,) = re.findall(r"```\n(accelerate: .*?)```", PAGE, re.DOTALL)
    assert capsys.readouterr().out == printed
