"""The training loop, one function read top to bottom."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor

from lora_sd import (
    adapter_metadata,
    checkpoint,
    clients,
    inject,
    layer_choice,
    layer_names,
    loss,
    prediction_type,
    run_data,
)
from lora_sd.base_model import BaseModel, load_base_model, pick_dtype
from lora_sd.config import Config
from lora_sd.data.training_data import Batch, TrainingData
from lora_sd.data.views import check_resolutions, make_views
from lora_sd.errors import EXIT_RESUMABLE, ConfigError, Problems, RunError
from lora_sd.formats import fitting_format, load_adapter, save_adapter
from lora_sd.layers import LayerOptions, LoRALayer
from lora_sd.parts import TEXT_ENCODERS, component_of, unread_layers
from lora_sd.randomness import seed_at
from lora_sd.run_folder import RunFolder, create_run
from lora_sd.run_record import RunRecord, StopRequest
from lora_sd.samples import draw_samples, draw_scale_grid, sample_settings
from lora_sd.verify import check_file

log = logging.getLogger("lora_sd")


def train(config: Config, default_name: str, resumed: RunFolder | None = None) -> int:
    """Train one adapter into a run folder.

    Args:
        default_name: the run folder's name where the settings give none.
        resumed: the run to go on with; its settings are `config`.

    Returns:
        0 when the run is finished, 75 when it was stopped and can go on.

    Raises:
        UserError: settings, data or model cannot be used; no run folder has been made then.
    """
    # --- where to compute ---
    options = config.train
    accelerator = Accelerator(
        mixed_precision=_precision(options.mixed_precision),
        kwargs_handlers=[
            # A layer that is left out has no gradient.
            DistributedDataParallelKwargs(find_unused_parameters=config.adapter.module_dropout > 0),
            # The others wait while one process draws, encodes or saves.
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
        ],
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    world, rank = accelerator.num_processes, accelerator.process_index
    step_pictures = options.batch_size * options.gradient_accumulation * world
    stop = StopRequest()

    # --- pictures, base model, layers: what can be wrong is found before a folder is made ---
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
                if resumed is None or not base.prediction_type_is_known:
                    told = prediction_type.check(base, *run_data.probe(base, views, max_tokens))
        adapted = base.components if config.adapter.text_encoder else {"unet": base.unet}
        shapes = layer_names.layer_shapes(adapted)
        for name in unread_layers(shapes, base.clip_skip):
            del shapes[name]
        plans = layer_choice.choose_layers(shapes, **config.adapter.layer_choice())
        planned = layer_choice.planned_adapter(plans, layer_options)
        file_format, format_notices = fitting_format(planned, config.output.format)
        if config.output.format not in ("auto", file_format):
            raise ConfigError(f"'output.format': {' '.join(format_notices)}")
    problems.tell()
    layers = inject.attach(base.components, plans, layer_options, options.seed)
    trains_text = any(component_of(name) in TEXT_ENCODERS for name in layers)
    run = resumed or _new_run(config, default_name, accelerator)

    with RunRecord(run, options.steps, is_main) as record:
        # --- the optimizer ---
        groups = _parameter_groups(layers, config)
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
        lr_schedule = get_scheduler(
            {"constant": "constant_with_warmup"}.get(options.schedule, options.schedule),
            optimizer,
            num_warmup_steps=options.warmup_steps,
            num_training_steps=options.steps,
        )

        def beat(*_: int) -> bool:
            """For long work: a sign of life, and whether to stop."""
            record.beat()
            return stop.requested

        def is_to_stop() -> bool:
            """Whether any of the processes was asked to: all leave the loop at the same step."""
            if world == 1:
                return stop.requested
            return float(accelerator.reduce(torch.tensor(float(stop.requested)).to(device))) > 0

        # --- class pictures that the base has yet to draw, where a folder wants some ---
        if run_data.wants_class_pictures(config):
            with record.during("starting", "drawing class pictures"):
                if is_main:
                    told += run_data.draw_class_pictures(base, config, beat)
            if is_to_stop():
                record.state("stopped", "stopped before the first step", 0)
                return EXIT_RESUMABLE
            pictures = run_data.read_pictures(config, stop)
            views, too_small = make_views(pictures, base.size_step_px, bad)
        identity = checkpoint.Identity(
            config.model_dump(), pictures.fingerprint, base.fingerprint()
        )

        # --- where an interrupted run stood ---
        step = 0
        if resumed is not None:
            step = _restore(run, identity, layers, optimizer, lr_schedule, accelerator)
            wants_grid = bool(config.sample.prompts and config.sample.scales)
            has_result = run.adapter_file.is_file() and (run.grid_file.is_file() or not wants_grid)
            if step >= options.steps and has_result:
                log.info("'%s' is complete already.", run.path)
                return 0

        def save() -> None:
            with record.during("saving", f"saving step {step}"):
                if is_main:
                    state = {
                        "optimizer": optimizer.state_dict(),
                        "schedule": lr_schedule.state_dict(),
                    }
                    if accelerator.scaler is not None:
                        state["scaler"] = accelerator.scaler.state_dict()
                    adapter = inject.collect(base.components, exact=True)
                    adapter.metadata = adapter_metadata.describe_run(config, base, run.name)
                    keep = config.output.keep_checkpoints
                    checkpoint.save(run, step, adapter, state, identity, keep)
                accelerator.wait_for_everyone()

        # --- what stays the same while training: latents, text embeddings, the noise schedule ---
        log.info("Run folder: %s", run.path)
        log.info("%s", run_data.describe_base(base))
        log.info("Adapted layers (preset '%s'):", config.adapter.preset)
        bytes_per_weight = getattr(torch, config.output.dtype).itemsize
        log.info("%s", layer_choice.describe(plans, layer_options, bytes_per_weight))
        told += format_notices
        if file_format == "kohya":  # diffusers' is for diffusers alone
            told += clients.ignored_layers(planned, base.family, file_format)
        noise_schedule = base.noise_schedule()
        data = TrainingData(
            base,
            views,
            run_data.open_store(config),
            noise_schedule,
            seed=options.seed,
            step_pictures=step_pictures,
            max_tokens=max_tokens,
            learns_text=trains_text,
        )
        record.state("starting", "encoding the pictures", step)
        with accelerator.main_process_first():
            told += run_data.encode(data, record, stop, is_main)
        told += pictures.notices + run_data.smaller_note(data.shown)
        data.release()
        for notice in told:
            log.warning("Note: %s", notice)
        for line in run_data.describe(pictures, data, too_small, options.steps, step_pictures):
            log.info("%s", line)
        if options.gradient_checkpointing:
            base.enable_gradient_checkpointing()
        unet, encoders = base.unet, base.text_encoders
        if world > 1:
            unet = accelerator.prepare_model(unet) if _learns(unet) else unet
            if trains_text:
                encoders = [
                    accelerator.prepare_model(one) if _learns(one) else one for one in encoders
                ]
        drops = layer_options.dropout or layer_options.rank_dropout or layer_options.module_dropout
        optimizer = accelerator.prepare_optimizer(optimizer)
        samples = sample_settings(config, base, run.name)
        sample_every = config.sample.every_steps if samples else 0
        stopping = is_to_stop()
        if sample_every and step == 0 and not stopping:
            with record.during("sampling", "drawing the base's pictures"):
                draw_samples(base, run, 0, samples, accelerator, beat)
            data.release()
        if data.held_out and step == 0 and not stopping:
            first = _validation_loss(base, noise_schedule, data, max_tokens, accelerator)
            log.info("Validation loss of the base: %.4f", first)

        # --- the loop ---
        started = time.monotonic()
        record.training_from(step)
        while step < options.steps and not is_to_stop():
            base.unet.train()
            for encoder in base.text_encoders:
                encoder.train(trains_text)
            step_loss = torch.zeros((), device=device)
            batches = data.batches(step, options.batch_size, world, rank)
            for number, batch in enumerate(batches):
                batch = batch.to(device)
                if drops:
                    torch.manual_seed(seed_at(options.seed, "dropout", step, number, rank))
                with contextlib.ExitStack() as stack:
                    if number < len(batches) - 1:
                        for model in (unet, *encoders):
                            stack.enter_context(accelerator.no_sync(model))
                    with accelerator.autocast():
                        errors = _errors(base, noise_schedule, batch, max_tokens, unet, encoders)
                    batch_loss = (errors * batch.weights).sum()
                    # Processes' gradients are averaged, and here they are parts of a sum.
                    accelerator.backward(batch_loss * world)
                step_loss += batch_loss.detach()
            loss_value = float(accelerator.reduce(step_loss, "sum"))
            grad_norm = float(accelerator.clip_grad_norm_(parameters, options.max_grad_norm))
            gradient_is_bad = accelerator.scaler is None and not math.isfinite(grad_norm)
            if not math.isfinite(loss_value) or gradient_is_bad:
                raise RunError(
                    f"The loss became {loss_value}, its gradient {grad_norm}, at step {step + 1}, "
                    f"and the run stopped. Lower train.learning_rate, or set train.mixed_precision "
                    f"to bf16 or no. What was saved before is whole."
                )
            lr = lr_schedule.get_last_lr()[0]
            optimizer.step()
            lr_schedule.step()
            optimizer.zero_grad()
            step += 1
            more = {}
            if data.held_out and _is_due(step, options.validate_every_steps, options.steps):
                more["validation_loss"] = _validation_loss(
                    base, noise_schedule, data, max_tokens, accelerator
                )
            record.step(step, loss_value, lr, grad_norm, step_pictures, more)

            # --- now and then: a checkpoint, sample pictures ---
            if _is_due(step, config.output.save_every_steps, options.steps):
                save()
            if sample_every and _is_due(step, sample_every, options.steps):
                with record.during("sampling", f"drawing samples of step {step}"):
                    draw_samples(base, run, step, samples, accelerator, beat)
                data.release()

        # --- stopped on request: everything is saved ---
        if step < options.steps:
            save()
            record.state("stopped", f"stopped at step {step} of {options.steps}, saved", step)
            log.info("Stopped at step %d of %d; everything is saved.", step, options.steps)
            log.info("Go on with: %s --resume %s", _command(), run.path)
            return EXIT_RESUMABLE

        # --- the result ---
        verified = ""
        if is_main:
            record.state("saving", "writing the adapter", step)
            verified = _save_result(config, base, run, step, data, file_format, told)
            if samples and config.sample.scales:
                record.state("sampling", "drawing the grid of scales")
                inject.detach(base.components)
                draw_scale_grid(base, run, config.sample.scales, samples, beat)
        accelerator.wait_for_everyone()
        log.info("Finished after %.0f s.", time.monotonic() - started)
        record.state("finished", verified, step)
        return 0


def _learns(model: torch.nn.Module) -> bool:
    """Whether anything of a model is trained; DDP refuses one of which nothing is."""
    return any(parameter.requires_grad for parameter in model.parameters())


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is to be done now."""
    return step % every == 0 or step == last


def _errors(
    base: BaseModel,
    schedule: DDPMScheduler,
    batch: Batch,
    max_tokens: int,
    unet: torch.nn.Module | None = None,
    encoders: Sequence[torch.nn.Module] | None = None,
) -> Tensor:
    """The squared error of each picture of a batch (n), where its mask counts.

    Args:
        unet, encoders: stand in for the base's own.
    """
    text = batch.text
    if text is None:  # not encoded beforehand
        text = base.encode_tokens(base.tokens(batch.captions, max_tokens), encoders)
    noisy = loss.add_noise(schedule, batch.latents, batch.noise, batch.timesteps)
    target = loss.prediction_target(schedule, batch.latents, batch.noise, batch.timesteps)
    predicted = base.predict(noisy, batch.timesteps, text, batch.time_ids, unet)
    return loss.squared_error(predicted, target, batch.mask)


@torch.no_grad()
def _validation_loss(
    base: BaseModel,
    schedule: DDPMScheduler,
    data: TrainingData,
    max_tokens: int,
    accelerator: Accelerator,
) -> float:
    """The mean loss on the validation pictures, with noise and timesteps that stay the same."""
    base.eval()
    with accelerator.autocast():
        found = [
            float(_errors(base, schedule, batch.to(base.device), max_tokens).mean())
            for batch in data.held_out_batches()
        ]
    return sum(found) / len(found)


def _parameter_groups(layers: dict[str, LoRALayer], config: Config) -> list[dict[str, Any]]:
    """What learns: the UNet's and the text encoders' factors, each at its rate, with weight decay
    on the factors alone. Decay would pull DoRA's magnitudes away from the base's norms."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, layer in layers.items():
        is_text = component_of(name) in TEXT_ENCODERS
        rate = adapter_metadata.text_learning_rate(config) if is_text else None
        for part, parameter in layer.named_parameters():
            if parameter.requires_grad:
                decay = config.train.weight_decay if part.endswith("weight") else 0.0
                key = (rate or config.train.learning_rate, decay)
                groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def _precision(asked: str) -> str:
    """The mixed precision; for 'auto' what `accelerate launch` was told, else by the GPU."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "auto":
        return asked
    if told != "no" or not torch.cuda.is_available():
        return told
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _new_run(config: Config, default_name: str, accelerator: Accelerator) -> RunFolder:
    """Make the run's folder, in the main process, and tell the others its path."""
    path: list[Any] = [None]
    if accelerator.is_main_process:
        output = config.output
        run = create_run(Path(output.folder), output.name, default_name, config.to_yaml())
        path = [str(run.path)]
    return RunFolder(broadcast_object_list(path)[0])


def _restore(
    run: RunFolder,
    identity: checkpoint.Identity,
    layers: dict[str, LoRALayer],
    optimizer: torch.optim.Optimizer,
    lr_schedule: Any,
    accelerator: Accelerator,
) -> int:
    """Put the newest whole checkpoint of a run into place; the step it stands at."""
    if accelerator.is_main_process and (leftovers := checkpoint.clean(run)):
        log.info("Removed %d unfinished saves of a killed process.", leftovers)
    folder, rejected = checkpoint.find_newest(run, identity)
    for reason in rejected:
        log.warning("Note: %s", reason)
    step = 0
    if folder is None:
        if run.adapter_file.exists():
            raise RunError(
                f"'{run.path}' has its result but no checkpoints to go on from. It is left as it "
                f"is; start a new run."
            )
        log.info("Nothing was saved before the run stopped: it begins again.")
    else:
        shapes = {name: layer.weight.shape for name, layer in layers.items()}
        inject.load(layers, load_adapter(folder / checkpoint.ADAPTER, shapes))
        state = checkpoint.load_state(folder, accelerator.device)
        optimizer.load_state_dict(state["optimizer"])
        lr_schedule.load_state_dict(state["schedule"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        step = checkpoint.step_of(folder)
        log.info("Going on from step %d.", step)
    if accelerator.is_main_process:
        run.cut_metrics(step)
    return step


def _save_result(
    config: Config,
    base: BaseModel,
    run: RunFolder,
    step: int,
    data: TrainingData,
    file_format: str,
    told: Sequence[str],
) -> str:
    """Write the result, read it back, and say how it compares with what was trained.

    Args:
        told: what was said before the start, and need not be said again.
    """
    adapter = inject.collect(base.components)
    adapter.metadata = {
        **adapter_metadata.describe_run(config, base, run.name),
        **adapter_metadata.describe_data(data.shown),
        **adapter_metadata.describe_result(run, run.sample_file(step, 0)),
    }
    dtype = getattr(torch, config.output.dtype)
    notices = save_adapter(adapter, run.adapter_file, dtype, file_format)
    log.info("Adapter: %s", run.adapter_file)
    report = check_file(run.adapter_file, base.family, adapter, base)
    for notice in notices:
        if notice not in told:
            log.warning("Note: %s", notice)
    log.info("Read back: %s", report.summary())
    for line in report.lines():
        if line not in told:
            log.info("  %s", line)
    return report.summary()


def _command() -> str:
    """The command a user types to start the trainer the way it was started now."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    return f"{'accelerate launch --quiet' if launched else 'python'} train_sd_lora.py"
