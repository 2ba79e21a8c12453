"""Read an adapter file back: is it what was meant, and what will each client do with it?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Size

from lora_sd import clients, layer_names
from lora_sd.adapter import Adapter
from lora_sd.algebra.comparison import SAME_UPDATE, Comparison, compare, largest_absolute_error
from lora_sd.clients.metadata import metadata_notes
from lora_sd.clients.outline import read_outline
from lora_sd.clients.report import ClientReport
from lora_sd.clients.sentences import joined, layer_of_keys, sentences
from lora_sd.clients.tables import TABLES
from lora_sd.errors import AdapterError, shown_list
from lora_sd.formats.layer_tables import FAMILIES, layer_shapes
from lora_sd.formats.reading import NOTE, load_adapter

if TYPE_CHECKING:
    from lora_sd.base_model import BaseModel

MOST_ROUNDING = 0.05  # of an update's norm, before it is worth telling


@dataclass
class Report:
    """What `check_file` found.

    Attributes:
        modules: how many layers the file should hold; without a live adapter, how many it holds.
        problems: sentences on what of the file cannot be read.
        comparison: with the live adapter; None without one.
        clients: each client's report.
        layer_of: {key of the file: full layer name}.
        in_diffusers: sentences on what is wrong when diffusers really loads the file; None: it
            was not tried.
        notes: how the file was read, and what its metadata lacks.
        by_rules: whether the clients were judged by their naming rules, as none of them knows the
            base model's shapes.
    """

    modules: int
    problems: list[str]
    comparison: Comparison | None
    clients: dict[str, ClientReport]
    layer_of: dict[str, str]
    in_diffusers: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    by_rules: bool = False
    largest_absolute: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the file is faithful: it can be read, and holds what was meant.

        What the clients make of it is another question: `everywhere`.
        """
        return not self.problems and (self.comparison is None or self.comparison.ok)

    @property
    def everywhere(self) -> bool:
        """Whether every client loads all of the file, and as it was meant."""
        return not self.in_diffusers and all(report.ok for report in self.clients.values())

    def client_notes(self, most: int = 5) -> list[str]:
        """Sentences on what clients leave out, refuse, or read otherwise than meant; they name at
        most so many layers."""
        return sentences(self.clients.values(), self.layer_of, most)

    def summary(self) -> str:
        """One line: '278 of 278 modules match in 7 clients, largest error 4e-4'."""
        whole = sum(report.ok for report in self.clients.values())
        total = len(self.clients)
        place = f"in {total} clients" if whole == total else f"in {whole} of {total} clients"
        others = [report.title for report in self.clients.values() if not report.ok]
        if self.by_rules:
            place = f"by the naming rules of {place.removeprefix('in ')}"
            if self.in_diffusers is not None:
                place += f" and {'not ' if self.in_diffusers else ''}in diffusers itself"
        comparison = self.comparison
        if comparison is None:
            text = f"{self.modules} modules are whole {place}"
        else:
            right = len(comparison.layers) - len(comparison.wrong)
            worst = comparison.worst
            error = comparison.layers[worst].error if worst else 0.0
            largest = f"{error:.0e}".replace("e-0", "e-") if error else "0"
            text = f"{right} of {self.modules} modules match {place}, largest error {largest}"
        if others:
            text += f"; not whole in {joined(others)}"
        return text if self.ok else f"THE FILE IS NOT RIGHT: {text}"

    def lines(self) -> list[str]:
        """Details for a person: what is wrong with the file, then with clients, then remarks."""
        lines = list(self.problems)
        if self.comparison:
            lines += _differences(self.comparison)
            if self.comparison.worst:
                lines.append(
                    f"The largest error is in '{self.comparison.worst}': "
                    f"{self.comparison.layers[self.comparison.worst].error:.1e} of its update's "
                    f"norm, at most {self.largest_absolute:.1e} in a weight."
                )
            rounded = [one for one in self.comparison.layers.values() if one.error > MOST_ROUNDING]
            if rounded and self.ok:
                lines.append(
                    f"Rounding to the file's precision changes the update of {len(rounded)} layers "
                    f"by more than {MOST_ROUNDING:.0%}: save it in float32."
                )
        return [*lines, *(self.in_diffusers or []), *self.client_notes(), *self.notes]


def check_file(
    path: Path,
    family: str,
    live: Adapter | None = None,
    base: "BaseModel | None" = None,
    shapes: Mapping[str, Size] | None = None,
) -> Report:
    """Read an adapter file back and check it.

    Args:
        family: 'sd15', 'sd21', 'sdxl', 'tiny-sd', or any other word for an unknown model, which
            `shapes`, `base` or else `live` describes then.
        live: the adapter that the file should hold.
        base: the base model. One that no client knows is small, so that diffusers really loads the
            file into a copy of it.
        shapes: weight shape of each layer of the base model; None: as the family or `base` has
            them.

    Raises:
        AdapterError: the file is damaged, holds values that are not finite numbers, or nothing
            that fits the model.
    """
    shapes = shapes or _shapes(family, live, base)
    found, problems = _read(path, shapes)
    outline = read_outline(path)
    reports = clients.check(outline, family, shapes)
    by_rules = family not in TABLES
    report = Report(
        modules=len((live or found).layers),
        problems=problems,
        comparison=compare(found, live) if live else None,
        clients=reports,
        layer_of=layer_of_keys(outline.shapes, shapes),
        in_diffusers=_check_in_diffusers(path, found, base) if base and by_rules else None,
        notes=metadata_notes(outline.metadata, family),
        by_rules=by_rules,
    )
    if NOTE in found.metadata and not problems:
        report.notes.insert(0, f"{found.metadata[NOTE].capitalize()}.")
    if live and report.comparison and report.comparison.worst:
        worst = report.comparison.worst
        if found.layers[worst].weight_shape == live.layers[worst].weight_shape:
            report.largest_absolute = largest_absolute_error(
                found.layers[worst], live.layers[worst]
            )
    return report


def _shapes(family: str, live: Adapter | None, base: "BaseModel | None") -> dict[str, Size]:
    if family in FAMILIES:
        return layer_shapes(family)
    if base is not None:
        return layer_names.layer_shapes(base.components)
    if live is not None:
        return {name: layer.weight_shape for name, layer in live.layers.items()}
    raise AdapterError(
        f"An adapter for the model '{family}' cannot be checked without its base: known are "
        f"{', '.join(FAMILIES)}."
    )


def _read(path: Path, shapes: Mapping[str, Size]) -> tuple[Adapter, list[str]]:
    """(what can be read of a file, sentences on what cannot)."""
    try:
        return load_adapter(path, shapes), []
    except AdapterError as error:
        return load_adapter(path, shapes, allow_partial=True), error.problems


def _differences(comparison: Comparison) -> list[str]:
    lines = [
        f"{len(names)} of the layers {what}: {shown_list(names)}."
        for what, names in (
            ("are missing from the file", comparison.missing),
            ("in the file should not be there", comparison.extra),
        )
        if names
    ]
    wrong = [f"'{name}': {comparison.layers[name].why}." for name in comparison.wrong]
    more = [f"{len(wrong) - 5} more layers are wrong."] if len(wrong) > 5 else []
    return lines + wrong[:5] + more


def _check_in_diffusers(path: Path, found: Adapter, base: "BaseModel") -> list[str]:
    """Sentences on what is wrong when diffusers loads the file; none when all is well."""
    from lora_sd.clients.diffusers_load import load_in_diffusers

    try:
        loaded = load_in_diffusers(path, base)
    except Exception as error:  # its and PEFT's refusals have no class in common
        return [f"diffusers refuses the file: {str(error).strip().splitlines()[0]}"]
    missing, wrong, without_dora = [], [], []
    for name, meant in found.layers.items():
        if name not in loaded:
            missing.append(name)
            continue
        update, magnitude = loaded[name]
        wanted = meant.low_rank()
        if not (update.reshape(wanted.shape) - wanted).norm() <= SAME_UPDATE * wanted.norm():
            wrong.append(name)
        if magnitude is None and meant.magnitude is not None:
            without_dora.append(name)
    return [
        f"diffusers {what} all {len(names)} layers."
        if len(names) == len(found.layers)
        else f"diffusers {what} {len(names)} of {len(found.layers)} layers: {shown_list(names)}."
        for what, names in (
            ("leaves out", missing),
            ("applies otherwise than meant", wrong),
            ("applies without DoRA", without_dora),
        )
        if names
    ]
