"""LoRA on any torch model, in a few calls.

    from lora_sd.any_model import LoraConfig, apply_lora, lora_state_dict, merge_all_lora

    config = LoraConfig(r=8, lora_alpha=16, target_modules=("attention.query", "attention.value"))
    print(apply_lora(net, config))       # which layers got an adapter; all else is frozen
    optimizer = torch.optim.AdamW(p for p in net.parameters() if p.requires_grad)
    ...                                  # train `net` as always; nothing else has changed
    save_file(lora_state_dict(net), "adapter.safetensors")  # a small file: the adapter alone
    merge_all_lora(net)                  # from here on as fast as the plain network

A wrapper takes the place of each chosen layer and adds a small trained update to its output; the
layer itself is kept inside, frozen (`layers` has the mathematics). A fresh adapter changes
nothing, `set_scale(net, 0)` switches a trained one off, and `inject.detach(net)` takes it out.

What can be adapted: `nn.Linear`, `nn.Conv2d` and `nn.Embedding`, wherever they lie in the model.
Classes derived from these are left alone, since models may use their weights without calling them,
as `nn.MultiheadAttention` does with its own. A layer used in several places is adapted once.

`target_modules` holds patterns over the layers' paths, as in `patterns`:

    'attention.query'     every layer whose path ends in it, at a dot
    'encoder.*'           a glob over the whole path
    're:.*\\.(fc1|fc2)'    a regular expression over the whole path

For Stable Diffusion with its presets use `layer_choice.choose_layers`; for its files use `formats`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from lora_sd import inject, patterns
from lora_sd.adapter import LoRAWeights
from lora_sd.errors import AdapterError, ConfigError, shown_list
from lora_sd.layer_choice import LayerPlan
from lora_sd.layers import KINDS, Adaptable, LayerOptions, LinearLoRA, LoRALayer, rank_limit


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and of what kind; the names are PEFT's.

    Attributes:
        r: rank; 0 leaves the layers as they are.
        lora_alpha: the update is scaled by lora_alpha / r; None means lora_alpha = r.
        lora_dropout: share of each update's input that is zeroed in training.
        target_modules: patterns of the layers (module docstring); one alone may be a string.
        inference_mode: train nothing, and merge the updates into the weights.
    """

    r: int = 8
    lora_alpha: float | None = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    inference_mode: bool = False

    def __post_init__(self) -> None:
        given = self.target_modules
        patterns = (given,) if isinstance(given, str) else tuple(given or ())
        object.__setattr__(self, "target_modules", patterns)
        problems = []
        if self.r < 0:
            problems.append(f"'r' is {self.r}: a rank is 0 or more.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            problems.append(f"'lora_alpha' is {self.lora_alpha}: it must be above 0.")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"'lora_dropout' is {self.lora_dropout}: it is a share, 0 to below 1.")
        if not patterns:
            problems.append("'target_modules' is empty. Name the layers to adapt, '*' for all.")
        if problems:
            raise ConfigError(problems)


def apply_lora(model: nn.Module, config: LoraConfig, seed: int = 0) -> dict[str, LoRALayer]:
    """Give the layers that a config names an adapter, in place; the new layers by path.

    Everything but adapters is frozen. The start depends on the seed and each layer's path alone.

    Raises:
        ConfigError: a pattern matches nothing, or layers are adapted already or cannot have the
            rank; all problems at once, and the model is as before.
        AdapterError: `inference_mode` with layers that cannot be merged (`merge_all_lora`).
    """
    chosen = _choose(model, config)
    alpha = float(config.r if config.lora_alpha is None else config.lora_alpha)
    ranks = {path: (config.r, alpha) for path in chosen if config.r}
    attached = _attach(model, ranks, LayerOptions(dropout=config.lora_dropout), seed)
    if config.inference_mode:
        model.requires_grad_(False)
        merge_all_lora(model)
    return attached


def replace_linear_with_lora(
    module: nn.Module,
    max_rank: int,
    scale: float = 1.0,
    lora_bias: bool = False,
    seed: int = 0,
) -> dict[str, LinearLoRA]:
    """Give every `nn.Linear` below a module an adapter, in place; the new layers by path.

    Args:
        max_rank: the rank; a layer whose smaller side is less gets that (its `rank` says so).
        scale: how strongly the updates act; alpha is the rank, so that they act as they are.
        lora_bias: give `lora_up` a bias, starting at zero. Few file formats can hold it.

    Raises:
        ConfigError: the rank is below 1, or there is no `nn.Linear` that is not adapted yet.
    """
    if max_rank < 1:
        raise ConfigError(f"'max_rank' is {max_rank}: it must be 1 or more.")
    ranks = {
        path: min(max_rank, rank_limit(layer.weight.shape))
        for path, layer in _plain_layers(module).items()
        if isinstance(layer, nn.Linear)
    }
    if not ranks:
        raise ConfigError("There is no nn.Linear below this module that is not adapted yet.")
    plans = {path: (rank, float(rank)) for path, rank in ranks.items()}
    attached = _attach(module, plans, LayerOptions(up_bias=lora_bias), seed)
    for layer in attached.values():
        layer.set_scale(scale)
    return cast(dict[str, LinearLoRA], attached)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every adapted layer by its path, also those that were put in by hand; '' is the model."""
    return {path: part for path, part in model.named_modules() if isinstance(part, LoRALayer)}


def set_lora_trainable(model: nn.Module) -> None:
    """Let the adapters train and nothing else; merged ones, which could not, are unmerged."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.unmerge()
        for name, part in layer.named_children():
            if name != "base":
                part.requires_grad_(True)
        for own in layer.parameters(recurse=False):
            own.requires_grad_(True)


def set_scale(model: nn.Module, scale: float | Tensor) -> None:
    """How strongly the adapters act: 1 as trained, 0 off; merged ones are merged anew.

    A tensor (samples,) gives each sample of a batch its own scale.
    """
    for layer in lora_layers(model).values():
        layer.set_scale(scale)


def merge_all_lora(model: nn.Module) -> None:
    """Put every update into its layer's weight, which then costs what the plain layer costs.

    Raises:
        AdapterError: naming all layers that cannot be merged; none has been merged then.
    """
    owners = Counter(id(own) for part in model.modules() for own in part.parameters(recurse=False))
    layers = {path: layer for path, layer in lora_layers(model).items() if layer.rank}
    problems = []
    for path, layer in layers.items():
        if layer.base is None:
            problems.append(f"Layer '{path}' has no base to merge into.")
        elif isinstance(layer.base, LoRALayer):
            problems.append(f"Layer '{path}' adapts an adapted layer. Use `merge.MergedWeights`.")
        elif isinstance(layer.scale, Tensor):
            problems.append(f"Layer '{path}' has a scale for each sample. Set one number.")
        elif owners[id(layer.weight)] > 1:
            problems.append(
                f"Layer '{path}' shares its weight with another layer, which merging would "
                f"change too. Give it a weight of its own, or leave it unmerged."
            )
    if problems:
        raise AdapterError(problems)
    for layer in layers.values():
        layer.merge()


def unmerge_all_lora(model: nn.Module) -> None:
    """Put every layer's own weight back, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapters alone, on the CPU.

    The keys are a layer's path and `.lora_down.weight`, `.lora_up.weight` and `.alpha`; where the
    layer has them `.lora_up.bias` and `.dora_scale`. Shapes are `adapter.LoRAWeights`'s.
    """
    return {
        key: tensor.detach().to("cpu", copy=True)
        for path, layer in lora_layers(model).items()
        if layer.rank
        for key, tensor in _tensors(path, layer.weights()).items()
    }


def load_lora_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True
) -> list[str]:
    """Load what `lora_state_dict` returned into adapted layers; merged ones are merged anew.

    Args:
        strict: refuse a state that does not fit in everything. Otherwise each layer that fits as
            a whole is loaded.

    Returns:
        A sentence for each key that is missing, unexpected, of another shape or of another alpha;
        with `strict` none.

    Raises:
        AdapterError: with those sentences, if `strict`; nothing has been loaded then.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if layer.rank}
    known: set[str] = set()
    problems: list[str] = []
    fitting: dict[str, LoRAWeights] = {}
    for path, layer in layers.items():
        mine = _tensors(path, layer.weights())
        known |= mine.keys()
        wrong = _differences(mine, state)
        if not wrong:
            fitting[path] = _weights(path, layer, state)
        problems += wrong
    problems += [f"'{key}' is not expected here." for key in state if key not in known]
    if problems and strict:
        raise AdapterError(problems)
    for path, weights in fitting.items():
        layers[path].load(weights)
    return problems


ROOT = ""
"""The component of a plain model's layers in `inject`: a name that none of its parts can have."""


def _plain_layers(model: nn.Module) -> dict[str, Adaptable]:
    """Every layer that can be adapted and is not yet, by its path, or the first of several."""
    adapted = {part for wrapper in lora_layers(model).values() for part in wrapper.modules()}
    return {
        path: cast(Adaptable, part)
        for path, part in model.named_modules()
        if path and type(part) in KINDS and part not in adapted
    }


def _choose(model: nn.Module, config: LoraConfig) -> list[str]:
    """The paths of the layers that a config names, in the model's order; `apply_lora` says more."""
    layers, adapted = _plain_layers(model), lora_layers(model)
    problems: list[str] = []
    chosen: set[str] = set()
    for pattern in config.target_modules:
        if wrong := patterns.invalid_pattern(pattern):
            problems.append(wrong)
        elif taken := _matching(pattern, adapted):
            problems.append(f"'{pattern}' names layers adapted already: {shown_list(taken)}.")
        elif named := _matching(pattern, layers):
            chosen.update(named)
        else:
            near = patterns.nearest_layers(pattern, layers)
            problems.append(f"'target_modules': no layer matches '{pattern}'.{near}")
    problems += _rank_problems(config.r, {path: layers[path] for path in chosen})
    if problems:
        raise ConfigError(problems)
    return [path for path in layers if path in chosen]


def _matching(pattern: str, paths: Mapping[str, nn.Module]) -> list[str]:
    """The paths that a pattern names."""
    return [path for path in paths if patterns.matches(pattern, f"{ROOT}.{path}")]


def _rank_problems(rank: int, layers: Mapping[str, Adaptable]) -> list[str]:
    """A sentence for each layer that cannot have a rank."""
    problems = []
    for path, layer in layers.items():
        groups = getattr(layer, "groups", 1)
        limit = rank_limit(layer.weight.shape, groups)
        if rank > limit:
            problems.append(f"'r' is {rank}, but layer '{path}' allows at most {limit}.")
        elif rank % groups:
            problems.append(f"'r' is {rank}, but layer '{path}' needs a multiple of {groups}.")
    return problems


def _attach(
    model: nn.Module,
    ranks: Mapping[str, tuple[int, float]],
    options: LayerOptions,
    seed: int,
) -> dict[str, LoRALayer]:
    """Wrap layers, given as path -> (rank, alpha), at every place where they are used."""
    plain = {path: model.get_submodule(path) for path in ranks}
    firsts = {layer: path for path, layer in plain.items()}
    places = [
        (place, firsts[part])
        for place, part in model.named_modules(remove_duplicate=False)
        if part in firsts
    ]
    plans = [
        LayerPlan(f"{ROOT}.{path}", *ranks[path], cast(Tensor, layer.weight).shape)
        for path, layer in plain.items()
    ]
    attached = inject.attach({ROOT: model}, plans, options, seed)
    by_path = {name.removeprefix(f"{ROOT}."): layer for name, layer in attached.items()}
    for place, first in places:
        model.set_submodule(place, by_path[first])
    for layer in by_path.values():
        layer.register_forward_pre_hook(_is_called)
    set_lora_trainable(model)
    return by_path


def _is_called(layer: nn.Module, inputs: object) -> None:
    """A hook that does nothing. `nn.TransformerEncoderLayer` uses its layers' weights without
    calling them where it can, but not where one has a hook: the update would be left out."""


def _tensors(path: str, weights: LoRAWeights) -> dict[str, Tensor]:
    """What a state dict holds of one layer."""
    named = {
        "lora_down.weight": weights.down,
        "lora_up.weight": weights.up,
        "lora_up.bias": weights.up_bias,
        "dora_scale": weights.magnitude,
        "alpha": torch.tensor(weights.alpha),
    }
    prefix = f"{path}." if path else ""
    return {f"{prefix}{name}": tensor for name, tensor in named.items() if tensor is not None}


def _weights(path: str, layer: LoRALayer, state: Mapping[str, Tensor]) -> LoRAWeights:
    """One layer's weights out of a state dict that fits it."""
    prefix = f"{path}." if path else ""
    return replace(
        layer.weights(),
        down=state[f"{prefix}lora_down.weight"],
        up=state[f"{prefix}lora_up.weight"],
        up_bias=state.get(f"{prefix}lora_up.bias"),
        magnitude=state.get(f"{prefix}dora_scale"),
    )


def _differences(mine: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """A sentence for each tensor of a layer that a state dict does not have as the layer has it."""
    problems = []
    for key, tensor in mine.items():
        if key not in state:
            problems.append(f"'{key}' is missing.")
        elif state[key].shape != tensor.shape:
            given, here = tuple(state[key].shape), tuple(tensor.shape)
            problems.append(f"'{key}' has shape {given}, but the layer here has {here}.")
        elif key.rpartition(".")[2] == "alpha" and float(state[key]) != float(tensor):
            problems.append(f"'{key}' is {state[key]:g}, but the layer here has {tensor:g}.")
    return problems
