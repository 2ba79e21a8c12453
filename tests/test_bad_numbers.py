"""Numbers that are not finite stop a run within their step, are named, and reach no file.

Rows of table C (RELIABILITY.md, 5.1) that are tested elsewhere: C3, latents, in
test_cache.test_all_pictures_whose_latents_are_not_finite_are_named and
test_base_model.test_what_overflows_in_float16_is_encoded_and_decoded_in_float32; C5, a decoded
picture, in test_base_model.test_a_picture_that_is_no_number_is_an_error_and_not_black. The other
rows are listed in test_silent_wrong.
"""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import PROJECT
from safetensors.torch import load_file
from test_train import losses, resume, tensors, train

from lora_sd import bad_numbers, preparation, train_step
from lora_sd import train as trainer
from lora_sd.bad_numbers import MOST_HALVINGS, MOST_SKIPPED, FoundBadNumbers, NumbersGuard
from lora_sd.config import config_from_values
from lora_sd.data.store import DiskStore
from lora_sd.data.training_data import TrainingData
from lora_sd.errors import EXIT_BAD_NUMBERS, BadNumbers
from lora_sd.run_folder import RunFolder

BAD_PICTURE = "3.png"
spoiled_by = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)


def run_folder(settings) -> RunFolder:
    return RunFolder(f"{settings['output']['folder']}/{settings['output']['name']}")


def stopped(settings) -> tuple[RunFolder, BadNumbers]:
    """Train until bad numbers stop it; the run and the error."""
    with pytest.raises(BadNumbers) as caught:
        train(settings)
    assert caught.value.exit_status == EXIT_BAD_NUMBERS
    run = run_folder(settings)
    assert run.read_status().state == "failed" and not run.adapter_file.exists()
    saved = sorted(run.checkpoints.glob("step_*/adapter.safetensors"))
    for file in saved:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())
    return run, caught.value


def spoil(monkeypatch, change, from_step=0) -> None:
    """Change the batches that hold one picture: `change(batch, row)` in place."""
    batches = TrainingData.batches

    def spoiled(self, step, *arguments):
        found = batches(self, step, *arguments)
        for batch in found:
            for row, name in enumerate(batch.names):
                if name.endswith(BAD_PICTURE) and step >= from_step:
                    change(batch, row)
        return found

    monkeypatch.setattr(TrainingData, "batches", spoiled)


def spoil_weights(monkeypatch, value, is_due) -> None:
    """Set a weight of the adapter to a value after the optimizer steps for which
    `is_due(number of the step, learning rate)`."""
    step = torch.optim.AdamW.step
    done = []

    def spoiled(self, *arguments, **options):
        step(self, *arguments, **options)
        done.append(1)
        group = self.param_groups[0]
        if is_due(len(done), group["lr"]):
            group["params"][0].data[0] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiled)


@pytest.fixture
def settings(run_settings):
    """Nine steps of three pictures, of which every second step shows the fourth."""
    run_settings["train"] |= {"steps": 9, "batch_size": 3}
    run_settings["optimizer"]["schedule"] = "constant"
    return run_settings


@spoiled_by
def test_a_picture_stops_the_run_within_its_step_and_is_named(settings, monkeypatch, value):
    spoil(monkeypatch, lambda batch, row: batch.latents[row].fill_(value), from_step=4)
    run, error = stopped(settings)
    done = len(losses(run))
    said = str(error)
    assert done >= 4 and f"at step {done + 1}, and nothing was learned from that step" in said
    assert f"It comes from '{BAD_PICTURE}': its encoded latents" in said
    assert all(f"{number}.png" not in said for number in (0, 1, 2, 4))
    assert f"The weights of step {done} are saved" in error.problems[-1]
    assert done == max(int(folder.name[5:]) for folder in run.checkpoints.iterdir())


def test_when_the_picture_is_mended_the_run_goes_on_as_if_nothing_had_been(settings, monkeypatch):
    straight = train(settings)
    settings["output"]["name"] = "spoiled"
    spoil(monkeypatch, lambda batch, row: batch.latents[row].fill_(torch.nan), from_step=3)
    run, _ = stopped(settings)
    monkeypatch.undo()
    assert resume(run) == 0
    assert losses(run) == losses(straight) and tensors(run, 9) == tensors(straight, 9)


def test_latents_that_are_no_numbers_in_the_cache_are_found_where_they_are(settings):
    first = train(settings)
    store = DiskStore(first.path.parent / ".cache")
    for file in (first.path.parent / ".cache").rglob("*.safetensors"):
        entry = store.get(file.stem)
        if "mean" in entry and float(entry["mean"].mean()) > 0:
            store.put(file.stem, {**entry, "mean": entry["mean"] * torch.nan})
    settings["output"]["name"] = "again"
    _, error = stopped(settings)
    assert "its encoded latents hold numbers that are not finite. Delete the cache" in str(error)


def test_a_caption_that_is_no_number_is_named(settings, monkeypatch):
    spoil(monkeypatch, lambda batch, row: batch.text.hidden[row].fill_(torch.nan))
    _, error = stopped(settings)
    assert f"It comes from '{BAD_PICTURE}': its encoded caption 'a white wall'" in str(error)


def test_a_gradient_that_is_no_number_stops_the_run_though_the_loss_is_one(settings, monkeypatch):
    errors_of = train_step.errors_of

    def steep(base, objective, batch, *arguments):
        errors = errors_of(base, objective, batch, *arguments)
        return torch.stack(
            [
                error + (error * 0).sqrt() if name.endswith(BAD_PICTURE) else error
                for name, error in zip(batch.names, errors, strict=True)
            ]
        )

    monkeypatch.setattr(train_step, "errors_of", steep)
    monkeypatch.setattr(bad_numbers, "errors_of", steep)
    run, error = stopped(settings)
    assert "The gradient became nan, at a loss of" in str(error)
    assert f"It comes from '{BAD_PICTURE}'" in str(error) and "0.png" not in str(error)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_weights_that_the_optimizer_spoils_are_not_saved(settings, monkeypatch, value):
    spoil_weights(monkeypatch, value, lambda number, _: number == 4)
    run, error = stopped(settings)
    assert "no finite numbers at step 4; they are not saved" in str(error)
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step_000002"]
    monkeypatch.undo()
    assert resume(run) == 0


def test_weights_that_grow_too_large_are_told_apart_from_bad_pictures(settings, monkeypatch):
    spoil_weights(monkeypatch, 1e38, lambda number, _: number == 4)
    _, error = stopped(settings)
    assert "at step 5" in str(error) and "Lower optimizer.learning_rate" in str(error)


def test_a_base_weight_that_is_no_number_is_named(settings, monkeypatch):
    batches = TrainingData.batches

    def spoiled(self, *arguments):
        self._base.unet.down_blocks[0].resnets[0].conv1.base.weight.data[0] = torch.nan
        return batches(self, *arguments)

    monkeypatch.setattr(TrainingData, "batches", spoiled)
    _, error = stopped(settings)
    assert "the base model's layer 'unet.down_blocks.0.resnets.0.conv1' holds" in str(error)


def test_what_float16_does_not_hold_is_told_from_what_nothing_holds(settings, monkeypatch):
    seen = []
    monkeypatch.setattr(NumbersGuard, "check", lambda self, worker, *_: seen.append(worker))
    settings["train"]["steps"] = 1
    train(settings)
    worker = seen[0]
    half = SimpleNamespace(
        mixed_precision="fp16",
        autocast=lambda: torch.autocast("cpu", torch.float16),
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
    )
    parameters = [one for one in worker.base.unet.parameters() if one.requires_grad]
    worker = replace(worker, accelerator=half)
    large = {}

    def enlarge(batch, row):
        batch.latents[row].mul_(large["factor"])

    spoil(monkeypatch, enlarge)
    large["factor"] = 1e6
    step = next(s for s in range(9) if any(BAD_PICTURE in n for n in names_of(worker, s)))
    cause = bad_numbers.find_cause(worker, step, parameters, [])
    assert cause.names == (BAD_PICTURE,) and "mixed_precision to bf16" in cause.text
    large["factor"] = 1e30
    cause = bad_numbers.find_cause(worker, step, parameters, [])
    assert "bf16" not in cause.text and cause.slower_helps


def names_of(worker, step) -> list[str]:
    return [name for batch in worker.data.batches(step, 9) for name in batch.names]


def test_looking_for_the_cause_changes_nothing(settings, monkeypatch):
    settings["adapter"] |= {"dropout": 0.2}
    settings["train"]["steps"] = 3
    straight = train(settings)
    settings["output"]["name"] = "looked"
    gradients = train_step.TrainStep.gradients

    def looked(self, step):
        parameters = [one for one in self.base.unet.parameters() if one.requires_grad]
        before = [None if one.grad is None else one.grad.clone() for one in parameters]
        bad_numbers.find_cause(self, step, parameters, [])
        after = [one.grad for one in parameters]
        assert all(a is None or torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return gradients(self, step)

    monkeypatch.setattr(train_step.TrainStep, "gradients", looked)
    assert losses(train(settings)) == losses(straight)


# --- a scaler ---


def guard_with_scaler() -> NumbersGuard:
    accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 1024.0), num_processes=1)
    schedule = SimpleNamespace(scale=1.0)
    return NumbersGuard([torch.nn.Parameter(torch.zeros(2))], accelerator, schedule, halves=False)


def test_a_scaler_s_skipped_steps_are_counted_and_too_many_in_a_row_stop_the_run():
    guard = guard_with_scaler()
    for step in range(MOST_SKIPPED - 1):
        guard.check(None, step, 1.0, torch.inf, [])
    guard.check(None, 19, 1.0, 1.0, [])  # a good one between
    assert guard.told() == {"skipped_steps": MOST_SKIPPED - 1}
    for step in range(MOST_SKIPPED - 1):
        guard.check(None, 20 + step, 1.0, torch.nan, [])
    again = guard_with_scaler()
    again.load_state_dict(guard.state_dict())  # a resumed run counts on
    for one in (guard, again):
        with pytest.raises(FoundBadNumbers, match="20 steps in a row.*mixed_precision to bf16"):
            one.check(None, 40, 1.0, torch.inf, [])


def test_a_step_that_a_scaler_skips_leaves_the_weights_and_is_in_the_metrics(
    settings, monkeypatch, caplog
):
    make = preparation.make_accelerator

    def scaled(config):
        accelerator = make(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        return accelerator

    monkeypatch.setattr(trainer, "make_accelerator", scaled)
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def overflow(self, parameters, most):
        calls.append(1)
        if len(calls) == 3:
            parameters[0].grad.fill_(torch.inf)
        return clip(parameters, most)

    monkeypatch.setattr(trainer.Accelerator, "clip_grad_norm_", overflow)
    settings["output"]["save_every_steps"] = 1
    settings["output"]["keep_checkpoints"] = 9
    run = train(settings)
    assert "Step 3 is skipped: float16 does not hold its gradient" in run.log_file.read_text()
    skipped = [record.get("skipped_steps", 0) for record in run.read_metrics()]
    assert skipped == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    files = [load_file(run.checkpoint(step) / "adapter.safetensors") for step in (2, 3, 4)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert any(not torch.equal(files[1][key], files[2][key]) for key in files[0])


# --- going on with half the learning rate ---


@pytest.fixture
def too_fast(settings, monkeypatch):
    """Weights grow too large in the third step and later, at more than a quarter of the rate."""
    settings["train"]["on_bad_numbers"] = "halve_learning_rate"
    grow(settings, monkeypatch)
    return settings


def grow(settings, monkeypatch) -> None:
    most = settings["optimizer"]["learning_rate"] * 0.3
    steps = iter(range(10**6))
    spoil_weights(monkeypatch, 1e38, lambda _, rate: next(steps) >= 2 and rate > most)


def test_it_goes_back_and_on_at_half_the_rate_until_that_is_low_enough(too_fast):
    run = train(too_fast)
    metrics = run.read_metrics()
    assert [record["step"] for record in metrics] == list(range(1, 10))
    factors = [record.get("learning_rate_factor", 1.0) for record in metrics]
    assert factors == [1.0] * 2 + [0.25] * 7
    assert [m["lr"] / f for m, f in zip(metrics, factors, strict=True)][2:] == [1e-2] * 7
    assert run.log_file.read_text().count("the run goes on from step 2 with") == 2


@pytest.mark.parametrize("killed_after", [3, 5])
def test_killed_and_resumed_it_does_the_same(too_fast, monkeypatch, killed_after):
    straight = train(too_fast)
    too_fast["output"]["name"] = "killed"
    append = RunFolder.append_metrics

    class Killed(BaseException):
        """Nothing of the trainer catches it."""

    def append_and_die(self, values):
        append(self, values)
        if values["step"] == killed_after and values.get("learning_rate_factor", 1) < 0.6:
            raise Killed

    monkeypatch.undo()
    grow(too_fast, monkeypatch)
    monkeypatch.setattr(RunFolder, "append_metrics", append_and_die)
    run = run_folder(too_fast)
    with pytest.raises(Killed):
        train(too_fast)
    monkeypatch.undo()
    most = too_fast["optimizer"]["learning_rate"] * 0.3
    spoil_weights(monkeypatch, 1e38, lambda _, rate: rate > most)  # two steps are done
    assert resume(run) == 0
    assert losses(run) == losses(straight) and tensors(run, 9) == tensors(straight, 9)
    lr = [[record["lr"] for record in one.read_metrics()] for one in (run, straight)]
    assert lr[0] == lr[1]


def test_it_goes_back_to_the_start_where_nothing_was_saved(settings, monkeypatch):
    settings["train"]["on_bad_numbers"] = "halve_learning_rate"
    settings["optimizer"]["warmup_steps"] = 0
    spoil_weights(monkeypatch, torch.nan, lambda _, rate: rate > 6e-3)
    run = train(settings)
    assert [record["lr"] for record in run.read_metrics()] == [5e-3] * 9
    assert "goes on from step 0 with 0.5 of its learning rate" in run.log_file.read_text()


def test_it_gives_up_after_so_many_times(settings, monkeypatch):
    settings["train"]["on_bad_numbers"] = "halve_learning_rate"
    spoil_weights(monkeypatch, torch.nan, lambda *_: True)
    run, error = stopped(settings)
    assert run.log_file.read_text().count("the run goes on from step 0") == MOST_HALVINGS
    assert "What was saved before is whole." in str(error.problems[-1])


def test_a_bad_picture_is_not_tried_again_at_half_the_rate(settings, monkeypatch):
    settings["train"]["on_bad_numbers"] = "halve_learning_rate"
    spoil(monkeypatch, lambda batch, row: batch.latents[row].fill_(torch.nan))
    run, _ = stopped(settings)
    assert "goes on from" not in run.log_file.read_text()


# --- what is saved ---


def test_an_adapter_that_is_no_number_is_refused_by_the_save_itself(settings, monkeypatch):
    monkeypatch.setattr(NumbersGuard, "check_weights", lambda *_: None)
    spoil_weights(monkeypatch, torch.nan, lambda number, _: number == 4)
    with pytest.raises(BadNumbers, match="Step 4 is not saved"):
        train(settings)
    run = run_folder(settings)
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step_000002"]


@pytest.mark.slow
def test_the_other_process_s_picture_is_named_too(settings, tmp_path):
    settings["train"] |= {"batch_size": 2, "steps": 20}
    settings["output"]["name"] = "first"
    first = train(settings)
    store = DiskStore(first.path.parent / ".cache")
    spoiled = 0
    for file in sorted((first.path.parent / ".cache").rglob("*.safetensors")):
        entry = store.get(file.stem)
        if "mean" in entry and not spoiled:
            spoiled = 1
            store.put(file.stem, {**entry, "mean": entry["mean"] * torch.nan})
    said = set()
    for seed in range(3):
        settings["train"]["seed"] = seed
        settings["output"]["name"] = f"two-{seed}"
        file = tmp_path / "two.yaml"
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*command, "--standalone", "train_sd_lora.py", "--config", str(file)],
            cwd=PROJECT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        told = [line for line in done.stderr.splitlines() if "It comes from '" in line]
        assert told, done.stderr[-2000:]
        said |= {line.partition("It comes from ")[2].partition(":")[0] for line in told}
    assert len(said) == 1


def test_the_settings_take_it():
    config_from_values({"train": {"on_bad_numbers": "halve_learning_rate"}})
