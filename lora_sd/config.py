"""Every setting once: type, default, range and help.

YAML and command line in, YAML out, and the fields of the app's form. A flag has the name of its
YAML key: `train: {steps: 400}` is `--train.steps 400`. The command line wins over the file, the
file over the defaults. Nothing below the front doors sees these classes: `train`, `generate` and
the rest take plain parameters.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from lora_sd.errors import ConfigError, nearest

LAYER_OPTIONS = ("init", "rs", "dora", "dropout", "rank_dropout", "module_dropout", "up_bias")
Preset = Literal["attention", "attention-ff", "attention-conv", "full"]
Resolution = Annotated[int, Field(ge=16, le=4096, multiple_of=8)]


def _as_list(value: Any) -> Any:
    """One value where several may stand."""
    return value if isinstance(value, list | tuple) else [value]


class Group(BaseModel):
    """A named group of settings."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class BaseGroup(Group):
    model: str = "tiny-sd"
    """The Stable Diffusion model to adapt: 'tiny-sd' (ships with the project), a .safetensors
    checkpoint as model sites offer them, the path of a diffusers folder, or a hub id."""
    vae: str | None = None
    """Another VAE for it: a .safetensors file, or a diffusers folder of one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen base weights. 'auto': bfloat16 on a GPU that has it, float16 on
    other GPUs, float32 on the CPU. SDXL's VAE stays in float32 where float16 is too narrow."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the model predicts. 'auto': as its files say, else as its own loss on the pictures
    tells. What is said is checked against that loss either way."""
    zero_terminal_snr: Literal["auto", "yes", "no"] = "auto"
    """Whether its last timestep is pure noise, as some v-prediction models have it. 'auto': as
    its files say."""
    clip_skip: int = Field(1, ge=1, le=12)
    """Which of the text encoder's last layers is used: 1 the last, 2 the one before, as many
    anime models want it. Not for SDXL, which always uses the one before."""

    def options(self) -> dict[str, Any]:
        """Which model, as `base_model.load_base_model` takes it."""
        return {"name": self.model} | self.model_dump(exclude={"model", "dtype"})


class PerFolderGroup(Group):
    """How pictures and captions are treated; each of `data.folders` may have its own."""

    caption: str | None = None
    """One caption for the images that have none of their own; '' lets them have none."""
    caption_fallback: Literal["none", "file_name", "folder_name"] = "none"
    """What captions an image that has no other caption: nothing, its own name, or its folder's. A
    folder named as kohya's tools want it ('10_sks cat') captions its images with that name anyway.
    """
    trigger_word: str | None = Field(None, max_length=200)
    """A word or phrase put before every caption, to call the result by; it is noted in the
    adapter's file."""
    caption_prefix: str = ""
    """Text before every caption, behind the trigger word."""
    caption_suffix: str = ""
    """Text after every caption."""
    shuffle_tags: bool = False
    """Put a caption's tags, which commas part, into another order each time it is shown."""
    keep_tags: int = Field(0, ge=0, le=1000)
    """So many first tags stay in place when tags are shuffled or dropped; '|||' in a caption parts
    what stays from what does not, too."""
    tag_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of tags left out, drawn anew each time a caption is shown."""
    caption_dropout: float = Field(0.05, ge=0, le=1)
    """Share of pictures shown with an empty caption, which keeps guidance working."""
    wildcards: bool = False
    """Draw one of '{a|b}' in captions, and one line of a caption of several lines."""
    resolution_px: Annotated[list[Resolution], BeforeValidator(_as_list)] = Field(
        [64], min_length=1, max_length=8
    )
    """Sides of the training pictures in pixels: 64 for tiny-sd, 512 for SD 1.5, 768 for SD 2.1,
    1024 for SDXL. Pictures keep their shape: this is the side of a square of the same area. With
    several, each picture is shown at each."""
    max_aspect_ratio: float = Field(2.0, ge=1, le=8, allow_inf_nan=False)
    """Longest shape, as long side / short side; longer pictures are cut. 1: squares only."""
    upscale: bool = False
    """Enlarge pictures that are smaller than the resolution; else they are shown at their own
    size."""
    flip: bool = False
    """Show pictures mirrored as often as not. Not for faces, text, or anything with sides."""
    crop_jitter: float = Field(0.0, ge=0, le=0.5)
    """Cut up to this share off the sides, each time elsewhere."""
    colour_jitter: float = Field(0.0, ge=0, le=0.5)
    """Vary brightness, contrast, saturation and hue by up to this share."""
    variants: int | None = Field(None, ge=1, le=64)
    """How many versions of each picture are drawn and encoded, to be shown in turn, the first of
    them unchanged. Empty: 1, 2 with flip, 8 with jitter."""
    background: str = "white"
    """What transparent pictures are laid on: a colour's name, or '#rrggbb'."""
    masks: Literal["off", "file", "alpha"] = "off"
    """Where the loss counts: everywhere; where 'cat-mask.png' beside 'cat.png' is white; or where
    the picture is not transparent."""
    unmasked_weight: float = Field(0.0, ge=0, le=1)
    """How much the rest of a masked picture counts."""

    @field_validator("resolution_px")
    @classmethod
    def _each_once(cls, sides: list[int]) -> list[int]:
        if len(set(sides)) < len(sides):
            raise ValueError(
                "a side is named twice; one number stands for all shapes of its area, so write "
                "512 for kohya's 512,512"
            )
        return sides


class FolderGroup(PerFolderGroup):
    folder: str
    """Folder of images; folders inside it belong to it."""
    kind: Literal["training", "regularisation", "validation"] = "training"
    """What its pictures are for: to learn; to stay as they are (prior preservation: shown as often
    as the others all together); or to measure the loss on, unseen."""
    repeats: float = Field(1.0, ge=0.01, le=1000)
    """How often each picture is shown in an epoch, times what its folder's name says ('10_cat');
    0.5: every other epoch."""
    loss_weight: float = Field(1.0, ge=0, le=100)
    """How much its pictures' loss counts (of regularisation: the prior's weight)."""
    class_pictures: int = Field(0, ge=0, le=10_000)
    """For regularisation: have the base draw so many pictures of `caption` into the folder, where
    there are fewer, at the largest resolution, each with its caption beside it."""

    @model_serializer(mode="wrap")
    def _what_was_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what comes from `data`, so that a written config says the same again."""
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}

    @model_validator(mode="after")
    def _settings_go_together(self) -> "FolderGroup":
        if self.class_pictures and (self.kind != "regularisation" or not self.caption):
            raise ValueError("class_pictures wants kind: regularisation, and a caption to draw")
        return self


EXAMPLE_FOLDER = "assets/ink-icons"
WITHOUT_SUBJECT: dict[str, Any] = {
    "caption": None,
    "trigger_word": None,
    "caption_prefix": "",
    "caption_suffix": "",
}


class DataGroup(PerFolderGroup):
    folder: str | None = None
    """Folder of training images, each with its caption beside it (fox.png, fox.txt); folders
    inside it belong to it. Empty, with no `folders` either: the example pictures."""
    folders: list[FolderGroup] = []
    """Further folders, each with 'folder', and what it wants of 'kind', 'repeats', 'loss_weight',
    'class_pictures' and of the other settings of `data` for itself: a list in YAML; JSON as a
    flag. Regularisation folders do not take over caption, trigger word, prefix and suffix."""
    bad_pictures: Literal["fail", "skip"] = "fail"
    """What to do about pictures and captions that cannot be used: stop and name them all, or leave
    them out and name them all."""
    max_tokens: Literal[75, 150, 225] = 75
    """Tokens of a caption that are read; more than 75 are encoded in parts, as A1111 and ComfyUI
    do with long prompts."""
    cache: Literal["disk", "memory"] = "disk"
    """Where encoded pictures and captions are kept: on disk, to be found there by the next run, or
    in memory alone."""
    cache_folder: str | None = None
    """Where on disk. Empty: '.cache' in the folder of all runs. It may be deleted at any time."""

    @model_validator(mode="after")
    def _some_folder(self) -> "DataGroup":
        if not self.folder and not self.folders:
            self.folder = EXAMPLE_FOLDER
        if not self.folder and all(one.kind != "training" for one in self.folders):
            raise ValueError("no folder is of kind 'training'")
        return self

    def folder_options(self) -> list[dict[str, Any]]:
        """Each folder with its settings, as `data.folder_options.FolderOptions` takes them."""
        shared = self.model_dump(include=set(PerFolderGroup.model_fields))
        given = [{"folder": self.folder}] if self.folder else []
        each = []
        for one in given + [one.model_dump() for one in self.folders]:
            # What calls the subject is not taken over by pictures of something else.
            own = WITHOUT_SUBJECT if one.get("kind") == "regularisation" else {}
            each.append(shared | own | one)
        for one in each:
            one |= {"folder": Path(one["folder"]), "resolution_px": tuple(one["resolution_px"])}
        return each


class AdapterGroup(Group):
    preset: Preset = "attention-conv"
    """Which layers are adapted: attention; attention and feed-forward; those and the 3x3
    convolutions; or every linear and convolution layer."""
    text_encoder: bool = False
    """Adapt the text encoders too (their attention, and with every preset but 'attention' their
    feed-forward layers); helps with new words, and overfits sooner."""
    include: list[str] = []
    """Patterns of further layers to adapt: a name's ending ('attn2.to_k'), a glob ('up_blocks.*'),
    a regular expression ('re:...') or a block ('block:mid', 'block:up.1/conv'). With text_encoder,
    'token_embedding' adapts its tokens."""
    exclude: list[str] = []
    """Patterns of layers to leave alone; they win over preset and include."""
    rank: int = Field(16, ge=0, le=1024)
    """Inner size of the adapter in linear layers and 1x1 convolutions; 0 leaves them alone."""
    alpha: float | None = Field(None, gt=0, le=4096, allow_inf_nan=False)
    """The update of linear layers is scaled by alpha / rank. Empty: the same as rank."""
    conv_rank: int = Field(8, ge=0, le=1024)
    """Inner size of the adapter in 3x3 convolutions; half the linear rank is usual, 0 leaves them
    alone."""
    conv_alpha: float | None = Field(None, gt=0, le=4096, allow_inf_nan=False)
    """The same for 3x3 convolutions: conv_alpha / conv_rank. Empty: the same as conv_rank."""
    ranks: list[str] = []
    """Ranks of their own for some layers: PATTERN=RANK or PATTERN=RANK:ALPHA, such as
    'attn2.to_k=32' or 'block:mid/conv=4:2'. Without alpha the scaling stays; the last that fits
    counts; 0 leaves a layer alone."""
    clamp_ranks: bool = False
    """Give a layer that is too small for the rank the largest it allows (conv_out of Stable
    Diffusion allows 4), and say so, instead of refusing to start."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa"] = "kaiming"
    """How lora_down starts: Kaiming uniform, Gaussian with deviation 1 / rank, or orthonormal rows;
    lora_up starts at zero. 'pissa' starts both at the base's principal components, learns faster,
    and makes a file of twice the rank."""
    rs: bool = False
    """Scale the update by alpha / sqrt(rank) instead of alpha / rank (rsLoRA), for high ranks."""
    dora: Literal["off", "input", "output"] = "off"
    """Train the norms of the weights apart (DoRA): closer to full fine-tuning, and slower. 'input':
    one norm for each input, as A1111, ComfyUI, Forge, InvokeAI and LyCORIS read it. 'output': one
    for each output, as PEFT has it; saved in diffusers' format."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the update's input that is zeroed in training, against overfitting."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the ranks that is zeroed in training, anew for each picture."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the passes that leave a layer's update out altogether."""
    up_bias: bool = False
    """Give lora_up a bias. Only diffusers' format holds it: A1111, Forge, ComfyUI and InvokeAI do
    not read it."""

    def layer_choice(self) -> dict[str, Any]:
        """Which layers, as `layer_choice.choose_layers` takes it."""
        return self.model_dump(exclude={"text_encoder", *LAYER_OPTIONS}) | {"rs": self.rs}

    def layer_options(self) -> dict[str, Any]:
        """How each layer is made, as `layers.LayerOptions` takes it."""
        return self.model_dump(include=set(LAYER_OPTIONS))

    @model_validator(mode="after")
    def _options_go_together(self) -> "AdapterGroup":
        if self.dora != "off" and self.up_bias:
            raise ValueError("dora has no bias of its own: turn dora or up_bias off")
        return self


class TrainGroup(Group):
    steps: int = Field(1500, ge=1, le=10_000_000)
    """Optimizer steps."""
    batch_size: int = Field(1, ge=1, le=4096)
    """Pictures in one forward and backward pass, on each device."""
    gradient_accumulation: int = Field(1, ge=1, le=4096)
    """Passes that make one optimizer step: the effective batch is batch_size times this, times
    the number of devices."""
    learning_rate: float = Field(1e-4, gt=0, le=10, allow_inf_nan=False)
    """Highest learning rate, reached after the warm-up."""
    text_encoder_learning_rate: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    """The same for the text encoders' layers. Empty: half of learning_rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up: fall to zero along a cosine, or stay."""
    warmup_steps: int = Field(50, ge=0, le=1_000_000)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(0.01, ge=0, le=10, allow_inf_nan=False)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Gradients are scaled down to this total norm."""
    validate_every_steps: int = Field(100, ge=1)
    """Measure the loss on the validation pictures, where a folder holds some, every so many
    steps."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the arithmetic. 'auto': what `accelerate launch` was told, otherwise bf16 on a
    GPU that has it, fp16 on other GPUs, none on the CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory, about a third more time."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """The same seed, data and settings give the same adapter on the same machine."""


class SampleGroup(Group):
    prompts: list[str] = []
    """Prompts for the pictures drawn during training and for the grid at the end; none: no
    pictures."""
    negative_prompt: str = ""
    """What the sample pictures should not show."""
    every_steps: int = Field(250, ge=0)
    """Draw the sample pictures every so many steps; 0: only the grid at the end."""
    steps: int = Field(25, ge=1, le=1000)
    """Denoising steps of a picture."""
    guidance: float = Field(7.5, ge=0, le=50, allow_inf_nan=False)
    """How strongly pictures follow the prompt (classifier-free guidance scale)."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Seed of the first prompt's picture; the next prompt uses the next seed."""
    scales: list[Annotated[float, Field(allow_inf_nan=False)]] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Columns of the grid at the end: adapter scales, 0 being the base alone. None: no grid."""


class OutputGroup(Group):
    folder: str = "outputs"
    """Where run folders are made."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run's folder. Empty: the config file's name, with a number when that is taken."""
    save_every_steps: int = Field(250, ge=1)
    """Save a checkpoint, from which the run can go on, every so many steps."""
    keep_checkpoints: int = Field(2, ge=2)
    """Newest checkpoints that are kept; at least two."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of adapter.safetensors."""
    format: Literal["auto", "kohya", "diffusers"] = "auto"
    """Format of adapter.safetensors. kohya's is read by every program; diffusers' (PEFT's keys) by
    diffusers alone. 'auto': kohya's, or diffusers' for an adapter that kohya's cannot hold."""

    @field_validator("name")
    @classmethod
    def _not_a_device(cls, name: str | None) -> str | None:
        if name and name.split(".")[0].upper() in _WINDOWS_DEVICES:
            raise ValueError(f"'{name}' is a device name on Windows")
        return name


_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL"} | {
    f"{port}{n}" for port in ("COM", "LPT") for n in range(10)
}


class Config(BaseSettings):
    """All settings of a run."""

    model_config = SettingsConfigDict(extra="forbid", validate_default=True)

    base: BaseGroup = Field(BaseGroup(), description="the model to adapt")
    data: DataGroup = Field(DataGroup(), description="the training pictures")
    adapter: AdapterGroup = Field(AdapterGroup(), description="what is trained")
    train: TrainGroup = Field(TrainGroup(), description="how it is trained")
    sample: SampleGroup = Field(SampleGroup(), description="pictures drawn on the way")
    output: OutputGroup = Field(OutputGroup(), description="what is kept, and where")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: Any, *_: Any, **__: Any
    ) -> tuple[Any, ...]:
        return (init_settings,)  # no environment variables: a run is its file and its flags

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that `from_values` reads back."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=100)


def config_from_values(values: dict[str, Any]) -> Config:
    """Check plain values (from YAML, flags or the app's form).

    Raises:
        ConfigError: all problems at once, each naming the setting.
    """
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError([_sentence(detail) for detail in error.errors()]) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file, unchecked.

    Raises:
        ConfigError: no such file, or not a mapping of settings.
    """
    if path.suffix.lower() == ".toml":
        raise ConfigError(
            f"'{path}' is TOML, as kohya's tools read it; settings here are YAML. README shows "
            f"them side by side under 'From kohya's tools'."
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _OnceOnly)
    except FileNotFoundError:
        near = sorted(str(found) for found in path.parent.glob("*.yaml"))
        hint = f" That folder holds {', '.join(near)}." if near else ""
        raise ConfigError(f"There is no config file '{path}'.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read as text: {error}.") from None
    except yaml.YAMLError as error:
        where = str(getattr(error, "problem_mark", "")).strip()
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"'{path}' is not valid YAML: {reason} {where}".rstrip()) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' cannot be read as settings: {error}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' must hold groups of settings such as 'train:', not a list.")
    strange = [key for key in values if not isinstance(key, str) or key.startswith("_")]
    if strange:
        raise ConfigError([f"'{path}': there is no setting '{key}'." for key in strange])
    return values


class _OnceOnly(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but a key given twice is an error, not a loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"'{key}' is given twice,"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class CommandLine:
    """What was typed: settings by group, unchecked, and where to start from."""

    flags: dict[str, dict[str, Any]]
    config_file: Path | None
    resume: Path | None
    like: Path | None

    def over(self, values: dict[str, Any]) -> dict[str, Any]:
        """Unchecked settings, overridden by the flags."""
        merged = dict(values)
        for group, given in self.flags.items():
            below = merged.get(group, {})
            merged[group] = {**below, **given} if isinstance(below, dict) else below
        return merged


def parse_command_line(argv: Sequence[str], program: str) -> CommandLine:
    """Take a command line apart.

    Raises:
        ConfigError: an unknown flag, a flag without its value, or more than one start.
    """
    parser = _Parser(
        prog=program,
        usage=f"{program} [--config FILE | --like ADAPTER | --resume RUN] [--GROUP.SETTING VALUE]",
        description="Train a LoRA adapter for Stable Diffusion on a folder of images.",
        epilog="A flag wins over the config file. Lists: repeat the flag, once for each entry.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings to start from, e.g. configs/tiny.yaml"
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="ADAPTER",
        help="the settings that an adapter of ours was trained with, as its file tells them",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with an interrupted run, e.g. outputs/tiny",
    )
    try:
        source: CliSettingsSource[_Parser] = CliSettingsSource(
            Config,
            root_parser=parser,
            parse_args_method=_without_text_lists,
            formatter_class=argparse.RawTextHelpFormatter,
            cli_avoid_json=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_parse_args=list(argv),
        )
        flags = source()
    except SettingsError as error:
        raise ConfigError(f"A flag's value cannot be read: {error.__cause__ or error}.") from None
    plain = vars(parser.parse_args(list(argv)))
    for name in _text_lists():
        if plain.get(name):
            group, _, setting = name.partition(".")
            flags.setdefault(group, {})[setting] = plain[name]
    line = CommandLine(flags, plain["config"], plain["resume"], plain["like"])
    starts = [path for path in (line.config_file, line.resume, line.like) if path]
    if len(starts) > 1:
        raise ConfigError("Give one of --config, --like and --resume.")
    if line.resume and flags:
        raise ConfigError(
            "--resume goes on with the run's own settings; give it alone, or start a new run."
        )
    return line


class _Parser(argparse.ArgumentParser):
    """Errors are ours to phrase: a sentence, with the nearest flag, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        flags = [flag for flag in unknown if flag.startswith("--")]
        if flags:
            known = [f"--{name}" for name in setting_names()]
            raise ConfigError(
                [f"There is no flag '{flag}'.{_hint(flag.split('=')[0], known)}" for flag in flags]
            )
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. --help lists the flags.")


def _text_lists() -> list[str]:
    """Settings that are lists of texts. An entry may hold commas, quotes and brackets, as prompts
    do, and pydantic-settings splits entries at commas: these are taken from argparse directly."""
    return [name for name, field in settings() if field.annotation == list[str]]


def _without_text_lists(
    parser: _Parser, args: Sequence[str], namespace: Any = None
) -> argparse.Namespace:
    parsed = argparse.ArgumentParser.parse_args(parser, args, namespace)
    for name in _text_lists():
        if hasattr(parsed, name):
            delattr(parsed, name)
    return parsed


def settings() -> Iterator[tuple[str, FieldInfo]]:
    """('train.steps', its field) for every setting, in the order they are declared."""
    for group, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Group)
        for name, inner in field.annotation.model_fields.items():
            yield f"{group}.{name}", inner


def setting_names() -> list[str]:
    """Every setting's dotted name."""
    return [name for name, _ in settings()]


def _sentence(detail: ErrorDetails) -> str:
    """One pydantic error as a sentence that names the setting as a user writes it."""
    name = ".".join(str(part) for part in detail["loc"])
    where, known = "", setting_names() if "." in name else list(Config.model_fields)
    if in_list := re.fullmatch(r"data\.folders\.(\d+)(?:\.(.+))?", name):
        folder = f"folder {int(in_list[1]) + 1}"
        where = f" of {folder} in 'data.folders'" if in_list[2] else " in 'data.folders'"
        name, known = in_list[2] or folder, list(FolderGroup.model_fields)
    if detail["type"] == "extra_forbidden":
        return f"There is no setting '{name}'{where}.{_hint(name, known)}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        return f"'{name}'{where} is {detail['input']!r}: write settings, as in {{folder: more/}}."
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict):  # settings that do not go together
        return f"'{name}'{where}: {message}."
    return f"'{name}'{where} is {detail['input']!r}: {message[:1].lower()}{message[1:]}."


def _hint(unknown: str, known: Sequence[str]) -> str:
    """What to say of a setting that does not exist."""
    group, _, name = unknown.removeprefix("--").partition(".")
    if group == "data" and name in FolderGroup.model_fields:
        return f" Each of 'data.folders' has a '{name}' of its own."
    return nearest(unknown, known)
