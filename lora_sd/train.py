"""The training loop, one function read top to bottom."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from lora_sd import __version__, checkpoint, inject, loss
from lora_sd.adapter import Adapter
from lora_sd.base_model import BaseModel, load_base_model, pick_dtype
from lora_sd.config import Config, config_from_values, parse_command_line, read_yaml
from lora_sd.data.cache import Cache, encode
from lora_sd.data.folder import read_folder
from lora_sd.errors import EXIT_RESUMABLE, ConfigError, RunError, UserError
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.generate import (
    PictureSettings,
    draw_grid,
    generate,
    generate_at_scales,
    save_picture,
)
from lora_sd.merge import MergedWeights
from lora_sd.randomness import generator, picture_at
from lora_sd.run_folder import RunFolder, State, Status, create_run

log = logging.getLogger("lora_sd")
HEARTBEAT_S = 1.0
LOG_EVERY_S = 20.0


def main(argv: Sequence[str]) -> int:
    """Train as the command line says; the exit status (0 finished, 75 stopped and resumable)."""
    values, config_file, resume = parse_command_line(argv, "train_sd_lora.py")
    if resume is None:
        default_name = config_file.stem if config_file else "run"
        if config_file and config_file.name == "config.yaml":
            default_name = config_file.resolve().parent.name
        return train(config_from_values(values), default_name)
    if values or config_file:
        raise ConfigError(
            "--resume goes on with the run's own settings; give it alone, or start a new run."
        )
    run = RunFolder(resume)
    if not run.config_file.is_file():
        raise RunError(f"'{resume}' is not a run folder: it holds no config.yaml.")
    return train(config_from_values(read_yaml(run.config_file)), run.name, run)


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
    # --- where to compute, and what was asked for ---
    precision = config.train.mixed_precision
    if precision == "auto":
        precision = _best_precision()
    accelerator = Accelerator(mixed_precision=precision)
    device = accelerator.device
    options = config.train
    world, rank = accelerator.num_processes, accelerator.process_index
    slots = options.batch_size * options.gradient_accumulation * world  # pictures in one step
    stop = _StopRequest()

    # --- pictures, base model, layers: what can be wrong is found before a folder is made ---
    folder = read_folder(Path(config.data.folder), config.data.resolution_px, config.data.caption)
    base = load_base_model(config.base.model, device, pick_dtype(config.base.dtype, device))
    if config.data.resolution_px % base.size_multiple:
        raise ConfigError(
            f"'data.resolution_px' is {config.data.resolution_px}; '{base.name}' wants a multiple "
            f"of {base.size_multiple}."
        )
    chosen = config.adapter
    plans = inject.choose_layers(
        base.unet,
        chosen.preset,
        chosen.rank,
        chosen.alpha,
        chosen.conv_rank,
        chosen.conv_alpha,
        chosen.include,
        chosen.exclude,
    )
    identity = checkpoint.Identity(config.model_dump(), folder.fingerprint, base.fingerprint())

    # --- the run folder ---
    if resumed is None:
        name: list[Any] = [None]
        if accelerator.is_main_process:
            created = create_run(
                Path(config.output.folder), config.output.name, default_name, config.to_yaml()
            )
            name = [str(created.path)]
        run = RunFolder(str(broadcast_object_list(name)[0]))
    else:
        run = resumed
    with _locked(run, accelerator.is_main_process), _logging(run, accelerator.is_main_process):
        record = _Record(run, options.steps, accelerator.is_main_process)
        try:
            # --- the adapter, and where it stood ---
            layers = inject.attach(base.unet, plans, chosen.init, options.seed)
            parameters = [p for layer in layers.values() for p in _factors(layer)]
            optimizer = torch.optim.AdamW(
                parameters,
                lr=options.learning_rate,
                weight_decay=options.weight_decay,
                fused=device.type in ("cpu", "cuda"),
            )
            shape = "constant_with_warmup" if options.schedule == "constant" else options.schedule
            lr_schedule = get_scheduler(
                shape,
                optimizer,
                num_warmup_steps=options.warmup_steps,
                num_training_steps=options.steps,
            )
            step = 0
            if resumed is not None:
                step = _restore(run, identity, layers, optimizer, lr_schedule, accelerator)
                if step >= options.steps and run.adapter_file.is_file():
                    log.info("'%s' is complete already.", run.path)
                    return 0
            record.starting(step, "reading the pictures")
            log.info("Run folder: %s", run.path)
            log.info("Adapted layers of the UNet (preset '%s'):", chosen.preset)
            log.info("%s", inject.describe(plans))
            for notice in folder.notices:
                log.warning("%s", notice)

            # --- everything that does not change while training ---
            cache, notices = encode(base, folder.examples, lambda done: record.beat())
            for notice in notices:
                log.warning("%s", notice)
            schedule = base.noise_schedule()
            if options.gradient_checkpointing:
                base.unet.enable_gradient_checkpointing()
            unet = accelerator.prepare_model(base.unet) if world > 1 else base.unet
            optimizer = accelerator.prepare_optimizer(optimizer)
            prompts = _sample_settings(config, run.name)
            log.info(
                "%d pictures, %d steps of %d pictures: each is seen about %.0f times. %s, %s.",
                len(cache),
                options.steps,
                slots,
                options.steps * slots / len(cache),
                device,
                f"mixed precision {accelerator.mixed_precision}",
            )
            if prompts and config.sample.every_steps and step == 0:
                record.state("sampling", "drawing the base's pictures")
                _draw_samples(base, run, 0, prompts, accelerator)

            # --- the loop ---
            record.state("training", "")
            bar = tqdm(
                total=options.steps,
                initial=step,
                unit="step",
                disable=not accelerator.is_main_process,
                dynamic_ncols=True,
                mininterval=0.5,
            )
            started, first = time.monotonic(), step
            while step < options.steps and not stop.requested:
                base.unet.train()
                step_started = time.monotonic()
                total = torch.zeros((), device=device)
                for micro_step in range(options.gradient_accumulation):
                    offset = (micro_step * world + rank) * options.batch_size
                    batch = _batch(
                        cache, schedule, options.seed, step, slots, offset,
                        options.batch_size, options.caption_dropout,
                    )  # fmt: skip
                    latents, noise, timesteps, captions = (part.to(device) for part in batch)
                    noisy = loss.add_noise(schedule, latents, noise, timesteps)
                    last = micro_step == options.gradient_accumulation - 1
                    with (
                        contextlib.nullcontext() if last else accelerator.no_sync(unet),
                        accelerator.autocast(),
                    ):
                        dtype = base.unet.dtype
                        prediction = unet(noisy.to(dtype), timesteps, captions.to(dtype)).sample
                        target = loss.prediction_target(schedule, latents, noise, timesteps)
                        mean = loss.squared_error(prediction, target).mean()
                        accelerator.backward(mean / options.gradient_accumulation)
                    total += mean.detach() / options.gradient_accumulation
                grad_norm = accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
                lr = lr_schedule.get_last_lr()[0]
                loss_value = float(accelerator.reduce(total, "mean"))
                if not torch.isfinite(torch.tensor(loss_value)):
                    raise RunError(
                        f"The loss became {loss_value} at step {step + 1}, and the run stopped. "
                        f"Lower train.learning_rate, or set train.mixed_precision to bf16 or no. "
                        f"What was saved before is whole."
                    )
                optimizer.step()
                lr_schedule.step()
                optimizer.zero_grad()
                step += 1

                # --- records, samples and checkpoints ---
                bar.update()
                record.step(
                    bar,
                    started,
                    first,
                    step=step,
                    loss=loss_value,
                    lr=lr,
                    grad_norm=float(grad_norm),
                    images_per_s=slots / max(time.monotonic() - step_started, 1e-9),
                    seconds=round(time.monotonic() - started, 3),
                )
                if step % config.output.save_every_steps == 0 or step == options.steps:
                    record.state("saving", f"saving step {step}")
                    _save(run, step, optimizer, lr_schedule, accelerator, base, identity, config)
                    record.state("training", "")
                every = config.sample.every_steps
                if prompts and every and step % every == 0 and step < options.steps:
                    record.state("sampling", f"drawing samples at step {step}")
                    _draw_samples(base, run, step, prompts, accelerator)
                    record.state("training", "")
            bar.close()

            # --- stopped on request: everything saved ---
            if step < options.steps:
                _save(run, step, optimizer, lr_schedule, accelerator, base, identity, config)
                record.state("stopped", f"stopped at step {step} of {options.steps}, saved")
                log.info("Stopped at step %d of %d; everything is saved.", step, options.steps)
                log.info("Go on with: %s --resume %s", _program(), run.path)
                return EXIT_RESUMABLE

            # --- the result ---
            adapter = _with_metadata(inject.collect(base.unet), config, base, run.name, len(cache))
            if accelerator.is_main_process:
                dtype = getattr(torch, config.output.dtype)
                record.state("saving", "writing the adapter")
                save_adapter(adapter, run.adapter_file, dtype)
                log.info("Adapter: %s", run.adapter_file)
                if prompts and config.sample.scales:
                    record.state("sampling", "drawing the grid of scales")
                    inject.detach(base.unet)
                    _draw_grid(base, run, config.sample.scales, prompts)
            accelerator.wait_for_everyone()
            record.state("finished", "")
            log.info("Finished after %.0f s.", time.monotonic() - started)
            return 0
        except UserError as error:
            record.state("failed", " ".join(error.problems))
            raise
        except BaseException as error:
            record.state("failed", f"{type(error).__name__}: {error}")
            log.error("The run failed.", exc_info=True)
            raise


def _best_precision() -> str:
    """What `accelerate launch` was told, else bf16 or fp16 on a CUDA GPU and none elsewhere."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told != "no" or not torch.cuda.is_available():
        return told
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _factors(layer: inject.LoRALayer) -> list[Tensor]:
    return [layer.lora_down.weight, layer.lora_up.weight]


def _batch(
    cache: Cache,
    schedule: Any,
    seed: int,
    step: int,
    slots: int,
    offset: int,
    batch_size: int,
    caption_dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(latents, noise, timesteps, captions) of one pass, on the CPU.

    What a slot of a step holds depends on the seed, the step and the slot's number alone: neither
    the number of processes nor accumulation changes it.
    """
    latents, noises, timesteps, captions = [], [], [], []
    for slot in range(offset, offset + batch_size):
        index = picture_at(step * slots + slot, len(cache), seed)
        draw = generator(seed, "picture", step, slot)
        shape = cache.mean.shape[1:]
        latents.append(cache.latents(index, torch.randn(shape, generator=draw)))
        noises.append(torch.randn(shape, generator=draw))
        timesteps.append(loss.random_timestep(schedule, draw))
        dropped = float(torch.rand((), generator=draw)) < caption_dropout
        captions.append(cache.empty if dropped else cache.captions[index])
    return torch.stack(latents), torch.stack(noises), torch.tensor(timesteps), torch.stack(captions)


def _save(
    run: RunFolder,
    step: int,
    optimizer: Any,
    lr_schedule: Any,
    accelerator: Accelerator,
    base: BaseModel,
    identity: checkpoint.Identity,
    config: Config,
) -> None:
    """Save a checkpoint of `step` (by the main process)."""
    if accelerator.is_main_process:
        state = {"optimizer": optimizer.state_dict(), "schedule": lr_schedule.state_dict()}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        adapter = _with_metadata(inject.collect(base.unet), config, base, run.name, None)
        checkpoint.save(run, step, adapter, state, identity, config.output.keep_checkpoints)
    accelerator.wait_for_everyone()


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
        log.warning("%s", reason)
    if folder is None:
        log.info("Nothing was saved before the run stopped: it begins again.")
        step = 0
    else:
        shapes = {f"unet.{name}": layer.weight.shape for name, layer in layers.items()}
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
) -> None:
    """Draw the sample pictures; a failure is logged, and training goes on."""
    if accelerator.is_main_process:
        base.unet.eval()
        try:
            with accelerator.autocast():
                pictures = generate(base, settings)
            for index, (picture, one) in enumerate(zip(pictures, settings, strict=True)):
                save_picture(picture, run.sample_file(step, index), one)
        except Exception:
            log.warning("The samples of step %d could not be drawn.", step, exc_info=True)
    accelerator.wait_for_everyone()


def _draw_grid(
    base: BaseModel, run: RunFolder, scales: Sequence[float], settings: list[PictureSettings]
) -> None:
    """Draw every prompt at every scale from the adapter's file, as a user of it would."""
    base.unet.eval()
    adapter = load_adapter(run.adapter_file, inject.layer_shapes(base.unet))
    merged = MergedWeights({"unet": base.unet})
    rows = generate_at_scales(base, merged, adapter, scales, settings)
    grid = draw_grid(rows, [one.prompt for one in settings], [f"scale {s:g}" for s in scales])
    grid.save(run.grid_file)
    log.info("Grid: %s", run.grid_file)


def _with_metadata(
    adapter: Adapter, config: Config, base: BaseModel, name: str, pictures: int | None
) -> Adapter:
    """The adapter with kohya's keys about the run; no time and no path, so that the same run
    gives the same file."""
    options = config.train
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
        "ss_total_batch_size": str(options.batch_size * options.gradient_accumulation),
        "ss_gradient_accumulation_steps": str(options.gradient_accumulation),
        "ss_resolution": f"({config.data.resolution_px}, {config.data.resolution_px})",
        "ss_seed": str(options.seed),
        "ss_mixed_precision": options.mixed_precision,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.resolution": f"{config.data.resolution_px}x{config.data.resolution_px}",
        "modelspec.prediction_type": "v" if base.prediction_type == "v_prediction" else "epsilon",
        "lora_sd.version": __version__,
        "lora_sd.config": config.model_dump_json(),
    }
    if base.architecture:
        adapter.metadata["modelspec.architecture"] = f"{base.architecture}/lora"
    if pictures is not None:
        adapter.metadata["ss_num_train_images"] = str(pictures)
    return adapter


class _StopRequest:
    """Set by the first SIGINT or SIGTERM; the second one ends the program at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._set)

    def _set(self, number: int, _: object) -> None:
        self.requested = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        text = "\nStopping after this step and saving. Once more to leave at once.\n"
        os.write(sys.stderr.fileno(), text.encode())


class _Record:
    """Writes status.json and metrics.jsonl, from the main process only."""

    def __init__(self, run: RunFolder, steps: int, is_main: bool) -> None:
        self._run, self._is_main = run, is_main
        self._status = Status("starting", 0, steps)
        self._written = self._logged = time.monotonic()

    def starting(self, step: int, message: str) -> None:
        self._status.step = step
        self.state("starting", message)

    def state(self, state: State, message: str) -> None:
        """Enter a state, and say so at once."""
        self._status.state, self._status.message = state, message
        self._write()

    def beat(self) -> None:
        """A sign of life, at most one a second."""
        if time.monotonic() - self._written >= HEARTBEAT_S:
            self._write()

    def step(self, bar: Any, started: float, first: int, **metrics: Any) -> None:
        """One step is done: a line of metrics, the progress bar, a heartbeat."""
        if not self._is_main:
            return
        self._run.append_metrics(metrics)
        self._status.step = step = metrics["step"]
        bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, {metrics['images_per_s']:.1f} images/s", refresh=False
        )
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S or step in (1, self._status.steps):
            self._logged = now
            left = (now - started) / (step - first) * (self._status.steps - step)
            log.info(
                "step %d/%d, loss %.4f, %.1f images/s, %.0f s left",
                step,
                self._status.steps,
                metrics["loss"],
                metrics["images_per_s"],
                left,
            )
        self.beat()

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._is_main:
            self._run.write_status(self._status)


@contextlib.contextmanager
def _locked(run: RunFolder, is_main: bool) -> Iterator[None]:
    """Hold the run's lock: one trainer writes to a run folder at a time."""
    lock = FileLock(run.lock_file)
    if is_main:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            status = run.read_status()
            who = f"process {status.pid}" if status else "another process"
            raise RunError(f"'{run.path}' is being trained by {who} now.") from None
    try:
        yield
    finally:
        lock.release()


class _BarHandler(logging.Handler):
    """Log lines on the terminal, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def _logging(run: RunFolder, is_main: bool) -> Iterator[None]:
    """Send the log to the terminal and to train.log."""
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    log.propagate = False
    handlers: list[logging.Handler] = [_BarHandler()]
    if is_main:
        handlers.append(logging.FileHandler(run.log_file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def _program() -> str:
    """The command a user types to start the trainer the way it was started now."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    return f"{'accelerate launch' if launched else 'python'} train_sd_lora.py"
