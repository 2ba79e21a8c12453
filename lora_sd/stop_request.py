"""How a working run is asked to stop: by signals."""

import os
import signal
import sys

STOP_SIGNALS = [  # the last is Windows' Ctrl-Break, which is what one process can send another
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
]


class StopRequest:
    """Becomes `requested` at the first stop signal; the second one ends the program at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, _: object) -> None:
        self.requested = True
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        text = "\nStopping: saving first. Once more to leave at once.\n"
        os.write(sys.stderr.fileno(), text.encode())
