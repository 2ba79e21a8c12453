"""What happens on the Data set tab; its layout is in tab.py."""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_sd.data.caption_files import is_unicode, tidy
from lora_sd.data.images import SUFFIXES
from lora_sd.data.listing import list_folder
from lora_sd.errors import DataError, UserError
from lora_sd.ui.cancelling import Cancelling
from lora_sd.ui.data import look, pictures
from lora_sd.ui.data.bulk import KINDS, BulkEdit, tag_counts
from lora_sd.ui.data.look import Captioned, Card
from lora_sd.ui.data.pictures import Cancelled, OnFile, PictureFolder
from lora_sd.ui.data.report import Checked, check_folder
from lora_sd.ui.data.saved import Deleted, SavedSets
from lora_sd.ui.families import CONFIGS
from lora_sd.ui.texts import say
from lora_sd.ui.workplace import Workplace

PAGE = 24
FILTERS = ("all", "bare", "cut")
MOST_SEARCH = 200


@dataclass(frozen=True)
class Shown:
    """One page of a data set.

    Attributes:
        page: from 1, of `pages`.
        found: pictures that the search finds, of `total`.
        bare: how many of all have no caption; `cut`: how many captions are too long.
        undo, redo: what can be taken back or done again, in words; "" for nothing.
    """

    folder: PictureFolder | None = None
    editable: bool = False
    base: str = "tiny-sd"
    cards: list[Card] = field(default_factory=list)
    page: int = 1
    pages: int = 1
    found: int = 0
    total: int = 0
    bare: int = 0
    cut: int = 0
    masks: int = 0
    tags: list[tuple[str, int]] = field(default_factory=list)
    undo: str = ""
    redo: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """What became of a caption: the picture as it is now; `conflict`: what another page has written
    meanwhile, where the caption was not saved for that."""

    card: Card | None = None
    conflict: str | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BulkPreview:
    """What a bulk edit would change: (picture, caption before, after); `of` so many pictures."""

    changes: list[tuple[str, str, str]] = field(default_factory=list)
    of: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """What came of a press: the data set to show now, what to say, or what was wrong."""

    data_set: str | None = None
    said: str = ""
    problems: list[str] = field(default_factory=list)


class DataHandlers:
    """The Data set tab's handlers. What the page sends is checked here again.

    Args:
        place: what all tabs work on.
    """

    def __init__(self, place: Workplace) -> None:
        self.cancelling = Cancelling()
        self._outputs, self._more = place.outputs, place.pictures
        self._saved = SavedSets(place)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def offered(self) -> list[PictureFolder]:
        """The data sets that can be chosen."""
        return pictures.offered_folders(self._outputs, self._more)

    def show(
        self, data_set: object, base: object, search: object = "", which: object = "all",
        page: object = 1,
    ) -> Shown:  # fmt: skip
        """A page of the pictures that a search finds.

        Args:
            data_set: its id.
            base: one of `families.CONFIGS`, for crops and tokens.
            search: words in the name or caption.
            which: one of `FILTERS`.
        """
        try:
            folder, base = self._find(data_set), _base(base)
            everything = look.captions_of(list_folder(folder.path))
            cut = {one.name for one in everything if _is_cut(one, base)}
            found = _filtered(everything, cut, search, which)
        except UserError as error:
            return Shown(problems=self._told(error))
        pages = max(1, math.ceil(len(found) / PAGE))
        number = min(max(page if isinstance(page, int) else 1, 1), pages)
        here = found[(number - 1) * PAGE : number * PAGE]
        name = _own_name(folder)
        history = self._saved.history(name) if name else None
        undo, redo = (history.to_undo(), history.to_redo()) if history else (None, None)
        return Shown(
            folder=folder,
            editable=name is not None,
            base=base,
            cards=list(look.cards(folder.path, here, base)),
            page=number,
            pages=pages,
            found=len(found),
            total=len(everything),
            bare=sum(not one.lines for one in everything),
            cut=len(cut),
            masks=sum(one.has_mask for one in everything),
            tags=tag_counts(one.lines for one in everything),
            undo=say(undo.what, **undo.values) if undo else "",
            redo=say(redo.what, **redo.values) if redo else "",
        )

    def look_at(self, data_set: object, base: object, picture: object) -> tuple[Card, Path]:
        """One picture and its file.

        Raises:
            DataError: it is not there.
        """
        folder = self._find(data_set)
        return self._card(folder, picture, _base(base)), folder.path / str(picture)

    def save(
        self, data_set: object, base: object, picture: object, before: object, caption: object
    ) -> Saved:
        """Write a picture's caption, unless it is another than the page had `before`."""
        try:
            folder, name = self._own(data_set)
            text = _caption(caption)
            with self._locks[name]:
                card = self._card(folder, picture, _base(base))
                now = card.picture.lines
                if text == now:
                    return Saved(card)
                if now != before:
                    return Saved(card, conflict=now)
                said = {"name": card.picture.name}
                self._saved.write_captions(name, {card.picture.name: text}, "data.did.edited", said)
                return Saved(self._card(folder, picture, _base(base)))
        except UserError as error:
            return Saved(problems=self._told(error))

    def remove(self, data_set: object, picture: object) -> Done:
        """Take a picture out of a saved data set."""

        def act(folder: PictureFolder, name: str) -> str:
            found = self._card(folder, picture, "tiny-sd").picture.name
            self._saved.remove(name, found)
            return say("data.did.removed", name=found)

        return self._change(data_set, act)

    def preview(
        self, data_set: object, base: object, search: object, which: object, form: Mapping[str, Any]
    ) -> BulkPreview:
        """What a bulk edit would do to the pictures that the search finds.

        Args:
            form: 'kind', 'text' and 'by' of a `BulkEdit`.
        """
        try:
            folder, _ = self._own(data_set)
            return self._preview(folder, base, search, which, form)
        except UserError as error:
            return BulkPreview(problems=self._told(error))

    def apply(
        self, data_set: object, base: object, search: object, which: object, form: Mapping[str, Any]
    ) -> Done:
        """Do what `preview` shows."""

        def act(folder: PictureFolder, name: str) -> str:
            planned = self._preview(folder, base, search, which, form)
            if not planned.changes:
                raise DataError(say("data.bulk.nothing"))
            captions = {picture: after for picture, _, after in planned.changes}
            key = _counted("data.did.bulk", len(captions))
            self._saved.write_captions(name, captions, key, {"count": len(captions)})
            return say(key, count=len(captions))

        return self._change(data_set, act)

    def undo(self, data_set: object) -> Done:
        """Take the last change of a saved data set back."""
        return self._go(data_set, back=True)

    def redo(self, data_set: object) -> Done:
        """Do again what was taken back last."""
        return self._go(data_set, back=False)

    def upload(self, name: object, files: object, on_file: OnFile) -> Done:
        """Make a new data set of uploaded files."""
        try:
            uploads = pictures.match_uploads(_paths(files), on_file)
            chosen = _name(name) or self._saved.free_name(say("data.upload.first_name"))
            self._saved.make(chosen, uploads, lambda done, of: False)
        except Cancelled:
            return Done(said=say("data.cancelled"))
        except UserError as error:
            return Done(problems=self._told(error))
        return Done(f"mine/{chosen}", say(_counted("data.upload.made", len(uploads)),
                    name=chosen, count=len(uploads)))  # fmt: skip

    def add(self, data_set: object, files: object, on_file: OnFile) -> Done:
        """Add uploaded files to a saved data set."""

        def act(folder: PictureFolder, name: str) -> str:
            uploads = pictures.match_uploads(_paths(files), on_file)
            if not uploads:
                raise DataError(say("data.upload.none"))
            renamed = self._saved.add(name, uploads)
            said = [say(_counted("data.did.added", len(uploads)), count=len(uploads))]
            said += [say("data.upload.renamed", name=a, new=b) for a, b in renamed.items()]
            return " ".join(said)

        return self._change(data_set, act)

    def copy(self, data_set: object, name: object, on_file: OnFile) -> Done:
        """Save a copy of any offered folder as a data set that can be changed."""
        try:
            folder = self._find(data_set)
            chosen = _name(name) or self._saved.free_name(pictures.safe_name(folder.path.name))
            self._saved.copy(folder.path, chosen, on_file)
        except Cancelled:
            return Done(said=say("data.cancelled"))
        except UserError as error:
            return Done(problems=self._told(error))
        return Done(f"mine/{chosen}", say("data.copy.made", name=chosen))

    def delete(self, data_set: object) -> Done:
        """Delete a saved data set; it can be brought back for a week."""
        try:
            _, name = self._own(data_set)
            with self._locks[name]:
                self._saved.delete(name)
        except UserError as error:
            return Done(problems=self._told(error))
        offered = self.offered()
        return Done(offered[0].id if offered else None, say("data.deleted.done", name=name))

    def deleted(self) -> list[Deleted]:
        """The data sets that can be brought back."""
        return self._saved.deleted()

    def bring_back(self, deleted_id: object) -> Done:
        """Undo a deletion."""
        try:
            name = self._saved.bring_back(deleted_id)
        except UserError as error:
            return Done(problems=self._told(error))
        return Done(f"mine/{name}", say("data.deleted.back", name=name))

    def check(self, data_set: object, base: object, on_picture: OnFile) -> Checked:
        """The data report."""
        try:
            folder = self._find(data_set)
            return check_folder(folder, look.settings_for(_base(base)), on_picture)
        except Cancelled:
            return Checked()
        except UserError as error:
            return Checked(problems=self._told(error))

    def _find(self, data_set: object) -> PictureFolder:
        return pictures.find_folder(self._outputs, self._more, data_set)

    def _own(self, data_set: object) -> tuple[PictureFolder, str]:
        """A saved data set and its name."""
        folder = self._find(data_set)
        name = _own_name(folder)
        if name is None:
            raise DataError(say("data.read_only"))
        return folder, name

    def _card(self, folder: PictureFolder, picture: object, base: str) -> Card:
        found = look.caption_of(folder.path, picture) if isinstance(picture, str) else None
        if found is None:
            raise DataError(say("data.no_picture"))
        return look.card(found, look.small(folder.path / found.name), base)

    def _change(self, data_set: object, act: Callable[[PictureFolder, str], str]) -> Done:
        """Change a saved data set, one change at a time."""
        try:
            folder, name = self._own(data_set)
            with self._locks[name]:
                return Done(folder.id, act(folder, name))
        except Cancelled:
            return Done(said=say("data.cancelled"))
        except UserError as error:
            return Done(problems=self._told(error))

    def _go(self, data_set: object, back: bool) -> Done:
        def act(folder: PictureFolder, name: str) -> str:
            history = self._saved.history(name)
            change = history.to_undo() if back else history.to_redo()
            if change is None:
                raise DataError(say("data.undo.nothing"))
            if any(Path(one).suffix.lower() in SUFFIXES for one in change.names):
                self._saved.check_idle(name)
            _ = history.undo() if back else history.redo()
            key = "data.undo.undone" if back else "data.undo.redone"
            return say(key, what=say(change.what, **change.values))

        return self._change(data_set, act)

    def _preview(
        self, folder: PictureFolder, base: object, search: object, which: object,
        form: Mapping[str, Any],
    ) -> BulkPreview:  # fmt: skip
        kind, text, by = form.get("kind"), form.get("text"), form.get("by")
        kinds = [one for one in KINDS if one == kind]
        if not kinds:
            raise DataError(say("data.bulk.no_kind"))
        # A field that nobody has written in yet is None.
        edit = BulkEdit(kinds[0], *(_caption("" if one is None else one) for one in (text, by)))
        everything = look.captions_of(list_folder(folder.path))
        cut = {one.name for one in everything if which == "cut" and _is_cut(one, _base(base))}
        found = _filtered(everything, cut, search, which)
        if not edit.text:
            return BulkPreview(of=len(found))
        planned = [(one.name, one.lines, edit.of(one.lines)) for one in found if not one.problem]
        if any(len(after) > pictures.MOST_CAPTION for _, _, after in planned):
            raise DataError(say("data.too_long", most=pictures.MOST_CAPTION))
        return BulkPreview([one for one in planned if one[1] != one[2]], len(found))

    def _told(self, error: UserError) -> list[str]:
        """The sentences, without where on this machine the files are."""
        roots = [f"{one}/" for one in (self._outputs, self._more) if one]
        said = error.problems
        for root in [*roots, *(f"{Path(one).absolute()}/" for one in roots)]:
            said = [sentence.replace(root, "") for sentence in said]
        return said


def _own_name(folder: PictureFolder) -> str | None:
    """The name of a saved data set; None of a folder that is not changed."""
    place, _, name = folder.id.partition("/")
    return name if place == "mine" else None


def _filtered(
    everything: Sequence[Captioned], cut: set[str], search: object, which: object
) -> list[Captioned]:
    words = (search if isinstance(search, str) else "")[:MOST_SEARCH].casefold().strip()
    found = [one for one in everything if words in f"{one.name}\n{one.lines}".casefold()]
    if which == "bare":
        return [one for one in found if not one.lines]
    return [one for one in found if one.name in cut] if which == "cut" else found


def _is_cut(one: Captioned, base: str) -> bool:
    return look.cut_place(tidy(one.lines), base)[1] is not None


def _base(base: object) -> str:
    return base if isinstance(base, str) and base in CONFIGS else "tiny-sd"


def _caption(text: object) -> str:
    """A caption as it is written into a file.

    Raises:
        DataError: it is none.
    """
    if not isinstance(text, str) or "\0" in text or not is_unicode(text):
        raise DataError(say("data.no_text"))
    if len(text) > pictures.MOST_CAPTION:
        raise DataError(say("data.too_long", most=pictures.MOST_CAPTION))
    return tidy(text, keep_lines=True)


def _name(name: object) -> str:
    return name.strip() if isinstance(name, str) else ""


def _paths(files: object) -> list[Path]:
    if not isinstance(files, Sequence) or isinstance(files, str):
        return []
    return [Path(file) for file in files if isinstance(file, str)]


def _counted(key: str, count: int) -> str:
    return f"{key}.{'one' if count == 1 else 'many'}"
