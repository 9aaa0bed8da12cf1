"""The survival losses in Triton: ``kernel_nll.py`` and ``kernels_scale.py`` hold the kernels, of
functions in ``rows.py`` and ``terms.py``; ``launch_*.py`` the operators that launch them. Importing
this registers the operators."""

from . import launch_nll, launch_scale  # noqa: F401
