"""``compress`` as a sweep starts it, with the skeletons that this test run has kept: the real export, in a second."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compress.children import follow_parent  # noqa: E402

if __name__ == "__main__":
    follow_parent(int(sys.argv[1]))
    from compress.cli import main
    from compress.graph import skeleton
    from tiny_models import Skeletons

    skeleton.build_skeleton = Skeletons(Path(os.environ["TEST_SKELETONS"])).build  # type: ignore[assignment]
    main(sys.argv[2:])
