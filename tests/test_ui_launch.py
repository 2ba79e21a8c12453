"""The trainer's process: started, watched, stopped, found again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from ui_fake_trainer import config, fake_trainer, state, trainers_of, wait_for  # noqa: F401

from lora_sd.errors import RunError
from lora_sd.run_folder import RunFolder, Status
from lora_sd.ui import launch
from lora_sd.ui.launch import Trainer
from lora_sd.ui.queue import RunQueue
from lora_sd.ui.train import run_view
from lora_sd.ui.train.run_view import read_run


def test_a_run_is_started_watched_and_finishes(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs, steps=3))
    assert trainer.current() == "run"
    assert state(trainer) == "Starting"
    wait_for(lambda: state(trainer) == "Finished")
    wait_for(lambda: trainer.current() is None)
    view = read_run(trainer, "run")
    assert (view.step, view.steps) == (3, 3)
    assert not view.can_stop and not view.can_resume
    assert trainers_of(trainer) == []


def test_stop_saves_resume_goes_on_and_nothing_is_left_behind(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    wait_for(lambda: state(trainer) == "Training")
    trainer.stop("run")
    assert state(trainer) in ("Stopping", "Stopped")
    wait_for(lambda: state(trainer) == "Stopped")
    wait_for(lambda: trainers_of(trainer) == [])
    stopped_at = read_run(trainer, "run").step
    trainer.resume("run")
    wait_for(lambda: read_run(trainer, "run").step > stopped_at)
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Stopped" and trainers_of(trainer) == [])


def test_where_there_are_no_signals_a_file_stops_it(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "HAS_SIGNALS", False)
    monkeypatch.setattr(launch, "_signal_group", None)
    trainer.start(config(trainer.outputs))
    wait_for(lambda: state(trainer) == "Training")
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Stopped" and trainers_of(trainer) == [])
    assert not RunFolder(trainer.outputs / "run").request_file("stop").exists()


def test_a_pause_a_save_and_samples_are_asked_for(trainer: Trainer) -> None:
    run = RunFolder(trainer.outputs / "run")

    def status() -> str:
        return getattr(run.read_status(), "state", "")

    trainer.start(config(trainer.outputs))
    with pytest.raises(RunError, match="'run' has not begun"):
        trainer.pause("run")
    wait_for(lambda: status() == "training")
    trainer.pause("run")
    wait_for(lambda: status() == "paused")
    assert trainer.asked("run") == {"pause"} and trainer.current() == "run"
    step = run.read_status().step
    trainer.save_now("run")
    trainer.sample_now("run")
    wait_for(lambda: trainer.asked("run") == {"pause"})
    assert run.checkpoint(step).is_dir() and run.sample_file(step, 0).is_file()
    assert run.read_status().step == step
    Trainer(trainer.outputs).go_on("run")
    wait_for(lambda: run.read_status().step > step)
    trainer.pause("run")
    wait_for(lambda: status() == "paused")
    trainer.stop("run")
    wait_for(lambda: status() == "stopped" and trainer.current() is None)
    for act in (trainer.pause, trainer.go_on, trainer.save_now, trainer.sample_now):
        with pytest.raises(RunError, match="not being trained"):
            act("run")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGKILL, -9, "as the system does when memory runs out"),
        (signal.SIGSEGV, -11, "It crashed (signal 11, SIGSEGV)."),
    ],
)
def test_a_crash_is_told_with_its_code_and_last_words_g6(
    trainer: Trainer, number: int, code: int, said: str
) -> None:
    """Also by an app that was not there when it happened; and a start is possible again."""
    trainer.start(config(trainer.outputs))
    wait_for(lambda: state(trainer) == "Training")
    os.kill(RunFolder(trainer.outputs / "run").read_status().pid, number)
    wait_for(lambda: state(trainer) == "Interrupted" and trainer.current() is None, 5)
    ending = Trainer(trainer.outputs).ending("run")
    assert ending.code == code and said in ending.sentence()
    assert trainer.start(config(trainer.outputs, "next")) == "next"


def test_the_launcher_tells_how_the_trainer_ended_g6(tmp_path: Path) -> None:
    """accelerate's own says 1 for everything; and the trainer knows that it is to end with its
    launcher, and that nobody has given it one core."""
    script = tmp_path / "trainer.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(launch.PROJECT)!r})\n"
        "from lora_sd.launcher import launcher, take_all_cores\n"
        "take_all_cores()\n"
        "print('OMP_NUM_THREADS' in os.environ, launcher() is not None, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*launch.COMMAND[:-1], str(script)],
        env={**env, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["False", "True"]
    assert done.returncode == 137 and done.stderr.endswith("\nThe trainer ended: -9\n")


def test_an_exit_status_is_told_with_the_last_twenty_lines_g6(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs, rank=77))
    wait_for(lambda: trainer.ending("run").code == 1)
    assert trainer.ending("run").sentence() == "It ended with exit status 1."
    assert trainer.ending("run").last_lines == ("something nobody foresaw",)
    many = "".join(f"\rbar {n}" for n in range(500)) + "".join(f"\nline {n}" for n in range(50))
    (trainer.outputs / ".app" / "run.log").write_text(many)
    assert trainer.ending("run").last_lines == tuple(f"line {n}" for n in range(30, 50))
    assert trainer.console("run").startswith("bar 499\n") and trainer.ending("run").code is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 1}', '{"run": "run", "pid": 1e400}'])
def test_a_damaged_record_of_the_trainer_is_nobody_s_g11(trainer: Trainer, text: str) -> None:
    trainer.outputs.joinpath(".app").mkdir(parents=True)
    (trainer.outputs / ".app" / "trainer.json").write_text(text)
    assert trainer.current() is None and trainer.last_launched() is None
    with pytest.raises(RunError, match="not being trained"):
        trainer.stop("run")


def test_a_pid_that_was_given_to_another_program_is_left_alone_g10(trainer: Trainer) -> None:
    trainer.outputs.joinpath(".app").mkdir(parents=True)
    record = {"run": "run", "pid": os.getpid(), "process_started": 1.0}
    (trainer.outputs / ".app" / "trainer.json").write_text(json.dumps(record))
    assert trainer.current() is None
    with pytest.raises(RunError, match="not being trained"):
        trainer.stop("run")


def test_a_run_that_a_terminal_trains_is_not_resumed_g14(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    wait_for(lambda: state(trainer) == "Training")
    (trainer.outputs / ".app" / "trainer.json").unlink()  # as if it was not started here
    with pytest.raises(RunError, match="'run' is being trained"):
        trainer.resume("run")
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Stopped")


def test_a_second_start_is_refused_by_this_app_and_by_another(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    for each in (trainer, Trainer(trainer.outputs, ["false"])):
        with pytest.raises(RunError, match="'run' is being trained"):
            each.start(config(trainer.outputs, "other"))
    trainer.stop("run")
    wait_for(lambda: trainer.current() is None)


def test_of_many_starts_at_once_one_trains_g13(trainer: Trainer) -> None:
    """From several apps on one folder."""
    done: list[str] = []
    command = trainer._command
    apps = [trainer, *(Trainer(trainer.outputs, command) for _ in range(3))]

    def start(number: int) -> None:
        try:
            done.append(apps[number % 4].start(config(trainer.outputs, f"run-{number}")))
        except RunError as error:
            done.append(str(error))

    threads = [threading.Thread(target=start, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = [one for one in done if " " not in one]
    assert len(done) == 20 and len(started) == 1
    trainer.stop(started[0])
    wait_for(lambda: trainer.current() is None)


def test_a_restarted_app_finds_its_trainer_and_can_stop_it_g7(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    again = Trainer(trainer.outputs)
    assert again.current() == "run"
    wait_for(lambda: state(again) == "Training")
    again.stop("run")
    assert again.is_stopping("run") and trainer.is_stopping("run")
    wait_for(lambda: state(again) == "Stopped" and not trainer.is_stopping("run"))


def test_a_killed_app_leaves_its_trainer_unharmed_g7(trainer: Trainer) -> None:
    trainer.outputs.mkdir()
    settings = trainer.outputs.parent / "settings.yaml"
    settings.write_text(config(trainer.outputs).to_yaml())
    start = (
        "import os, signal, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(launch.PROJECT)!r})\n"
        "from lora_sd.config import config_from_values, read_yaml\n"
        "from lora_sd.ui.launch import Trainer\n"
        f"config = config_from_values(read_yaml(Path({str(settings)!r})))\n"
        f"Trainer(Path({str(trainer.outputs)!r}), {trainer._command!r}).start(config)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", start]).returncode == -signal.SIGKILL
    assert trainer.current() == "run" and trainer.last_launched() == "run"
    wait_for(lambda: state(trainer) == "Training")
    step = read_run(trainer, "run").step
    wait_for(lambda: read_run(trainer, "run").step > step)
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Stopped" and trainer.current() is None)


def test_a_stop_may_be_asked_for_twice_and_after_the_end_g5(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    wait_for(lambda: state(trainer) == "Training")
    trainer.stop("run")
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Stopped" and trainer.current() is None)
    with pytest.raises(RunError, match="'run' is not being trained now"):
        trainer.stop("run")


def test_a_halted_trainer_is_silent_and_goes_on_g9(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_view, "STALE_AFTER_S", 0.5)
    trainer.start(config(trainer.outputs))
    wait_for(lambda: state(trainer) == "Training")
    pid = RunFolder(trainer.outputs / "run").read_status().pid
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: "No sign of life" in read_run(trainer, "run").message)
    assert trainer.current() == "run"
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: "No sign of life" not in read_run(trainer, "run").message)


def test_a_gigabyte_of_console_takes_no_memory_g12(trainer: Trainer) -> None:
    console = trainer.outputs / ".app" / "run.log"
    console.parent.mkdir(parents=True)
    with open(console, "wb") as file:
        file.truncate(2**30)  # zeros, without the disk
        file.seek(0, os.SEEK_END)
        file.write(b"\xff\xfe the last words")
    assert len(trainer.console("run")) <= launch.MOST_CONSOLE
    assert trainer.ending("run").last_lines[-1].endswith("the last words")


@pytest.mark.slow
def test_fifty_starts_and_stops_leave_nothing_behind_g18(trainer: Trainer) -> None:
    me = psutil.Process()

    def taken() -> tuple[int, int, int]:
        return me.num_fds(), me.num_threads(), len(trainers_of(trainer))

    before, memory = taken(), me.memory_info().rss
    for number in range(50):
        name = trainer.start(config(trainer.outputs, f"run-{number}"))
        wait_for(lambda name=name: state(trainer, name) == "Training")
        trainer.stop(name)
        wait_for(lambda name=name: state(trainer, name) == "Stopped")
        wait_for(lambda: trainer.current() is None)
    wait_for(lambda: taken() == before)
    assert me.memory_info().rss - memory < 20 * 2**20


def test_a_trainer_that_does_not_stop_is_killed(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "KILL_AFTER_S", 0.5)
    trainer.start(config(trainer.outputs, seed=13))
    wait_for(lambda: state(trainer) == "Training")
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Interrupted")
    wait_for(lambda: trainers_of(trainer) == [])
    assert read_run(trainer, "run").can_resume


def test_a_killed_launcher_leaves_a_trainer_that_can_be_stopped(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    wait_for(lambda: state(trainer) == "Training")
    leader = json.loads((trainer.outputs / ".app" / "trainer.json").read_text())["pid"]
    os.kill(leader, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(leader))
    assert trainer.current() == "run"
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Stopped")


def test_a_killed_trainer_shows_as_interrupted(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    wait_for(lambda: state(trainer) == "Training")
    status = RunFolder(trainer.outputs / "run").read_status()
    assert status
    os.kill(status.pid, signal.SIGKILL)
    wait_for(lambda: state(trainer) == "Interrupted")
    assert "resume to go on" in read_run(trainer, "run").message


def test_a_stranger_with_the_old_pid_is_left_alone(trainer: Trainer) -> None:
    run = RunFolder(trainer.outputs / "run")
    run.path.mkdir(parents=True)
    run.config_file.write_text("{}")
    old = Status("training", 3, 10, pid=os.getpid(), process_started=1.0, heartbeat=1.0)
    run.status_file.write_text(json.dumps(vars(old)))
    assert trainer.current() is None and state(trainer) == "Interrupted"
    with pytest.raises(RunError, match="not being trained"):
        trainer.stop("run")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"state": "asleep"}', '{"state": 3}', '{"state": "training", "pid": 1e400}'],
)
def test_a_damaged_status_is_shown_and_nothing_more(trainer: Trainer, text: str) -> None:
    run = RunFolder(trainer.outputs / "run")
    run.path.mkdir(parents=True)
    run.config_file.write_text("{}")
    run.status_file.write_text(text)
    view = read_run(trainer, "run")
    assert view.badge == "Not started" and view.can_resume and not view.can_stop


def test_sentences_of_a_refused_start_are_shown(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs, rank=500))
    wait_for(lambda: state(trainer) == "Not started")
    view = read_run(trainer, "run")
    assert view.message == "'adapter.rank' is too large for this model."
    assert not view.can_resume


def test_the_last_words_of_a_crashed_start_are_shown(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs, rank=77))
    wait_for(lambda: state(trainer) == "Not started")
    assert read_run(trainer, "run").message.endswith("something nobody foresaw")


def test_a_silent_trainer_is_named(trainer: Trainer) -> None:
    run = RunFolder(trainer.outputs / "run")
    run.path.mkdir(parents=True)
    run.write_status(Status("training", 3, 10))
    values = json.loads(run.status_file.read_text())
    run.status_file.write_text(json.dumps({**values, "heartbeat": time.time() - 100}))
    assert read_run(trainer, "run").message == "No sign of life for 1 min 40 s."


def test_names_are_free_and_never_a_folder_of_ours(trainer: Trainer) -> None:
    (trainer.outputs / "fox").mkdir(parents=True)
    assert RunQueue(trainer).free_name("fox") == "fox-2"
    assert RunQueue(trainer).free_name("datasets") == "datasets-2"
    assert RunQueue(trainer).free_name("../ü") == "run"
    for taken in ("fox", "datasets"):
        with pytest.raises(RunError, match="already"):
            trainer.start(config(trainer.outputs, taken))


def test_a_stop_before_the_beginning_is_no_failure(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Stopped")
    wait_for(lambda: trainer.current() is None and trainers_of(trainer) == [])
