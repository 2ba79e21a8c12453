"""The training loop, one function read top to bottom."""

import logging
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lora_sd import adapter_metadata, checkpoint, inject, out_of_memory, run_data
from lora_sd.bad_numbers import FoundBadNumbers, NumbersGuard
from lora_sd.config import Config
from lora_sd.errors import EXIT_RESUMABLE
from lora_sd.gauge import Gauge
from lora_sd.memory.heap import keep_freed_memory
from lora_sd.preparation import (
    make_accelerator,
    make_data,
    make_validation,
    make_worker,
    prepare,
    settled,
)
from lora_sd.result import save_result
from lora_sd.resume import is_finished, restore
from lora_sd.run_folder import RunFolder, create_run
from lora_sd.run_record import RunRecord
from lora_sd.run_requests import RunRequests, in_any
from lora_sd.samples import Samples
from lora_sd.stop_request import StopRequest
from lora_sd.trackers import Trackers

log = logging.getLogger("lora_sd")
EARLY_LOOKS = (5, 10, 20, 50)  # at how much the adapter changes, long before the first save


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
        UserError: settings, data or model cannot be used, and no run folder has been made; or the
            run cannot go on, and what was saved is whole.
    """
    # --- pictures, base model, layers, optimizer: what can be wrong is found before a folder ---
    options = config.train
    stop = stop or StopRequest()
    accelerator = make_accelerator(config)
    device, is_main = accelerator.device, accelerator.is_main_process

    def advise() -> list[str]:
        """What to do where memory runs out."""
        return out_of_memory.advice(config, device)

    with out_of_memory.told(advise):
        ready = prepare(config, accelerator, stop, resumed is None)
    base, learner = ready.base, ready.learner
    run = resumed or _new_run(config, default_name, accelerator)
    stop.watch(run, is_main)

    with RunRecord(run, options.steps, is_main) as record, out_of_memory.told(advise):

        def beat(*_: int) -> bool:
            """For long work: a sign of life, and whether to stop."""
            record.beat()
            return stop.requested

        requests = RunRequests(run, stop, accelerator, record)

        # --- class pictures that the base has yet to draw, where a folder wants some ---
        if run_data.wants_class_pictures(config):
            with record.during("starting", "drawing class pictures"):
                if is_main:
                    ready.notices += run_data.draw_class_pictures(base, config, beat)
            if requests.to_stop():
                record.state("stopped", "stopped before the first step", 0)
                return EXIT_RESUMABLE
            ready.read_again(config, stop)

        # --- what goes through the steps, and what of it has a state ---
        data = make_data(config, ready)
        worker = make_worker(config, ready, data, accelerator)
        steps_down = config.memory.on_out_of_memory == "step_down"
        stepper = out_of_memory.SteppingDown(
            worker, learner.parameters, steps_down=steps_down, save=lambda: save(), advise=advise
        )
        validation = make_validation(config, ready, data, accelerator, run, beat)
        halves = options.on_bad_numbers == "halve_learning_rate"
        guard = NumbersGuard(learner.parameters, accelerator, learner.schedule, halves)
        gauge = Gauge(ready.layers, options.steps, config.optimizer.warmup_steps)
        stateful = {
            **learner.stateful, "validation": validation, "numbers": guard, "memory": stepper,
        }  # fmt: skip
        samples = Samples(base, run, ready.prompts, accelerator)
        identity = checkpoint.Identity(
            settled(config, accelerator),
            ready.pictures.fingerprints(),
            base.fingerprint(),
            ready.step_pictures,
        )

        def save() -> None:
            with record.during("saving", f"saving step {step}"):
                if is_main:
                    adapter = inject.collect(base.components, exact=True)
                    adapter.metadata = adapter_metadata.describe_run(config, base, run.name)
                    state = {name: one.state_dict() for name, one in stateful.items()}
                    waits = config.output.on_full_disk == "wait"
                    wait = record.wait_for_room(lambda: stop.requested) if waits else None
                    keep = config.output.keep_checkpoints
                    checkpoint.save(run, step, adapter, state, identity, keep, wait)
                    record.trackers.flush()
                accelerator.wait_for_everyone()

        def go_back() -> int:
            """To where the last checkpoint stands; its step."""
            return restore(run, identity, ready.layers, stateful, device, is_main)

        def sample() -> None:
            if not ready.prompts:
                log.warning("Note: no samples can be drawn: sample.prompts holds no prompt.")
                return
            with record.during("sampling", f"drawing samples of step {step}"), learner.averaged():
                record.trackers.pictures(step, samples.draw(step, beat))
            data.release()

        # --- where an interrupted run stood ---
        step = 0
        if resumed is not None:
            step = restore(
                run, identity, ready.layers, stateful, device, is_main,
                allowed=allowed, config_yaml=config.to_yaml(),
            )  # fmt: skip
            last = step if validation.is_over else options.steps
            has_grid = run.grid_file.is_file()
            is_done = is_finished(run, step, last) and (has_grid or not ready.wants_grid)
            if in_any(accelerator, [is_main and is_done])[0]:
                log.info("'%s' is complete already.", run.path)
                return 0

        record.trackers = Trackers(
            run,
            step,
            is_main=is_main,
            tensorboard=config.output.tensorboard,
            wandb_project=config.output.wandb,
            settings=adapter_metadata.shared_config(config),
        )

        # --- what stays the same while training: latents, text embeddings ---
        ready.describe(config, run)
        record.state("starting", "encoding the pictures", step)
        if is_main:
            ready.notices += run_data.encode(data, record, stop, is_main)
        if not requests.to_stop() and not is_main:  # what is on disk, the main one has put there
            run_data.encode(data, record, stop, is_main)
        data.release()
        ready.describe_data(data, options.steps)
        worker.share()
        sample_every = config.sample.every_steps if ready.prompts else 0
        stopping = requests.to_stop()
        due = bool(sample_every) and (step == 0 or _is_due(step, sample_every, options.steps))
        # Each process would look at another moment: the main one decides for all.
        [is_missing] = in_any(accelerator, [is_main and not samples.is_drawn(step)])
        if due and is_missing and not stopping:
            sample()  # the base's, or those that a stop has cut off
        if data.held_out and not stopping:
            validation.measure_base()

        if step == 0 and halves and not stopping:
            save()  # to have something to go back to

        # --- the loop ---
        if device.type == "cpu":
            keep_freed_memory()
        started = time.monotonic()
        record.training_from(step)
        while step < options.steps and not (validation.is_over or requests.answer(save, sample)):
            try:
                loss, bad_pictures = stepper.gradients(step)
                grad_norm = learner.clip()
                guard.check(worker, step, loss, grad_norm, bad_pictures)
                rates = learner.rates()
                learner.step()
                guard.check_weights(step)
            except FoundBadNumbers as error:
                step = guard.after(error, step, save, go_back)
                record.training_from(step)
                continue
            step += 1
            saves = _is_due(step, config.output.save_every_steps, options.steps)
            validates = _is_due(step, options.validate_every_steps, options.steps)
            more: dict[str, Any] = guard.told()
            if saves or validates or step in EARLY_LOOKS:
                more |= gauge.measure(step)
            if validates and data.held_out:
                with learner.averaged():
                    more |= validation.measure(step)
            record.step(step, loss, rates, grad_norm, ready.step_pictures, more)

            # --- now and then: a checkpoint, sample pictures ---
            if saves or validation.is_over:
                save()
            if sample_every and (_is_due(step, sample_every, options.steps) or validation.is_over):
                sample()

        # --- stopped on request: everything is saved ---
        if step < options.steps and not validation.is_over:
            save()
            record.state("stopped", f"stopped at step {step} of {options.steps}, saved", step)
            log.info("Stopped at step %d of %d; everything is saved.", step, options.steps)
            log.info("Go on with: %s --resume %s", _command(), run.path)
            accelerator.wait_for_everyone()  # or a launcher stops the last of them again
            return EXIT_RESUMABLE

        # --- the result ---
        verified = ""
        if is_main:
            record.state("saving", "writing the adapter", step)
            with learner.averaged():
                verified = save_result(
                    config, base, run, step, data.shown, ready.file_format, ready.notices
                )
            if ready.wants_grid:
                record.state("sampling", "drawing the grid of scales")
                inject.detach(base.components)
                samples.draw_grid(config.sample.scales, beat)
        accelerator.wait_for_everyone()
        log.info("Finished after %.0f s.", time.monotonic() - started)
        record.state("finished", verified, step)
        return 0


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
