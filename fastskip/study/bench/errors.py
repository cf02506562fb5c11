"""What cannot be measured."""


class BenchError(ValueError):
    """A measurement that cannot be made; says what is wrong and what is allowed."""
