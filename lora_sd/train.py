"""The training loop, one function read top to bottom."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor

from lora_sd import __version__, checkpoint, inject, loss
from lora_sd.adapter import Adapter
from lora_sd.base_model import BaseModel, load_base_model, pick_dtype
from lora_sd.config import Config
from lora_sd.data.cache import Cache, encode
from lora_sd.data.folder import read_folder
from lora_sd.errors import EXIT_RESUMABLE, Problems, RunError
from lora_sd.formats import load_adapter, save_adapter
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
from lora_sd.merge import MergedWeights
from lora_sd.randomness import generator, picture_at
from lora_sd.run_folder import RunFolder, create_run
from lora_sd.run_record import RunRecord, StopRequest

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
    accelerator = Accelerator(mixed_precision=_precision(options.mixed_precision))
    device, is_main = accelerator.device, accelerator.is_main_process
    world, rank = accelerator.num_processes, accelerator.process_index
    step_pictures = options.batch_size * options.gradient_accumulation * world
    stop = StopRequest()

    # --- pictures, base model, layers: what can be wrong is found before a folder is made ---
    problems = Problems()
    resolution = config.data.resolution_px
    with problems.gathered():
        folder = read_folder(Path(config.data.folder), resolution, config.data.caption)
    with problems.gathered():
        base = load_base_model(config.base.model, device, pick_dtype(config.base.dtype, device))
        with problems.gathered():
            base.check_size(resolution)
        plans = inject.choose_layers(base.unet, **config.adapter.model_dump(exclude={"init"}))
    problems.tell()
    identity = checkpoint.Identity(config.model_dump(), folder.fingerprint, base.fingerprint())
    run = resumed or _new_run(config, default_name, accelerator)

    with RunRecord(run, options.steps, is_main) as record:
        # --- the adapter and its optimizer ---
        layers = inject.attach(
            base.unet, plans, inject.LayerOptions(config.adapter.init), options.seed
        )
        parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
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
                    adapter = _adapter(config, base, run.name)
                    keep = config.output.keep_checkpoints
                    checkpoint.save(run, step, adapter, state, identity, keep)
                accelerator.wait_for_everyone()

        # --- what stays the same while training: latents, text embeddings, the noise schedule ---
        log.info("Run folder: %s", run.path)
        log.info("Adapted layers of the UNet (preset '%s'):", config.adapter.preset)
        log.info("%s", inject.describe(plans))
        record.state("starting", "encoding the pictures", step)
        cache, notices = encode(base, folder.examples, beat)
        for notice in folder.notices + notices:
            log.warning("Note: %s", notice)
        noise_schedule = base.noise_schedule()
        if options.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        unet = accelerator.prepare_model(base.unet) if world > 1 else base.unet
        optimizer = accelerator.prepare_optimizer(optimizer)
        log.info(
            "%d pictures, %d steps of %d: each is seen about %.0f times (%s, mixed precision %s).",
            len(cache),
            options.steps,
            step_pictures,
            options.steps * step_pictures / len(cache),
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
            mean_loss = torch.zeros((), device=device)
            for micro_step in range(options.gradient_accumulation):
                first_slot = (micro_step * world + rank) * options.batch_size
                slots = range(first_slot, first_slot + options.batch_size)
                batch = _batch(cache, noise_schedule, config, step, step_pictures, slots)
                latents, noise, timesteps, captions = (part.to(device) for part in batch)
                noisy = loss.add_noise(noise_schedule, latents, noise, timesteps)
                target = loss.prediction_target(noise_schedule, latents, noise, timesteps)
                is_last = micro_step == options.gradient_accumulation - 1
                with contextlib.nullcontext() if is_last else accelerator.no_sync(unet):
                    with accelerator.autocast():
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
        if is_main:
            record.state("saving", "writing the adapter", step)
            adapter = _adapter(config, base, run.name)
            save_adapter(adapter, run.adapter_file, getattr(torch, config.output.dtype))
            log.info("Adapter: %s", run.adapter_file)
            if samples and config.sample.scales:
                record.state("sampling", "drawing the grid of scales")
                inject.detach(base.unet)
                _draw_grid(base, run, config.sample.scales, samples, beat)
        accelerator.wait_for_everyone()
        log.info("Finished after %.0f s.", time.monotonic() - started)
        record.state("finished", "", step)
        return 0


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
    layers: dict[str, inject.LoRALayer],
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
        base.unet.eval()
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
    base.unet.eval()
    with _pictures_may_fail("The grid"):
        adapter = load_adapter(run.adapter_file, inject.layer_shapes(base.unet))
        merged = MergedWeights({"unet": base.unet})
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


def _adapter(config: Config, base: BaseModel, name: str) -> Adapter:
    """The adapter as it is now, with kohya's keys about the run.

    No time and no path is among them, so that the same run gives the same file.
    """
    options, resolution = config.train, config.data.resolution_px
    shared = config.model_dump(exclude={"output"})
    shared["data"]["folder"] = Path(config.data.folder).name
    shared["base"]["model"] = Path(config.base.model).name
    adapter = inject.collect(base.unet)
    adapter.metadata = {
        "ss_output_name": name,
        "ss_sd_model_name": Path(base.name).name,
        "ss_base_model_version": base.kohya_version,
        "ss_v2": str(base.kohya_version.startswith("sd_v2")),
        "ss_steps": str(options.steps),
        "ss_learning_rate": str(options.learning_rate),
        "ss_lr_scheduler": options.schedule,
        "ss_lr_warmup_steps": str(options.warmup_steps),
        "ss_optimizer": "torch.optim.AdamW",
        "ss_batch_size_per_device": str(options.batch_size),
        "ss_gradient_accumulation_steps": str(options.gradient_accumulation),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_seed": str(options.seed),
        "ss_mixed_precision": options.mixed_precision,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if base.prediction_type == "v_prediction" else "epsilon",
        "lora_sd.version": __version__,
        "lora_sd.config": json.dumps(shared),
    }
    if base.architecture:
        adapter.metadata["modelspec.architecture"] = f"{base.architecture}/lora"
    return adapter


def _command() -> str:
    """The command a user types to start the trainer the way it was started now."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    return f"{'accelerate launch --quiet' if launched else 'python'} train_sd_lora.py"
