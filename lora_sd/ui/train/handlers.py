"""What happens on the Train tab; its layout is in train_tab.py and run_panel.py."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_sd.config import EXAMPLE_FOLDER, Config, config_from_values, read_yaml
from lora_sd.errors import ConfigError, DataError, UserError
from lora_sd.run_folder import NAME_PATTERN, list_runs
from lora_sd.ui import fields
from lora_sd.ui.adapters.offered import OfferedAdapter, find_adapter
from lora_sd.ui.data import pictures
from lora_sd.ui.data.pictures import PictureFolder, Upload
from lora_sd.ui.launch import PROJECT
from lora_sd.ui.train.family_settings import FamilySettings, settings_of
from lora_sd.ui.train.run_view import RunView, read_run
from lora_sd.ui.workplace import Workplace

STARTING_CONFIG = PROJECT / "configs" / "tiny.yaml"
EXAMPLE = f"example/{Path(EXAMPLE_FOLDER).name}"
OWN_FIELDS = {"data.folder", "output.folder"}  # the page decides these


@dataclass(frozen=True)
class Started:
    """What came of a press on Start: a run, or the sentences that say why not."""

    run: str | None = None
    problems: list[str] = field(default_factory=list)
    saved: PictureFolder | None = None


@dataclass(frozen=True)
class LayersShown:
    """The layers that settings choose, a line a kind, and what clients will not read of them."""

    table: str = ""
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Shown:
    """What a folder or an upload holds, for the page."""

    pairs: list[tuple[Path, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    masks: int = 0

    @property
    def lacks_captions(self) -> bool:
        """Whether a picture has no caption of its own."""
        return any(not caption for _, caption in self.pairs)


class TrainHandlers:
    """The Train tab's handlers.

    Args:
        place: what all tabs work on.
        make_room: called before a training begins, to free memory that it may need.
    """

    def __init__(
        self,
        place: Workplace,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.outputs = place.outputs
        self.more_pictures = place.pictures
        self.trainer = place.trainer
        self._make_room = make_room

    def starting_config(self) -> Config:
        """What the form shows first: configs/tiny.yaml, or the defaults."""
        try:
            return config_from_values(read_yaml(STARTING_CONFIG))
        except ConfigError:
            return Config()

    def starting_settings(self) -> FamilySettings:
        """What the form is set to first, as `family_settings.follow` takes it."""
        try:
            return settings_of("tiny-sd")
        except ConfigError:
            return FamilySettings("", {})

    def folders(self) -> list[PictureFolder]:
        """The folders of pictures that can be chosen."""
        return pictures.offered_folders(self.outputs, self.more_pictures)

    def show_folder(self, folder_id: object) -> Shown:
        """The pictures and captions of an offered folder."""
        try:
            folder = pictures.find_folder(self.outputs, self.more_pictures, folder_id)
            return Shown(pictures.captioned(folder.path), masks=pictures.mask_count(folder.path))
        except UserError as error:
            return Shown(problems=error.problems)

    def show_upload(self, files: object) -> Shown:
        """The uploaded pictures with the captions found for them."""
        try:
            uploads = pictures.match_uploads(_paths(files))
        except UserError as error:
            return Shown(problems=error.problems)
        pairs = [(upload.file, upload.caption) for upload in uploads]
        return Shown(pairs, masks=sum(upload.mask is not None for upload in uploads))

    def fitting_prompts(
        self, source: object, folder_id: object, table: object, trigger: object, common: object
    ) -> str | None:
        """Sample prompts, a line each, that fit the chosen pictures: the example's own; of others
        the first two captions with the trigger word; None where no pictures are chosen.

        Args:
            source, folder_id: as for `start`; table: the captions of uploaded pictures.
            trigger, common: the trigger word, and the caption for pictures that have none.
        """
        if source == "upload":
            captions = [caption for name, caption in _rows(table) if name]
        elif folder_id == EXAMPLE:
            return "\n".join(self.starting_config().sample.prompts)
        else:
            captions = [caption for _, caption in self.show_folder(folder_id).pairs]
        if not captions:
            return None
        filled = [caption or _text(common) for caption in captions]
        return "\n".join(pictures.prompts_from(filled, _text(trigger)))

    def layers(self, form: Mapping[str, Any]) -> LayersShown:
        """Which layers the settings choose, from the base's files alone; no model is loaded."""
        from lora_sd import clients, layer_choice
        from lora_sd.base_files import open_base
        from lora_sd.formats import fitting_format
        from lora_sd.layers import LayerOptions
        from lora_sd.parts import unread_layers

        try:
            config = fields.config_from_form(form)
            base = open_base(config.base.model)
            unread = unread_layers(base.shapes, config.base.clip_skip)
            wanted = {
                name: shape
                for name, shape in base.shapes.items()
                if name.startswith("unet.") or (config.adapter.text_encoder and name not in unread)
            }
            plans = layer_choice.choose_layers(wanted, **config.adapter.layer_choice())
        except UserError as error:
            return LayersShown(problems=[fields.in_page_words(one) for one in error.problems])
        options = LayerOptions(**config.adapter.layer_options())
        bytes_per_weight = 4 if config.output.dtype == "float32" else 2
        planned = layer_choice.planned_adapter(plans, options)
        file_format, notices = fitting_format(planned, config.output.format)
        if file_format == "kohya":
            notices = notices + clients.ignored_layers(planned, base.family, file_format)
        return LayersShown(layer_choice.describe(plans, options, bytes_per_weight), notices)

    def chosen_pictures(
        self, source: object, folder_id: object, upload: Mapping[str, Any]
    ) -> tuple[PictureFolder | None, list[Upload]]:
        """(the offered folder that was chosen, or else the uploaded pictures); as `start` takes
        them.

        Raises:
            DataError: neither is there, or uploads cannot be used.
        """
        if source != "upload":
            return pictures.find_folder(self.outputs, self.more_pictures, folder_id), []
        uploads = _with_captions(
            pictures.match_uploads(_paths(upload.get("files"))), upload.get("captions")
        )
        if not uploads:
            raise DataError("Upload some pictures, or use a folder.")
        return None, uploads

    def start(
        self, form: Mapping[str, Any], source: object, folder_id: object, upload: Mapping[str, Any]
    ) -> Started:
        """Check everything, save uploaded pictures as a data set, and start the trainer.

        Args:
            form: field values by setting.
            source: 'folder' or 'upload'.
            folder_id: of an offered folder.
            upload: 'name', 'files' and the table of 'captions'.
        """
        problems: list[str] = []
        folder: PictureFolder | None = None
        uploads: list[Upload] = []
        try:
            folder, uploads = self.chosen_pictures(source, folder_id, upload)
        except UserError as error:
            problems += error.problems
        data_name = folder.path.name if folder else str(upload.get("name") or "").strip()
        values = dict(form)
        values["data.folder"] = str(folder.path if folder else self.outputs / data_name)
        values["output.folder"] = str(self.outputs)
        if not str(values.get("output.name") or "").strip():
            values["output.name"] = self.trainer.free_name(data_name)
        saved = None
        try:
            config = fields.config_from_form(values)
            if problems:
                return Started(problems=problems)
            if source == "upload":
                self.trainer.check_free(str(config.output.name))
                saved = pictures.save_folder(self.outputs, data_name, uploads)
                values["data.folder"] = str(saved.path)
                config = fields.config_from_form(values)
            self._make_room()
            return Started(self.trainer.start(config), saved=saved)
        except UserError as error:
            return Started(problems=problems + error.problems, saved=saved)

    def stop(self, run: object) -> list[str]:
        """Ask a run to save and end; sentences when that cannot be."""
        return self._act(self.trainer.stop, run)

    def resume(self, run: object) -> list[str]:
        """Go on with a run; sentences when that cannot be."""
        self._make_room()
        return self._act(self.trainer.resume, run)

    def run_names(self) -> list[str]:
        """All runs, newest first, with one that is just being started at the top."""
        names = [run.name for run in list_runs(self.outputs)]
        launched = self.trainer.last_launched()
        if launched and launched not in names and self.trainer.has_console(launched):
            names.insert(0, launched)
        return names

    def look(self, selected: object) -> RunView | None:
        """The selected run as it is now, or the one at work, or the newest; None: no runs."""
        names = self.run_names()
        if not names:
            return None
        name = selected if selected in names else self.trainer.current()
        return read_run(self.trainer, str(name if name in names else names[0]))

    def result(self, run: str) -> OfferedAdapter | None:
        """The finished adapter of a run."""
        try:
            return find_adapter(self.outputs, run)
        except UserError:
            return None

    def _act(self, action: Callable[[str], Any], run: object) -> list[str]:
        if not isinstance(run, str) or not NAME_PATTERN.fullmatch(run):
            return ["Choose a run first."]
        try:
            action(run)
        except UserError as error:
            return error.problems
        return []


def _paths(files: object) -> list[Path]:
    if not isinstance(files, Sequence) or isinstance(files, str):
        return []
    return [Path(file) for file in files if isinstance(file, str)]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _rows(table: object) -> list[tuple[str, str]]:
    """(picture, caption) of each row of the table on the page."""
    rows = table if isinstance(table, list) else []
    return [
        (row[0], row[1])
        for row in rows
        if isinstance(row, list) and len(row) == 2 and all(isinstance(cell, str) for cell in row)
    ]


def _with_captions(uploads: Sequence[Upload], table: object) -> list[Upload]:
    """The uploads with the captions as the table on the page has them now."""
    written = dict(_rows(table))
    problems = [
        f"The caption of '{name}' is too long: at most {pictures.MOST_CAPTION} characters."
        for name, caption in written.items()
        if len(caption) > pictures.MOST_CAPTION
    ]
    if problems:
        raise DataError(problems)
    return [
        replace(upload, caption=written.get(upload.file.name, upload.caption)) for upload in uploads
    ]
