"""What most providers have in common: this Python, this onnxruntime, one session."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.contracts import CacheType, Evidence, Runtime, Scheme
from compress.environments import Environment
from compress.errors import ProviderError
from compress.providers._session import session_options

_BITS = (2, 4, 8)
_BLOCKS = (16, 32, 64, 128, 256)


class OrtProvider:
    """A provider that is built into an onnxruntime package.

    Attributes:
        package: The distribution that has it.
        environment: What has it where this Python has not; ``None``: this Python or nothing.
    """

    name = ""
    onnxruntime_name = ""
    static_shapes = False
    cache_device: str | None = None
    package = "onnxruntime"
    environment: Environment | None = None

    def runtime(self) -> Runtime:
        """Return this Python where it has the provider, else that of the environment.

        Raises:
            ProviderError: This machine cannot have it, or it is not installed; with what to do.
        """
        missing = self.missing()
        if missing is not None:
            raise ProviderError(missing, hint=self.remedy())
        if self.here():
            return Runtime((sys.executable,))
        assert self.environment is not None
        if not self.environment.installed:
            raise ProviderError(
                f"the {self.name} provider's runtime is not installed", hint=f"compress doctor --install {self.name}"
            )
        # Nothing of the user's own environment is looked up in the provider's.
        return Runtime((str(self.environment.python),), {"PYTHONPATH": ""})

    def missing(self) -> str | None:
        """Return what this machine lacks that no installation brings: a system, a driver; ``None`` if nothing."""
        return None

    def remedy(self) -> str | None:
        """Return what to do about that."""
        return None

    def here(self) -> bool:
        """Return whether this Python has it."""
        return self.environment is None

    def install(self, say: Callable[[str], None]) -> None:
        """Make the environment, if this machine needs and can have it.

        Raises:
            ProviderError: It cannot.
        """
        missing = self.missing()
        if missing is not None:
            raise ProviderError(missing, hint=self.remedy())
        if self.here() or self.environment is None:
            say(f"{self.name}: nothing to install")
        else:
            self.environment.install(say)

    def available(self) -> tuple[bool, str]:
        """Return whether this process's onnxruntime has it, and the version or the remedy."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            return False, f"onnxruntime cannot be imported ({error}): pip install {self.package}"
        if self.onnxruntime_name not in ort.get_available_providers():
            return False, f"onnxruntime {ort.__version__} was built without {self.onnxruntime_name}"
        return True, f"onnxruntime {ort.__version__}"

    def device(self) -> str:
        """Return the processor's name."""
        return processor()

    def evidence(self) -> Evidence:
        """Return ``measured``: the code runs on this machine's own hardware."""
        return "measured"

    def tokens_at_once(self) -> int | None:
        """Return ``None``: any number of new tokens."""
        return None

    def session(
        self, model: Path, options: Mapping[str, str], threads: int, provider_options: Mapping[str, str] | None = None
    ) -> Any:  # noqa: ANN401 - onnxruntime has no stubs
        """Return a session on this provider; see :class:`compress.contracts.Provider`.

        What the provider does not take falls to the CPU, where it shows in the placement: a session that refuses a
        graph as a whole would not say which nodes are to blame.

        Raises:
            ProviderError: It does not work here, refuses the model, or was silently left out by onnxruntime.
        """
        usable, reason = self.available()
        if not usable:
            raise ProviderError(f"the {self.name} provider does not work here", hint=reason)
        built = session_options(options, threads)
        chosen = {**self.defaults(), **(provider_options or {})}
        return self.opened(model, lambda ort: self.start(ort, model, built, chosen))

    def defaults(self) -> dict[str, str]:
        """Return the provider options that go without saying."""
        return {}

    def start(self, ort: Any, model: Path, options: Any, provider_options: Mapping[str, str]) -> Any:  # noqa: ANN401
        """Start the session; ``enable_fallback``, on by default, would begin again on the CPU where that fails."""
        chosen = [(self.onnxruntime_name, dict(provider_options))]
        return ort.InferenceSession(str(model), options, providers=chosen, enable_fallback=0)

    def opened(self, model: Path, start: Callable[[Any], Any]) -> Any:  # noqa: ANN401
        """Return what ``start(onnxruntime)`` returns, its failures in our words.

        Raises:
            ProviderError: It was refused, or the session came without this provider.
        """
        import onnxruntime as ort

        try:
            session = start(ort)
        except Exception as error:  # onnxruntime raises a dozen classes that share only Exception
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise ProviderError(
                f"onnxruntime {ort.__version__} cannot load the model on {self.name}: {first_line(error)}",
                where=str(model),
            ) from error
        if self.onnxruntime_name not in session.get_providers():
            raise ProviderError(
                f"onnxruntime {ort.__version__} left {self.onnxruntime_name} out of the session without an error: "
                "its device or a library is missing",
                where=str(model),
            )
        return session

    def supports(self, scheme: Scheme) -> str | None:
        """Return why ``MatMulNBits`` cannot run ``scheme``, or ``None``."""
        if scheme.activations != "none":
            return None
        if scheme.bits not in _BITS:
            return f"{scheme.bits}-bit weights have no kernel on {self.name}; use 2, 4 or 8 bits"
        if scheme.block_size not in _BLOCKS:
            return f"block size {scheme.block_size} has no kernel on {self.name}; use {', '.join(map(str, _BLOCKS))}"
        return None

    def supports_cache(self, kept: CacheType) -> str | None:
        """Return that only floats have kernels, or ``None`` for them."""
        return None if kept == "float" else f"a cache kept as {kept} has no kernel on {self.name}"


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def first_line(error: BaseException) -> str:
    """Return an error's first line, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
