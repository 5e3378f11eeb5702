"""Pruning: what is cut out of a model, and what is mended afterwards."""
