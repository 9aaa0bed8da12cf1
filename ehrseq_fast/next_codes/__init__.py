"""The binary cross-entropy of a visit's codes over a vocabulary."""
