"""Rewrite rules, one a file; each opens with its before -> after and returns how often it fired."""
