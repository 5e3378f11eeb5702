"""Structured pruning: what is cut, how it is chosen, and how the rest makes up for it."""
