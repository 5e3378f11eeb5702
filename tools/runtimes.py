"""Install the other runtimes that artifacts must load in, each apart from this environment, into the cache folder.

- transformers.js with its onnxruntime for Node and for browsers, from the npm registry (Node 18 or later is needed);
- optimum's ONNX Runtime classes, which live on transformers 4 and so need an environment of their own.

Called as ``python tools/runtimes.py``; ``make test-runtimes`` does, and then runs the tests marked ``runtimes``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from compress.environments import Environment, cache_directory, run
from compress.errors import CompressError, ProviderError

#: Pinned together: the browser needs the very onnxruntime-web that transformers.js was bundled with.
NPM_PACKAGES = ("@huggingface/transformers@4.3.1",)
OPTIMUM = Environment(
    "optimum", ("torch==2.13.0", "transformers==4.57.6", "optimum-onnx==0.1.0", "onnxruntime==1.31.1")
)
_STAMP = "installed"
_OLDEST_NODE = 18


def javascript_folder() -> Path:
    """Return where the npm packages are (``node_modules`` in it); the name changes with the pins."""
    told = hashlib.sha256("\n".join(NPM_PACKAGES).encode()).hexdigest()[:12]
    return cache_directory() / "environments" / f"javascript-{told}"


def javascript_missing() -> str | None:
    """Return why artifacts cannot be run in JavaScript here, ``None`` where they can."""
    node = shutil.which("node")
    if node is None:
        return "node is not installed"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    if not version.startswith("v") or int(version[1:].split(".")[0]) < _OLDEST_NODE:
        return f"node {_OLDEST_NODE} or later is needed, this is {version or 'none'}"
    return None if (javascript_folder() / _STAMP).is_file() else "make test-runtimes installs transformers.js"


def install_javascript() -> None:
    """Install the npm packages, unless they are there.

    Raises:
        ProviderError: There is no npm, or it refuses.
    """
    folder = javascript_folder()
    if (folder / _STAMP).is_file():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise ProviderError("npm is not installed", hint=f"install Node {_OLDEST_NODE} or later")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "package.json").write_text('{"private": true}\n')
    # Its installation scripts would download a GPU runtime.
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", *NPM_PACKAGES]
    run(command, what=f"npm cannot install {', '.join(NPM_PACKAGES)}", cwd=folder)
    (folder / _STAMP).write_text("\n".join(NPM_PACKAGES) + "\n")


def main() -> int:
    """Install what is missing; a runtime that cannot be had is said, and is exit code 4."""
    code = 0
    for name, install in (("javascript", install_javascript), ("optimum", lambda: OPTIMUM.install(_say))):
        try:
            install()
            _say(f"{name}: installed")
        except CompressError as error:
            _say(f"{name}: {error}")
            code = error.exit_code
    return code


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    sys.exit(main())
