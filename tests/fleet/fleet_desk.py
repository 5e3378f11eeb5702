"""A desk with fake models, whose exports do what they are told, and a grid of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAKE = ("-S", str(Path(__file__).with_name("fake_export.py")))
PROFILES = ("arm-int4", "x86-int8")


def report(kl: float, size: int, rate: float = 100.0, *, passed: bool = True) -> dict[str, Any]:
    """Return a decoder's report with these measures."""
    steady = {"median": rate, "p10": rate, "p90": rate}
    return {
        "schema_version": 2,
        "verdict": {"status": "pass", "reasons": []} if passed else {"status": "fail", "reasons": ["kl is <b>0.5"]},
        "size": {"source_bytes": 540_000_000, "artifact_bytes": size, "ratio": 540_000_000 / size},
        "drift": {
            "provider": "cpu", "tokens": 2044, "windows": 4, "eval_text": {"name": "a text", "sha256": "0" * 64},
            "reference": "PyTorch float32", "reference_perplexity": 13.3,
            "perplexity_ratio": {"value": 1.3, "standard_error": 0.007},
            "kl_divergence": {"mean": kl, "standard_error": kl / 10, "p99": 2.5},
            "top1_agreement": 0.664, "confident_tokens": 900, "confident_flips": 31, "logit_max_abs": 9.5,
        },
        "speed": [
            {
                "provider": "cpu", "device": "a processor", "evidence": "measured", "threads": 2, "prompt_tokens": 128,
                "new_tokens": 32, "repeats": 3, "load_seconds": 0.3, "peak_rss_bytes": 200_000_000,
                "prefill_tokens_per_second": 551.0, "decode_tokens_per_second": steady, "speedup_vs_pytorch": 2.5,
            }
        ],
        "stages": [{"name": "quantize", "seconds": 12.5, "peak_rss_bytes": 400_000_000}],
        "environment": {
            "versions": {"python": "3.11.7"}, "cpu": "a processor", "cores": 2, "instruction_sets": [], "os": "Linux 6",
            "architecture": "x86_64",
        },
    }  # fmt: skip


class Desk:
    """A directory with models and a grid."""

    def __init__(self, place: Path) -> None:
        self.place, self.output, self.grid = place, place / "out", place / "grid.toml"
        self.peaks: dict[str, int] = {}

    def model(self, name: str, **told: dict[str, Any]) -> None:
        """Make a model; ``told`` is what its exports do by profile (``_`` for ``-``), nothing special by default."""
        (self.place / name).mkdir()
        by_profile = {profile: told.get(profile.replace("-", "_"), {}) for profile in PROFILES}
        (self.place / name / "told.json").write_text(json.dumps(by_profile))

    def write(self, *models: str, profiles: tuple[str, ...] = PROFILES, more: str = "") -> Path:
        """Write the grid."""
        listed = ", ".join(f'"./{model}"' for model in models)
        self.grid.write_text(f"models = [{listed}]\nprofiles = {json.dumps(profiles)}\n{more}\n")
        return self.grid

    def events(self) -> list[tuple[float, str, str]]:
        """Return when which job started and ended."""
        path = self.place / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(float(when), kind, name) for when, kind, name, _ in map(str.split, lines)]

    def starts(self) -> list[str]:
        """Return the jobs in the order of their starts."""
        return [name for _, kind, name in self.events() if kind == "start"]
