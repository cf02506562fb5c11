"""What is recommended, and what is said of the rest."""

import pytest

from fastskip.commands.search_table import show
from fastskip.intervals import Estimate
from fastskip.policy import SkipPolicy
from fastskip.study.search.conclusion import recommended, told
from fastskip.study.search.result import Comparison, Found, SearchResult, front, slug


def found(name: str, source: str, kl: float, change: Estimate, keeps: bool = True) -> Found:
    return Found(
        name=name,
        source=source,
        policy=SkipPolicy(),
        cost=0.6,
        flops=0.6,
        ttft_s=None,
        tpot_s=None,
        calibration_kl=kl,
        score=Estimate(0.9 + change.mean, 0.8, 1.0),
        change=change,
        tokens=1.0,
        kl=kl,
        keeps_budget=keeps,
    )


LEVEL, WORSE = Estimate(-0.01, -0.03, 0.01), Estimate(-0.1, -0.15, -0.05)
DENSE = found("dense", "dense", 0.0, Estimate(0.0, 0.0, 0.0), keeps=False)


def test_the_least_moved_of_those_that_are_not_worse() -> None:
    over = found("over the budget", "search", 0.001, LEVEL, keeps=False)
    worse = found("worse", "search", 0.002, WORSE)
    first, second = found("first", "peer", 0.02, LEVEL), found("second", "search", 0.03, LEVEL)
    every = [DENSE, over, worse, second, first]
    assert recommended(every) is first
    assert recommended([DENSE, over, worse]) is None
    router = found("router", "router", 0.001, LEVEL)
    assert recommended([*every, router]) is first
    assert recommended([DENSE, over, worse, router]) is router
    text = told(every, first, (), 50, "TPOT 2x faster")
    assert "Take 'first': -1.0 points (-3.0 to +1.0)" in text and "50 held-out items" in text


def test_few_items_and_wide_intervals_are_told() -> None:
    def said(change: Estimate, items: int) -> str:
        best = found("first", "search", 0.01, change)
        return told([DENSE, best], best, (), items, "x")

    wide, same = Estimate(-0.5, -1.0, 0.0), Estimate(0.0, 0.0, 0.0)
    assert "rely" not in said(LEVEL, 100) and "rely" not in said(same, 500)
    assert "rely on it yet: a loss of 100.0 points is not ruled out; judge it" in said(wide, 500)
    assert "rely on it yet: 99 items can only show large differences; judge" in said(same, 99)
    # The caution follows the advice at once, before how the advice was arrived at.
    text = said(wide, 500)
    assert text.index("Do not rely") < text.index("The rule: of the candidates")
    text = said(wide, 1)
    assert "on 1 held-out item, within" in text
    assert "1 item can only show large differences and a loss of 100.0 points is not" in text


def test_nothing_is_worth_it() -> None:
    worse = found("worse", "search", 0.002, WORSE)
    text = told([DENSE, worse], None, (), 50, "x")
    assert text.startswith("Nothing is worth it here") and "'worse'" in text
    assert "does not" not in text
    milder = found("search at 0.9", "search", 0.001, LEVEL, keeps=False)
    text = told([DENSE, worse, milder], None, (), 50, "x")
    assert "\nAt 0.6 of the dense cost 'search at 0.9' does not: -1.0 points" in text
    assert told([DENSE], None, (), 50, "x").startswith("Nothing meets the budget")


def test_how_the_search_stands() -> None:
    own = found("search", "search", 0.01, LEVEL)
    above, level = Estimate(0.1, 0.05, 0.2), Estimate(0.02, -0.01, 0.04)

    def said(*rivals: Comparison) -> str:
        return told([DENSE, own], own, rivals, 50, "x")

    beaten = Comparison("a", "uniform", above), Comparison("b", "peer", above)
    assert "beats every uniform interval and every peer at this budget (2)" in said(*beaten)
    # routers and random policies are not what this is about
    assert "beats every" in said(*beaten, Comparison("r", "router", level))
    text = said(*beaten, Comparison("c", "peer", level), Comparison("d", "peer", WORSE))
    assert "does not beat every" in text and "2 of 4 are beaten" in text
    assert "are beaten; better: d; no clear difference: c." in text  # the worst news first
    cheaper = told([DENSE, own], own, beaten, 50, "x", "search at 0.4", beaten)
    advice, standing, at_less, rule = cheaper.splitlines()
    assert advice.startswith("Take 'search'") and standing.startswith("The search's policy beats")
    assert at_less.endswith("'search at 0.4', which costs no more than any of them, beats 2 of 2.")
    assert rule.startswith("The rule: of the candidates")
    rest = (*beaten, Comparison("c", "peer", level))
    at_less = told([DENSE, own], own, rest, 50, "x", "y", rest).splitlines()[2]
    assert at_less.endswith("beats 2 of 3; not c.")
    assert "no peer meets the budget" in said()


@pytest.mark.parametrize(
    ("points", "marks"),
    [
        ([(1.0, 0.9), (0.5, 0.9), (0.5, 0.8), (0.4, 0.7)], [False, True, False, True]),
        ([(1.0, 0.9), (1.0, 0.9)], [True, True]),
    ],
)
def test_the_front(points: list[tuple[float, float]], marks: list[bool]) -> None:
    assert front(points) == marks


def test_file_names() -> None:
    assert slug("search, solver alone") == "search-solver-alone"
    assert slug("search at 0.83") == "search-at-0.83"


def test_brackets_in_names_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    named = found("a[b].json", "peer", 0.1, LEVEL)
    settings = {"calibration_items": 2, "held_out_items": 2, "is_cut_short": False}
    show(
        SearchResult(
            budget={"quantity": "flops", "text": "FLOPs 60 %"},
            circumstances={},
            workload={"n_image": 1, "n_text": 1, "n_new": 2},
            settings=settings,
            sensitivity=(),
            candidates=(DENSE, named),
            comparisons=(),
            left_out=(),
            recommended=None,
            text="",
        )
    )
    assert "a[b].json" in capsys.readouterr().out
