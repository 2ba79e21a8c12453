"""Read an adapter file of any format. What it holds, its tensors' names say.

The names are looked up among those of the model's layers, never guessed from underscores.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Size, Tensor

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.errors import AdapterError, shown_list
from lora_sd.formats import diffusers, kohya
from lora_sd.formats.layer_tensors import (
    ALPHA,
    DOWN,
    EMBEDDING_DOWN,
    flat,
    is_whole,
    to_weights,
    weight_shape,
)
from lora_sd.formats.peft_config import PeftAlphas
from lora_sd.formats.safetensors_file import read_tensors

NOTE = "lora_sd.note"
OTHER_KINDS = {
    "LoHa": r"hada_\w+",
    "LoKr": r"lokr_\w+",
    "OFT": r"(oft_\w+|boft_\w+)(\.weight)?",
    "GLoRA": r"[ab][12]\.weight",
    "IA3": r"(on_input|ia3_l(\.default)?)",
    "full difference": r"(diff|diff_b|w_norm|b_norm)",
}


@dataclass
class FileNames:
    """A file's tensor names, sorted.

    Attributes:
        layers: {layer's name in the file: {part: tensor name}}; the parts are `layer_tensors`'s.
        other_kinds: {kind of adapter that is no LoRA: names of its layers}.
        foreign: names that no format has.
        twice: names of layers with a part that is there under two names, which are in none of the
            others: nothing says which of the two is meant.
    """

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    other_kinds: dict[str, set[str]] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    twice: set[str] = field(default_factory=set)


def sort_names(tensor_names: Iterable[str]) -> FileNames:
    """Sort the names of a file's tensors by layer and part."""
    sorted_names = FileNames()
    for name in tensor_names:
        found = kohya.split(name) or diffusers.split(name)
        if found:
            parts = sorted_names.layers.setdefault(found[0], {})
            if found[1] in parts:
                sorted_names.twice.add(found[0])
            parts[found[1]] = name
        elif kind := _other_kind(name):
            sorted_names.other_kinds.setdefault(kind[0], set()).add(kind[1])
        else:
            sorted_names.foreign.append(name)
    for layers in sorted_names.other_kinds.values():
        for layer in layers:
            sorted_names.layers.pop(layer, None)  # an alpha
    for layer in sorted_names.twice:
        sorted_names.layers.pop(layer, None)
    return sorted_names


def known_keys(shapes: Mapping[str, Size]) -> dict[str, str]:
    """{layer's name in a file: full layer name} of a model's layers, in every format."""
    return {**diffusers.known_keys(shapes), **kohya.known_keys(shapes)}


def load_adapter(path: Path, shapes: Mapping[str, Size], allow_partial: bool = False) -> Adapter:
    """Read an adapter file for a model.

    What was read otherwise than the file says is told in the metadata, under 'lora_sd.note'.

    Args:
        shapes: weight shape of each layer of the model (`layer_names.layer_shapes`).
        allow_partial: leave out what does not fit, instead of refusing the file.

    Raises:
        AdapterError: the file is damaged, foreign or for another model: all that does not fit,
            with counts and the first names.
    """
    tensors, metadata = read_tensors(path)
    intake = _Intake(tensors, shapes)
    intake.sort()
    layers = intake.build(PeftAlphas(metadata, path))
    if not tensors:
        raise AdapterError(f"'{path}' holds no adapter: it has no tensors.")
    if intake.problems and not (allow_partial and layers):
        raise AdapterError([f"'{path}': {problem}." for problem in intake.problems])
    metadata.pop(NOTE, None)
    notes = [*intake.notes, *(f"left out: {problem}" for problem in intake.problems)]
    if notes:
        metadata[NOTE] = "; ".join(notes)
    return Adapter({name: layers[name] for name in shapes if name in layers}, metadata)


class _Intake:
    """Goes through a file's tensors in two stages, and gathers what does not fit.

    Attributes:
        problems: sentences without a full stop.
        notes: what was read otherwise than the file says.
    """

    def __init__(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._tensors, self._shapes = tensors, shapes
        self._keys: dict[str, str] = {}
        self._layers: dict[str, dict[str, str]] = {}

    def sort(self) -> None:
        """Find the model's layers in the names."""
        names = sort_names(self._tensors)
        for kind, layers in sorted(names.other_kinds.items()):
            self.problems.append(
                f"{len(layers)} of its layers are of the kind {kind}, such as "
                f"{shown_list(sorted(layers), 1)}; only LoRA, LoCon and DoRA can be read"
            )
        known, foreign, twice = known_keys(self._shapes), list(names.foreign), set(names.twice)
        spellings = Counter(known[key] for key in names.layers if key in known)
        for key, parts in names.layers.items():
            if key not in known:
                foreign += parts.values()
            elif spellings[known[key]] > 1:
                twice.add(key)
            else:
                self._keys[known[key]] = key
                self._layers[known[key]] = parts
        if foreign:
            self.problems.append(
                f"{len(foreign)} of its {len(self._tensors)} tensors belong to no layer of this "
                f"model, such as {shown_list(sorted(foreign), 2)}"
            )
        if twice:
            layers = {known.get(key, key) for key in twice}
            self.problems.append(
                f"{len(layers)} of its layers are there twice, under different names, such as "
                f"{shown_list(sorted(twice), 2)}"
            )

    def build(self, alphas: PeftAlphas) -> dict[str, LoRAWeights]:
        """The layers that are whole and fit the model."""
        built: dict[str, LoRAWeights] = {}
        unfit: dict[str, list[str]] = {}
        without_alpha = 0
        for name, parts in self._layers.items():
            tensors = {part: self._tensors[tensor] for part, tensor in parts.items()}
            why, detail = self._unfit(name, tensors)
            if not why:
                rank = tensors[DOWN if DOWN in tensors else EMBEDDING_DOWN].shape[0]
                alpha = None if kohya.is_key(self._keys[name]) else alphas.of(name, rank)
                try:
                    built[name] = to_weights(tensors, self._shapes[name], alpha)
                    without_alpha += ALPHA not in tensors and alpha is None
                except ValueError as error:
                    why, detail = "cannot be used", f": {error}"
            if why:
                unfit.setdefault(why, []).append(f"'{self._keys[name]}'{detail}")
        self.problems += [
            f"{len(details)} of its {len(self._layers)} layers {why}, such as {details[0]}"
            for why, details in unfit.items()
        ]
        if without_alpha:
            self.notes.append(f"{without_alpha} layers have no alpha and were read as alpha = rank")
        return built

    def _unfit(self, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
        """(why the layer cannot be read, its detail); two empty strings when it can."""
        if not is_whole(tensors):
            return "lack lora_down or lora_up", ""
        shape, here = weight_shape({p: t.shape for p, t in tensors.items()}), self._shapes[name]
        if shape is None:
            factors = ", ".join(f"{part} is {tuple(t.shape)}" for part, t in tensors.items())
            return "have factors that do not go together", f": {factors}"
        if shape != flat(here):
            return "have another shape", f": it is {shape} in the file and {tuple(here)} here"
        return "", ""


def _other_kind(tensor_name: str) -> tuple[str, str] | None:
    """(kind, layer) of a tensor of an adapter that is no LoRA."""
    for kind, ending in OTHER_KINDS.items():
        found = re.fullmatch(rf"(.+?)\.{ending}", tensor_name)
        if found:
            return kind, found[1]
    return None
