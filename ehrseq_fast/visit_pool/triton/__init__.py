"""Visit pooling in Triton: ``kernels_*.py`` hold the kernels, ``launch_*.py`` the operators that
launch them. Importing this registers the operators."""

from . import launch_attention, launch_gradient, launch_pool, launch_weights  # noqa: F401
