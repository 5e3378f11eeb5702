"""Runs ``compress`` for a sweep: ``python -m compress.fleet.launch PARENT WORDS...``.

The kernel ends it with the process that started it, however that one ends: a job never outlives its sweep.
"""

from __future__ import annotations

import sys

from compress.children import follow_parent

if __name__ == "__main__":
    follow_parent(int(sys.argv[1]))
    from compress.cli import main

    main(sys.argv[2:])
