"""Linear layers whose bits do not depend on the number of threads."""
