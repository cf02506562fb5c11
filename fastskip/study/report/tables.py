"""The tables of a report: every number that the charts show, with intervals and verdicts."""

from __future__ import annotations

from dataclasses import replace

from fastskip.intervals import Estimate, SpeedVerdict, Spread, Verdict
from fastskip.study.report.bench_file import BenchResult, Contender, PerPhase, Timed
from fastskip.study.report.blocks import NOTHING, Cell, Table, Tone
from fastskip.study.report.eval_file import EvalResult, JudgedPolicy
from fastskip.study.report.heat_chart import HeatMap
from fastskip.study.report.search_file import Candidate, SearchResult
from fastskip.wording import Scale, counted, significant

EMPTY = Cell(NOTHING)
MOST_KINDS = 8
"""Maximum number of kinds per sensitivity table."""


def eval_table(result: EvalResult) -> Table:
    """Scores, differences, agreement, compute and times of a run's policies."""
    has_times = any(each.ttft_s is not None for each in result.judged)
    scale = result.scale
    head = ["no.", "policy", f"{scale.heading} (95\u00a0%)"]
    head += [f"{scale.points} from dense (95\u00a0%)"]
    head += ["token agreement", "KL, nats", "FLOPs", *(["TTFT", "TPOT"] if has_times else [])]
    rows = []
    for number, each in enumerate(result.judged, start=1):
        row = [Cell(str(number)), Cell(each.label), score_cell(each.score, scale)]
        row.append(EMPTY if each is result.dense else change_cell(each.minus(result.dense)))
        row += [Cell(f"{each.tokens:.0%}"), Cell(f"{each.divergence:.2g}")]
        row.append(_share(each.flops, result.dense.flops))
        if has_times:
            row += [_own_time(each, result.dense, name) for name in ("ttft_s", "tpot_s")]
        rows.append(tuple(row))
    count, tokens = len(result.items), result.new_tokens
    caption = (
        f"{counted(count, 'item')}. Differences are paired by item. Token agreement: share of "
        "dense's tokens before the first mismatch; KL: of the first answer token, from dense; "
        f"FLOPs: decoder and lm_head, first item, {tokens} new tokens."
    )
    if has_times:
        caption += " Times: medians, first item, batch 1, without intervals."
    return Table(caption, tuple(head), tuple(rows))


def kinds_table(result: EvalResult) -> Table | None:
    """Mean scores by kind of item; `None` if there is only one kind."""
    if len(result.kinds) < 2:
        return None
    places = {
        kind: [n for n, item in enumerate(result.items) if item.kind == kind]
        for kind in result.kinds
    }
    rows = []
    for number, each in enumerate(result.judged, start=1):
        row = [Cell(str(number)), Cell(each.label)]
        for own in places.values():
            mean, dense = (
                sum(one.answers[n].score for n in own) / len(own) for one in (each, result.dense)
            )
            small = "" if each is result.dense else f"{100 * (mean - dense):+.1f}"
            row.append(Cell(result.scale.text(mean), small))
        rows.append(tuple(row))
    head = ("no.", "policy", *(f"{kind} ({len(own)})" for kind, own in places.items()))
    caption = "Mean scores by kind of item, with differences from dense below."
    return Table(caption, head, tuple(rows))


def bench_table(result: BenchResult) -> Table:
    """Times against fastskip's own dense model, and memory."""
    head = ("no.", "contender", "TTFT", "against dense", "TPOT", "against dense")
    rows = []
    for number, (contender, timed) in enumerate(result.timed, start=1):
        row = [Cell(str(number)), Cell(contender.label, _source(contender))]
        for quantity, spread in (("ttft", timed.ttft_s), ("tpot", timed.tpot_s)):
            row += [time_cell(spread), _speedup(timed, quantity)]
        row += [Cell(significant(timed.tokens_per_s))]
        row += [_megabytes(timed.peak_bytes), _megabytes(timed.kv_bytes)]
        rows.append(tuple(row))
    caption = (
        "Medians, with quartiles below. Against dense: speed-up over fastskip's own dense model, "
        "paired by round, with its 95 % interval."
    )
    return Table(caption, (*head, "tokens/s", "peak, MB", "KV, MB"), tuple(rows))


def floor_table(result: BenchResult) -> Table | None:
    """Measured time, floor and share of ideal for both phases; `None` if no floor is known."""
    if all(timed.floor_s is None for _, timed in result.timed):
        return None
    rows = []
    for number, (contender, timed) in enumerate(result.timed, start=1):
        row = [Cell(str(number)), Cell(contender.label, _source(contender))]
        for phase, spread in (("prefill", timed.prefill_s), ("decode", timed.decode_s)):
            row += [time_cell(spread), _floor(timed.floor_s, phase, spread)]
            row.append(_ideal(timed.ideal_share, phase))
        rows.append(tuple(row))
    head = [
        f"{phase}{what}" for phase in ("prefill", "step") for what in ("", ": floor", ": of ideal")
    ]
    caption = (
        "Medians with quartiles for the prefill and for one decode step. Floor: the sum over "
        "operations of the least time that memory bandwidth or arithmetic allows, at the ceilings "
        "measured on this machine; decoder and lm_head only. Of ideal: the speed-up over "
        "fastskip's dense model divided by floor(dense) / floor(policy); at 1, all skipped work "
        "turns into speed."
    )
    return Table(caption, ("no.", "contender", *head), tuple(rows))


def search_table(result: SearchResult) -> Table:
    """Candidates with their costs and their scores on held-out items."""
    head = ("no.", "candidate", "cost of dense", "FLOPs", "TTFT", "TPOT")
    rows = []
    for number, each in enumerate(result.candidates, start=1):
        times = [_milliseconds(each.ttft_s), _milliseconds(each.tpot_s)]
        row = [Cell(str(number)), _name(each), _percent(each.cost), _percent(each.flops), *times]
        row.append(EMPTY if each.score is None else score_cell(each.score, result.scale))
        change = None if each.source == "dense" else each.change
        row.append(EMPTY if change is None else change_cell(change))
        row.append(EMPTY if each.tokens is None else Cell(f"{each.tokens:.0%}"))
        found = each.calibration_kl
        row.append(EMPTY if found is None else Cell(f"{found:.2g}"))
        rows.append(tuple(row))
    rest = (
        f"{result.scale.heading} (95\u00a0%)",
        f"{result.scale.points} from dense (95\u00a0%)",
        "token agreement",
        "calibration KL, nats",
    )
    caption = (
        f"Cost: the search's estimate in the budget's quantity ({result.quantity.value}). Times: "
        "measured medians. Scores are on held-out items, with differences paired by item."
    )
    return Table(caption, (*head, *rest), tuple(rows))


def rivals_table(result: SearchResult) -> Table:
    """The search's best policy against others at the same budget."""
    rows = []
    for number, each in enumerate(result.rivals, start=1):
        badges = {Verdict.BETTER: "beaten", Verdict.WORSE: "beats the search"}
        verdict = Verdict.of(each.difference)
        cell = replace(change_cell(each.difference), badges=(badges.get(verdict, verdict),))
        rows.append((Cell(str(number)), Cell(each.name, each.source), cell))
    caption = "How far the search's best policy scores above others at the same budget."
    unit = f"{result.scale.points} above (95\u00a0%)"
    return Table(caption, ("no.", "against", unit), tuple(rows))


def left_out_table(result: SearchResult) -> Table:
    """What the search left out, and why."""
    rows = tuple((Cell(name), Cell(reason)) for name, reason in result.left_out)
    caption, head = "What was left out, and why", ("policy", "reason")
    return Table(caption, head, rows, name_at=0, has_numbers=False, is_folded=True)


def sensitivity_tables(result: SearchResult) -> list[Table]:
    """The heat map's numbers: one row per layer, up to `MOST_KINDS` kinds of cells per table."""
    found = HeatMap.of(result.sensitivity)
    tables = []
    for first in range(0, len(found.kinds), MOST_KINDS):
        kinds = found.kinds[first : first + MOST_KINDS]
        rows = []
        for layer in found.layers:
            values = [found.values.get((layer, kind)) for kind in kinds]
            cells = (EMPTY if value is None else Cell(f"{value:.2g}") for value in values)
            rows.append((Cell(str(layer)), *cells))
        which = f", {first + 1} to {first + len(kinds)} of {len(found.kinds)} changes"
        caption = "KL in nats, by layer and change" + (
            which if len(found.kinds) > len(kinds) else ""
        )
        head = ("layer", *kinds)
        tables.append(Table(caption, head, tuple(rows), name_at=0, is_folded=True))
    return tables


def score_cell(score: Estimate, scale: Scale) -> Cell:
    """A score with its interval."""
    return Cell(scale.text(score.mean), f"{100 * score.low:.1f} to {100 * score.high:.1f}")


def change_cell(change: Estimate) -> Cell:
    """A difference from dense with its interval and its verdict."""
    verdict = Verdict.of(change)
    tone = {Verdict.BETTER: Tone.GOOD, Verdict.WORSE: Tone.BAD}.get(verdict, Tone.OPEN)
    return Cell(*change.in_points, (verdict,), tone)


def time_cell(spread: Spread) -> Cell:
    """A time with its quartiles."""
    low, high = (significant(1e3 * each) for each in (spread.low, spread.high))
    return Cell(f"{significant(1e3 * spread.median)} ms", f"{low} to {high}")


def speedup_text(spread: Spread) -> str:
    """A ratio with its interval."""
    return f"{spread.median:.2f}x ({spread.low:.2f} to {spread.high:.2f})"


def _speedup(timed: Timed, quantity: str) -> Cell:
    spread, verdict = timed.speedup.get(quantity), timed.verdict.get(quantity)
    if spread is None:
        return EMPTY
    cell = Cell(f"{spread.median:.2f}x", f"{spread.low:.2f} to {spread.high:.2f}")
    if verdict is None:
        return cell
    badge, tone = {
        SpeedVerdict.FASTER: ("faster", Tone.GOOD),
        SpeedVerdict.SLOWER: ("slower here", Tone.BAD),
        SpeedVerdict.NOT_TOLD_APART: ("not told apart", Tone.OPEN),
    }[verdict]
    return replace(cell, badges=(badge,), tone=tone)


def _own_time(each: JudgedPolicy, dense: JudgedPolicy, name: str) -> Cell:
    own, base = getattr(each, name), getattr(dense, name)
    if own is None:
        return EMPTY
    ratio = f"{base / own:.2f}x as fast" if base and own and each is not dense else ""
    return Cell(f"{significant(1e3 * own)} ms", ratio)


def _name(each: Candidate) -> Cell:
    holds = (
        ("recommended", each.is_recommended),
        ("on the front", each.is_on_front),
        ("over the budget", not each.keeps_budget and each.source != "dense"),
    )
    tone = Tone.GOOD if each.is_recommended else Tone.OPEN
    return Cell(each.name, each.source, tuple(text for text, is_so in holds if is_so), tone)


def _source(contender: Contender) -> str:
    names = {"hf": "Hugging Face", "hf-compiled": "Hugging Face, compiled", "fastskip": ""}
    return "" if contender.label == names[contender.source] else names[contender.source]


def _floor(found: PerPhase | None, phase: str, measured: Spread) -> Cell:
    if found is None:
        return EMPTY
    least = float(getattr(found, phase))
    ratio = f"measured: {measured.median / least:.2f}x" if least else ""
    return Cell(f"{significant(1e3 * least)} ms", ratio)


def _ideal(found: PerPhase | None, phase: str) -> Cell:
    return EMPTY if found is None else Cell(f"{getattr(found, phase):.2f}")


def _share(value: float, of: float) -> Cell:
    return Cell(f"{value / of:.0%}") if of else EMPTY


def _percent(value: float | None) -> Cell:
    return EMPTY if value is None else Cell(f"{value:.1%}")


def _milliseconds(value: float | None) -> Cell:
    return EMPTY if value is None else Cell(f"{significant(1e3 * value)} ms")


def _megabytes(value: int | None) -> Cell:
    return EMPTY if value is None else Cell(significant(value / 1e6, 4))
