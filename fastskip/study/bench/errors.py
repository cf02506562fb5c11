"""The error of benchmarks."""


class BenchError(ValueError):
    """A benchmark cannot be run; says what is wrong and what is allowed."""
