"""Packaging: the data file, the manifest, and one file a target."""
