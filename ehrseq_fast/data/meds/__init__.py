"""MEDS, the Medical Event Data Standard: datasets read into a store, and stores written as such."""

from .read import read_meds
from .write import to_meds

__all__ = ["read_meds", "to_meds"]
