"""Building blocks of verdicts: measures, draws, scores and answers, for one row or a tile of rows.

Shared by ``routing`` (any number of rows) and ``riding`` (few rows, at the end of an update), so
that both decide alike. Formulas are those of ``ops.fused_routes``; scores, agreements and moves
have the names that ``ops.routes`` gives them. All in fp32, except a capacity's share (fp64).

Rows decide alone, or together by one of four rules: ``mean`` and ``any`` as in ``Agreement``,
``latest`` by the draw of the largest position, ``capacity`` by rank. Together means that each row
looks at all members of its group (``tally``), in the same order as every other row: so they all
decide alike, and none waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastskip.ops.routes import EPSILON as ROW_EPSILON
from fastskip.ops.routes import Group, Score, Terms, Verdict, signed

TINY = tl.constexpr(1e-30)
EPSILON = tl.constexpr(ROW_EPSILON)
ALONE = tl.constexpr("alone")
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def draw(position, salt):
    """``u`` in (0, 1], with the same bits as ``routes.draw``."""
    # An integer 1 in a tuple arrives as a constexpr, which has no .to.
    value = (position.to(tl.uint32) * 0x9E3779B1) ^ tl.cast(salt, tl.uint32)
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    value = value ^ (value >> 16)
    return ((value >> 8) + 1).to(tl.float32) * (1 / (1 << 24))


@triton.jit
def moved(
    MOVE: tl.constexpr,
    found_ptr,
    ran_ptrs,
    row,
    is_row,
    square,
    before,
    product,
    difference,
):
    """Cosine and relative change of rows after their trace has moved; both are stored.

    The sums over each row, which only ``next`` reads, are ``out^2``, ``in^2``, ``in * out`` and
    ``(out - in)^2``. ``row`` may have any shape; all else has the same.
    """
    cosine = tl.full(row.shape, float("-inf"), tl.float32)
    change = tl.full(row.shape, float("inf"), tl.float32)
    if found_ptr is not None and MOVE != "start":
        cosine = tl.load(found_ptr + row * 2, mask=is_row, other=0.0)
        change = tl.load(found_ptr + row * 2 + 1, mask=is_row, other=0.0)
    if MOVE == "next":
        did = is_row
        for number in tl.static_range(len(ran_ptrs)):
            did = did & (tl.load(ran_ptrs[number] + row, mask=is_row, other=0) != 0)
        new_cosine = product / tl.maximum(tl.sqrt(before * square), TINY)
        new_change = tl.sqrt(difference) / tl.maximum(tl.sqrt(before), TINY)
        cosine = tl.where(did, new_cosine, cosine)
        change = tl.where(did, new_change, change)
    if MOVE != "none":
        tl.store(found_ptr + row * 2, cosine, mask=is_row)
        tl.store(found_ptr + row * 2 + 1, change, mask=is_row)
    return cosine, change


@triton.jit
def score(SCORE: tl.constexpr, cosine, change, square, product, bias, position, salt, D):
    """How much rows wish to skip. ``square``, ``product``: sums of ``h^2`` and ``weight * h``."""
    if SCORE == "cosine":
        return cosine
    elif SCORE == "change":
        return -change
    elif SCORE == "linear":
        return -(product * tl.rsqrt(square / D + EPSILON) + bias)
    else:
        tl.static_assert(SCORE == "random")
        return -draw(position, salt)


@triton.jit
def answer(wish, bar):
    """1 where a row runs, else 0. NaN does not reach the bar, so it runs."""
    return tl.where(wish >= bar, 0, 1)


@triton.jit
def tally(
    RULE: tl.constexpr,
    is_member,
    row,
    position,
    wish,
    their_row,
    their_position,
    their_wish,
    bar,
    members,
    counted,
    latest,
    total,
):
    """Updates what rows ``row [R]`` know of their groups, after a look at rows ``their_row [J]``.

    ``is_member [R, J]``: which of the latter are in the group of each of the former. Scores and
    positions of both; what a rule does not read may be ``None``. Returns ``[R]`` each: members,
    those of them that would run (or, by ``capacity``, rank first), the largest position, the sum of
    scores.
    """
    members += tl.sum(is_member.to(tl.int32), 1)
    if RULE == "latest":
        latest = tl.maximum(latest, tl.max(tl.where(is_member, their_position[None], -1), 1))
    elif RULE == "mean":
        total += tl.sum(tl.where(is_member, their_wish[None], 0.0), 1)
    elif RULE == "any":
        counted += tl.sum(tl.where(is_member, answer(their_wish, bar)[None], 0), 1)
    else:
        tl.static_assert(RULE == "capacity")
        own, other = _rankable(wish)[:, None], _rankable(their_wish)[None]
        is_earlier = (their_position[None] < position[:, None]) | (
            (their_position[None] == position[:, None]) & (their_row[None] < row[:, None])
        )
        is_first = (other < own) | ((other == own) & is_earlier)
        counted += tl.sum((is_member & is_first).to(tl.int32), 1)
    return members, counted, latest, total


@triton.jit
def ruling(RULE: tl.constexpr, members, counted, latest, total, bar, salt, capacity):
    """1 where a row runs, else 0, given what it knows of its group."""
    if RULE == "latest":
        return answer(-draw(latest, salt), bar)
    elif RULE == "mean":
        return answer(total / tl.maximum(members, 1), bar)
    elif RULE == "any":
        return tl.where(counted > 0, 1, 0)
    else:
        # In fp64, like Python's numbers; the bits were passed as an integer.
        share = capacity.to(tl.int64).to(tl.float64, bitcast=True)
        return tl.where(counted < tl.ceil(share * members.to(tl.float64)), 1, 0)


@triton.jit
def together(RULE: tl.constexpr, is_member, row, position, wish, bar, salt):
    """``ruling`` of few rows, which all look at each other: ``is_member [R, R]``."""
    none = tl.zeros(row.shape, tl.int32)
    members, counted, latest, total = tally(
        RULE,
        is_member,
        row,
        position,
        wish,
        row,
        position,
        wish,
        bar,
        none,
        none,
        none - 1,
        none.to(tl.float32),
    )
    return ruling(RULE, members, counted, latest, total, bar, salt, None)


@triton.jit
def _rankable(wish):
    """Scores in a total order: NaN comes last, as in torch."""
    return tl.where(wish == wish, tl.minimum(wish, LARGEST), float("inf"))


class Asked(NamedTuple):
    """Verdicts as passed to a kernel, one element each."""

    weights: tuple[Tensor | None, ...]
    candidates: tuple[Tensor, ...]
    runs: tuple[Tensor, ...]
    bars: tuple[float, ...]
    biases: tuple[float, ...]


def told(found: Sequence[Verdict]) -> dict[str, Any]:
    """The kernel arguments for verdicts; ``salts`` apart, so that no code specialises on them."""
    return {
        "asked": Asked(
            weights=tuple(verdict.weight for verdict in found),
            candidates=tuple(verdict.candidates for verdict in found),
            runs=tuple(verdict.runs for verdict in found),
            bars=tuple(float(verdict.bar) for verdict in found),
            biases=tuple(float(verdict.bias) for verdict in found),
        ),
        "salts": tuple(signed(verdict.salt) for verdict in found),
        "SCORES": tuple(verdict.score.value for verdict in found),
        "RULES": tuple(rule_of(verdict) for verdict in found),
    }


def rule_of(verdict: Terms) -> str:
    """The rule by which rows decide together, or that each decides alone."""
    if verdict.capacity is not None:
        return "capacity"
    if verdict.group is Group.ROW:
        return str(ALONE.value)
    return "latest" if verdict.score is Score.RANDOM else verdict.agreement.value
