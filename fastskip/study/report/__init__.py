"""One self-contained page of everything that `fastskip eval`, `bench` and `search` found."""

from fastskip.study.report.drawing import DrawingError
from fastskip.study.report.fields import ReportError
from fastskip.study.report.writing import write_report

__all__ = ["DrawingError", "ReportError", "write_report"]
