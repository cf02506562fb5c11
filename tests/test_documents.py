"""What the documents say: links lead somewhere, examples run, commands have the options shown."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from fastskip.cli import app
from fastskip.policy import SkipPolicy

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastskip", "kernels", "benchmarks", "tests")
DOCUMENTS = [
    ROOT / "README.md",
    *sorted({path.resolve() for name in FOLDERS for path in (ROOT / name).rglob("*.md")}),
]


def identified(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)


def anchors(path: Path) -> set[str]:
    """As GitHub names them: lower case, punctuation dropped, spaces as hyphens."""
    titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=identified)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such section"


def policies() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in DOCUMENTS:
        for block in blocks(path, "json"):
            if '"schema_version"' in block:
                yield path, json.loads(block)
            else:
                yield path, {"schema_version": 1, **json.loads("{" + block + "}")}


@pytest.mark.parametrize(("path", "written"), list(policies()))
def test_policies_can_be_read(path: Path, written: dict[str, Any]) -> None:
    policy = SkipPolicy.from_dict(written)
    assert policy != SkipPolicy(), path
    assert SkipPolicy.from_dict(policy.to_dict()) == policy


RUNNABLE = [ROOT / "README.md", ROOT / "fastskip" / "routing" / "README.md"]


@pytest.mark.parametrize("path", RUNNABLE, ids=identified)
def test_python_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first one of a document, on the bundled model."""
    exec(compile(blocks(path, "python")[0], str(path), "exec"), {})
    if path.parent == ROOT:
        assert capsys.readouterr().out.strip()


def shown_commands() -> Iterator[tuple[Path, list[str]]]:
    for path in DOCUMENTS:
        for block in blocks(path, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    words = shlex.split(command, comments=True)
                    if words[:1] == ["fastskip"]:
                        yield path, words[1:]


def known_options(words: list[str]) -> set[str]:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return {option for each in command.params for option in (*each.opts, *each.secondary_opts)}


@pytest.mark.parametrize(("path", "words"), list(shown_commands()))
def test_shown_commands_have_these_options(path: Path, words: list[str]) -> None:
    used = {word for word in words if word.startswith("-")}
    assert used <= known_options(words), identified(path)


def helps(command: Any = None) -> Iterator[str]:
    command = command or typer.main.get_command(app)
    yield command.help
    for part in getattr(command, "commands", {}).values():
        yield from helps(part)


EXAMPLES = [
    Text.from_markup(paragraph).plain
    for text in helps()
    for paragraph in text.split("\n\n")
    if paragraph.startswith("[cyan]fastskip")
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_can_be_copied(example: str) -> None:
    """Each is one line of a help page of 100 columns, which has a margin on both sides."""
    assert len(example) <= 98, len(example)
    for command in example.split("&&"):
        words = shlex.split(command, comments=True)[1:]
        assert {word for word in words if word.startswith("-")} <= known_options(words)
