"""The training loop, one function read top to bottom."""

import logging
import math
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lora_sd import adapter_metadata, checkpoint, clients, inject, layer_choice, run_data
from lora_sd.config import Config
from lora_sd.data.training_data import TrainingData
from lora_sd.data.views import make_views
from lora_sd.errors import EXIT_RESUMABLE, RunError
from lora_sd.objective import Objective
from lora_sd.optimizers import make_optimizer, make_schedule, parameter_groups
from lora_sd.preparation import make_accelerator, prepare
from lora_sd.result import save_result
from lora_sd.resume import Stateful, is_finished, restore
from lora_sd.run_folder import RunFolder, create_run
from lora_sd.run_record import RunRecord
from lora_sd.samples import draw_samples, draw_scale_grid, sample_settings
from lora_sd.stop_request import StopRequest
from lora_sd.train_step import TrainStep
from lora_sd.validation import validation_loss

log = logging.getLogger("lora_sd")


def train(
    config: Config,
    default_name: str,
    resumed: RunFolder | None = None,
    allowed: Collection[str] = (),
    stop: StopRequest | None = None,
) -> int:
    """Train one adapter into a run folder.

    Args:
        default_name: the run folder's name where the settings give none.
        resumed: the run to go on with; its settings are `config`.
        allowed: names of what may have changed of it (`changes.check`).
        stop: a request that is heeded since before this was called.

    Returns:
        0 when the run is finished, 75 when it was stopped and can go on.

    Raises:
        UserError: settings, data or model cannot be used; no run folder has been made then.
    """
    # --- pictures, base model, layers: what can be wrong is found before a folder is made ---
    options, max_tokens = config.train, config.data.max_tokens
    stop = stop or StopRequest()
    accelerator = make_accelerator(config)
    device, is_main = accelerator.device, accelerator.is_main_process
    ready = prepare(config, accelerator, stop, resumed is None)
    base, layers, step_pictures = ready.base, ready.layers, ready.step_pictures
    pictures, views, told = ready.pictures, ready.views, ready.notices
    run = resumed or _new_run(config, default_name, accelerator)
    stop.watch(run, is_main)

    with RunRecord(run, options.steps, is_main) as record:

        def beat(*_: int) -> bool:
            """For long work: a sign of life, and whether to stop."""
            record.beat()
            return stop.requested

        def is_to_stop() -> bool:
            """Whether any of the processes was asked to: all leave the loop at the same step."""
            if accelerator.num_processes == 1:
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
            views, ready.too_small = make_views(
                pictures, base.size_step_px, config.data.bad_pictures
            )

        # --- what learns, and how ---
        groups = parameter_groups(
            layers,
            learning_rate=config.optimizer.learning_rate,
            conv_learning_rate=config.optimizer.conv_learning_rate,
            text_encoder_rates=config.optimizer.text_encoder_rates(),
            block_learning_rates=config.optimizer.block_learning_rates,
            lora_plus_ratio=config.optimizer.lora_plus_ratio,
            weight_decay=config.optimizer.weight_decay,
        )
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = make_optimizer(config.optimizer.name, groups, config.optimizer.options, device)
        lr_schedule = make_schedule(optimizer, options.steps, **config.optimizer.schedule_options())
        objective = Objective(base.noise_schedule())

        # --- where an interrupted run stood ---
        identity = checkpoint.Identity(
            config.model_dump(), pictures.fingerprints(), base.fingerprint(), step_pictures
        )
        stateful: dict[str, Stateful] = {"optimizer": optimizer, "schedule": lr_schedule}
        if accelerator.scaler is not None:
            stateful["scaler"] = accelerator.scaler
        step = 0
        if resumed is not None:
            step = restore(
                run, identity, layers, stateful, device, is_main,
                allowed=allowed, config_yaml=config.to_yaml(),
            )  # fmt: skip
            wants_grid = bool(config.sample.prompts and config.sample.scales)
            has_grid = run.grid_file.is_file() or not wants_grid
            if is_finished(run, step, options.steps) and has_grid:
                log.info("'%s' is complete already.", run.path)
                return 0

        def save() -> None:
            with record.during("saving", f"saving step {step}"):
                if is_main:
                    adapter = inject.collect(base.components, exact=True)
                    adapter.metadata = adapter_metadata.describe_run(config, base, run.name)
                    state = {name: one.state_dict() for name, one in stateful.items()}
                    keep = config.output.keep_checkpoints
                    waits = config.output.on_full_disk == "wait"
                    wait = record.wait_for_room(lambda: stop.requested) if waits else None
                    checkpoint.save(run, step, adapter, state, identity, keep, wait)
                accelerator.wait_for_everyone()

        # --- what stays the same while training: latents, text embeddings ---
        log.info("Run folder: %s", run.path)
        log.info("%s", run_data.describe_base(base))
        log.info("Adapted layers (preset '%s'):", config.adapter.preset)
        bytes_per_weight = getattr(torch, config.output.dtype).itemsize
        log.info("%s", layer_choice.describe(ready.plans, ready.options, bytes_per_weight))
        if ready.file_format == "kohya":  # diffusers' is for diffusers alone
            told += clients.ignored_layers(ready.planned, base.family, ready.file_format)
        data = TrainingData(
            base,
            views,
            run_data.open_store(config),
            objective,
            seed=options.seed,
            step_pictures=step_pictures,
            max_tokens=max_tokens,
            learns_text=ready.trains_text,
        )
        record.state("starting", "encoding the pictures", step)
        with accelerator.main_process_first():
            told += run_data.encode(data, record, stop, is_main)
        told += pictures.notices + run_data.smaller_note(data.shown)
        data.release()
        for notice in told:
            log.warning("Note: %s", notice)
        for line in run_data.describe(
            pictures, data, ready.too_small, options.steps, step_pictures
        ):
            log.info("%s", line)
        if config.memory.gradient_checkpointing:
            base.enable_gradient_checkpointing()
        optimizer = accelerator.prepare_optimizer(optimizer)
        worker = TrainStep(
            base,
            objective,
            data,
            accelerator,
            _shared(base.unet, accelerator),
            [_shared(encoder, accelerator) for encoder in base.text_encoders],
            options.batch_size,
            max_tokens,
            options.seed,
            ready.drops,
            ready.trains_text,
        )
        samples = sample_settings(config, base, run.name)
        sample_every = config.sample.every_steps if samples else 0
        stopping = is_to_stop()
        if sample_every and step == 0 and not stopping:
            with record.during("sampling", "drawing the base's pictures"):
                draw_samples(base, run, 0, samples, accelerator, beat)
            data.release()
        if data.held_out and step == 0 and not stopping:
            first = validation_loss(base, data, max_tokens, accelerator)
            log.info("Validation loss of the base: %.4f", first)

        # --- the loop ---
        started = time.monotonic()
        record.training_from(step)
        while step < options.steps and not is_to_stop():
            loss, bad_pictures = worker.gradients(step)
            grad_norm = float(
                accelerator.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
            )
            gradient_is_bad = accelerator.scaler is None and not math.isfinite(grad_norm)
            if not math.isfinite(loss) or gradient_is_bad:
                raise RunError(
                    f"The loss became {loss}, its gradient {grad_norm}, at step {step + 1}, "
                    f"and the run stopped. Lower optimizer.learning_rate, or set "
                    f"train.mixed_precision to bf16 or no. What was saved before is whole."
                )
            lr = lr_schedule.get_last_lr()[0]
            optimizer.step()
            lr_schedule.step()
            optimizer.zero_grad()
            step += 1
            more = {}
            if data.held_out and _is_due(step, options.validate_every_steps, options.steps):
                more["validation_loss"] = validation_loss(base, data, max_tokens, accelerator)
            record.step(step, loss, lr, grad_norm, step_pictures, more)

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
            verified = save_result(config, base, run, step, data.shown, ready.file_format, told)
            if samples and config.sample.scales:
                record.state("sampling", "drawing the grid of scales")
                inject.detach(base.components)
                draw_scale_grid(base, run, config.sample.scales, samples, beat)
        accelerator.wait_for_everyone()
        log.info("Finished after %.0f s.", time.monotonic() - started)
        record.state("finished", verified, step)
        return 0


def _shared(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """A model wrapped to share its gradients between processes, where anything of it learns."""
    learns = any(parameter.requires_grad for parameter in model.parameters())
    if accelerator.num_processes == 1 or not learns:  # DDP refuses what does not learn
        return model
    wrapped: torch.nn.Module = accelerator.prepare_model(model)
    return wrapped


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is to be done now."""
    return step % every == 0 or step == last


def _new_run(config: Config, default_name: str, accelerator: Accelerator) -> RunFolder:
    """Make the run's folder, in the main process, and tell the others its path."""
    path: list[Any] = [None]
    if accelerator.is_main_process:
        output = config.output
        run = create_run(Path(output.folder), output.name, default_name, config.to_yaml())
        path = [str(run.path)]
    return RunFolder(broadcast_object_list(path)[0])


def _command() -> str:
    """The command a user types to start the trainer the way it was started now."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    return f"{'accelerate launch --quiet' if launched else 'python'} train_sd_lora.py"
