"""The sweep's command line with quick exports of tiny models; see :mod:`quick_export`."""

from __future__ import annotations

import sys
from pathlib import Path

from compress import cli
from compress.fleet import jobs

if __name__ == "__main__":
    jobs.LAUNCHER = (str(Path(__file__).with_name("quick_export.py")),)
    cli.main(sys.argv[1:])
