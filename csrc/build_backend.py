"""Build backend: setuptools, with the torch of the environment that is being installed into.

Under build isolation pip runs the build in a fresh environment that holds only
``build-system.requires``. Listing torch there would download a second torch, of another version
and several GB large. ``sysconfig`` still names the user's own site-packages, so the build looks for
torch there first and asks for one only where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the rest of the interface, unchanged)
    build_sdist,
    get_requires_for_build_sdist,
)


def find_compiler() -> str | None:
    """The C++ compiler that setuptools will call, or None."""
    return shutil.which(os.environ.get("CXX", "").split(" ")[0] or "c++") or shutil.which("g++")


def _target_site_packages() -> list[str]:
    """Where the environment that is being installed into keeps its packages."""
    folders = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists() and "include-system-site-packages = true" in config.read_text():
        folders.append(sysconfig.get_paths(vars={"base": sys.base_prefix})["purelib"])
    return folders


def _reach_installed_torch() -> bool:
    """Make the torch of the target environment importable; say whether there is one."""
    if importlib.util.find_spec("torch") is not None:
        return True
    for folder in _target_site_packages():
        # Appended, so that what the isolated environment holds comes first; .pth files are obeyed.
        site.addsitedir(folder)
    return importlib.util.find_spec("torch") is not None


def _torch_requirement() -> list[str]:
    """A torch to build against, only where there is none and something is going to be compiled."""
    compiles = (
        find_compiler() is not None
        and os.environ.get("EHRSEQ_FAST_CPP") != "0"
        and not os.environ.get("EHRSEQ_FAST_PREBUILT")  # only _batching is, which takes no torch
    )
    return ["torch>=2.10"] if compiles and not _reach_installed_torch() else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    torch = _torch_requirement()  # first: setup.py is run to answer the rest
    return build_meta.get_requires_for_build_wheel(config_settings) + torch


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    torch = _torch_requirement()
    return build_meta.get_requires_for_build_editable(config_settings) + torch


def prepare_metadata_for_build_wheel(directory: str, config_settings: Any = None) -> str:
    _reach_installed_torch()
    return build_meta.prepare_metadata_for_build_wheel(directory, config_settings)


def prepare_metadata_for_build_editable(directory: str, config_settings: Any = None) -> str:
    _reach_installed_torch()
    return build_meta.prepare_metadata_for_build_editable(directory, config_settings)


def build_wheel(directory: str, config_settings: Any = None, metadata: str | None = None) -> str:
    _reach_installed_torch()
    return build_meta.build_wheel(directory, config_settings, metadata)


def build_editable(directory: str, config_settings: Any = None, metadata: str | None = None) -> str:
    _reach_installed_torch()
    return build_meta.build_editable(directory, config_settings, metadata)
