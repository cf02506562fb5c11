"""Places that commands cannot write to: told in one line, before the work."""

from pathlib import Path

import pytest

from fastskip.commands.common import CommandError
from fastskip.commands.outputs import check_file, check_folder
from tests.commands.test_cli import run

COMMANDS = {
    "bench": "--out",
    "eval": "--out",
    "search -b flops_0.6": "--out",
    "train --demo": "--out",
    "prune --ratio 0.5": "--out",
    "study paper --quick --seeds 1": "--out",
    "demo --quick": "--plots",
    "demo --quick ": "--json",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["file/below", "file"])
def test_what_cannot_be_written_is_told_before_the_work(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    option, out = COMMANDS[command], tmp_path / place
    out = out / "below" if option == "--json" else out

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fastskip.loading.load_model", load)
    monkeypatch.setattr("fastskip.demo.measure.Bench.load", load)
    arguments = [part.replace("_", " ") for part in command.split()]
    result = run(*arguments, option, out)
    assert result.exit_code == 2, result.exception
    assert result.stderr.startswith(f"{option} {out}: ") and result.stderr.count("\n") == 1
    assert "allowed: a" in result.stderr and result.stdout == ""
    assert (tmp_path / "file").read_text() == "kept"


def test_trying_leaves_nothing_behind(tmp_path: Path) -> None:
    check_folder("--out", tmp_path / "a" / "b")
    check_file("--json", tmp_path / "c" / "d.json")
    check_folder("--out", None)
    check_file("--json", None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    check_folder("--out", tmp_path / "there" / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["there"]
    with pytest.raises(CommandError, match="--json .*there: is a folder; allowed: a file in"):
        check_file("--json", tmp_path / "there")
