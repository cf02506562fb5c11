"""What pyproject.toml promises about the package; building it is the business of CI."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

import fastskip

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == fastskip.__version__


def test_every_folder_with_modules_is_listed(project: dict[str, Any]) -> None:
    listed: list[str] = project["tool"]["setuptools"]["packages"]
    folders = {file.parent for file in (ROOT / "fastskip").glob("**/*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == names | {"fastskip.kernels"}
    assert listed == sorted(set(listed))


def test_an_editable_install_is_a_path(project: dict[str, Any]) -> None:
    """Else a clone beside a script hides the package: setuptools' finders come behind folders."""
    assert project["tool"]["setuptools"]["package-dir"] == {"": "."}


def test_package_data_is_there(project: dict[str, Any]) -> None:
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: {pattern}"


def test_the_command(project: dict[str, Any]) -> None:
    from importlib import import_module

    module, _, name = project["project"]["scripts"]["fastskip"].partition(":")
    assert callable(getattr(import_module(module), name))
