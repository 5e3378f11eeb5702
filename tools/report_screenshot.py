"""Pictures of a report's page in light, in dark and on a phone, by headless Chromium.

    python tools/report_screenshot.py artifacts/smollm2-arm-int4 docs

writes report-light.png, report-dark.png and report-phone.png. Chromium (Debian: ``apt-get install chromium``) draws
with the fonts that are installed: ``fonts-inter`` looks as most systems' own face does. The pictures are made small by
Pillow (``pip install pillow``).
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Literal

import browser

from compress.report import html
from compress.report import json as report_json

#: Name, width in CSS pixels, scheme, and how much of the page is shown.
PICTURES: tuple[tuple[str, int, Literal["light", "dark"], int | None], ...] = (
    ("light", 1120, "light", None),
    ("dark", 1120, "dark", 1500),
    ("phone", 360, "light", 2400),
)
MAX_BYTES = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="an artifact with a report, or a report.json")
    parser.add_argument("output", type=Path, help="the folder for the pictures")
    options = parser.parse_args()
    executable = browser.find()
    if executable is None:
        sys.exit("error: Chromium is not installed\n  try: apt-get install chromium")
    with tempfile.TemporaryDirectory() as place, browser.browser(executable) as running:
        page = Path(place) / html.NAME
        page.write_text(_page(options.artifact), encoding="utf-8")
        tab = running.page()
        for name, width, scheme, height in PICTURES:
            tab.open(page, width=width, scheme=scheme)
            picture = _small(tab.picture(height))
            if len(picture) > MAX_BYTES:
                sys.exit(f"error: the {name} picture has {len(picture):,} bytes, at most {MAX_BYTES:,} were wanted")
            (options.output / f"report-{name}.png").write_bytes(picture)
            print(f"{name}: {len(picture):,} bytes")


def _small(picture: bytes) -> bytes:
    """Return a PNG with a palette: pages have few colours, and letters need not have every shade of grey."""
    from PIL import Image

    made = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        made, format="PNG", optimize=True
    )
    return made.getvalue()


def _page(given: Path) -> str:
    directory = given if given.is_dir() else given.parent
    path = directory / "manifest.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return html.page(report_json.read(directory / "report.json" if given.is_dir() else given), record)


if __name__ == "__main__":
    main()
