"""How a working run is asked to stop: by a signal, a file, or the end of what launched it.

    SIGINT, SIGTERM, SIGHUP   Ctrl-C, `kill`, a closed terminal (not under nohup); Ctrl-Break on
                              Windows
    the file stop             in the run's folder, made by the app or by anybody: where there are no
                              signals
    the launcher's end        `accelerate launch` and `torchrun` leave the trainer behind when they
                              are killed; one that a shell has started works on without the shell

Before there is a run folder nothing can be lost, and the program ends at once.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil

from lora_sd.errors import RunError
from lora_sd.launcher import launcher
from lora_sd.run_folder import RunFolder

log = logging.getLogger("lora_sd")
STOP_SIGNALS = [  # the last is Windows' Ctrl-Break, which is what one process can send another
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
]
LOOK_EVERY_S = 0.2
PASSED_ON_S = 2.0
"""So soon after a signal another one is the same, which `torchrun` has passed on: in a terminal
Ctrl-C goes to the launcher and to the trainer."""


class StopRequest:
    """Becomes `requested` at the first request; a second signal ends the program at once, with the
    exit status that the system gives for it: 130 (SIGINT) or 143 (SIGTERM) in a shell.

    To be made before libraries are imported, as the launcher may end meanwhile.
    """

    def __init__(self) -> None:
        self.began = time.time()
        self._run: RunFolder | None = None
        self._requested, self._is_watching = False, False
        self._signalled = self._looked = 0.0
        self._is_elastic = "TORCHELASTIC_RUN_ID" in os.environ
        for number in STOP_SIGNALS:
            if number != getattr(signal, "SIGHUP", None) or (
                signal.getsignal(number) != signal.SIG_IGN  # nohup
            ):
                signal.signal(number, self._on_signal)
        if parent := launcher():
            watcher = threading.Thread(target=self._wait_for_end, args=(parent,), daemon=True)
            watcher.start()

    def watch(self, run: RunFolder, is_main: bool = True) -> None:
        """From now on there is something to save: a request is noted, and obeyed at the next step.

        Args:
            is_main: whether this process looks at the run's stop file. One that is older than this
                process was meant for another, and is removed.
        """
        self._is_watching = True
        if is_main:
            self._run = run

    @property
    def requested(self) -> bool:
        """Whether to stop; cheap enough to be asked at every step."""
        if not self._requested and self._run is not None:
            now = time.monotonic()
            if now - self._looked >= LOOK_EVERY_S:
                self._looked = now
                self._look_at_file(self._run)
        return self._requested

    def _look_at_file(self, run: RunFolder) -> None:
        if run.is_asked("stop", self.began):
            self._requested = True
            log.info("Stopping, as '%s' asks for: saving first.", run.request_file("stop"))
            with contextlib.suppress(RunError):  # then it is looked at again
                run.withdraw("stop")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._is_elastic and self._signalled and now - self._signalled < PASSED_ON_S:
            return
        if not self._is_watching:
            self._requested = True  # so it stops, if later, where a library swallows the exception
            raise KeyboardInterrupt
        if self._requested and self._signalled:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._requested, self._signalled = True, now
        if not self._is_elastic:
            for each in STOP_SIGNALS:  # even while a library is at work that lets no Python run
                if signal.getsignal(each) == self._on_signal:
                    signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            text = "\nStopping: saving first. Once more to leave at once.\n"
            os.write(sys.stderr.fileno(), text.encode())

    def _wait_for_end(self, parent: psutil.Process) -> None:
        while parent.is_running() and os.getppid() == parent.pid:
            time.sleep(LOOK_EVERY_S)
        if not self._requested:
            log.warning("What launched the trainer has ended: it stops, and saves first.")
            signal.raise_signal(signal.SIGTERM)
