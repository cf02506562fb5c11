"""One self-contained page of everything that `fastskip eval`, `bench` and `search` found."""

from fastskip.plotting import PlotsError
from fastskip.study.report.fields import ReportError
from fastskip.study.report.writing import write_report

__all__ = ["PlotsError", "ReportError", "write_report"]
