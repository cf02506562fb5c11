"""The page: whole, escaped, loading nothing, and saying what the files say."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastskip.cli import app
from fastskip.demo import checkpoint_path
from fastskip.intervals import Estimate
from fastskip.plan import shape_of_depth
from fastskip.study.report import write_report
from fastskip.study.report.drawing import Colour
from fastskip.study.report.fields import ReportError
from fastskip.study.report.maps import maps
from fastskip.study.report.results import read_results
from tests.study.report.files import (
    DEPTH,
    EVIL,
    bench_document,
    eval_document,
    search_document,
    write,
)

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """What a browser sees: elements with their attributes, that they close, and the words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for document in (eval_document(), bench_document(), search_document()):
        write(folder / document["kind"], document)
    folders = [folder / kind for kind in ("eval", "bench", "search")]
    shape = shape_of_depth(DEPTH)
    options = {"made": "2026-11-26"}
    write_report(folders, folder / "out.html", folder / "png", lambda _: shape, **options)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> str:
    return (folder / "out.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_nothing_is_loaded(source: str, page: Page) -> None:
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", source.replace("data:", ""))
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert not page.all("script") and not page.all("link")
    policy = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_texts_from_data_are_texts(source: str, page: Page) -> None:
    assert "<script" not in source and EVIL in page.text
    assert "&lt;script&gt;alert(" in source


def test_it_can_be_read_by_all(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert (link["href"] or "").removeprefix("#") in ids
    assert all(image["alt"] for image in page.all("img")) and page.all("img")
    charts = [a for a in page.all("div") if a.get("class") == "chart"]
    assert charts and all(a["role"] == "img" and a["aria-label"] for a in charts)
    assert len(page.all("caption")) == len(page.all("table"))
    heads = page.all("th")
    assert {a["scope"] for a in heads} == {"col", "row"}
    assert page.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-4]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1


def test_tables_say_what_the_files_say(page: Page) -> None:
    for words in (
        "50.0% 21.5 to 78.5",  # the score of every_nth_block, Wilson's interval of 4 of 8
        "1.40x 1.33 to 1.54 faster",
        "0.90x 0.85 to 0.99 slower here",
        "Slower here than fastskip's own dense model: image_ffn (TPOT 0.90x (0.85 to 0.99))",
        "compiled: left out (no compiler)",
        "30 ms measured: 2.67x",  # dense: prefill of 80 ms
        "0.91",
        "image_ffn search recommended on the front",
        "+10.0 +2.0 to +20.0 beaten",
        "after layer 1: 50% of image rows stay, by attention",
        "A processor",
        "model fingerprint 0123456789abcdef",
        "8 items",
        "not told apart",
    ):
        assert words in page.text, words
    assert "/models/a/small" not in page.text and "a/small" in page.text
    labels = " ".join(str(a["aria-label"]) for a in page.all("div") if "aria-label" in a)
    assert "image_ffn: 70 ms, 100.0%" in labels  # the score of one, the time of the other


def test_cider_is_no_percentage(tmp_path: Path) -> None:
    """Captions under CIDEr beside questions: two means, two charts, one with a percent sign."""
    document = eval_document(12)
    for place, item in enumerate(document["items"][:4]):
        item["metric"] = "cider"
        for number, each in enumerate(document["judgements"]):
            each["evaluation"]["judged"][place] |= {
                "metric": "cider",
                "answer": f"a dog ({number})",
                "score": 5.0 - number,
            }
    folder = write(tmp_path / "eval", document)
    shape = shape_of_depth(DEPTH)
    written = write_report([folder], tmp_path / "r.html", tmp_path / "png", lambda _: shape)
    text = unescape(Page(written[0].read_text(encoding="utf-8")).text)
    assert "Answers (8 items) not told apart from dense: image_ffn (+0.0 points)" in text
    assert "Captions by CIDEr, times 100 (4 items) worse than dense: image_ffn (-100.0)" in text
    assert "500.0 500.0 to 500.0" in text and "CIDEr 400.0, lower than dense" in text
    assert "500.0%" not in text and "-100.0 points" not in text
    names = {path.name for path in written[1:]}
    assert {"eval1_share_ttft.png", "eval1_cider_ttft.png"} <= names
    # of captions that nobody gets right, Wilson's interval would not be 0 to 0
    for each in document["judgements"]:
        for judged in each["evaluation"]["judged"][:4]:
            judged["score"] = 0.0
    (run,) = read_results([write(tmp_path / "eval", document)]).evals
    assert run.parts[1].dense.score == Estimate(0.0, 0.0, 0.0)


def test_charts_are_files_too(folder: Path, page: Page) -> None:
    names = {path.name for path in (folder / "png").iterdir()}
    assert {"eval1_ttft.png", "eval1_tpot.png", "bench1_cost.png"} <= names
    assert {"search1_tpot.png", "search1_sensitivity.png", "policy1.png"} <= names
    charts = [a for a in page.all("div") if a.get("class") == "chart"]
    assert len(charts) == len(names)


def test_colours_can_be_told_from_the_ground(source: str) -> None:
    """WCAG: 4.5 to 1 for texts, in light and in dark."""
    style = source[source.index("<style>") : source.index("</style>")]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    for block in (light, dark):
        palette = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        assert palette.keys() == {colour.name.lower() for colour in Colour}
        for name in ("ink", "muted", "blue", "orange", "green", "purple", "red", "grey"):
            assert contrast(palette[name], palette["paper"]) >= 4.5, name
    drawn = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light))
    assert drawn == {colour.name.lower(): colour.value for colour in Colour}


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_part_of_the_results_is_enough(tmp_path: Path) -> None:
    document = bench_document()
    for contender in document["contenders"]:
        contender |= {"floor_s": None, "ideal_share": None}
    write(tmp_path, document)
    out = tmp_path / "deep" / "r.html"
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(tmp_path), "-o", str(out)])
    assert done.exit_code == 0, done.output
    text = unescape(Page(out.read_text(encoding="utf-8")).text)
    assert "Cost against the floor" in text and "Accuracy" not in text
    # no config at hand: no maps, and the page says so
    assert "image_ffn: no map (the depth of a/small is unknown)" in text
    assert [path.name for path in (out.parent / "r_files").iterdir()] == ["bench1_cost.png"]
    assert not list(out.parent.glob("*.part"))


def test_a_summary_needs_findings(tmp_path: Path) -> None:
    document = bench_document()
    for contender in document["contenders"]:
        contender["verdict"] = dict.fromkeys(("ttft", "tpot"), "not told apart")
    folder = write(tmp_path / "bench", document)
    written = write_report([folder], tmp_path / "r.html", tmp_path / "png", lambda _: None)
    page = Page(written[0].read_text(encoding="utf-8"))
    assert "Summary" not in page.text and "Limitations" in page.text


def test_a_conclusion_of_several_lines_is_several_paragraphs(tmp_path: Path) -> None:
    document = search_document()
    document["conclusion"]["text"] = "Take it.\nIt is < others."
    folder = write(tmp_path / "search", document)
    written = write_report([folder], tmp_path / "r.html", tmp_path / "png", lambda _: None)
    source = written[0].read_text(encoding="utf-8")
    paragraphs = "<p>Search (TPOT 1.5x faster): Take it.</p><p>It is &lt; others.</p>"
    assert f"<li>{paragraphs}</li>" in source


def test_a_map_for_each_policy_of_each_model(tmp_path: Path) -> None:
    bench, run = bench_document(), eval_document()
    other = {**bench["circumstances"], "model": "other/model", "model_fingerprint": "another"}
    folders = [write(tmp_path / "e", run), write(tmp_path / "s", search_document())]
    shape = shape_of_depth(DEPTH)
    labels = ["image_ffn", "every_nth_block", "block_pairs", "removing"]
    assert [each.label for each in maps(read_results(folders), lambda _: shape)] == labels
    bench["circumstances"] = other
    folders = [folders[0], write(tmp_path / "b", bench)]
    found = maps(read_results(folders), lambda told: None if told.model == "other/model" else shape)
    assert [(each.label, each.found is None) for each in found] == [
        ("image_ffn (eval)", False),
        ("every_nth_block (eval)", False),
        ("block_pairs", False),
        ("image_ffn (bench)", True),
        ("every_nth_block (bench)", True),
    ]
    assert found[-1].problem == "the depth of other/model is unknown"
    deep = maps(read_results(folders[:1]), lambda _: shape_of_depth(1))
    assert "bounds" in deep[0].problem and deep[0].found is None


def test_layers_are_for_models_that_are_not_at_hand(tmp_path: Path) -> None:
    document = eval_document()
    document["circumstances"] = {**document["circumstances"], "model": str(checkpoint_path())}
    own, foreign = write(tmp_path / "own", document), write(tmp_path / "foreign", bench_document())

    def done(folder: Path, layers: int) -> Any:
        out = ("--out", str(tmp_path / "r.html"), "--layers", str(layers))
        return CliRunner().invoke(app, ["report", str(folder), *out])

    for layers in (3, 12):
        found = done(own, layers)
        assert found.exit_code == 2
        told = f"--layers: got {layers}; allowed: 8, the depth of demo/checkpoint, or no --layers"
        assert told in " ".join(found.output.split())
    assert done(own, 8).exit_code == done(foreign, 5).exit_code == 0
    results = read_results([foreign, write(tmp_path / "search", search_document())])
    assert all(each.found is not None for each in maps(results, lambda _: None, 8))
    # what a search tells of the same model counts as well
    (tmp_path / "search" / "policies").mkdir()
    made = {"provenance": {"made_for": {"depth": 8}}}
    (tmp_path / "search" / "policies" / "image_ffn.json").write_text(json.dumps(made))
    results = read_results([foreign, tmp_path / "search"])
    with pytest.raises(ReportError, match="--layers: got 5; allowed: 8, the depth of a/small"):
        maps(results, lambda _: None, 5)


def test_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["report", *arguments])
        assert done.exit_code == 2
        return " ".join(done.output.split())

    assert "holds none of them; allowed: a folder that holds eval.json" in refused(str(tmp_path))
    assert "--out r.pdf: allowed: a file (.html, .htm) in" in refused(
        str(tmp_path), "--out", "r.pdf"
    )
    told = refused(str(tmp_path), "--layers", "8", "--model", "x")
    assert "--layers 8: --model already gives it" in told

    monkeypatch.setattr("fastskip.plotting.is_available", lambda: False)
    assert "report: matplotlib is missing; install it with: pip install" in refused(str(tmp_path))
