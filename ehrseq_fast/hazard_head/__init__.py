"""The hazard head: hidden states of visits to hazards."""
