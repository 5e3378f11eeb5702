"""Pages that are made from the code: complete, fresh, and seen to be stale when they are."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import profile_reference
import pytest
import report_reference
import sweep_reference
from schema_tables import is_model

from compress.profile import Profile, SchemeOverride, available_profiles
from compress.report.model import Report, Sample, TensorRecord


@pytest.mark.parametrize("tool", [profile_reference, report_reference, sweep_reference])
def test_a_stale_page_is_seen(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--check"]) == 0  # the one in docs/
    page = tmp_path / tool.PAGE.name
    monkeypatch.setattr(tool, "PAGE", page)
    assert tool.main(["--check"]) == 1  # missing
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
    page.write_text(page.read_text().replace("required", "optional", 1))
    assert tool.main(["--check"]) == 1
    assert f"docs/{page.name} is stale" in capsys.readouterr().err


def test_every_profile_and_every_key_are_there() -> None:
    page = profile_reference.page()
    for name in available_profiles():
        assert f"[`{name}`](#{name})" in page and f"\n### {name}\n" in page
    keys = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)) - set(SchemeOverride.model_fields)
    expected = {name for name, field in Profile.model_fields.items() if not is_model(field.annotation)}
    for name, field in Profile.model_fields.items():
        if is_model(field.annotation):
            expected |= {f"{name}.{key}" for key in field.annotation.model_fields}
    assert keys == expected and {"name", "budget.max_kl"} <= expected


def test_weights_are_told_as_the_profiles_store_them() -> None:
    rows = {line.split("`")[1]: line for line in profile_reference.page().splitlines() if line.startswith("| [`")}
    assert "| 4 bits, blocks of 32 | float32 | `cpu` | `genai`, `optimum` | `max_kl` 0.4," in rows["arm-int4"]
    assert "4 bits, blocks of 32, zero points; some roles 8" in rows["x86-int4"]
    assert "of decoders some roles 4 | 16 bits, fixed ranges | `qnn`" in rows["npu-qnn-int4"]
    assert "| not quantized | float16 | `cuda` |" in rows["cuda-fp16"]


def test_every_part_of_a_report_has_a_section() -> None:
    models = report_reference.models()
    assert models[0] is Report and {TensorRecord, Sample} <= set(models) and len(models) == len(set(models))
    page = report_reference.page()
    for model in models:
        section = page.split(f"\n## {model.__name__}\n")[1].split("\n## ")[0]
        assert all(f"| `{name}` |" in section for name in model.model_fields)
    links = set(re.findall(r"\]\(#(\w+)\)", page))
    assert links == {model.__name__.lower() for model in models[1:]}
