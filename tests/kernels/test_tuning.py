"""Which table is asked first."""

from fastskip.kernels import tuning


def test_measured_tables_are_asked_first() -> None:
    """Those of a sister of the GPU, too; then what nobody measured, and the default last."""
    tables = tuning.tables_for("NVIDIA H200", 90)
    are_measured = [table.measured is not None for table in tables]
    assert are_measured == sorted(are_measured, reverse=True) and are_measured[0]
    assert tables[-1].slug == tuning.DEFAULT
    first = next(table for table in tables if table.measured is None)
    assert first.slug == "nvidia-h200"


def test_another_architecture_has_the_default() -> None:
    assert [table.slug for table in tuning.tables_for("NVIDIA L4", 89)] == [tuning.DEFAULT]
    assert [table.slug for table in tuning.tables_for(None, None)] == [tuning.DEFAULT]
