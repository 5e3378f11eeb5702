"""``report.html``: the report as one page that needs nothing else: no script, no font, no request.

Everything in a report is hostile text: the template escapes it, and what hides or reorders text is spelled out. The
page's policy allows no script and no source but itself. The same report gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from compress.package.staging import write_file
from compress.report import measured, sheet
from compress.report.figures import heat_strip
from compress.report.limits import limits
from compress.report.model import Report
from compress.report.reproduce import reproduction
from compress.report.wording import moment, visible

NAME = "report.html"
_TEMPLATES = Path(__file__).with_name("templates")


def page(report: Report, record: Mapping[str, Any] | None = None) -> str:
    """Return a report as an HTML document.

    Args:
        report: The report.
        record: The artifact's manifest, which also knows the seed; ``None`` where only the report is at hand.
    """
    template = environment().get_template("report.html.jinja")
    return str(template.render(_context(report, record)))


def write(report: Report, directory: Path, record: Mapping[str, Any] | None = None) -> None:
    """Write ``report.html`` into an artifact."""
    write_file(directory / NAME, page(report, record))


@cache
def environment() -> Any:
    """Return the templates' environment: everything is escaped, and what hides or reorders text is spelled out."""
    import jinja2

    def shown(value: Any) -> Any:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    return made


def styles() -> Markup:
    """Return the pages' style sheet."""
    return Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8"))


def _context(report: Report, record: Mapping[str, Any] | None) -> dict[str, Any]:
    passed = report.verdict.status == "pass"
    drift, allocation, pruning, tensors = report.drift, report.allocation, report.pruning, report.tensors
    return {
        "report": report,
        "created": moment(report.created) if report.created else "",
        "word": "PASS" if passed else "FAIL",
        "passed": passed,
        "model": report.source.identifier if report.source else "unknown model",
        "readings": measured.readings(report),
        "limits": limits(report),
        "size": measured.size_figure(report),
        "speeds": measured.speeds(report),
        "drift_table": measured.drift_table(drift) if drift else None,
        "drift_facts": measured.drift_facts(drift) if drift else [],
        "distribution": measured.distribution(drift) if drift else None,
        "distribution_of": "KL divergence, nats a token"
        if drift and drift.distribution and drift.distribution.measure == "kl"
        else "cosine distance, 1 − cosine",
        "heat": heat_strip(tensors),
        "tensor_table": sheet.tensor_table(tensors),
        "storage": sheet.storage_summary(tensors),
        "allocation_picture": sheet.allocation_picture(allocation) if allocation else None,
        "allocation_tables": sheet.allocation_tables(allocation) if allocation else (),
        "frontier_table": sheet.frontier_table(allocation) if allocation else None,
        "calibration_facts": sheet.calibration_facts(report),
        "calibration_warning": report.calibration.warning() if report.calibration else None,
        "providers": sheet.providers(report),
        "samples": sheet.samples(report.samples),
        "pruning_picture": sheet.pruning_picture(pruning) if pruning else None,
        "pruning_tables": sheet.pruning_tables(pruning) if pruning else (),
        "pruning_facts": sheet.pruning_facts(pruning) if pruning else [],
        "stage_table": sheet.stage_table(report),
        "environment_facts": sheet.environment_facts(report.environment),
        "fusions": sorted(report.fusions.items()),
        "profile_table": sheet.profile_rows(report.profile.resolved) if report.profile else None,
        "reproduction": reproduction(report, record),
        "css": styles(),
    }
