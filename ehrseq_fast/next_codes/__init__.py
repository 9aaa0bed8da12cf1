"""The binary cross-entropy of a visit's codes over a vocabulary."""

from .module import NextCodesLoss
from .op import next_codes_bce

__all__ = ["NextCodesLoss", "next_codes_bce"]
