"""What benchmark_speed.py says of its rounds: tokens a second, ratios, the share of the memory's rate, notes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from measured_export import MB
from speed_contenders import LLAMA_CMAKE, LLAMA_PINS

#: Metric -> tokens a second, of one contender in one round.
Rates = dict[str, float]


# ------------------------------------------------------------------------------------------------------- arithmetic


def rates(answer: Mapping[str, Any]) -> Rates:
    """Return a round's tokens a second: of each prompt, and of tokens one by one, from the medians of its times."""
    found = {f"prefill {length}": int(length) / statistics.median(times) for length, times in answer["prefill"].items()}
    return found | {"decode": 1 / statistics.median(answer["decode"])}


def ratios(rounds: Sequence[Mapping[str, Rates]], ours: str, peer: str) -> dict[str, list[float]]:
    """Return for every metric the ratio ``ours / peer`` in each round."""
    return {metric: [each[ours][metric] / each[peer][metric] for each in rounds] for metric in rounds[0][ours]}


def spread(values: Sequence[float], digits: int) -> str:
    """Return the median and, of several values, the range."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def decode_rate(rounds: Sequence[Mapping[str, Rates]], name: str) -> float:
    """Return a contender's median tokens a second."""
    return statistics.median(each[name]["decode"] for each in rounds)


# ----------------------------------------------------------------------------------------------------------- report


def speed_table(document: Mapping[str, Any], rounds: Sequence[Mapping[str, Rates]]) -> str:
    """Return a Markdown table of tokens a second, a row for each contender."""
    metrics = list(next(iter(rounds[0].values())))
    head = ["contender", "MB", *(f"{metric}, tokens/s" for metric in metrics), "peak, MB", "logits of a prompt"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, facts in document["contenders"].items():
        cells = [f"`{name}`", f"{facts['bytes'] / MB:.1f}"]
        cells += [spread([each[name][metric] for each in rounds], 1) for metric in metrics]
        cells += [f"{facts['peak_rss_bytes'] / MB:.0f}", "all positions" if facts["all_positions"] else "the last"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio_table(document: Mapping[str, Any], rounds: Sequence[Mapping[str, Rates]]) -> str:
    """Return a Markdown table of our speed over each peer's, empty without either."""
    groups = {name: facts["group"] for name, facts in document["contenders"].items()}
    mine = [name for name, group in groups.items() if group == "ours"]
    peers = [name for name, group in groups.items() if group != "ours"]
    if not mine or not peers:
        return ""
    metrics = list(rounds[0][mine[0]])
    head = ["ours / peer", *metrics]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in mine:
        for peer in peers:
            cells = [spread(values, 2) for values in ratios(rounds, name, peer).values()]
            lines.append(f"| `{name}` / `{peer}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def roofline_table(document: Mapping[str, Any], rounds: Sequence[Mapping[str, Rates]]) -> str:
    """Return a Markdown table: bytes of weights a token, the rate they are read at, and its share of the memory's."""
    bandwidth = max(document["bandwidths"])
    lines = ["| contender | MB a token | decode, GB/s | share of the memory's rate |", "|---|---|---|---|"]
    for name, facts in document["contenders"].items():
        rate = facts["token_bytes"] * decode_rate(rounds, name)
        share = f"{100 * rate / bandwidth:.0f} %"
        lines.append(f"| `{name}` | {facts['token_bytes'] / MB:.1f} | {rate / 1e9:.2f} | {share} |")
    return "\n".join(lines)


def roofline_notes(document: Mapping[str, Any]) -> list[str]:
    """Say what the memory's rate is and where it bounds nothing."""
    cache, threads = document["cache"], document["threads"]
    lines = [
        f"The memory's rate: {max(document['bandwidths']) / 1e9:.1f} GB/s, the best of reads of 2 GiB by {threads} "
        "threads before and after every round. A token's bytes are the weights as they lie in the file, without tables "
        "that rows are only looked up in, scales at their stored width (ONNX Runtime widens them to float32), and "
        "without the key/value cache"
    ]
    small = [name for name, facts in document["contenders"].items() if cache and facts["token_bytes"] < cache]
    if small:
        lines.append(
            f"The last level's cache is {cache / MB:.0f} MB: the memory's rate does not bound "
            + ", ".join(f"`{name}`" for name in small)
        )
    return lines


def llama_notes(document: Mapping[str, Any]) -> list[str]:
    """Say how llama.cpp was built and what it logged of its attention and buffers."""
    facts = next((each for each in document["contenders"].values() if each["kind"] == "llama"), None)
    if facts is None:
        return []
    flash = "used" if facts["flash_attention"] else "not used"
    buffers = [" ".join(line.split(": ", 1)[-1].split()) for line in facts["log"] if "model buffer size" in line]
    return [
        f"llama.cpp: {', '.join(LLAMA_PINS)} compiled here with `{LLAMA_CMAKE}`, its own defaults; "
        f"flash attention: {flash}",
        f"llama.cpp's buffers: {'; '.join(buffers)}; every matrix of the GGUF has the same type",
        f"llama.cpp's system: {facts['system']}",
    ]


def section(document: Mapping[str, Any]) -> str:
    """Return the Markdown section."""
    rounds = [{name: rates(answer) for name, answer in each.items()} for each in document["rounds"]]
    lines = [f"### Speed beside peers: {document['checkpoint']}, {document['date']}", ""]
    lines += [speed_table(document, rounds), ""]
    if table := ratio_table(document, rounds):
        lines += [table, "", "Ratios within a round; above 1 ours is faster.", ""]
    lines += [roofline_table(document, rounds), ""]
    prompts = document["prompts"]
    lines += [
        f"- Input: {document['input']}",
        f"- {document['threads']} threads; medians of {len(rounds)} interleaved rounds, with the range; decode: "
        f"{document['new']} tokens one by one behind {prompts[0]}, the median of them in each round; random token ids",
    ]
    lines += [f"- {note}" for note in (*roofline_notes(document), *llama_notes(document))]
    lines += [f"- Session entries of ours: {document['session']}"] if document["session"] else []
    if document["environment"]:
        told = ", ".join(f"`{name}={value}`" for name, value in document["environment"].items())
        lines.append(f"- Every contender's process had {told}")
    made = {name: facts["day"] for name, facts in document["contenders"].items() if facts["day"]}
    lines += [f"- Made earlier, from the same sources: `{name}` on {day}" for name, day in made.items()]
    lines += [f"- Missing: `{name}`: {reason}" for name, reason in document["missing"].items()]
    others = [answer["others"] for each in document["rounds"] for answer in each.values()]
    lines += [
        f"- Other processes had {100 * statistics.median(others):.0f} % of the processors' time during a measurement "
        f"in the median, {100 * max(others):.0f} % at most",
        f"- Machine: {document['machine']}; instruction sets {document['instructions']}",
        f"- Versions: {'; '.join(f'{name} {version}' for name, version in document['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"
