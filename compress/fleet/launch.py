"""Runs ``compress`` for a sweep: ``python -m compress.fleet.launch PARENT WORDS...``.

The kernel ends it with the process that started it, however that one ends: a job never outlives its sweep.
"""

from __future__ import annotations

import sys

from compress.validation.protocol import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    from compress.cli import main

    main(sys.argv[2:])
