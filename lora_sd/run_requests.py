"""What a run at work is asked for by files in its folder, made by the app or by anybody.

    stop      save and end (`stop_request.py`, which knows of signals, too)
    pause     wait, for as long as the file is there; what else is asked for is done meanwhile
    save      write a checkpoint, and go on
    sample    draw the sample pictures, and go on

`touch outputs/RUN/pause`, and remove it. All are heeded between two steps, by all processes at the
same one, and change nothing of what is learned: the run stays the same to the bit.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from lora_sd.errors import RunError
from lora_sd.run_folder import REQUESTS, Request, RunFolder
from lora_sd.run_record import RunRecord
from lora_sd.stop_request import LOOK_EVERY_S, StopRequest

log = logging.getLogger("lora_sd")


class RunRequests:
    """Hears and answers what a run is asked for.

    Args:
        run: its folder, whose files the main process looks at.
        stop: the request to end, which any process may have got.
    """

    def __init__(
        self, run: RunFolder, stop: StopRequest, accelerator: Accelerator, record: RunRecord
    ) -> None:
        self._run, self._stop = run, stop
        self._accelerator, self._record = accelerator, record
        self._looked = 0.0

    def to_stop(self) -> bool:
        """Whether any process was asked to end: all learn it at once."""
        return in_any(self._accelerator, [self._stop.requested])[0]

    def answer(self, save: Callable[[], None], sample: Callable[[], None]) -> bool:
        """Do what was asked for, and wait while the run is paused; whether it is to end."""
        asked = self._heard()
        if "pause" in asked and "stop" not in asked:
            asked = self._wait(asked, save, sample)
        if "stop" in asked:  # which saves in any case
            return True
        _do(asked, save, sample)
        return False

    def _wait(
        self, asked: set[Request], save: Callable[[], None], sample: Callable[[], None]
    ) -> set[Request]:
        """Wait until the pause is over; what is asked for then."""
        file = self._run.request_file("pause")
        log.info("Paused, until '%s' is removed.", file)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for others, meanwhile
        with self._record.paused("paused"):
            while "pause" in asked and "stop" not in asked:
                _do(asked, save, sample)
                self._record.beat()
                time.sleep(LOOK_EVERY_S)
                asked = self._heard()
        log.info("The pause is over.")
        return asked

    def _heard(self) -> set[Request]:
        """What any process was asked for since the last time; the same in all."""
        here = self._looked_at()
        heard = in_any(self._accelerator, [one in here for one in REQUESTS])
        return {one for one, is_asked in zip(REQUESTS, heard, strict=True) if is_asked}

    def _looked_at(self) -> set[Request]:
        """What this process was asked for; files are looked at a few times a second."""
        asked: set[Request] = {"stop"} if self._stop.requested else set()
        now = time.monotonic()
        if self._accelerator.is_main_process and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            for request in REQUESTS[1:]:
                if self._run.is_asked(request, self._stop.began):
                    asked.add(request)
                    if request != "pause":
                        with contextlib.suppress(RunError):  # then it is done again
                            self._run.withdraw(request)
        return asked


def _do(asked: set[Request], save: Callable[[], None], sample: Callable[[], None]) -> None:
    if "save" in asked:
        save()
    if "sample" in asked:
        sample()


def in_any(accelerator: Accelerator, here: Sequence[bool]) -> list[bool]:
    """Whether each of some things is so in any of the processes; all learn the same."""
    if accelerator.num_processes == 1:
        return list(here)
    told = torch.tensor(here, dtype=torch.float32, device=accelerator.device)
    return [count > 0 for count in accelerator.reduce(told).tolist()]
