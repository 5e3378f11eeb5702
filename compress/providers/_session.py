"""What the providers share: session options from an artifact's configuration to ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compress.errors import UsageError

# Keys of genai_config.json's session_options that are attributes of SessionOptions, not config entries.
_ATTRIBUTES: dict[str, Callable[[str], Any]] = {
    "log_id": str,
    "log_severity_level": int,
    "log_verbosity_level": int,
    "intra_op_num_threads": int,
    "inter_op_num_threads": int,
    "enable_cpu_mem_arena": lambda text: text.lower() in ("1", "true"),
    "enable_mem_pattern": lambda text: text.lower() in ("1", "true"),
}
_RENAMED = {"log_id": "logid"}


def session_options(options: Mapping[str, str], threads: int) -> Any:  # noqa: ANN401 - onnxruntime has no stubs
    """Return ``onnxruntime.SessionOptions`` that record the placement of every node.

    Args:
        options: Attributes of SessionOptions by their genai_config.json name, and config entries (dotted keys).
        threads: Threads inside an operator; it overrides what ``options`` say, since speed is measured at it.

    Raises:
        UsageError: A value does not fit its attribute, or a key without a dot is none.
    """
    import onnxruntime as ort

    built = ort.SessionOptions()
    built.log_severity_level = 3
    for key, value in options.items():
        if key in _ATTRIBUTES:
            try:
                setattr(built, _RENAMED.get(key, key), _ATTRIBUTES[key](value))
            except (TypeError, ValueError) as error:
                raise UsageError(f"session option {key!r} cannot be {value!r}") from error
        elif "." in key:
            built.add_session_config_entry(key, value)
        else:
            known = ", ".join(sorted(_ATTRIBUTES))
            raise UsageError(f"unknown session option {key!r}", hint=f"use a dotted config entry or one of {known}")
    built.intra_op_num_threads = threads
    built.inter_op_num_threads = 1
    built.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return built
