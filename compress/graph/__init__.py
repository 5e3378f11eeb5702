"""Graphs: a skeleton without weights, rewrite rules one a file, and quantized nodes that read planned bytes."""
