"""What stops the benchmark."""


class BenchError(Exception):
    """A side does not do the work that it is measured for."""
