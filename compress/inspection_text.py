"""An inspected artifact as a person reads it: a few lines, then its files and its tensors as trees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from compress.sizes import format_size

_Rows = tuple[tuple[str, str, int, int, int], ...]


def show_inspection(document: Mapping[str, Any], console: Console, *, tensors: bool = False) -> None:
    """Print :func:`compress.inspection.inspect_document`'s document; ``tensors`` lists each one."""
    for line in _lines(document):
        console.print(Text(line), soft_wrap=True, highlight=False)
    console.print(_files(document["files"]), highlight=False)
    if document["tensors"]:
        console.print(_tensors(document, every=tensors), highlight=False)


def _lines(document: Mapping[str, Any]) -> list[str]:
    source, profile, report = document["source"], document["profile"], document["report"]
    if document["status"] is None:
        lines = ["status    unknown: there is no manifest.json"]
    else:
        lines = [f"status    {document['status']}"]
    if source is not None:
        revision = f" @ {source['revision']}" if source.get("revision") else ""
        lines.append(f"source    {source.get('id')}{revision} ({source.get('kind')})")
    if document["task"]:
        lines.append(f"task      {document['task']}")
    if profile is not None:
        lines.append(f"profile   {profile.get('name')}: {profile.get('description')}")
    if report is not None:
        made = f", made {report['created']}" if report["created"] else ""
        lines.append(f"report    {report['verdict']['status']}, schema version {report['schema_version']}{made}")
        lines += [f"          - {reason}" for reason in report["verdict"]["reasons"]]
    if document["opset"] is not None:
        operators = document["operators"]
        listed = ", ".join(f"{count} {name}" for name, count in list(operators.items())[:6])
        lines += [
            f"graph     opset {document['opset']}, {sum(operators.values())} nodes: {listed}",
            "inputs    " + ", ".join(map(_value, _few(document["inputs"]))),
            "outputs   " + ", ".join(map(_value, _few(document["outputs"]))),
        ]
    return lines + _calibrated(document["calibration"])


def _value(item: Mapping[str, Any]) -> str:
    return f"{item['name']} [{', '.join(map(str, item['shape']))}]"


def _few(values: list[Any]) -> list[Any]:
    """Leave the cache of all layers but the first out."""
    return [item for item in values if not any(char.isdigit() and char != "0" for char in item["name"])]


def _calibrated(record: Mapping[str, Any] | None) -> list[str]:
    if record is None:
        return []
    if "algorithm" in record:
        return _calibrated_decoder(record)
    kept = ", ".join(record["kept_float"]) or "none"
    return [
        f"calibrated on {record['texts']} texts of {record['text']['name']}; linears kept in float32: {kept}",
    ]


def _calibrated_decoder(record: Mapping[str, Any]) -> list[str]:
    text = record["text"]
    seeded = "" if text.get("seed") is None else f" (seed {text['seed']})"
    lines = [
        f"calibrated on {text['tokens']} tokens of {text['name']}{seeded}: "
        f"{record['algorithm']}, effort {record['effort']}"
    ]
    if record.get("predicted_kl") is not None:
        lines.append(f"bits were chosen by what each tensor's errors cost: predicted KL {record['predicted_kl']:.4g}")
    return lines


def _files(files: list[Mapping[str, Any]]) -> Tree:
    tree = Tree(Text(f"files: {len(files)}, {format_size(sum(item['size'] for item in files))}"))
    for item in files:
        digest = (item["sha256"] or "")[:12]
        state = f"  ({item['state']})" if item["state"] else ""
        tree.add(Text(f"{format_size(item['size']):>10}  {digest:<12}  {item['name']}{state}"))
    return tree


# --------------------------------------------------------------------------------------------------------- tensors


def _tensors(document: Mapping[str, Any], *, every: bool) -> Tree:
    totals = document["totals"]
    constants = f", and {format_size(totals['constants_bytes'])} of constants" if totals["constants_bytes"] else ""
    tree = Tree(
        Text(
            f"tensors: {totals['tensors']}, {totals['values']:,} values in {format_size(totals['bytes'])}, "
            f"{totals['bits']:.2f} bits a value{constants}"
        )
    )
    outside = [item for item in document["tensors"] if item["layer"] is None]
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for item in document["tensors"]:
        if item["layer"] is not None:
            blocks.setdefault(item["layer"], []).append(item)
    _add(tree, outside, every=every)
    # Blocks stored alike are shown once: a uniform profile's thirty blocks are five lines.
    alike = groupby(sorted(blocks.items()), key=lambda pair: _summary(pair[1]) if not every else pair[0])
    for _, group in alike:
        members = list(group)
        first, last = members[0][0], members[-1][0]
        size = sum(item["bytes"] for _, tensors in members for item in tensors)
        title = f"block {first}" if first == last else f"blocks {first} to {last}, each as"
        branch = tree.add(Text(f"{title}  ({format_size(size)}{'' if first == last else ' together'})"))
        _add(branch, members[0][1], every=every)
    return tree


def _summary(tensors: Iterable[Mapping[str, Any]]) -> _Rows:
    """Return role, storage, tensors, values and bytes, in the order of the graph."""
    rows: dict[tuple[str, str], list[int]] = {}
    for item in tensors:
        row = rows.setdefault((item["role"], item["storage"]), [0, 0, 0])
        values = 1
        for size in item["shape"]:
            values *= size
        for index, amount in enumerate((1, values, item["bytes"])):
            row[index] += amount
    return tuple((role, storage, *counts) for (role, storage), counts in rows.items())  # type: ignore[misc]


def _add(branch: Tree, tensors: list[Mapping[str, Any]], *, every: bool) -> None:
    if every:
        for item in tensors:
            shape = " x ".join(map(str, item["shape"]))
            branch.add(
                Text(
                    f"{item['storage']:<17} {item['bits']:>6.2f} bits {format_size(item['bytes']):>10}  "
                    f"{item['name']} [{shape}]"
                )
            )
        return
    for role, storage, count, values, size in _summary(tensors):
        counted = f"  {count} tensors" if count > 1 else ""
        branch.add(Text(f"{role:<18} {storage:<17} {8 * size / values:>6.2f} bits {format_size(size):>10}{counted}"))
