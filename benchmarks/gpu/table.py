"""Tables of a results file: plain text for a terminal, Markdown for the README.

python -m benchmarks.gpu.table benchmarks/results/<gpu> ... [--readme README.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.inputs import SEVEN
from benchmarks.gpu.results import Line, Results, Values
from benchmarks.report import counts

NOT_MEASURED = "not measured yet"
BEGIN, END = "<!-- GPU table -->", "<!-- end of GPU table -->"
HEAD = (
    "",
    "TTFT, ms",
    "prefill, ms (floor)",
    "vs dense",
    "ms/token (floor)",
    "of floor",
    "vs HF",
    "vs compiled HF",
    "vs dense",
    "of ideal",
    "tokens/s",
    "peak, GB",
)
ROUTING_HEAD = (
    "",
    "skipped rows of the prompt",
    "prefill, ms",
    "over static",
    "vs dense",
    "of ideal",
    "skipped blocks of steps",
    "ms/token",
    "over static",
    "vs dense",
    "of ideal",
)
ROUTING_ROWS = tuple(
    (f"{kind}_{rate}", f"routed, {way}{rate:.0%}")
    for kind, way in (("row", ""), ("if", "IF nodes, "), ("loop", "loop, "))
    for rate in (0.0, 0.25, 0.5, 0.75)
)
"""What the README shows of routers at batch 1, where skipped rows leave no cache entries; the first
four rows always."""
ALWAYS_SHOWN = "row_"
Row = tuple[str, ...]


def text_tables(results: Results) -> str:
    """All results, with the end-to-end and routing tables and the goals last."""
    parts = [*_ceilings(results), *_correctness(results), *_kernels(results), *_profiles(results)]
    parts += [
        f"{end_to_end_title(line.values)}\n{_aligned([HEAD, *_rows(line)])}"
        for line in _end_to_end(results)
    ]
    parts += _routing(results)
    judged = goals(*(results.values(f"e2e.7b.b{batch}") for batch in (1, 16)))
    judged += routing_goals(results.values("routing.7b.b1.omit"))
    if judged:
        parts.append("Goals\n" + _aligned(judged))
    failed = [line for line in results.lines().values() if not line.is_done]
    parts += [f"FAILED {x.cell}: {x.reason}" for x in failed]
    return "\n\n".join(parts) or NOT_MEASURED


def markdown(*gpus: Results) -> str:
    """The README's GPU tables; ``not measured yet`` while there is no end-to-end line."""
    return "\n\n".join(filter(None, map(_markdown_of, gpus))) or NOT_MEASURED


def _markdown_of(results: Results) -> str:
    lines = _end_to_end(results)
    if not lines:
        return ""
    parts = [f"#### {lines[0].environment.get('device')}"]
    for line in lines:
        parts += _markdown_table(end_to_end_title(line.values), HEAD, _rows(line), line)
    title = "LLaVA-1.5-7B shapes with routers, batch 1: blocks skipped at random, row by row"
    routers = results.lines().get("routing.7b.b1.omit")
    if routers is None or not routers.is_done:
        parts.append(f"**{title}**: {NOT_MEASURED}")
    else:
        ways = routers.values["ways"]
        routed = [
            _routing_row(ways[name])
            if name in ways
            else (label, *[NOT_MEASURED] * (len(ROUTING_HEAD) - 1))
            for name, label in ROUTING_ROWS
            if name in ways or name.startswith(ALWAYS_SHOWN)
        ]
        parts += _markdown_table(title, ROUTING_HEAD, routed, routers)
    return "\n\n".join(parts)


def _markdown_table(title: str, head: Row, rows: Sequence[Row], line: Line) -> tuple[str, str, str]:
    """A title, its table and its source: the lines of a file differ in date and commit."""
    cells = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    cells.insert(1, "|---|" + "---:|" * (len(head) - 1))
    where = line.environment
    versions = [f"{name} {where.get(name)}" for name in ("torch", "triton", "transformers")]
    about = ", ".join([*versions, f"commit {where.get('commit')}", line.date])
    source = f"{where.get('device')}, {about}: `python -m benchmarks.gpu {line.cell}`"
    return f"**{title}**", "\n".join(cells), source


def write_readme(readme: Path, *gpus: Results) -> None:
    """Writes the tables between the README's markers."""
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme}: no markers; needed: {BEGIN} ... {END}")
    table = f"{head}{BEGIN}\n{markdown(*gpus)}\n{END}{tail}"
    readme.write_text(table, encoding="utf-8")


def _ceilings(results: Results) -> list[str]:
    rows: list[Row] = []
    memory, matrix = (results.values(f"ceilings.{name}") for name in ("memory", "matrix"))
    if memory:
        rows += [(name, f"{rate:.0f} GB/s") for name, rate in memory["gb_per_s"].items()]
    if matrix:
        found = matrix["tflop_per_s"].items()
        rows += [(f"matrix product {size}", f"{rate:.0f} TFLOP/s") for size, rate in found]
    nodes = results.values("ceilings.nodes")
    if nodes:
        found = nodes["us_per_node"].items()
        rows += [(f"graph node: {name}", f"{us:.2f} us") for name, us in found]
        rows += [(nodes["note"], "")] * bool(nodes["note"])
    return ["Ceilings\n" + _aligned(rows)] if rows else []


def _correctness(results: Results) -> list[str]:
    rows: list[Row] = []
    for name, line in results.lines().items():
        if name.startswith("correctness."):
            note = line.values.get("note")  # why nothing was checked
            text = "WRONG" if not line.is_done else "not run" if note else "ok"
            shares = [own["share_of_allowed"] for own in line.values.get("errors", {}).values()]
            detail = f"worst error {max(shares):.2f} of the allowed one" if shares else ""
            detail = detail or line.values.get("summary") or note or ""
            rows.append((name.partition(".")[2], text, str(detail)))
    return ["Correctness\n" + _aligned(rows)] if rows else []


def _kernels(results: Results) -> list[str]:
    """The cells that time kernels, graphs and steps: a table for each kind of values they have."""
    parts = []
    for name, line in results.lines().items():
        for rows_of in _TIMES.get(name.partition(".")[0], ()) if line.is_done else ():
            if rows := rows_of(line.values):
                faults = line.values.get("faults", ())
                parts.append("\n".join([name, _aligned(rows), *faults]))
    return parts


def _tuned(values: Values) -> list[Row]:
    rows: list[Row] = [("kernel", "us", "GB/s", "of floor", "us before", "configuration")]
    for kernel, own in values["kernels"].items():
        config = " ".join(f"{key}={value}" for key, value in own["config"].items())
        columns = ("us", "gb_per_s", "share_of_floor", "us_before")
        rows.append((kernel, *(_short(own[key]) for key in columns), config))
    return rows


def _works(values: Values) -> list[Row]:
    if "works" not in values:
        return []
    rows: list[Row] = [("operation", "us", "floor", "of floor", "torch us", "of floor", "GB/s")]
    for work, own in values["works"].items():
        keys = ("us", "floor_us", "share_of_floor", "torch_us", "torch_share_of_floor", "gb_per_s")
        rows.append((work, *(_short(own.get(key)) for key in keys)))
    return rows


def _library_products(values: Values) -> list[Row]:
    if "cublas" not in values:
        return []
    rows: list[Row] = [("cuBLAS", "us", "of floor")]
    for work, own in values["cublas"].items():
        rows.append((work, _short(own["us"]), _short(own["share_of_floor"])))
    return rows


def _graph(values: Values) -> list[Row]:
    head = ("eager_ms", "captured_ms", "gain", "worst_difference")
    return [head, tuple(_short(values.get(key)) for key in head)]


def _ways(values: Values) -> list[Row]:
    rows: list[Row] = [("steps", "way", "ms/token", "gain")]
    for policy, ways in values["policies"].items():
        for way, own in ways.items():
            rows.append((policy, way, _short(own["tpot_ms"]), _times(own["gain"])))
    return rows


_TIMES: dict[str, tuple[Callable[[Values], list[Row]], ...]] = {
    "tune": (_tuned,),
    "kernels": (_works, _library_products),
    "graphs": (_graph,),
    "overlap": (_ways,),
    "halves": (_ways,),
}
"""By group of cells, what makes rows of their values."""


def _profiles(results: Results) -> list[str]:
    parts = []
    for name, line in results.lines().items():
        if not (name.startswith("profile.") and line.is_done):
            continue
        for phase in ("decode", "prefill"):
            rows: list[Row] = [(f"{phase}: kernel", "launches", "us", "share", "GB/s")]
            for own in line.values.get(f"{phase}_kernels", [])[:10]:
                numbers = (own["launches"], own["us"], own["share"], own.get("gb_per_s"))
                rows.append((own["kernel"][:60], *map(_short, numbers)))
            if len(rows) > 1:
                parts.append(f"{name}\n{_aligned(rows)}")
    return parts


def _end_to_end(results: Results) -> list[Line]:
    return [line for line in results.lines().values() if line.cell[:4] == "e2e." and line.is_done]


def _rows(line: Line) -> list[Row]:
    return [_row(own) for own in line.values["peers"].values()]


def end_to_end_title(values: Values) -> str:
    """The title of an end-to-end cell's table."""
    return (
        f"LLaVA-1.5-{values['widths']} shapes, random weights, batch {values['batch']}: "
        f"{counts(values['n_image'])} image and {counts(values['n_text'])} text rows, "
        f"{values['n_new']} new tokens"
    )


def _routing(results: Results) -> list[str]:
    parts = []
    for name, line in results.lines().items():
        if not (name.startswith("routing.") and line.is_done):
            continue
        values = line.values
        if "us_per_block" in values:
            rows: list[Row] = [("a block of a step", "us")]
            rows += [(what, _short(us)) for what, us in values["us_per_block"].items()]
            rows += [(f"{what}: {why}", "") for what, why in values["notes"].items()]
            parts.append(f"{name}\n{_aligned(rows)}")
        if "ways" in values:
            rows = [ROUTING_HEAD, *map(_routing_row, values["ways"].values())]
            parts.append(f"{name}\n{_aligned(rows)}")
        if "found" in values:
            rows = [(what, str(fault)) for what, fault in values["found"].items()]
            parts.append(f"{name}\n{_aligned(rows)}")
    return parts


def _routing_row(own: dict[str, Any]) -> Row:
    return (
        own["label"],
        _percent(100 * own["rate_prompt"]) if own["is_routed"] else "",
        _short(own["prefill_ms"]),
        _percent(own.get("prefill_over_static_percent")),
        _times(own.get("prefill_vs_dense")),
        _short(own.get("prefill_share_of_ideal")),
        _percent(100 * own["idle_steps"]) if own["is_routed"] else "",
        _short(own["tpot_ms"]),
        _percent(own.get("tpot_over_static_percent")),
        _times(own.get("tpot_vs_dense")),
        _short(own.get("tpot_share_of_ideal")),
    )


def routing_goals(one: Values | None) -> list[Row]:
    """The goals for routers on an H200 in bf16, and whether they are met: 7B at batch 1."""
    if not one or one["widths"] != SEVEN.name:
        return []
    rows: list[Row] = []

    def goal(text: str, found: Sequence[float | None], limit: float) -> None:
        known = [each for each in found if each is not None]
        if known:
            worst = max(known)
            rows.append((text, _percent(worst), "met" if worst <= limit else "missed"))

    ways = one["ways"]
    early = [own for name, own in ways.items() if name.startswith("row_") and own["rate"]]
    over = "over_static_percent"
    goal("routed, steps: <= 6 % over static", [own.get(f"tpot_{over}") for own in early], 6)
    goal("routed, prefill: <= 10 % over static", [own.get(f"prefill_{over}") for own in early], 10)
    idle = [own for name, own in ways.items() if name.startswith("row_") and not own["rate"]]
    for quantity in ("tpot", "prefill"):
        found = [own.get(f"{quantity}_over_dense_percent") for own in idle]
        goal(f"routed at rate 0, {quantity}: <= 2 % over dense", found, 2)
    # A way is adopted only if it pays at every rate above 0.
    for short, name in (("if", "IF nodes"), ("loop", "loops")):
        pairs = [(own, ways.get(f"{short}_{own['rate']}")) for own in early]
        gains = [
            100 * (nodes["tpot_ms"] / own["tpot_ms"] - 1)
            for own, nodes in pairs
            if nodes and own["tpot_ms"] and nodes["tpot_ms"]
        ]
        goal(f"{name}: <= -3 % of early exits' steps, else not adopted", gains, -3)
    return rows


def _row(own: dict[str, Any]) -> Row:
    peak = own["peak_bytes"]
    return (
        own["label"],
        _short(own["ttft_ms"]),
        _with_floor(own, "prefill"),
        _times(own["prefill_vs_dense"]),
        _with_floor(own, "tpot"),
        _short(own["tpot_share_of_floor"]),
        _times(own["tpot_vs_hf"]),
        _times(own["tpot_vs_hf_static"]),
        _times(own["tpot_vs_dense"]),
        _short(own.get("tpot_share_of_ideal")),
        _short(own["tokens_per_s"]),
        _short(None if peak is None else peak / 1e9),
    )


def goals(one: Values | None, many: Values | None) -> list[Row]:
    """The goals on an H200 in bf16, and whether they are met: 7B at batch 1 and 16."""
    rows: list[Row] = []

    def goal(text: str, own: dict[str, Any] | None, key: str, limit: float, at_most: bool) -> None:
        value = None if own is None else own.get(key)
        if value is not None:
            is_met = value <= limit if at_most else value >= limit
            rows.append((text, f"{value:.2f}", "met" if is_met else "missed"))

    if one and one["widths"] == SEVEN.name:  # else the run was --tiny
        peers = one["peers"]
        dense, half = peers.get("dense"), peers.get("half_blocks")
        goal("dense, batch 1: ms/token <= 3.6", dense, "tpot_ms", 3.6, True)
        goal("  stretch: <= 3.4", dense, "tpot_ms", 3.4, True)
        goal("  >= 1.25x compiled Hugging Face", dense, "tpot_vs_hf_static", 1.25, False)
        goal("  >= 3x Hugging Face's default", dense, "tpot_vs_hf", 3.0, False)
        goal("half of the blocks: >= 1.87x dense", half, "tpot_vs_dense", 1.87, False)
        image = peers.get("image_ffn_all")
        goal("text-only FFN: prefill >= 1.7x dense", image, "prefill_vs_dense", 1.7, False)
    if many and many["widths"] == SEVEN.name:
        dense = many["peers"].get("dense")
        goal("batch 16: >= 0.85 of the floor", dense, "tpot_share_of_floor", 0.85, False)
    return rows


def _with_floor(own: dict[str, Any], quantity: str) -> str:
    value, floor = _short(own[f"{quantity}_ms"]), _short(own.get(f"{quantity}_floor_ms"))
    return f"{value} ({floor})" if value and floor else value


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _aligned(rows: Sequence[Row]) -> str:
    width = max(len(row) for row in rows)
    full = [(*row, *[""] * (width - len(row))) for row in rows]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = []
    for first, *others in full:
        cells = [cell.rjust(size) for cell, size in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the README's tables, or writes them there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=__doc__)
    about = "a folder with a results.jsonl, one per GPU"
    parser.add_argument("folders", type=Path, nargs="+", metavar="folder", help=about)
    parser.add_argument("--readme", type=Path, help="a file with markers around its GPU tables")
    options = parser.parse_args(arguments)
    gpus = list(map(Results, options.folders))
    if options.readme is None:
        print(markdown(*gpus))
    else:
        write_readme(options.readme, *gpus)


if __name__ == "__main__":
    main()
