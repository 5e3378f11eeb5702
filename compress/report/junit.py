"""A report as JUnit XML, for what shows test results: a case a budget, a provider, a placement.

Cases have no times, the suite's is that of the report's stages. Names do not change with what was measured. A failure
carries the gate's own sentence, and every sentence of the verdict is in some case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from compress.errors import UsageError
from compress.package.staging import write_file
from compress.report.model import ProviderVerdict, Report
from compress.validation.gate import BUDGETS, TASKS_OF, concerns

_DECODING = "text-generation"


def check_place(path: Path) -> None:
    """Refuse before work starts where the file could not be written afterwards.

    Raises:
        UsageError: Its directory is missing, or it is a directory itself.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            "it is a directory" if path.is_dir() else "its directory does not exist",
            where=str(path),
            hint="give the name of a file in a directory that exists",
        )


def write(report: Report, path: Path) -> None:
    """Write the report's cases, replacing an older file in one step."""
    write_file(path, dumps(report))


def dumps(report: Report) -> bytes:
    """Return the cases as XML, UTF-8."""
    name = "compress" if report.source is None else f"compress {report.source.identifier}"
    if report.profile is not None:
        name = f"{name} {report.profile.name}"
    suite = TestSuite(_legal(name))
    suite.add_testcases(list(cases(report)))
    document = JUnitXml(_legal(name))
    document.add_testsuite(suite)
    document.update_statistics()  # type: ignore[no-untyped-call]
    suite.time = document.time = round(sum(stage.seconds for stage in report.stages), 3)
    content: bytes = document.tostring()  # type: ignore[no-untyped-call]
    return b"<?xml version='1.0' encoding='utf-8'?>\n" + content + b"\n"


def cases(report: Report) -> Iterator[TestCase]:
    """Yield a case for each budget on each provider, each provider's run, and each placement."""
    limits = _limits(report)
    task = _task(report)
    for provider in report.providers:
        left = list(provider.verdict.reasons)
        for budget, limit in limits.items():
            about = [reason for reason in left if concerns(budget, reason)]
            left = [reason for reason in left if reason not in about]
            foreign = task not in TASKS_OF.get(budget.split("_", 1)[1], {task})
            yield _case(
                f"budget.{provider.provider}",
                budget,
                about,
                skipped=f"no measure of {task}" if foreign else _unasked(budget, report),
                shown=f"at {'most' if budget.startswith('max') else 'least'} {limit:g}",
            )
        placed = [reason for reason in left if " did not run on " in reason]
        others = [reason for reason in left if reason not in placed]
        shown = ", ".join(item for item in (provider.state, provider.evidence, provider.device) if item)
        yield _case("provider", provider.provider, others, shown=shown)
        yield from _placement(provider, placed)
    told = [reason for item in report.providers for reason in item.verdict.reasons]
    others = [reason for reason in report.verdict.reasons if not any(reason.endswith(known) for known in told)]
    if report.verdict.status == "fail" and not told and not others:
        others = ["the verdict is fail, without a reason"]
    if others or not report.providers:
        yield _case("verdict", "verdict", others)


def _placement(provider: ProviderVerdict, reasons: list[str]) -> Iterator[TestCase]:
    found = provider.placement
    if found is not None or reasons:
        shown = f"{found.nodes_on_provider} of {found.nodes_total} nodes" if found is not None else None
        nodes = "\n".join(found.fallback_nodes) if found is not None else ""
        yield _case("placement", provider.provider, reasons, details=nodes, shown=shown)


def _limits(report: Report) -> Mapping[str, float]:
    budget = report.profile.resolved.get("budget", {}) if report.profile is not None else {}
    return {name: float(budget[name]) for name in BUDGETS if budget.get(name) is not None}


def _task(report: Report) -> str | None:
    """Return the task whose budgets count; ``None`` where nothing was measured that shows it."""
    if report.drift is None:
        return None
    return getattr(report.drift, "task", _DECODING)


def _unasked(budget: str, report: Report) -> str | None:
    """Return why a budget of accuracy did not count: without labels it is not asked for."""
    labelled = getattr(report.drift, "task_accuracy", None) is not None
    return None if labelled or "accuracy_drop" not in budget else "no labels were given"


def _case(
    group: str,
    name: str,
    reasons: Iterable[str],
    *,
    skipped: str | None = None,
    details: str = "",
    shown: str | None = None,
) -> TestCase:
    case = TestCase(_legal(name), classname=f"compress.{_legal(group)}")
    told = list(reasons)
    if told:
        # One failure a case: readers of the format disagree on what two of them are.
        failure = Failure(_legal("; ".join(told)), group.partition(".")[0])
        failure.text = _legal("\n".join([*told, details] if details else told))
        case.result = failure
    elif skipped is not None:
        case.result = Skipped(skipped)
    if shown is not None:
        case.system_out = _legal(shown)
    return case


def _legal(text: str) -> str:
    """Return text without what XML 1.0 has no character for (https://www.w3.org/TR/xml/#charsets)."""
    return "".join(
        letter if letter in "\t\n" or (letter >= " " and not 0xD800 <= ord(letter) <= 0xDFFF and ord(letter) < 0xFFFE)
        or ord(letter) > 0xFFFF else "\ufffd"
        for letter in text
    )  # fmt: skip
