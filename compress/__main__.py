"""``python -m compress``: the same as the ``compress`` script."""

from compress.cli import main

main()
