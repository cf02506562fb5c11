"""``python -m fastskip``: the command line."""

from fastskip.cli import app

if __name__ == "__main__":
    app(prog_name="fastskip")
