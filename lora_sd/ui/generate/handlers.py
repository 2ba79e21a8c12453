"""What happens on the Generate tab."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sd.errors import AdapterError, ConfigError
from lora_sd.ui.adapters.offered import (
    OfferedAdapter,
    adapters_of,
    find_adapter,
    offered_adapters,
)
from lora_sd.ui.bases import OfferedBase, offered_bases
from lora_sd.ui.cancelling import Cancelling
from lora_sd.ui.generate import pictures
from lora_sd.ui.generate.grid import Grid, read_grid
from lora_sd.ui.generate.pictures import Restored
from lora_sd.ui.generate.request import Request, read_request
from lora_sd.ui.generate.studio import OnStep, Studio
from lora_sd.ui.workplace import Workplace

if TYPE_CHECKING:
    from PIL.Image import Image

BY_HAND = "by hand"


@dataclass(frozen=True)
class Drawn:
    """A picture of the base alone and with the adapters; both hold their settings."""

    request: Request
    before: Image
    after: Image


@dataclass(frozen=True)
class Adopted:
    """What the form shows when an adapter is chosen: as its run's own samples were drawn."""

    steps: int | None = None
    guidance: float | None = None
    prompt: str | None = None


class GenerateHandlers:
    """The Generate tab's handlers.

    Args:
        place: what all tabs work on.
    """

    def __init__(self, place: Workplace) -> None:
        self.place = place
        self.outputs = place.outputs
        self.studio = Studio(place.trainer)
        self.cancelling = Cancelling()
        self._newest: dict[str, Mapping[str, Any]] = {}

    # --- what there is to choose ---

    def adapters(self) -> list[OfferedAdapter]:
        """The adapters that can be chosen."""
        return offered_adapters(self.outputs)

    def bases(self) -> list[OfferedBase]:
        """The base models that can be chosen."""
        return offered_bases(self.place.models)

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

    def newest_of(self, run: object) -> str | None:
        """A run's result, or else its newest checkpoint; None: it has saved nothing."""
        return next((one.id for one in self.adapters() if one.run and one.run.name == run), None)

    def find(self, adapter_id: object) -> OfferedAdapter | None:
        """An offered adapter, or None."""
        try:
            return find_adapter(self.outputs, adapter_id)
        except AdapterError:
            return None

    def checkpoints(self, adapter: OfferedAdapter) -> list[OfferedAdapter]:
        """What the run of an adapter saved, in the order of the steps; itself where it has none."""
        return adapters_of(adapter.run)[::-1] if adapter.run else [adapter]

    def adopted(self, adapter: OfferedAdapter | None) -> Adopted:
        """How the run of an adapter drew its samples."""
        config = adapter.config() if adapter else None
        if config is None:
            return Adopted()
        prompts = config.sample.prompts
        return Adopted(config.sample.steps, config.sample.guidance, prompts[0] if prompts else None)

    # --- drawing ---

    def request(self, values: Mapping[str, Any]) -> Request:
        """Check what the browser sent, by name of the field.

        Raises:
            UserError: all problems at once.
        """
        return read_request(values, self.place, self.find)

    def draw(self, request: Request, on_step: OnStep) -> list[Drawn]:
        """The pictures without and with the adapters.

        Raises:
            UserError: they cannot be drawn, or `on_step` wanted to stop.
        """
        alone = request.without_adapters()
        before, after = self.studio.draw([[alone], [request]], on_step)
        return [
            Drawn(
                one,
                pictures.signed(off, one.without_adapters()),
                pictures.signed(on, one),
            )
            for one, off, on in zip(pictures.of_each(request), before[0], after[0], strict=True)
        ]

    def picture(self, request: Request, on_step: OnStep) -> Image:
        """The first picture with the adapters, without the base's.

        Raises:
            UserError: it cannot be drawn, or `on_step` wanted to stop.
        """
        first = pictures.of_each(request)[0]
        ((drawn,),) = self.studio.draw([[first]], on_step)
        return pictures.signed(drawn[0], first)

    def grid(self, values: Mapping[str, Any]) -> Grid:
        """Check what the browser sent for a strip or a grid.

        Raises:
            UserError: all problems at once.
        """
        return read_grid(self.request(values), values, self.find, self.checkpoints)

    def draw_grid(self, grid: Grid, on_step: OnStep) -> Image:
        """All pictures of a grid as one, with labels.

        Raises:
            UserError: they cannot be drawn, or `on_step` wanted to stop.
        """
        from lora_sd.generate import draw_grid

        drawn = self.studio.draw(grid.cells, on_step)
        cells = [[of_one[0] for of_one in row] for row in drawn]
        picture = draw_grid(cells, grid.row_labels, grid.column_labels)
        return pictures.signed(picture, grid.cells[0][-1])

    def read_picture(self, file: object) -> Restored:
        """The form's values out of a picture that was uploaded.

        Raises:
            UserError: it holds no settings, or none that can be used.
        """
        if not isinstance(file, str):
            raise ConfigError([])
        return self.restore(pictures.read_note(Path(file)))

    def restore(self, note: Mapping[str, Any]) -> Restored:
        """The form's values out of a picture's settings.

        Raises:
            UserError: they cannot be used.
        """
        return pictures.restore(note, self.find)

    def warm_up(self) -> None:
        """Import the slow libraries before they are needed, in a thread of their own."""
        threading.Thread(target=self.studio.warm_up, daemon=True).start()

    def make_room(self) -> None:
        """Give the GPU's memory back, for a training that begins; drawing loads it again."""
        self.studio.make_room()

    # --- an open page that changes its mind ---

    def begin(self, page: str, values: Mapping[str, Any]) -> None:
        """A page's drawing begins."""
        self._newest[page] = dict(values)

    def wants_other(self, page: str, values: Mapping[str, Any]) -> None:
        """A page has asked for something else than what it may be drawing."""
        if page in self._newest:
            self._newest[page] = dict(values)

    def is_stale(self, page: str, values: Mapping[str, Any]) -> bool:
        """Whether the page has asked for something else since."""
        return self._newest.get(page, values) != values

    def end(self, page: str) -> None:
        """A page's drawing is over."""
        self._newest.pop(page, None)
