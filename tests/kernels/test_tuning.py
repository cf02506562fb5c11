"""Which table is asked first."""

from fastskip.kernels import tuning


def test_measured_tables_are_asked_first() -> None:
    """A GPU's own, then those of its sisters, and the default, which nobody measured, last."""
    for name, slugs in (
        ("NVIDIA H200", ["nvidia-h200", "nvidia-h100-80gb-hbm3"]),
        ("NVIDIA H100 80GB HBM3", ["nvidia-h100-80gb-hbm3", "nvidia-h200"]),
        ("another one", ["nvidia-h100-80gb-hbm3", "nvidia-h200"]),
    ):
        tables = tuning.tables_for(name, 90)
        assert [table.slug for table in tables] == [*slugs, tuning.DEFAULT]
        assert [table.measured is not None for table in tables] == [True, True, False]


def test_another_architecture_has_the_default() -> None:
    assert [table.slug for table in tuning.tables_for("NVIDIA L4", 89)] == [tuning.DEFAULT]
    assert [table.slug for table in tuning.tables_for(None, None)] == [tuning.DEFAULT]
