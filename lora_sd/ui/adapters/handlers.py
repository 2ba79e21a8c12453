"""What happens on the Adapters tab: checks what the browser sent, and calls library and tools."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_sd.errors import AdapterError, ConfigError, UserError
from lora_sd.known_bases import PUBLISHED
from lora_sd.ui.adapters import library, tools
from lora_sd.ui.adapters.cards import BASES, Card, all_cards, find_card, item_of
from lora_sd.ui.adapters.offered import OfferedAdapter, find_adapter, offered_adapters
from lora_sd.ui.bases import find_base, offered_bases
from lora_sd.ui.cancelling import Cancelling
from lora_sd.ui.texts import say
from lora_sd.ui.workplace import Workplace

if TYPE_CHECKING:
    from lora_sd.verbs.arguments import Watch
    from lora_sd.verbs.inspect import Inspection
    from lora_sd.verify import Report

MOST_CARDS = 60
MOST_SEARCH = 200  # characters
MOST_COMBINED = 4
MOST_SCALE = 2.0
MOST_RANK = 1024
MOST_SIZE_MB = 1024.0
OnStep = Callable[[int, int], bool]
"""Gets how many of how many are done; whether to end."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class CardList:
    """The cards that are shown, and how many more the search found."""

    cards: list[Card]
    more: int = 0


@dataclass(frozen=True)
class Chosen:
    """A card, and the one of its adapters that is looked at: None where it has none."""

    card: Card
    version: OfferedAdapter | None


class AdapterHandlers:
    """The Adapters tab's handlers.

    Args:
        place: what all tabs work on.
    """

    def __init__(self, place: Workplace) -> None:
        self.place = place
        self.outputs = place.outputs
        self.cancelling = Cancelling()
        self._lock = threading.Lock()
        self._in_use: Counter[str] = Counter()

    def cards(self, search: object = "") -> CardList:
        """Those that hold every word of the search."""
        words = search[:MOST_SEARCH].lower().split() if isinstance(search, str) else []
        found = [card for card in all_cards(self.outputs) if card.matches(words)]
        return CardList(found[:MOST_CARDS], max(0, len(found) - MOST_CARDS))

    def choose(self, adapter_id: object) -> Chosen | None:
        """What an adapter's or a card's id stands for; the first card where it has gone."""
        card = find_card(self.outputs, item_of(adapter_id))
        if card is None:  # one that can be used, where there is any
            cards = all_cards(self.outputs)
            card = next(iter([*(one for one in cards if one.versions), *cards]), None)
        if card is None:
            return None
        same = [one for one in card.versions if one.id == adapter_id]
        return Chosen(card, next(iter([*same, *card.versions]), None))

    def others(self) -> list[tuple[str, str]]:
        """(label, id) of every adapter, to be chosen beside another."""
        return [(one.label, one.id) for one in offered_adapters(self.outputs)]

    def families(self) -> list[tuple[str, str]]:
        """(label, id) of the families of base models."""
        return [(BASES[family], family) for family in PUBLISHED]

    def bases(self) -> list[tuple[str, str]]:
        """(label, id) of the base models that can be named."""
        return [(base.label, base.id) for base in offered_bases(self.place.models)]

    def import_file(self, file: object, base: object) -> OfferedAdapter:
        """Keep an uploaded adapter.

        Raises:
            UserError: it is none, is damaged, or belongs to another model.
        """
        if not isinstance(file, str):
            raise AdapterError(say("adapters.no_file"))
        named = str(base or "")
        if named and named not in PUBLISHED:
            named = find_base(self.place.models, base)
        with tools.plain(other={Path(file): Path(file).name}):
            return library.import_file(self.outputs, Path(file), named)

    def rename(self, adapter_id: object, wish: object) -> str:
        """Another name for the run or the file; its new id.

        Raises:
            UserError: the name cannot be or is taken, or it is at work or in use.
        """
        item = self._unused(adapter_id)
        return library.rename(self.place, item, wish)

    def delete(self, adapter_id: object) -> library.Trashed:
        """Put the run or the file into the trash.

        Raises:
            UserError: it is at work, in use, or has gone.
        """
        return library.move_to_trash(self.place, self._unused(adapter_id))

    def trashed(self) -> list[library.Trashed]:
        """What is in the trash, the last deleted first."""
        return library.trashed(self.outputs)

    def restore(self, trash_id: object) -> str:
        """Take something out of the trash; its id.

        Raises:
            UserError: it is not there.
        """
        return library.restore(self.outputs, trash_id)

    def empty_trash(self) -> None:
        """Delete for good what is in the trash.

        Raises:
            UserError: it cannot be.
        """
        library.empty_trash(self.outputs)

    def download(self, adapter_id: object, format: object) -> tuple[Path, list[str]]:
        """(a file that the browser may fetch, sentences on it).

        Raises:
            UserError: there is none, or the format cannot hold it.
        """
        with self._using(adapter_id) as adapter:
            return tools.converted(adapter, format)

    def inspect(self, adapter_id: object, on_step: OnStep) -> Inspection:
        """What is in a file, in numbers.

        Raises:
            UserError: it cannot be read, or this was cancelled.
        """
        with self._using(adapter_id) as adapter:
            return tools.inspect_file(adapter, watching(on_step))

    def verify(self, adapter_id: object, on_step: OnStep) -> tuple[str, Report]:
        """(family, what each program would load of a file). It is one step.

        Raises:
            UserError: it cannot be read, or this was cancelled.
        """
        with self._using(adapter_id) as adapter:
            found = tools.verify_file(adapter)
        if on_step(1, 1):
            raise UserError(say("adapters.cancelled"))
        return found

    def compare(self, adapter_id: object, other: object, on_step: OnStep) -> tools.Compared:
        """Two adapters beside each other.

        Raises:
            UserError: one cannot be read, they do not belong together, or this was cancelled.
        """
        if not other:
            raise AdapterError(say("adapters.choose_other"))
        with self._using(adapter_id) as first, self._using(other) as second:
            return tools.compare_files(first, second, watching(on_step))

    def combine(self, values: Mapping[str, Any], on_step: OnStep) -> tools.Made:
        """One adapter of several.

        Args:
            values: `adapter` and `scale`, `other_1`, `scale_1`, ...; `name`, and `rank`, None for
                an exact sum.

        Raises:
            UserError: a value cannot be, or as of `tools.combine_files`.
        """
        check = _Check(values)
        ids = [values.get("adapter"), *(values.get(f"other_{n}") for n in range(1, MOST_COMBINED))]
        names = ["scale", *(f"scale_{n}" for n in range(1, MOST_COMBINED))]
        scales = [
            check.number(name, -MOST_SCALE, MOST_SCALE, "adapters.scale") if one else 0.0
            for one, name in zip(ids, names, strict=True)
        ]
        rank = values.get("rank")
        most = None if rank is None else int(check.whole("rank", 1, MOST_RANK, "adapters.rank"))
        check.tell()
        chosen = [(one, scale) for one, scale in zip(ids, scales, strict=True) if one]
        if len(chosen) < 2:
            raise AdapterError(say("adapters.choose_other"))
        with self._using_all([one for one, _ in chosen]) as adapters:
            parts = list(zip(adapters, [scale for _, scale in chosen], strict=True))
            return tools.combine_files(
                self.outputs, parts, values.get("name"), most, watching(on_step)
            )

    def resize(self, values: Mapping[str, Any], on_step: OnStep) -> tools.Made:
        """An adapter at a lower rank.

        Args:
            values: `adapter`, `name`, and `by`: 'rank', 'energy' or 'size', with the value of that
                name: a rank, per cent of the energy, or MB.

        Raises:
            UserError: a value cannot be, or as of `tools.resize_file`.
        """
        check = _Check(values)
        limit: dict[str, Any]
        match values.get("by"):
            case "rank":
                limit = {"rank": int(check.whole("rank", 1, MOST_RANK, "adapters.rank"))}
            case "energy":
                limit = {"energy": check.number("energy", 1, 100, "adapters.energy") / 100}
            case "size":
                size_mb = check.number("size", 0.001, MOST_SIZE_MB, "adapters.size")
                limit = {"size_bytes": int(1e6 * size_mb)}
            case _:
                raise ConfigError(say("adapters.choose_by"))
        check.tell()
        with self._using(values.get("adapter")) as adapter:
            return tools.resize_file(
                self.outputs, adapter, values.get("name"), limit, watching(on_step)
            )

    def bake(self, values: Mapping[str, Any], on_step: OnStep) -> tools.BakedModel:
        """A base model with the adapter in it.

        Args:
            values: `adapter`, `scale`, `name`, `single_file`, and `base`, '' for the one that it
                was trained on.

        Raises:
            UserError: a value cannot be, or as of `tools.bake_files`.
        """
        check = _Check(values)
        scale = check.number("scale", -MOST_SCALE, MOST_SCALE, "adapters.scale")
        check.tell()
        base = values.get("base")
        named = find_base(self.place.models, base) if base else ""
        with self._using(values.get("adapter")) as adapter:
            return tools.bake_files(
                self.place.models,
                named,
                [(adapter, scale)],
                values.get("name"),
                values.get("single_file") is not False,
                watching(on_step),
            )

    def _unused(self, adapter_id: object) -> str:
        """The card's id, of one that nothing is done with at this moment."""
        chosen = self.choose(adapter_id)
        item = item_of(adapter_id)
        if chosen is None or chosen.card.id != item:
            raise AdapterError(say("adapters.choose_first"))
        with self._lock:
            if self._in_use[item]:
                raise AdapterError(say("adapters.in_use", name=chosen.card.name))
        return item

    @contextmanager
    def _using(self, adapter_id: object) -> Iterator[OfferedAdapter]:
        """An adapter, which cannot be renamed or deleted as long as this holds."""
        item = item_of(adapter_id)
        with self._lock:
            self._in_use[item] += 1
        try:
            yield find_adapter(self.outputs, adapter_id)
        finally:
            with self._lock:
                self._in_use[item] -= 1
                self._in_use += Counter()  # forgets what is at 0

    @contextmanager
    def _using_all(self, ids: Sequence[object]) -> Iterator[list[OfferedAdapter]]:
        if not ids:
            yield []
            return
        with self._using(ids[0]) as first, self._using_all(ids[1:]) as rest:
            yield [first, *rest]


def watching(on_step: OnStep) -> Watch:
    """Tells `on_step` how far a verb's walk is, and ends it when that says so."""

    def watch(
        items: Iterable[Item], what: str, total: int | None = None, unit: str = "layer"
    ) -> Iterator[Item]:
        most = total or (len(items) if isinstance(items, Sized) else 0)
        for number, item in enumerate(items):
            if on_step(number, most):
                raise UserError(say("adapters.cancelled"))
            yield item

    return watch


class _Check:
    """Values that the browser sent, with all that is wrong with them told at once."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._problems: list[str] = []

    def number(self, name: str, low: float, high: float, label: str) -> float:
        value: Any = self._values.get(name)
        wrong = isinstance(value, bool) or not isinstance(value, int | float)
        if wrong or not math.isfinite(value) or not low <= value <= high:
            words = say("adapters.not_a_number", label=say(label), low=low, high=high)
            self._problems.append(words)
            return low
        return float(value)

    def whole(self, name: str, low: int, high: int, label: str) -> float:
        value = self.number(name, low, high, label)
        if value % 1:
            self._problems.append(say("adapters.not_whole", label=say(label)))
        return value

    def tell(self) -> None:
        if self._problems:
            raise ConfigError(self._problems)
