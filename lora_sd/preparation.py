"""All that can be wrong with a run is found here, before its folder is made."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)

from lora_sd import (
    adapter_metadata,
    clients,
    inject,
    layer_choice,
    layer_names,
    memory,
    prediction_type,
    run_data,
)
from lora_sd.adapter import Adapter
from lora_sd.base_loading import load_base_model, pick_dtype
from lora_sd.base_model import BaseModel
from lora_sd.config import Config
from lora_sd.data.picture_set import LeftOut, PictureSet
from lora_sd.data.training_data import TrainingData
from lora_sd.data.views import View, check_resolutions, make_views
from lora_sd.errors import ConfigError, Problems
from lora_sd.formats import fitting_format
from lora_sd.layers import LayerOptions, LoRALayer
from lora_sd.learner import Learner
from lora_sd.objective import Objective
from lora_sd.optimizers.schedules import warmup_note
from lora_sd.parts import TEXT_ENCODERS, component_of, unread_layers
from lora_sd.run_folder import RunFolder
from lora_sd.sample_prompts import SamplePrompts
from lora_sd.samples import shared_settings
from lora_sd.stop_request import StopRequest
from lora_sd.trackers import check_trackers
from lora_sd.train_step import TrainStep
from lora_sd.validation import BestFile, Validation, check_validation

log = logging.getLogger("lora_sd")


@dataclass
class Prepared:
    """What a run starts with.

    Attributes:
        layers: the attached layers, by full name.
        planned: the adapter as it will be, without weights.
        file_format: the format of the result.
        notices: sentences for the log.
        wants_grid: whether the grid of scales is drawn at the end.
        step_pictures: pictures in a step, of all processes and passes together.
    """

    base: BaseModel
    pictures: PictureSet
    views: list[View]
    too_small: list[LeftOut]
    objective: Objective
    prompts: SamplePrompts
    layers: dict[str, LoRALayer]
    learner: Learner
    plans: list[layer_choice.LayerPlan]
    options: LayerOptions
    planned: Adapter
    file_format: str
    notices: list[str]
    wants_grid: bool
    step_pictures: int

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder learns."""
        return any(component_of(name) in TEXT_ENCODERS for name in self.layers)

    def read_again(self, config: Config, stop: StopRequest) -> None:
        """Read the pictures once more, as the base has drawn some of them meanwhile."""
        self.pictures = run_data.read_pictures(config, stop)
        bad = config.data.bad_pictures
        self.views, self.too_small = make_views(self.pictures, self.base.size_step_px, bad)

    def describe(self, config: Config, run: RunFolder) -> None:
        """Say in the log what is trained."""
        log.info("Run folder: %s", run.path)
        log.info("%s", run_data.describe_base(self.base))
        log.info("Adapted layers (preset '%s'):", config.adapter.preset)
        bytes_per_weight = getattr(torch, config.output.dtype).itemsize
        log.info("%s", layer_choice.describe(self.plans, self.options, bytes_per_weight))
        if self.file_format == "kohya":  # diffusers' is for diffusers alone
            self.notices += clients.ignored_layers(self.planned, self.base.family, self.file_format)

    def describe_data(self, data: TrainingData, steps: int) -> None:
        """Say in the log what is seen, and all that is worth a note."""
        self.notices += self.pictures.notices + run_data.smaller_note(data.shown)
        for notice in self.notices:
            log.warning("Note: %s", notice)
        for line in run_data.describe(
            self.pictures, data, self.too_small, steps, self.step_pictures
        ):
            log.info("%s", line)


def make_accelerator(config: Config) -> Accelerator:
    """Where to compute.

    Raises:
        ConfigError: accelerate was told to cut the model into pieces.
    """
    accelerator = Accelerator(
        mixed_precision=arithmetic_precision(config.train.mixed_precision),
        kwargs_handlers=[
            # A layer that is left out has no gradient.
            DistributedDataParallelKwargs(find_unused_parameters=config.adapter.module_dropout > 0),
            # The others wait while one process draws, encodes or saves.
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
        ],
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate is set up for {kind.value}, which cuts a model into pieces that fit no "
            f"single GPU. Stable Diffusion fits whole, and only the small adapter learns: choose "
            f"multi-GPU with `accelerate config`, and memory.base_weights for small cards."
        )
    return accelerator


def prepare(config: Config, accelerator: Accelerator, stop: StopRequest, is_new: bool) -> Prepared:
    """Read pictures and base model, check both, choose and attach the layers.

    Args:
        is_new: whether the run starts; one that goes on need not be checked again in full.

    Raises:
        UserError: settings, data or model cannot be used; all that is wrong, at once.
    """
    device, options = accelerator.device, config.train
    problems = Problems()
    layer_options = LayerOptions(**config.adapter.layer_options())
    bad, max_tokens = config.data.bad_pictures, config.data.max_tokens
    pictures, told = None, []
    with problems.gathered():
        pictures = run_data.read_pictures(config, stop, undrawn_too=False)
    with problems.gathered():
        base = load_base_model(
            device=device, dtype=pick_dtype(config.base.dtype, device), **config.base.options()
        )
        with problems.gathered():
            if pictures is not None:
                check_resolutions(run_data.folder_options(config), base.size_step_px)
                views, too_small = make_views(pictures, base.size_step_px, bad)
                if is_new or not base.prediction_type_is_known:
                    told = prediction_type.check(base, *run_data.probe(base, views, max_tokens))
        with problems.gathered():
            objective = Objective(base.noise_schedule(), **config.objective.model_dump())
        with problems.gathered():
            prompts = _sample_prompts(config, base)
        adapted = base.components if config.adapter.text_encoder else {"unet": base.unet}
        shapes = layer_names.layer_shapes(adapted)
        for name in unread_layers(shapes, base.clip_skip):
            del shapes[name]
        plans = layer_choice.choose_layers(shapes, **config.adapter.layer_choice())
        planned = layer_choice.planned_adapter(plans, layer_options)
        file_format, format_notices = fitting_format(planned, config.output.format)
        if config.output.format not in ("auto", file_format):
            raise ConfigError(f"'output.format': {' '.join(format_notices)}")
    with problems.gathered():
        if pictures is not None:
            kinds = {folder.kind for folder in run_data.folder_options(config)}
            check_validation("validation" in kinds, options.keep_best, options.patience)
    with problems.gathered():
        check_trackers(config.output.tensorboard, config.output.wandb)
    with problems.gathered():
        memory.check(
            device,
            accelerator.mixed_precision,
            base_weights=config.memory.base_weights,
            adapter_dtype=config.memory.adapter_dtype,
            dora=config.adapter.dora,
            compile=config.memory.compile,
            module_dropout=config.adapter.module_dropout,
        )
    problems.tell()
    assert pictures is not None
    layers = inject.attach(base.components, plans, layer_options, options.seed)
    told += memory.apply(base, layers, **config.memory.applied())
    optimizer = config.optimizer
    learner = Learner(
        layers,
        accelerator,
        options.steps,
        optimizer=optimizer.name,
        options=optimizer.options,
        groups={
            "learning_rate": optimizer.learning_rate,
            "conv_learning_rate": optimizer.conv_learning_rate,
            "text_encoder_rates": optimizer.text_encoder_rates(),
            "block_learning_rates": optimizer.block_learning_rates,
            "lora_plus_ratio": optimizer.lora_plus_ratio,
            "weight_decay": optimizer.weight_decay,
        },
        schedule=optimizer.schedule_options(),
        max_grad_norm=optimizer.max_grad_norm,
        max_weight_norm=optimizer.max_weight_norm,
        ema_decay=options.ema_decay,
    )
    if config.memory.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    if note := warmup_note(options.steps, optimizer.warmup_steps):
        told.append(note)
    return Prepared(
        base, pictures, views, too_small, objective, prompts, layers, learner, plans,
        layer_options, planned, file_format, [*told, *format_notices],
        bool(prompts and config.sample.scales),
        options.batch_size * options.gradient_accumulation * accelerator.num_processes,
    )  # fmt: skip


def make_data(config: Config, ready: Prepared) -> TrainingData:
    """What each step sees."""
    return TrainingData(
        ready.base,
        ready.views,
        run_data.open_store(config),
        ready.objective,
        seed=config.train.seed,
        step_pictures=ready.step_pictures,
        max_tokens=config.data.max_tokens,
        learns_text=ready.trains_text,
    )


def make_worker(
    config: Config, ready: Prepared, data: TrainingData, accelerator: Accelerator
) -> TrainStep:
    """What works through a step."""
    return TrainStep(
        ready.base,
        ready.objective,
        data,
        accelerator,
        ready.base.unet,
        ready.base.text_encoders,
        config.train.batch_size,
        config.data.max_tokens,
        config.train.seed,
        ready.trains_text,
    )


def make_validation(
    config: Config,
    ready: Prepared,
    data: TrainingData,
    accelerator: Accelerator,
    run: RunFolder,
    beat: Callable[[], object],
) -> Validation:
    """What measures on held-out pictures."""
    held_out = {view.picture.name for view in data.held_out}
    own = [item for item in ready.pictures.fingerprints().items() if item[0] in held_out]
    best = BestFile(
        run.best_file,
        getattr(torch, config.output.dtype),
        ready.file_format,
        lambda: adapter_metadata.describe_run(config, ready.base, run.name),
    )
    return Validation(
        ready.base,
        data,
        config.data.max_tokens,
        accelerator,
        batch_size=config.train.batch_size,
        best=best if config.train.keep_best else None,
        patience=config.train.patience,
        about=_joined(own, ready.base.fingerprint(), settled(config, accelerator)),
        beat=beat,
    )


def _joined(own: Sequence[tuple[str, str]], base: str, settings: dict[str, Any]) -> str:
    """Changes with all that the base's validation loss depends on."""
    precision = settings["train"]["mixed_precision"], settings["base"]["dtype"]
    bits, most = settings["memory"]["base_weights"], settings["data"]["max_tokens"]
    facts = [own, base, precision, bits, most]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def settled(config: Config, accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    """The settings, with what 'auto' came to: another launcher or machine may decide it anew."""
    found = config.model_dump()
    found["train"]["mixed_precision"] = accelerator.mixed_precision
    dtype = pick_dtype(config.base.dtype, accelerator.device)
    found["base"]["dtype"] = str(dtype).removeprefix("torch.")
    return found


def _sample_prompts(config: Config, base: BaseModel) -> SamplePrompts:
    sample = config.sample
    shared = shared_settings(
        base,
        max(config.data.resolution_px),
        negative_prompt=sample.negative_prompt,
        seed=sample.seed,
        steps=sample.steps,
        guidance=sample.guidance,
    )
    file = Path(sample.prompt_file) if sample.prompt_file else None
    return SamplePrompts(sample.prompts, file, shared, base.size_step_px)


def arithmetic_precision(asked: str) -> str:
    """The mixed precision; for 'auto' what `accelerate launch` was told, else by the GPU."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "auto":
        return asked
    if told != "no" or not torch.cuda.is_available():
        return told
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
