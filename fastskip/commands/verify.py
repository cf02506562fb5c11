"""`fastskip verify`: does the skipping model compute what its policy says?"""

from typing import Annotated
import typer


def verify() -> None:
    """x"""
