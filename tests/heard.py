"""What the log says: a run keeps it from pytest's own `caplog`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard() -> Iterator[list[str]]:
    """The lines of the log while inside."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, ear = logging.getLogger("lora_sd"), Ear()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(ear)
    try:
        yield lines
    finally:
        log.removeHandler(ear)
        log.setLevel(level)
