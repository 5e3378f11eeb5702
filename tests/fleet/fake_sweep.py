"""The sweep's command line with :mod:`fake_export` in the place of exports: for tests that kill it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from compress import cli
from compress.fleet import jobs, run

if __name__ == "__main__":
    jobs.LAUNCHER = ("-S", str(Path(__file__).with_name("fake_export.py")))
    peaks = json.loads(os.environ.get("TEST_PEAKS", "{}"))
    run.predicted_peak = lambda job, threads, limit: peaks.get(job.name, 1_000)
    cli.main(sys.argv[1:])
