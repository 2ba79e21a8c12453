"""Make the plan of a run from its settings."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import psutil
import torch

from lora_sd import layer_choice, layer_names, run_data
from lora_sd.base_loading import load_base_model, pick_device, pick_dtype
from lora_sd.config import Config
from lora_sd.errors import shown_size
from lora_sd.known_bases import size_step_px
from lora_sd.layers import LayerOptions
from lora_sd.parts import unread_layers
from lora_sd.plan.base_configs import BaseConfigs, base_configs
from lora_sd.plan.cards import CARDS_GB, Card, fit_cards
from lora_sd.plan.facts import Plan
from lora_sd.plan.measurement import Measured, measure
from lora_sd.plan.pictures import Pictures, pictures_of
from lora_sd.plan.prediction import Phase, Prediction
from lora_sd.plan.setting import Setting
from lora_sd.plan.shaped_base import shaped_base

BYTES_OF_LATENTS = 2 * 4 * 4  # mean and deviation, of four channels, in float32
ROOM = 0.8  # of the free memory that a measured step may take by what the shapes say
Device = Literal["here", "cuda", "cpu"]


def make_plan(
    config: Config,
    *,
    measured: bool = True,
    device: Device = "here",
    cards_gb: tuple[float, ...] = CARDS_GB,
    on_picture: Callable[[int, int], bool] = lambda done, of: False,
) -> Plan:
    """What a run needs, before anything of it starts.

    Args:
        measured: do a few real steps where base model and device are at hand; else all is said
            from shapes.
        device: what to plan for; 'here' what computes on this machine, or a GPU of NVIDIA's where
            the base is not on it.
        cards_gb: for which graphics cards it is said what fits them.
        on_picture: called with (pictures read, of how many).

    Raises:
        UserError: the base is not there and of no known family, or settings do not go together.
    """
    found = base_configs(config.base.model, config.base.vae)
    here = pick_device().type
    chosen = device if device != "here" else here if found.is_here else "cuda"
    step_px = size_step_px(found.configs["unet"], found.configs["vae"])
    folders = run_data.folder_options(config)
    index = run_data.cache_folder(config) / run_data.INDEX
    pictures = pictures_of(folders, step_px, index if index.is_file() else None, on_picture)
    setting = setting_of(config, found, pictures, chosen)
    prediction = Prediction(found.name, found.configs, setting, config.base.clip_skip)
    phases = tuple(prediction.phases())
    notices = [one for one in (found.notice, *pictures.notices) if one]
    result = None
    if measured:
        why_not = _why_not_measured(found, chosen, here, phases)
        if why_not:
            notices.append(f"Nothing was measured: {why_not}.")
        else:
            result = _measured(config, setting)
    if config.memory.compile:
        notices.append("What torch.compile changes cannot be said beforehand.")
    if len({chosen, here}) == 1 and chosen == "cpu":
        notices.append(
            "On the CPU several pictures are encoded at once, as far as half of the free memory "
            "reaches."
        )
    return Plan(
        base=found.name,
        device=chosen,
        size_px=setting.size_px,
        batch_size=setting.batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        steps=config.train.steps,
        pictures=pictures.count,
        epoch=pictures.epoch,
        layers=len(setting.plans),
        parameters=prediction.parameters,
        phases=phases,
        measured=result,
        adapter_bytes=_file_bytes(config, setting),
        checkpoint_bytes=prediction.parameters * 4 + prediction.states + prediction.average,
        checkpoints=config.output.keep_checkpoints,
        encoded_bytes=pictures.encoded_px // _pixels_of_latent(found) * BYTES_OF_LATENTS,
        cards=tuple(_cards(config, found, pictures, cards_gb, chosen, setting, phases)),
        notices=tuple(notices),
    )


def setting_of(config: Config, base: BaseConfigs, pictures: Pictures, device: str) -> Setting:
    """What the memory of a run depends on.

    Args:
        device: 'cuda', 'cpu' or 'mps', here or elsewhere.

    Raises:
        ConfigError: no layer is chosen, or ranks are too large.
    """
    train, memory, sample = config.train, config.memory, config.sample
    shaped = shaped_base(base.name, base.configs, config.base.clip_skip)
    adapted = shaped.components if config.adapter.text_encoder else {"unet": shaped.unet}
    shapes = layer_names.layer_shapes(adapted)
    for name in unread_layers(shapes, config.base.clip_skip):
        del shapes[name]
    plans = layer_choice.choose_layers(shapes, **config.adapter.layer_choice())
    learns_text = any(plan.name.startswith("text_encoder") for plan in plans)
    step_px = shaped.size_step_px
    side_px = max(max(config.data.resolution_px) // step_px, 1) * step_px
    prompts = len(sample.prompts) + _prompts_in(sample.prompt_file)
    drawn = max(
        prompts, max((one.class_pictures for one in run_data.folder_options(config)), default=0)
    )
    step_pictures = train.batch_size * train.gradient_accumulation
    return Setting(
        size_px=pictures.size_px,
        batch_size=train.batch_size,
        adds_up=train.gradient_accumulation > 1 or (pictures.sizes > 1 and step_pictures > 1),
        plans=tuple(plans),
        options=LayerOptions(**config.adapter.layer_options()),
        optimizer=config.optimizer.name,
        dtype=_dtype(config.base.dtype, device),
        base_weights=memory.base_weights,
        adapter_dtype=getattr(torch, memory.adapter_dtype),
        autocast=_autocast(train.mixed_precision, device),
        like_cuda=device == "cuda",
        gradient_checkpointing=memory.gradient_checkpointing,
        text="trained" if learns_text else "frozen" if pictures.texts_vary else "cached",
        max_tokens=config.data.max_tokens,
        ema=train.ema_decay > 0,
        keeps_idle_parts=memory.idle_parts == "keep",
        slices_vae=memory.vae_slicing,
        validates=pictures.has_validation,
        sample_px=(side_px, side_px) if drawn else None,
        samples=drawn,
        draws_grid=bool(prompts and sample.scales),
    )


def _prompts_in(file: str | None) -> int:
    """How many prompts a file holds; 0 where it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError, TypeError):
        lines = Path(file or "").read_text(encoding="utf-8").splitlines()
        return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)
    return 0


def _dtype(name: str, device: str) -> torch.dtype:
    """As `pick_dtype`, also for a GPU that is elsewhere, which is taken for one with bfloat16."""
    if name == "auto" and device == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return pick_dtype(name, torch.device(device))


def _autocast(asked: str, device: str) -> torch.dtype | None:
    """As `preparation` decides of the mixed precision, also for a GPU that is elsewhere."""
    from lora_sd.preparation import arithmetic_precision

    if asked == "auto" and device == "cuda" and not torch.cuda.is_available():
        asked = "bf16"
    said = arithmetic_precision(asked)
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(said)


def _why_not_measured(base: BaseConfigs, device: str, here: str, phases: tuple[Phase, ...]) -> str:
    """Why no step can be tried, as the end of a sentence; '' when it can."""
    if not base.is_here:
        return f"the weights of '{base.name}' are not on this machine"
    if device != here:
        return f"the plan is for {device}, and this machine has none"
    if device not in ("cuda", "cpu"):
        return f"the highest memory of {device} cannot be read"
    free = psutil.virtual_memory().available
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    need = max(phase.total for phase in phases)
    if need > ROOM * free:
        return f"it would take {shown_size(need)}, and {shown_size(free)} are free"
    return ""


def _measured(config: Config, setting: Setting) -> Measured:
    """A few real steps with the real base."""
    from lora_sd.preparation import make_accelerator

    accelerator = make_accelerator(config)
    base = load_base_model(device=accelerator.device, dtype=setting.dtype, **config.base.options())
    chosen = config.memory.model_dump(exclude={"gradient_checkpointing", "on_out_of_memory"})
    return measure(
        base, accelerator, setting, options=config.optimizer.options, memory_options=chosen
    )


def _file_bytes(config: Config, setting: Setting) -> int:
    """The size of the result's file, but for its header."""
    planned = layer_choice.planned_adapter(setting.plans, setting.options)
    numbers = sum(layer.size for layer in planned.layers.values())
    return numbers * int(getattr(torch, config.output.dtype).itemsize)


def _pixels_of_latent(base: BaseConfigs) -> int:
    return int(4 ** (len(base.configs["vae"]["block_out_channels"]) - 1))


def _cards(
    config: Config,
    base: BaseConfigs,
    pictures: Pictures,
    cards_gb: tuple[float, ...],
    device: str,
    setting: Setting,
    phases: tuple[Phase, ...],
) -> Iterator[Card]:
    """How the run fits graphics cards, whatever it was planned for."""
    on_card = setting if device == "cuda" else setting_of(config, base, pictures, "cuda")

    def predict(one: Setting) -> Iterator[Phase]:
        if one == setting:
            yield from phases
        else:
            yield from Prediction(base.name, base.configs, one, config.base.clip_skip).phases()

    tile_px = int(base.configs["vae"].get("sample_size", 0))
    passes = config.train.gradient_accumulation
    yield from fit_cards(on_card, passes, predict, tile_px, cards_gb)
