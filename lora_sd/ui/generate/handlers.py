"""What happens on the Generate tab: one pipeline, one lock round it, and the pictures it drew."""

from __future__ import annotations

import gc
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sd.errors import AdapterError, ConfigError, UserError
from lora_sd.ui.adapters.offered import OfferedAdapter, add_upload, find_adapter, offered_adapters
from lora_sd.ui.cancelling import Cancelling
from lora_sd.ui.workplace import Workplace

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_sd.adapter import Adapter
    from lora_sd.base_model import BaseModel
    from lora_sd.generate import PictureSettings
    from lora_sd.merge import MergedWeights

BY_HAND = "by hand"
MOST_SCALE = 1.5
MOST_STEPS = 100
MOST_STRIP_PX = 512  # side of the pictures of a strip that are drawn in one pass
STRIP_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_PROMPT = 2_000  # characters
MOST_SEED = 2**31 - 1
PICTURES_KEPT = 64
OnStep = Callable[[int, int], bool]


@dataclass(frozen=True)
class Request:
    """A checked wish: which adapter, at what scale, and what to draw."""

    adapter: OfferedAdapter
    base: str
    scale: float
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float


@dataclass
class _Loaded:
    """A base model, ready to draw."""

    base: BaseModel
    merged: MergedWeights
    shapes: Mapping[str, Any]


class GenerateHandlers:
    """The Generate tab's handlers.

    Args:
        place: what all tabs work on.
    """

    def __init__(self, place: Workplace) -> None:
        self.outputs = place.outputs
        self._lock = threading.Lock()
        self._loaded: tuple[str, _Loaded] | None = None
        self._adapter: tuple[Any, Adapter] | None = None
        self._pictures: OrderedDict[Any, Image] = OrderedDict()
        self.cancelling = Cancelling()

    def adapters(self) -> list[OfferedAdapter]:
        """The adapters that can be chosen."""
        return offered_adapters(self.outputs)

    def to_choose(self, chosen: object, seen: object) -> str | None:
        """The adapter to choose when the tab is opened: what is chosen as long as it is offered,
        but for a result that came after `seen`; the first that is offered; None: there is none.

        Args:
            seen: `newest_result` when `chosen` was chosen, or BY_HAND: nothing comes before it.
        """
        ids = [adapter.id for adapter in self.adapters()]
        stays = seen in (BY_HAND, self.newest_result())
        return str(chosen) if stays and chosen in ids else next(iter(ids), None)

    def newest_result(self) -> str | None:
        """Tells the newest result of a run from earlier ones."""
        first = next(iter(self.adapters()), None)
        return repr(first.stamp()) if first and first.is_result else None

    def find(self, adapter_id: object) -> OfferedAdapter | None:
        """An offered adapter, or None."""
        try:
            return find_adapter(self.outputs, adapter_id)
        except AdapterError:
            return None

    def request(self, values: Mapping[str, Any]) -> Request:
        """Check what the browser sent.

        Raises:
            UserError: all problems at once.
        """
        problems: list[str] = []

        def number(name: str, low: float, high: float, whole: bool = False) -> float:
            raw: Any = values.get(name)
            wrong = isinstance(raw, bool) or not isinstance(raw, int | float)
            if wrong or not math.isfinite(raw) or not low <= raw <= high or (whole and raw % 1):
                kind = "a whole number" if whole else "a number"
                problems.append(f"{name.capitalize()} must be {kind} from {low:g} to {high:g}.")
                return low
            return float(raw)

        def text(name: str, words: str) -> str:
            raw = values.get(name) or ""
            if not isinstance(raw, str) or len(raw) > MOST_PROMPT or "\0" in raw:
                problems.append(f"{words} must be text of at most {MOST_PROMPT} characters.")
                return ""
            return raw.strip()

        adapter = self.find(values.get("adapter"))
        if adapter is None:
            problems.append("Choose an adapter first: train one, or add a file.")
        scale = number("scale", 0, MOST_SCALE)
        seed = number("seed", 0, MOST_SEED, whole=True)
        steps = number("steps", 1, MOST_STEPS, whole=True)
        guidance = number("guidance", 0, 50)
        prompt = text("prompt", "The prompt")
        negative = text("negative", "The negative prompt")
        config = adapter.config() if adapter else None
        base = config.base.model if config else text("base", "The base model")
        if problems or adapter is None:
            raise ConfigError(problems)
        return Request(
            adapter, base, scale, prompt, negative, int(seed), int(steps), float(guidance)
        )

    def before_and_after(self, wish: Request, on_step: OnStep) -> tuple[Image, Image]:
        """The same picture by the base alone and with the adapter at the wished scale.

        Raises:
            UserError: the base or the adapter cannot be used.
        """
        off, on = self._draw(wish, (0.0, wish.scale), on_step)
        return off, on

    def strip(self, wish: Request, on_step: OnStep) -> Image:
        """The picture at rising scales, side by side."""
        from lora_sd.generate import draw_grid

        pictures = self._draw(wish, STRIP_SCALES, on_step)
        labels = [f"scale {scale:g}" for scale in STRIP_SCALES]
        return draw_grid([pictures], [wish.prompt or "(no prompt)"], labels)

    def add_file(self, file: object, base: object) -> OfferedAdapter:
        """Keep an uploaded adapter, if it fits the base model it is said to be for.

        Raises:
            UserError: it is no adapter, or belongs to another model.
        """
        from lora_sd.formats import load_adapter

        if not isinstance(file, str) or not isinstance(base, str):
            raise AdapterError("Choose an adapter file.")
        path = Path(file)
        with self._lock:
            loaded = self._load(base.strip())
            try:
                load_adapter(path, loaded.shapes)
            except UserError as error:  # its sentences name the path, which is ours
                words = [problem.replace(str(path), path.name) for problem in error.problems]
                raise AdapterError(words) from None
        return add_upload(self.outputs, path)

    def warm_up(self) -> None:
        """Import the slow libraries before they are needed; no model takes memory yet."""
        import lora_sd.formats
        import lora_sd.generate  # noqa: F401

    def make_room(self) -> None:
        """Give the GPU's memory back, for a training that begins; drawing loads it again."""
        loaded = self._loaded
        if loaded is None or loaded[1].base.device.type == "cpu":
            return
        import torch

        with self._lock:  # after a drawing that is under way
            self._loaded = self._adapter = loaded = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _draw(self, wish: Request, scales: Sequence[float], on_step: OnStep) -> list[Image]:
        """The wished picture at each scale; those drawn before are taken from memory."""
        from lora_sd.generate import (
            Cancelled,
            PictureSettings,
            generate_at_scales,
            generate_strip,
        )

        settings = PictureSettings(
            wish.prompt, wish.negative_prompt, wish.seed, wish.steps, wish.guidance
        )
        stamp = wish.adapter.stamp()
        with self._lock:
            keys = [(wish.base, stamp if scale else None, settings, scale) for scale in scales]
            missing = [
                scale for scale, key in zip(scales, keys, strict=True) if key not in self._pictures
            ]
            if missing:
                loaded = self._load(wish.base)
                adapter = self._adapter_for(wish, loaded, stamp)
                base, is_small = loaded.base, loaded.base.resolution_px <= MOST_STRIP_PX
                try:
                    if len(missing) > 2 and is_small:
                        row = generate_strip(base, adapter, missing, settings, on_step)
                    else:
                        (row,) = generate_at_scales(
                            base, loaded.merged, adapter, missing, [settings], on_step
                        )
                except Cancelled:
                    raise UserError("Cancelled.") from None
                for scale, picture in zip(missing, row, strict=True):
                    used = wish.adapter.id if scale else ""
                    made = replace(settings, adapter=used, scale=scale)
                    self._pictures[keys[list(scales).index(scale)]] = _sign(picture, made)
            drawn = [self._pictures[key] for key in keys]
            for key in keys:
                self._pictures.move_to_end(key)
            while len(self._pictures) > PICTURES_KEPT:
                self._pictures.popitem(last=False)
        return drawn

    def _load(self, name: str) -> _Loaded:
        """The base model, kept until another one is asked for. Call it under the lock."""
        from lora_sd.base_loading import load_base_model, pick_device, pick_dtype
        from lora_sd.layer_names import layer_shapes
        from lora_sd.merge import MergedWeights

        if self._loaded is None or self._loaded[0] != name:
            self._loaded = self._adapter = None  # frees the memory before the next one needs it
            device = pick_device()
            base = load_base_model(name or "tiny-sd", device, pick_dtype("auto", device))
            merged = MergedWeights(base.components)
            self._loaded = name, _Loaded(base, merged, layer_shapes(base.components))
        return self._loaded[1]

    def _adapter_for(self, wish: Request, loaded: _Loaded, stamp: Any) -> Adapter:
        from lora_sd.formats import load_adapter

        if self._adapter is None or self._adapter[0] != (wish.base, stamp):
            adapter = load_adapter(wish.adapter.file, loaded.shapes)
            self._adapter = (wish.base, stamp), adapter
        return self._adapter[1]


def _sign(picture: Image, settings: PictureSettings) -> Image:
    """Note in a picture how it was made, as in the PNG of a sample: Gradio writes it out."""
    picture.info |= {"prompt": settings.prompt, "lora_sd": json.dumps(asdict(settings))}
    return picture
