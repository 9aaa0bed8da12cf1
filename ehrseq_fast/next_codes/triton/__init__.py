"""The loss of a visit's codes in Triton: ``kernel.py`` holds the kernel of a chunk of logits,
``launch.py`` the operator. Importing this registers it."""

from . import launch  # noqa: F401
