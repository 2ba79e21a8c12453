"""A base model's files written anew with adapters in them, tensor by tensor."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Size, Tensor

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.base_files.files import WEIGHTS, BaseFiles
from lora_sd.base_files.original import Piece, to_original
from lora_sd.base_files.tensor_stream import StoredTensor, file_bytes, write_tensor_file
from lora_sd.errors import AdapterError, UserError, shown_list, shown_size
from lora_sd.parts import Scales

WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data"),
)
COMPONENTS = (
    *WEIGHTS,
    *("tokenizer", "tokenizer_2", "scheduler"),
    *("feature_extractor", "image_encoder", "safety_checker"),
)
OF_A_COMPONENT = re.compile(  # what diffusers and transformers write into a component's folder
    r"(\w+_)?config\.json|merges\.txt|vocab\.json|tokenizer\.json|special_tokens_map\.json|"
    r"added_tokens\.json|(diffusion_pytorch_|pytorch_)?model[\w.\-]*\.(safetensors|json|bin)"
)
OF_THE_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
SPARE_BYTES = 2**26
Updates = Mapping[str, Sequence[tuple[LoRAWeights, float]]]  # by layer: factors, scale
Watch = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class Recipe:
    """A base, what is added to each of its layers, and the dtype to write (None: as it is)."""

    base: BaseFiles
    updates: Updates
    dtype: torch.dtype | None

    def written_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is written; integers stay."""
        dtype = self.base.dtype(name)
        return self.dtype if self.dtype and dtype.is_floating_point else dtype

    def joined(self, pieces: Mapping[str, Piece], key: str) -> Tensor:
        """A tensor of a file to be written, by its key there."""
        return pieces[key].join([self.tensor(name) for name in pieces[key].names])

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model with the adapters in it: base + sum of scale * delta in float32,
        rounded once.

        Raises:
            AdapterError: the result is not finite in that dtype.
        """
        base = self.base.tensor(name)
        layer, _, part = name.rpartition(".")
        merged = base
        if layer in self.updates and part in ("weight", "bias"):
            merged = base.to(torch.float32, copy=True)
            for weights, scale in self.updates[layer]:
                if part == "weight":
                    weights.add_to(merged, scale, base)
                elif (delta := weights.bias_delta()) is not None:
                    merged += scale * delta
        result = merged.to(self.written_dtype(name))
        # torch cannot ask 8-bit floats themselves.
        numbers = result.float() if result.dtype.itemsize == 1 else result
        if result is not base and not torch.isfinite(numbers).all():
            raise AdapterError(
                f"'{name}' would hold values that {str(result.dtype)[6:]} cannot, up to "
                f"{merged.abs().max():.3g}. Choose a lower scale, or the dtype bfloat16 or float32."
            )
        return result


def gather_updates(base: BaseFiles, adapters: Sequence[tuple[Adapter, Scales]]) -> Updates:
    """What the adapters add to each layer; layers at scale 0 are left alone.

    Raises:
        AdapterError: an adapter does not fit the base, has a bias for a layer without one, or gets
            a scale that float32 cannot hold.
    """
    updates: dict[str, list[tuple[LoRAWeights, float]]] = {}
    for number, (adapter, scales) in enumerate(adapters, 1):
        adapter.check_fits(base.shapes, adapter.metadata.get("ss_output_name", f"adapter {number}"))
        for name, weights in adapter.layers.items():
            if scale := scales.of(name, weights.weight_shape):
                if abs(scale * max(weights.scaling, 1)) > torch.finfo(torch.float32).max:
                    raise AdapterError(
                        f"The scale {scale:g} of '{name}' is too large for any number format. "
                        f"Choose a lower one."
                    )
                updates.setdefault(name, []).append((weights, scale))
    homeless = [
        name
        for name, parts in updates.items()
        if f"{name}.bias" not in base.tensor_shapes and any(w.up_bias is not None for w, _ in parts)
    ]
    if homeless:
        raise AdapterError(
            f"The adapter adds a bias to {len(homeless)} layers that have none in the base, such "
            f"as {shown_list(homeless, 2)}: a base model's file has no place for it. Train without "
            f"'up_bias' to bake."
        )
    return updates


def single_file_plan(recipe: Recipe) -> tuple[list[Piece], list[StoredTensor]]:
    """(pieces, tensors to copy as they are) of the single file; an EMA copy is left out, as it is
    the model without the adapters."""
    base = recipe.base
    if base.is_folder:
        return to_original(base.tensor_shapes, base.has_open_clip), []
    copied = [stored for stored in base.rest if not stored.key.startswith("model_ema.")]
    return [entry.piece for entry in base.entries], copied


def write_single_file(
    recipe: Recipe, path: Path, metadata: Mapping[str, str], watch: Watch = iter
) -> None:
    """Write the model as one file in the original layout.

    Raises:
        UserError: the disk is too small; nothing is written then.
    """
    pieces, copied = single_file_plan(recipe)
    by_key = {piece.key: piece for piece in pieces}
    as_they_are = {stored.key: stored for stored in copied}
    plan = {key: _planned(recipe, piece) for key, piece in by_key.items()}
    plan |= {key: (stored.dtype, stored.shape) for key, stored in as_they_are.items()}
    check_room(path.parent, file_bytes(plan))

    def tensor_of(key: str) -> Tensor:
        return as_they_are[key].read() if key in as_they_are else recipe.joined(by_key, key)

    write_tensor_file(path, plan, tensor_of, metadata, watch)


def write_folder(recipe: Recipe, folder: Path, watch: Watch = iter) -> list[str]:
    """Write the model as a diffusers folder, everything else in it copied; each weights file keeps
    its name. Weights that were not read (other variants, other formats) are left out.

    Returns:
        the names of the files left out, as they lie in the base's folder.

    Raises:
        UserError: the disk is too small; nothing is written then.
    """
    base = recipe.base
    files: dict[Path, dict[str, Piece]] = {}
    for entry in base.entries:
        files.setdefault(entry.stored.path, {})[entry.stored.key] = entry.piece
    plans = {
        path: {key: _planned(recipe, piece) for key, piece in pieces.items()}
        for path, pieces in files.items()
    }
    others, left_out = files_to_copy(base.path, set(files))
    copied_bytes = sum(path.stat().st_size for path in others)
    check_room(folder.parent, copied_bytes + sum(map(file_bytes, plans.values())))
    for path in others:
        target = folder / path.relative_to(base.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for path, plan in plans.items():
        target = folder / path.relative_to(base.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_tensor_file(target, plan, partial(recipe.joined, files[path]), {}, watch)
    if recipe.dtype:
        for component in WEIGHTS:
            _say_dtype(folder / component / "config.json", str(recipe.dtype).removeprefix("torch."))
    return [str(path.relative_to(base.path)) for path in left_out]


def files_to_copy(folder: Path, read: set[Path]) -> tuple[list[Path], list[Path]]:
    """(files to copy, files to leave out) of a diffusers folder besides the weights that are read:
    no weights without the adapters shall stay beside those with them. Hidden files are in neither.
    """
    copied: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in place.parts)
        if path.is_file() and path not in read and not hidden:
            (copied if _is_copied(path, place, read) else left_out).append(path)
    return copied, left_out


def foreign_files(base: BaseFiles, folder: Path) -> list[str]:
    """Files of a diffusers folder, hidden ones and links among them, that neither this bake nor one
    of another base writes there: those of its owner."""
    read = {entry.stored.path for entry in base.entries}
    copied, _ = files_to_copy(base.path, read)
    own = {path.relative_to(base.path) for path in [*read, *copied]} | {Path("model_index.json")}
    found = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        is_file = path.is_symlink() or not path.is_dir()
        if is_file and place not in own and not _is_of_a_model(place):
            found.append(str(place))
    return found


def _is_of_a_model(place: Path) -> bool:
    """Whether a file's place in a diffusers folder tells that it is a part of the model's."""
    if (
        len(place.parts) == 2
        and place.parts[0] in COMPONENTS
        and OF_A_COMPONENT.fullmatch(place.name)
    ):
        return True
    return place.name in OF_THE_SYSTEM


def _is_copied(path: Path, place: Path, read: set[Path]) -> bool:
    if len(place.parts) > 1 and place.parts[0] not in WEIGHTS:
        return True  # another component, such as the safety checker
    if path.name.endswith(".json") and ".index" in path.name:
        shards = json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values()
        return {path.parent / shard for shard in shards} <= read
    return path.suffix.lower() not in WEIGHT_SUFFIXES


def _say_dtype(config: Path, dtype: str) -> None:
    """Let a written config name the dtype that its weights have now, where it names one:
    transformers 5 casts the weights to it when it loads them."""
    fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    stale = [key for key in ("dtype", "torch_dtype") if fields.get(key, dtype) != dtype]
    if stale:
        changed = json.dumps({**fields, **dict.fromkeys(stale, dtype)}, indent=2)
        config.write_text(f"{changed}\n", encoding="utf-8")


def check_room(folder: Path, wanted_bytes: int) -> None:
    """Raises UserError when the disk of `folder` has less room than that."""
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes + SPARE_BYTES:
        raise UserError(
            f"The result needs {shown_size(wanted_bytes + SPARE_BYTES)}, and the disk of "
            f"'{folder}' has {shown_size(free)} left. Make room, or choose another disk."
        )


def _planned(recipe: Recipe, piece: Piece) -> tuple[torch.dtype, Size]:
    shapes = [recipe.base.tensor_shapes[name] for name in piece.names]
    return recipe.written_dtype(piece.names[0]), piece.joined_shape(shapes)
