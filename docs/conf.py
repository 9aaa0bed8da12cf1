"""How Sphinx builds the documentation; ``docs/run`` calls it.

The source folder is the clone itself, so that one relative link between pages, to the README or to
a results page is right on the site and on the repository's page. The notebook is executed anew,
whatever outputs are stored in it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# for the process that executes the notebook
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

project = "ehrseq_fast"
author = "the authors of ehrseq_fast"
(release,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
version = release

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/results/*.md",
]
exclude_patterns = [".venv*", "build", ".git", "**/.ipynb_checkpoints"]

myst_heading_anchors = 4
# docs/migrate.md and others begin with ## sections of their own, the README has two levels skipped
suppress_warnings = ["myst.header"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# Signatures name the arguments; dtypes and shapes, which types do not tell, are in the docstrings.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"ehrseq_fast {release}"
html_copy_source = False
html_extra_path = ["site"]  # the root of the site leads to docs/index.html
