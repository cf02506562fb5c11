"""What `fastskip bench` prints: prompt and decode tables, and a verdict on each policy."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastskip.commands.tables import number_table, show_table
from fastskip.intervals import SpeedVerdict, Spread
from fastskip.study.bench.contenders import HF
from fastskip.study.bench.results import BenchResult, ContenderResult
from fastskip.wording import counted, significant


def show(found: BenchResult) -> None:
    """Print two tables, the verdicts, and where the numbers come from."""
    console = Console(highlight=False)
    load = found.workload
    console.print(
        f"[bold]prompt[/]: batch {load.batch}, {load.n_image} image and {load.text} text tokens"
    )
    show_table(console, _table(found, "ttft", "prefill"))
    console.print(f"[bold]decode[/]: {load.new_tokens} new tokens")
    show_table(console, _table(found, "tpot", "decode"))
    for each in found.contenders:
        text = verdict(each)
        if text:
            console.print(text, soft_wrap=True)
    console.print(footer(found), soft_wrap=True)


def _table(found: BenchResult, seen: str, inner: str) -> Table:
    """`seen`: the quantity that users see; `inner`: the phase that the floors are for."""
    is_prompt = seen == "ttft"
    has_peak = not is_prompt and any(each.peak_bytes is not None for each in found.contenders)
    titles = ["", f"{seen.upper()}, ms\nquartiles", "vs HF", "vs dense\n95 %"]
    titles += [f"{inner}, ms\nfloor", "of floor\nof ideal"]
    titles += ["KV\nMB"] if is_prompt else ["tokens\n/s", *(["peak\nGB"] if has_peak else [])]
    table = number_table(titles, 12)
    hf = next((each.times for each in found.contenders if each.label == HF), None)
    for each in found.contenders:
        if each.times is None:
            continue
        time, part = getattr(each.times, f"{seen}_s"), getattr(each.times, f"{inner}_s")
        base, floor = getattr(hf, f"{seen}_s", None), getattr(each.floor_s, inner, None)
        shares = (floor / part.median if floor else None, getattr(each.ideal_share, inner, None))
        row = [
            f"{_ms(time.median)}\n{_ms(time.low)}-{_ms(time.high)}",
            base and f"{base.median / time.median:.2f}x",
            _gain(getattr(each.speedup, seen, None)),
            _ms(part.median) + (f"\n{_ms(floor)}" if floor else ""),
            "\n".join("" if share is None else f"{share:.0%}" for share in shares),
        ]
        if is_prompt:
            row.append(_number(each.kv_bytes, 1e6))
        else:
            row.append(_number(each.tokens_per_s))
        if has_peak:
            row.append(_number(each.peak_bytes, 1e9))
        table.add_row(escape(each.label), *(cell or "" for cell in row))
    return table


def _ms(seconds: float) -> str:
    return significant(1e3 * seconds)


def _gain(speedup: Spread | None) -> str:
    if speedup is None:
        return ""
    return f"{speedup.median:.2f}x\n{speedup.low:.2f}-{speedup.high:.2f}"


def _number(value: float | None, unit: float = 1) -> str:
    return "" if value is None else significant(value / unit)


WORDS = {
    SpeedVerdict.FASTER: "faster",
    SpeedVerdict.SLOWER: "[red]slower here[/]",
    SpeedVerdict.NOT_TOLD_APART: "not told apart",
}


def verdict(each: ContenderResult) -> str:
    """One line for a policy or a contender that was left out; empty for the others."""
    if each.left_out is not None:
        return f"{escape(each.label)}: left out: {escape(each.left_out)}"
    if each.speedup is None or each.policy is None:
        return ""
    found = each.speedup.verdicts
    parts = [f"{name.upper()} {WORDS[found[name]]}" for name in ("ttft", "tpot")]
    return f"{escape(each.label)} vs dense: " + ", ".join(parts)


def footer(found: BenchResult) -> str:
    """Where the numbers come from, and how to read them."""
    about, ceilings = found.circumstances, found.ceilings
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    count = about["threads"]
    threads = f", {counted(count, 'thread')}" if count else ""
    lines = [
        f"{about['device']}{threads}, {about['dtype']}; {versions}; {found.rounds} rounds, medians",
        f"floors at {_number(ceilings.bandwidth_bytes_per_s, 1e9)} GB/s and "
        f"{_number(ceilings.flops_per_s, 1e12)} TFLOP/s; KV: size in the plan at the last token",
    ]
    lines += [
        f"{each.label}: {each.as_hf.equal} of {each.as_hf.of} greedy tokens match Hugging Face's"
        for each in found.contenders
        if each.as_hf is not None and each.label != HF
    ]
    return "\n".join(lines)
