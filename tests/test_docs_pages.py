"""The pages of docs/: their Python runs and prints what they say, their commands and files are
accepted, and what they list is complete.

A block marked ``python`` is run, all of a page in one namespace and an empty folder; a block marked
``text`` that follows it is what it prints. ``py`` is Python that is not run: a comment before the
block, or in the page, says why.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

from ehrseq_fast import backend
from ehrseq_fast.data import FirstEvent

from . import docs_records
from .extras import needs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FENCED = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
# What a page's code finds in its folder, and the extras that this takes.
RECORDS = {
    "records.md": docs_records.of_records,
    "tasks.md": docs_records.of_store,
    "train.md": docs_records.of_store,
}
EXTRAS = {
    "records.md": ("meds", "omop"),
    "tasks.md": ("meds",),
    "train.md": ("meds", "train", "metrics"),
    "evaluate.md": ("metrics", "train"),
    "migrate.md": ("metrics",),
    "trainers.md": ("trainers",),
}
NOT_RUN = re.compile(r"<!-- not run: .+? -->\n```py\n|<!-- its py blocks are not run: .+? -->")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks, those within lists without their indentation."""
    found = FENCED.findall((DOCS / page).read_text())
    return [(kind, re.sub(f"^{margin}", "", text, flags=re.M)) for margin, kind, text in found]


def prose(page: str) -> str:
    """All but the fenced blocks."""
    return FENCED.sub("", (DOCS / page).read_text())


def with_code(kind: str) -> list:
    pages = [page for page in PAGES if any(kind == found for found, _ in blocks(page))]
    return [pytest.param(page, marks=needs(*EXTRAS.get(page, ()))) for page in pages]


@pytest.mark.parametrize("page", with_code("python"))
def test_the_python_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    RECORDS.get(page, lambda folder: None)(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names, printed = {"__name__": page}, None
    for number, (kind, text) in enumerate(blocks(page)):
        if kind == "python":
            code = compile(text, f"{page}, block {number}", "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            printed = out.getvalue()
        elif kind == "text" and printed is not None:
            assert printed == text, f"{page}, block {number}"
        if kind != "python":
            printed = None


def test_all_other_python_says_why_it_is_not_run():
    for page in PAGES:
        text = (DOCS / page).read_text()
        of_page = "<!-- its py blocks are not run: " in text
        unmarked = len(re.findall(r"^ *```py$", text, re.M)) - len(NOT_RUN.findall(text))
        assert of_page or unmarked == 0, page


def test_only_known_languages():
    """A typing error in one would leave a block out."""
    known = {"python", "py", "text", "sh", "bash", "yaml", "diff", "cpp", ""}
    known |= {"{toctree}", "{eval-rst}"}
    assert {kind for page in PAGES for kind, _ in blocks(page)} <= known


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in prose(p)])
def test_the_examples_give_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(DOCS / page), module_relative=False)
    assert result.failed == 0 < result.attempted


@needs("train")
@pytest.mark.parametrize("page", with_code("sh"))
def test_the_commands_are_accepted(page):
    """As far as their parsers: what they do has tests of its own."""
    program = import_module("ehrseq_fast.cli.main")  # the package has its function by that name
    from ehrseq_fast.cli import train
    from ehrseq_fast.training import RunConfig

    for kind, text in blocks(page):
        for line in text.splitlines() if kind == "sh" else ():
            words = shlex.split(line, comments=True)
            if "ehrseq-fast" in words[:1]:
                given = words[1:]
            elif "ehrseq_fast" in words and "-m" in words:
                given = words[words.index("ehrseq_fast") + 1 :]
            else:
                assert not words or is_there(words), f"{page}: {line}"
                continue
            if given[0] != "train":
                program._parser().parse_args(given)
            elif given[1:] != ["--help"]:
                train._parser(RunConfig).parse_args(given[1:])


def is_there(words: list[str]) -> bool:
    """Whether a command is pip's, or one of this repository."""
    if words[0] == "pip":
        return words[1] == "install"
    if words[:2] == ["python", "-m"]:
        module = Path(*words[2].split("."))
        return words[2] == "pytest" or any(
            (ROOT / path).exists() for path in (module.with_suffix(".py"), module / "__main__.py")
        )
    return os.access(ROOT / words[0], os.X_OK)


@needs("train")
@pytest.mark.parametrize("page", with_code("yaml"))
def test_the_files_are_accepted(page):
    import yaml

    for kind, text in blocks(page):
        if kind == "yaml":
            assert FirstEvent.from_dict(yaml.safe_load(text))


def test_the_pages_link_to_what_is_there():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(page)):
            assert ((DOCS / page).parent / link).exists(), f"{page}: {link}"


def test_every_page_is_in_the_contents():
    listed = set()
    for page in PAGES:
        for kind, text in blocks(page):
            if kind == "{toctree}":
                folder = (DOCS / page).parent
                entries = [line for line in text.splitlines() if line and line[0] != ":"]
                listed |= {(folder / f"{entry}.md").resolve() for entry in entries}
    assert {DOCS / page for page in PAGES} - listed == {DOCS / "index.md"}


def test_the_environment_variables_are_all_told():
    """Those that a user may set; tests and builds have others among themselves."""
    text = (DOCS / "backends.md").read_text()
    sources = [*(ROOT / "ehrseq_fast").rglob("*.py"), ROOT / "setup.py"]
    sources += (ROOT / "csrc").rglob("*.h")
    found = {name for p in sources for name in re.findall(r"EHRSEQ_FAST_[A-Z_]+", p.read_text())}
    own = {"EHRSEQ_FAST_BUILD_FLAGS", "EHRSEQ_FAST_PREBUILT", "EHRSEQ_FAST_NO_EVENTS"}
    for name in found - own:
        assert f"`{name}" in text, f"docs/backends.md: add {name}"
    for name in backend.BACKENDS:
        assert f"| `{name}` |" in text
