"""Build backend: setuptools, with the torch of the environment that is being installed into.

Under build isolation pip runs the build in a fresh environment that holds only
``build-system.requires``. Listing torch there would download a second torch, of another version
and several GB large. ``sysconfig`` still names the user's own site-packages, so the build looks for
torch there first and asks for one only where there is none.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the rest of the interface, unchanged)
    build_sdist,
    get_requires_for_build_sdist,
)


def _reach_installed_torch() -> bool:
    """Make the torch of the target environment importable; say whether there is one."""
    if importlib.util.find_spec("torch") is not None:
        return True
    for folder in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        if folder not in sys.path:
            sys.path.append(folder)  # last: what the isolated environment holds comes first
    return importlib.util.find_spec("torch") is not None


def _torch_requirement() -> list[str]:
    return [] if _reach_installed_torch() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


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
