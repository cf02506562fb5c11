"""Measure a GPU, cell by cell.

Without names the default cells run: about 23 minutes on an H200. Every cell writes one line to
<results>/results.jsonl when it finishes, and cells that already have a line are skipped: the same
command resumes an interrupted run. Failed cells are retried.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """
examples:
  python -m benchmarks.gpu                      the default cells, then the tables
  python -m benchmarks.gpu --budget 9           in pieces: repeat until nothing is left
  python -m benchmarks.gpu --list               all cells, and which are done
  python -m benchmarks.gpu tune e2e.7b.b1       some cells: full names, or leading parts of names
  python -m benchmarks.gpu e2e --again          measure again what is already done
  python -m benchmarks.gpu --results out/h200   another folder for results, logs and tables
  python -m benchmarks.gpu --tables             measure nothing, print the tables of what is done
  python -m benchmarks.gpu --tiny               everything at tiny shapes on the CPU: does it work?

A tuning cell writes kernels/tables/<gpu>/ (used from then on) and a copy below the results.
Clocks and power limits are used as they are set; nothing here changes them.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; the exit status is 1 if a cell failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    if options.tiny:
        # Triton chooses its interpreter when it is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.gpu import protocol

    try:
        return protocol.start(options, given)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "cells", nargs="*", metavar="cell", help="a cell, or the leading part of its name"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="default: benchmarks/results/<gpu>"
    )
    parser.add_argument(
        "--budget", type=float, default=23.0, metavar="MIN", help="total minutes (23)"
    )
    parser.add_argument("--again", action="store_true", help="also run cells that are already done")
    parser.add_argument("--list", action="store_true", help="list all cells")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print the tables")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument(
        "--same-process", action="store_true", help="no process per group: for a debugger"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
