"""One base model ready to draw, one lock round it, and the pictures that it drew."""

from __future__ import annotations

import gc
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_sd.errors import AdapterError, UserError, shown_size
from lora_sd.ui.generate.request import Request, Used
from lora_sd.ui.launch import Trainer
from lora_sd.ui.texts import say

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_sd.adapter import Adapter
    from lora_sd.base_model import BaseModel
    from lora_sd.merge import MergedWeights

log = logging.getLogger("lora_sd")
MOST_ROW_PX = 512  # side of the pictures of a row that are drawn in one pass
LEAST_IN_A_ROW = 3
MOST_KEPT_PX = 2**26  # pixels of the pictures in memory: 200 MB
ADAPTERS_KEPT = 8
ROOM_TO_DRAW = 3 * 2**30  # bytes on a GPU beside the weights: the UNet's and the VAE's work
OnStep = Callable[[int, int], bool]  # (steps done, in all) -> whether to stop


@dataclass
class _Loaded:
    """A base model, ready to draw."""

    base: BaseModel
    merged: MergedWeights
    shapes: Mapping[str, Any]


class Studio:
    """Draws what is requested, one request after the other.

    Args:
        trainer: whose training may want the GPU's memory.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._lock = threading.Lock()
        self._loaded: tuple[tuple[tuple[str, Any], ...], _Loaded] | None = None
        self._adapters: OrderedDict[Any, Adapter] = OrderedDict()
        self._drawn: OrderedDict[Any, list[list[Image]]] = OrderedDict()

    def draw(self, rows: Sequence[Sequence[Request]], on_step: OnStep) -> list[list[list[Image]]]:
        """The pictures of each request; those drawn before are taken from memory.

        A request's pictures depend on nothing but the request, bit for bit, with one exception: a
        row of small pictures at several scales of one adapter is drawn in one pass, which is
        quicker and equal but for rounding.

        Args:
            rows: all of one base model.
            on_step: called before the model is loaded, and at every denoising step.

        Raises:
            UserError: the base or an adapter cannot be used, memory does not suffice, a picture
                came out black, or `on_step` wanted to stop.
        """
        with self._lock:
            tasks = [[(_key(task), task) for task in _tasks(row)] for row in rows]
            missing = {key: task for row in tasks for key, task in row if key not in self._drawn}
            done, total = 0, max(1, sum(task[0].steps for task in missing.values()))
            if on_step(0, total):
                raise UserError(say("generate.cancelled"))
            for key, task in missing.items():

                def over_all(part: int, of: int, before: int = done, task: Any = task) -> bool:
                    return on_step(before + part * task[0].steps // of, total)

                with self._sentences():
                    self._drawn[key] = self._draw(task, over_all)
                done += task[0].steps
            found = [[one for key, _ in row for one in self._drawn[key]] for row in tasks]
            for key in [key for row in tasks for key, _ in row]:
                self._drawn.move_to_end(key)
            self._forget_old()
        return found

    def warm_up(self) -> None:
        """Import what drawing needs; no model takes memory yet."""
        with self._lock:  # diffusers must not be imported by two threads at once
            import lora_sd.formats
            import lora_sd.generate  # noqa: F401

    def make_room(self) -> None:
        """Give the GPU's memory back, for a training that begins; drawing loads it again."""
        loaded = self._loaded
        if loaded is None or loaded[1].base.device.type == "cpu":
            return
        loaded = None
        with self._lock:  # after a drawing that is under way
            self._unload()

    def _unload(self) -> None:
        import torch

        self._loaded = None
        self._adapters.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """What goes wrong, as sentences. After what nobody foresaw, the base is loaded anew."""
        from lora_sd.generate import Cancelled
        from lora_sd.out_of_memory import is_out_of_memory, let_go

        try:
            yield
        except UserError:
            raise
        except Cancelled:
            raise UserError(say("generate.cancelled")) from None
        except Exception as error:
            if is_out_of_memory(error):
                let_go(error)
                self._unload()
                raise UserError(say("generate.out_of_memory")) from None
            log.exception("A picture could not be drawn.")
            self._unload()
            raise UserError(say("generate.failed", error=type(error).__name__)) from None

    def _draw(self, task: Sequence[Request], on_step: OnStep) -> list[list[Image]]:
        """The pictures of each request of a task."""
        from lora_sd.generate import generate, generate_at_scales, generate_strip

        first = task[0]
        loaded = self._load(first)
        base, merged = loaded.base, loaded.merged
        _check_size(base, first)
        adapters = [(self._adapter(one, loaded), one.scales()) for one in first.used]
        if len(task) == 1:
            merged.set(adapters)
            drawn = [generate(base, first.settings(), on_step)]
        else:
            scales, settings = [one.used[0].scale for one in task], first.settings()
            merged.set([])
            if base.resolution_px <= MOST_ROW_PX:
                row = generate_strip(base, adapters[0][0], scales, settings[0], on_step)
            else:
                (row,) = generate_at_scales(base, merged, adapters[0][0], scales, settings, on_step)
            drawn = [[picture] for picture in row]
        for picture in [picture for pictures in drawn for picture in pictures]:
            if picture.getbbox() is None:  # all black
                raise AdapterError(say("generate.black"))
        return drawn

    def _load(self, request: Request) -> _Loaded:
        """The base model, kept until another one is asked for. Call it under the lock."""
        from lora_sd.base_loading import load_base_model, pick_device, pick_dtype
        from lora_sd.layer_names import layer_shapes
        from lora_sd.merge import MergedWeights

        device = pick_device()
        is_there = self._loaded is not None and self._loaded[0] == request.base
        if not is_there and self._loaded is not None:
            self._unload()  # before the next one needs the memory
        dtype = pick_dtype("auto", device)
        if device.type == "cuda" and (run := self._trainer.current()):
            weights = 0 if is_there else _weights_bytes(dict(request.base)["name"], dtype.itemsize)
            _check_room(run, 2 * weights)  # with a second copy, which scales are changed by
        if not is_there:
            base = load_base_model(device=device, dtype=dtype, **dict(request.base))
            loaded = _Loaded(base, MergedWeights(base.components), layer_shapes(base.components))
            self._loaded = request.base, loaded
        assert self._loaded
        return self._loaded[1]

    def _adapter(self, used: Used, loaded: _Loaded) -> Adapter:
        from lora_sd.formats import load_adapter

        key = _stamp(used)
        if key not in self._adapters:
            try:
                self._adapters[key] = load_adapter(used.adapter.file, loaded.shapes)
            except UserError as error:  # its sentences name the path, which is ours
                _stamp(used)  # as long as it is there
                path, name = str(used.adapter.file), used.adapter.label
                words = [problem.replace(path, name) for problem in error.problems]
                raise AdapterError(words) from None
        self._adapters.move_to_end(key)
        while len(self._adapters) > ADAPTERS_KEPT:
            self._adapters.popitem(last=False)
        return self._adapters[key]

    def _forget_old(self) -> None:
        pixels = sum(map(_pixels, self._drawn.values()))
        while pixels > MOST_KEPT_PX:
            pixels -= _pixels(self._drawn.popitem(last=False)[1])


def _pixels(drawn: Sequence[Sequence[Image]]) -> int:
    return sum(picture.width * picture.height for pictures in drawn for picture in pictures)


def _tasks(row: Sequence[Request]) -> list[tuple[Request, ...]]:
    """What is drawn at once: a row of one picture at several scales, or each request by itself."""
    alike = {one.at_scale(1.0) for one in row if one.used}
    first = row[0]
    at_once = (
        len(row) >= LEAST_IN_A_ROW
        and all(one.used for one in row)
        and len(alike) == 1
        and len(first.used) == first.count == 1
        and first.used[0].is_whole
    )
    return [tuple(row)] if at_once else [(one,) for one in row]


def _key(task: Sequence[Request]) -> tuple[Any, ...]:
    """All that the pictures of a task depend on."""
    used = [
        [(_stamp(u), u.scale, u.linear, u.conv, u.text_encoder) for u in one.used if u.scale]
        for one in task
    ]
    return task[0].base, tuple(task[0].settings()), tuple(map(tuple, used))


def _stamp(used: Used) -> tuple[str, int, int]:
    try:
        return used.adapter.stamp()
    except OSError:
        raise AdapterError(say("generate.gone", adapter=used.adapter.label)) from None


def _check_size(base: BaseModel, request: Request) -> None:
    step_px = base.size_step_px
    sides = {"generate.width": request.width_px, "generate.height": request.height_px}
    problems = [
        say(
            "generate.wrong_size",
            name=say(key),
            step=step_px,
            nearest=max(px // step_px, 1) * step_px,
        )
        for key, px in sides.items()
        if px % step_px
    ]
    if problems:
        raise AdapterError(problems)


def _check_room(run: str, weights_bytes: int) -> None:
    """The rule for a GPU on which a training is at work: it is never put at risk.

    Raises:
        UserError: what is free there is less than what drawing takes.
    """
    import torch

    own = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # is free to be used again
    free, wanted = torch.cuda.mem_get_info()[0] + own, weights_bytes + ROOM_TO_DRAW
    if free < wanted:
        raise UserError(
            say("generate.no_room", run=run, free=shown_size(free), wanted=shown_size(wanted))
        )


def _weights_bytes(name: str, bytes_of_each: int) -> int:
    """What a base model's weights take."""
    from lora_sd.base_files.hub import find_base

    shapes = find_base(name, half=bytes_of_each < 4).tensor_shapes.values()
    return bytes_of_each * sum(math.prod(shape) for shape in shapes)
