"""A resumed run is the same run, and a save that is cut off anywhere loses nothing.

Rows of table A (RELIABILITY.md, 5.1) are tested in test_resume (A8 to A16, A19 to A22),
test_checkpoint (A3 to A7, A17, A21) and test_train (A1 in short); here A2, and of A9 what is asked
for within a step. The whole of it, with every pair of settings and hundreds of kills, is
`make torture`.
"""

import os
import signal

import pytest
from test_train import losses, resume, tensors, train

from lora_sd import train as trainer
from lora_sd import train_step
from lora_sd.config import config_from_values
from lora_sd.errors import EXIT_RESUMABLE
from lora_sd.run_folder import RunFolder
from tests.torture.programs import ran


@pytest.fixture
def settings(run_settings):
    """Six steps of three passes, with dropout."""
    run_settings["train"] |= {"batch_size": 1, "gradient_accumulation": 3}
    run_settings["adapter"] |= {"dropout": 0.3}
    return run_settings


def stopped_within(settings, monkeypatch, at_pass: int) -> RunFolder:
    """A run that is asked to stop in a pass, counted from the start, and goes on later."""
    errors_of, done = train_step.errors_of, []

    def stop_and_compute(*arguments):
        done.append(1)
        if len(done) == at_pass:
            os.kill(os.getpid(), signal.SIGTERM)
        return errors_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "errors_of", stop_and_compute)
        assert trainer.train(config_from_values(settings), "run") == EXIT_RESUMABLE
    run = RunFolder(f"{settings['output']['folder']}/{settings['output']['name']}")
    assert resume(run) == 0
    return run


def test_a_request_between_the_passes_of_a_step_is_obeyed_after_it(settings, monkeypatch):
    straight = train(settings)
    settings["output"]["name"] = "stopped"
    run = stopped_within(settings, monkeypatch, 8)
    assert losses(run) == losses(straight) and tensors(run, 6) == tensors(straight, 6)


def test_the_comparison_notices_when_passes_are_not_seeded(settings, monkeypatch):
    monkeypatch.setattr(train_step.torch, "manual_seed", lambda seed: None)
    straight = train(settings)
    settings["output"]["name"] = "stopped"
    assert losses(stopped_within(settings, monkeypatch, 8)) != losses(straight)


def test_a_save_may_be_cut_off_at_every_operation_a2():
    done = ran("crash_points", "--quick")
    assert done.returncode == 0, done.stdout
    assert "operations on the disk: checkpoint 4" in done.stdout  # forty and some
