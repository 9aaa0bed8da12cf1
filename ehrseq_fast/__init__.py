"""EHR sequence models that cost what their real codes cost."""

from .backend import use_backend

__all__ = ["use_backend"]
