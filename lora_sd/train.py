"""The training loop, one function read top to bottom."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor

from lora_sd import adapter_metadata, checkpoint, clients, inject, layer_choice, layer_names, loss
from lora_sd.base_model import BaseModel, load_base_model, pick_dtype
from lora_sd.config import Config
from lora_sd.data.cache import Cache, encode
from lora_sd.data.folder import read_folder
from lora_sd.errors import EXIT_RESUMABLE, ConfigError, Problems, RunError
from lora_sd.formats import fitting_format, load_adapter, save_adapter
from lora_sd.generate import (
    Cancelled,
    OnStep,
    PictureSettings,
    draw_grid,
    generate,
    generate_at_scales,
    save_picture,
    write_png,
)
from lora_sd.layers import LayerOptions, LoRALayer
from lora_sd.merge import MergedWeights
from lora_sd.parts import TEXT_ENCODERS, component_of
from lora_sd.randomness import generator, picture_at, seed_at
from lora_sd.run_folder import RunFolder, create_run
from lora_sd.run_record import RunRecord, StopRequest
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
        kwargs_handlers=[  # a layer that is left out has no gradient
            DistributedDataParallelKwargs(find_unused_parameters=config.adapter.module_dropout > 0)
        ],
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    world, rank = accelerator.num_processes, accelerator.process_index
    step_pictures = options.batch_size * options.gradient_accumulation * world
    stop = StopRequest()

    # --- pictures, base model, layers: what can be wrong is found before a folder is made ---
    problems = Problems()
    resolution = config.data.resolution_px
    layer_options = LayerOptions(**config.adapter.layer_options())
    with problems.gathered():
        folder = read_folder(
            Path(config.data.folder), resolution, config.data.caption, config.data.trigger_word
        )
    with problems.gathered():
        base = load_base_model(config.base.model, device, pick_dtype(config.base.dtype, device))
        with problems.gathered():
            base.check_size(resolution)
        adapted = base.components if config.adapter.text_encoder else {"unet": base.unet}
        plans = layer_choice.choose_layers(
            layer_names.layer_shapes(adapted), **config.adapter.layer_choice()
        )
        planned = layer_choice.planned_adapter(plans, layer_options)
        file_format, format_notices = fitting_format(planned, config.output.format)
        if config.output.format not in ("auto", file_format):
            raise ConfigError(f"'output.format': {' '.join(format_notices)}")
    problems.tell()
    identity = checkpoint.Identity(config.model_dump(), folder.fingerprint, base.fingerprint())
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

        # --- where an interrupted run stood ---
        step = 0
        if resumed is not None:
            step = _restore(run, identity, layers, optimizer, lr_schedule, accelerator)
            wants_grid = bool(config.sample.prompts and config.sample.scales)
            has_result = run.adapter_file.is_file() and (run.grid_file.is_file() or not wants_grid)
            if step >= options.steps and has_result:
                log.info("'%s' is complete already.", run.path)
                return 0

        def beat(*_: int) -> bool:
            """For long work: a sign of life, and whether to stop."""
            record.beat()
            return stop.requested

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
        log.info("Adapted layers (preset '%s'):", config.adapter.preset)
        bytes_per_weight = getattr(torch, config.output.dtype).itemsize
        log.info("%s", layer_choice.describe(plans, layer_options, bytes_per_weight))
        record.state("starting", "encoding the pictures", step)
        cache, notices = encode(base, folder.examples, beat, as_tokens=trains_text)
        told = list(format_notices)
        if file_format == "kohya":  # diffusers' is for diffusers alone
            told += clients.ignored_layers(planned, base.family, file_format)
        for notice in [*told, *folder.notices, *notices]:
            log.warning("Note: %s", notice)
        noise_schedule = base.noise_schedule()
        if options.gradient_checkpointing:
            base.enable_gradient_checkpointing()
        unet, text_encoder = base.unet, base.text_encoder
        if world > 1:
            unet = accelerator.prepare_model(unet)
            text_encoder = accelerator.prepare_model(text_encoder) if trains_text else text_encoder
        drops = layer_options.dropout or layer_options.rank_dropout or layer_options.module_dropout
        optimizer = accelerator.prepare_optimizer(optimizer)
        log.info(
            "%d pictures, %d steps of %d: each is seen about %s (%s, mixed precision %s).",
            len(cache),
            options.steps,
            step_pictures,
            _times(options.steps * step_pictures / len(cache)),
            device,
            accelerator.mixed_precision,
        )
        samples = _sample_settings(config, run.name)
        sample_every = config.sample.every_steps if samples else 0
        if sample_every and step == 0:
            with record.during("sampling", "drawing the base's pictures"):
                _draw_samples(base, run, 0, samples, accelerator, beat)

        # --- the loop ---
        started = time.monotonic()
        record.training_from(step)
        while step < options.steps and not stop.requested:
            base.unet.train()
            base.text_encoder.train(trains_text)
            mean_loss = torch.zeros((), device=device)
            for micro_step in range(options.gradient_accumulation):
                first_slot = (micro_step * world + rank) * options.batch_size
                slots = range(first_slot, first_slot + options.batch_size)
                batch = _batch(cache, noise_schedule, config, step, step_pictures, slots)
                latents, noise, timesteps, captions = (part.to(device) for part in batch)
                noisy = loss.add_noise(noise_schedule, latents, noise, timesteps)
                target = loss.prediction_target(noise_schedule, latents, noise, timesteps)
                if drops:
                    torch.manual_seed(seed_at(options.seed, "dropout", step, first_slot))
                is_last = micro_step == options.gradient_accumulation - 1
                with contextlib.ExitStack() as stack:
                    if not is_last:
                        stack.enter_context(accelerator.no_sync(unet))
                        stack.enter_context(accelerator.no_sync(text_encoder))
                    with accelerator.autocast():
                        if trains_text:
                            captions = text_encoder(captions)[0]
                        dtype = base.unet.dtype
                        predicted = unet(noisy.to(dtype), timesteps, captions.to(dtype)).sample
                    batch_loss = loss.squared_error(predicted, target).mean()
                    accelerator.backward(batch_loss / options.gradient_accumulation)
                mean_loss += batch_loss.detach() / options.gradient_accumulation
            loss_value = float(accelerator.reduce(mean_loss, "mean"))
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
            record.step(step, loss_value, lr, grad_norm, step_pictures)

            # --- now and then: a checkpoint, sample pictures ---
            if step % config.output.save_every_steps == 0 or step == options.steps:
                save()
            if sample_every and (step % sample_every == 0 or step == options.steps):
                with record.during("sampling", f"drawing samples of step {step}"):
                    _draw_samples(base, run, step, samples, accelerator, beat)

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
            seen = [example.caption for example in folder.examples]
            verified = _save_result(config, base, run, step, seen, file_format, told)
            if samples and config.sample.scales:
                record.state("sampling", "drawing the grid of scales")
                inject.detach(base.components)
                _draw_grid(base, run, config.sample.scales, samples, beat)
        accelerator.wait_for_everyone()
        log.info("Finished after %.0f s.", time.monotonic() - started)
        record.state("finished", verified, step)
        return 0


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


def _batch(
    cache: Cache,
    noise_schedule: DDPMScheduler,
    config: Config,
    step: int,
    step_pictures: int,
    slots: range,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(latents, noise, timesteps, captions) of one pass, on the CPU.

    What a slot of a step holds depends on the seed, the step and the slot's number alone: neither
    the number of processes nor accumulation changes what is seen.
    """
    seed, shape = config.train.seed, cache.mean.shape[1:]
    latents, noises, timesteps, captions = [], [], [], []
    for slot in slots:
        index = picture_at(step * step_pictures + slot, len(cache), seed)
        draw = generator(seed, "picture", step, slot)
        latents.append(cache.latents(index, torch.randn(shape, generator=draw)))
        noises.append(torch.randn(shape, generator=draw))
        timesteps.append(loss.random_timestep(noise_schedule, draw))
        dropped = float(torch.rand((), generator=draw)) < config.train.caption_dropout
        captions.append(cache.empty if dropped else cache.captions[index])
    return torch.stack(latents), torch.stack(noises), torch.tensor(timesteps), torch.stack(captions)


def _times(number: float) -> str:
    return "once" if round(number) == 1 else f"{number:.0f} times"


def _sample_settings(config: Config, adapter_name: str) -> list[PictureSettings]:
    sample = config.sample
    return [
        PictureSettings(
            prompt=prompt,
            negative_prompt=sample.negative_prompt,
            seed=sample.seed + number,
            steps=sample.steps,
            guidance=sample.guidance,
            width_px=config.data.resolution_px,
            height_px=config.data.resolution_px,
            adapter=adapter_name,
        )
        for number, prompt in enumerate(sample.prompts)
    ]


def _draw_samples(
    base: BaseModel,
    run: RunFolder,
    step: int,
    settings: list[PictureSettings],
    accelerator: Accelerator,
    on_step: OnStep,
) -> None:
    """Draw the sample pictures; a failure is logged, and training goes on."""
    if accelerator.is_main_process:
        base.eval()
        with _pictures_may_fail(f"The samples of step {step}"), accelerator.autocast():
            pictures = generate(base, settings, on_step)
            for index, (picture, one) in enumerate(zip(pictures, settings, strict=True)):
                save_picture(picture, run.sample_file(step, index), one)
    accelerator.wait_for_everyone()


def _draw_grid(
    base: BaseModel,
    run: RunFolder,
    scales: Sequence[float],
    settings: list[PictureSettings],
    on_step: OnStep,
) -> None:
    """Draw every prompt at every scale from the adapter's file, as a user of it would."""
    base.eval()
    with _pictures_may_fail("The grid"):
        adapter = load_adapter(run.adapter_file, layer_names.layer_shapes(base.components))
        merged = MergedWeights(base.components)
        rows = generate_at_scales(base, merged, adapter, scales, settings, on_step)
        labels = [f"scale {scale:g}" for scale in scales]
        write_png(draw_grid(rows, [one.prompt for one in settings], labels), run.grid_file)
        log.info("Grid: %s", run.grid_file)


@contextlib.contextmanager
def _pictures_may_fail(what: str) -> Iterator[None]:
    """Pictures are not worth a run: their failure is logged, and the run goes on."""
    try:
        yield
    except Cancelled:
        log.info("%s: not drawn, since the run is to stop.", what)
    except Exception:
        log.warning("%s could not be drawn.", what, exc_info=True)


def _save_result(
    config: Config,
    base: BaseModel,
    run: RunFolder,
    step: int,
    captions: Sequence[str],
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
        **adapter_metadata.describe_data(captions, config.data.resolution_px),
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
