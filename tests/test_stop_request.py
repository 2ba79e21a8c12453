"""Asked to stop in any way at any moment, a run saves, ends, and is the same run afterwards.

The letters are rows of the table of faults: A crash and resume, G processes.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import PROJECT
from test_full_disk import losses, saved, straight

import train_sd_lora
from lora_sd import checkpoint, stop_request
from lora_sd import samples as samples_module
from lora_sd.data.training_data import TrainingData
from lora_sd.errors import EXIT_INTERRUPTED, EXIT_RESUMABLE, run_program
from lora_sd.run_folder import RunFolder
from lora_sd.stop_request import StopRequest

Settings = dict[str, dict]
SECONDS = 60.0


class Trainer:
    """A trainer in a process of its own, forked from this one, which has imported all it needs."""

    def __init__(self, arguments: list[str], output: Path, before: Callable[[], object]) -> None:
        self.output = output
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                stream = open(output, "w")  # noqa: SIM115
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
                before()
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
                sys.argv = ["train_sd_lora.py", *arguments]
                run_program(train_sd_lora.main)
            except SystemExit as ended:
                status = int(ended.code or 0)
            finally:
                os._exit(status)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit status, negative for a signal."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        pytest.fail(f"did not end: {self.output.read_text()[-2000:]}")


@pytest.fixture
def start(run_settings: Settings, tmp_path: Path):
    """Starts the run of the settings, or goes on with it."""
    run = folder_of(run_settings)
    started: list[Trainer] = []

    def start_or_go_on(before: Callable[[], object] = lambda: None) -> Trainer:
        run = folder_of(run_settings)
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(run_settings))
        is_there = run.config_file.exists()
        arguments = ["--resume", str(run.path)] if is_there else ["--config", str(file)]
        started.append(Trainer(arguments, tmp_path / f"output-{len(started)}", before))
        return started[-1]

    assert run.name == "run"
    yield start_or_go_on
    for one in started:
        try:
            one.send(signal.SIGKILL)
            os.waitpid(one.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def folder_of(settings: Settings) -> RunFolder:
    return RunFolder(Path(settings["output"]["folder"]) / settings["output"]["name"])


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


def is_at(run: RunFolder, step: int) -> Callable[[], bool]:
    return lambda: len(run.read_metrics()) >= step


def stop_often(settings: Settings, start, moments: int, seed: int) -> None:
    """Stop a run at random moments until it has ended; it must be as if it never was."""
    settings["train"]["steps"] = 40
    settings["sample"] = {"prompts": ["a red wall"], "steps": 3, "every_steps": 8}
    settings["data"]["cache"] = "memory"
    whole = straight(settings)
    run, draw = folder_of(settings), random.Random(seed)
    ends: list[int] = []
    while not ends or ends[-1] != 0:
        trainer = start()
        if len(ends) < moments:
            time.sleep(draw.choice([draw.uniform(0, 0.5), draw.uniform(0.5, 2.5)]))
            trainer.send(draw.choice([signal.SIGINT, signal.SIGTERM]))
            ends.append(trainer.wait(10))
            # After the end of training, and before a run is there, nothing is to be saved.
            assert ends[-1] in (0, EXIT_RESUMABLE, EXIT_INTERRUPTED), trainer.output.read_text()
            if ends[-1] == EXIT_RESUMABLE:
                status = run.read_status()
                assert status.state == "stopped"
                assert status.step == 0 or run.checkpoint(status.step).is_dir()
        else:
            ends.append(trainer.wait())
    assert ends.count(EXIT_RESUMABLE) > 0
    assert losses(run) == losses(whole) and saved(run, 40) == saved(whole, 40)
    assert run.adapter_file.read_bytes() == whole.adapter_file.read_bytes()
    assert list(run.path.rglob(".tmp*")) == []


def test_a_signal_at_random_moments_g1(run_settings: Settings, start) -> None:
    stop_often(run_settings, start, 10, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_a_signal_at_many_random_moments_g1(run_settings: Settings, start, seed: int) -> None:
    stop_often(run_settings, start, 20, seed)


@pytest.mark.parametrize("signals", [2, 3])
def test_a_second_signal_leaves_at_once_g2(run_settings: Settings, start, signals: int) -> None:
    """While it saves: the earlier checkpoints are whole."""
    whole = straight(run_settings)
    run = folder_of(run_settings)
    write = checkpoint._write_manifest

    def slowly(folder: Path, step: int, *arguments) -> None:
        if step == 4:
            time.sleep(SECONDS)
        write(folder, step, *arguments)

    def slow_saves() -> None:
        checkpoint._write_manifest = slowly

    trainer = start(slow_saves)
    wait_for(lambda: list(run.checkpoints.glob(".tmp*/state.pt")) and run.checkpoint(2).exists())
    for _ in range(signals):
        try:
            trainer.send(signal.SIGTERM)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    assert trainer.wait(5) == -signal.SIGTERM  # which a shell calls 143
    assert checkpoint.find_newest(run)[0].step == 2
    assert start().wait() == 0
    assert losses(run) == losses(whole) and saved(run, 6) == saved(whole, 6)


PLACES = {
    "model load": (stop_request.StopRequest, "watch"),
    "caching": (TrainingData, "encode"),
    "saving": (checkpoint, "_check_finite"),
    "sampling": (samples_module, "save_picture"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_at_any_place_g5(run_settings: Settings, start, place: str) -> None:
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2, "every_steps": 3}
    run, (owner, name) = folder_of(run_settings), PLACES[place]
    original = getattr(owner, name)

    def stopped(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    trainer = start(lambda: setattr(owner, name, stopped))
    status = trainer.wait()
    if place == "model load":  # of a new run: nothing is there yet
        assert status == EXIT_INTERRUPTED and "Stopped." in trainer.output.read_text()
    else:
        assert status == EXIT_RESUMABLE and run.read_status().state == "stopped"
    assert start().wait() == 0 and run.read_status().state == "finished"


def test_a_signal_after_the_end_changes_nothing_g5(run_settings: Settings, start) -> None:
    run = folder_of(run_settings)

    def stop_at_the_end() -> None:
        write = RunFolder.write_status

        def write_and_stop(self, status):
            write(self, status)
            if status.state == "finished":
                os.kill(os.getpid(), signal.SIGTERM)

        RunFolder.write_status = write_and_stop

    assert start(stop_at_the_end).wait() == 0
    assert run.read_status().state == "finished"


def test_a_stop_file_g5(run_settings: Settings, start) -> None:
    """Obeyed and removed; one from before is not meant."""
    run_settings["train"]["steps"] = 100_000
    run = folder_of(run_settings)
    stop_file = run.request_file("stop")
    trainer = start()
    wait_for(is_at(run, 3))
    stop_file.touch()
    assert trainer.wait(10) == EXIT_RESUMABLE
    assert not stop_file.exists() and run.read_status().state == "stopped"
    assert f"as '{stop_file}' asks for" in run.log_file.read_text()
    stopped_at = run.read_status().step
    assert run.checkpoint(stopped_at).is_dir()
    stop_file.touch()
    os.utime(stop_file, (time.time() - 60, time.time() - 60))
    trainer = start()
    wait_for(is_at(run, stopped_at + 3))
    assert "was left from before" in run.log_file.read_text() and not stop_file.exists()
    trainer.send(signal.SIGINT)
    assert trainer.wait(10) == EXIT_RESUMABLE


def test_the_terminal_may_go(run_settings: Settings, start) -> None:
    """Its last words find no reader, and the run is whole all the same."""
    reading, writing = os.pipe()

    def write_to_a_pipe() -> None:
        os.dup2(writing, 2)
        os.close(writing)
        os.close(reading)

    trainer = start(write_to_a_pipe)
    os.close(writing)
    os.close(reading)
    assert trainer.wait() == 0
    assert folder_of(run_settings).read_status().state == "finished"


def test_two_resumes_at_once_a22_g14(run_settings: Settings, start) -> None:
    run_settings["train"]["steps"] = 100_000
    run = folder_of(run_settings)
    first = start()
    wait_for(is_at(run, 3))
    first.send(signal.SIGTERM)
    assert first.wait() == EXIT_RESUMABLE
    before = len(run.read_metrics())
    both = [start(), start()]
    wait_for(is_at(run, before + 3))
    lost = None
    while lost is None:
        for one in both:
            if os.waitpid(one.pid, os.WNOHANG)[0]:
                lost = one
    (won,) = [one for one in both if one is not lost]
    assert f"is being trained by process {won.pid} now" in lost.output.read_text()
    won.send(signal.SIGTERM)
    assert won.wait() == EXIT_RESUMABLE


def test_a_shell_that_ends_stops_nothing(run_settings: Settings, start) -> None:
    """Even where the environment speaks of a launcher, as it may be exported anywhere."""
    run = folder_of(run_settings)

    def leave_the_parent() -> None:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        if os.fork():
            os._exit(7)

    assert start(leave_the_parent).wait() == 7
    wait_for(lambda: (status := run.read_status()) and status.state == "finished")


# --- launchers, for real ---


def launched(command: list[str], settings: Settings, tmp_path: Path) -> subprocess.Popen:
    """Start a launcher as the leader of a session of its own."""
    settings["train"]["steps"] = 100_000
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    output = open(tmp_path / "output", "w")  # noqa: SIM115
    return subprocess.Popen(
        [sys.executable, "-m", *command, "train_sd_lora.py", "--config", str(file)],
        cwd=PROJECT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


ACCELERATE = [
    *("accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
]
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


def works(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_ended(trainers: list[psutil.Process]) -> None:
    """Taking Python and its libraries down alone takes seconds on a busy machine."""
    try:
        wait_for(lambda: not any(map(works, trainers)))
    finally:
        for one in filter(works, trainers):
            one.kill()


def assert_ended_and_saved(run: RunFolder, trainers: list[psutil.Process]) -> None:
    until = time.monotonic() + 5
    while run.read_status().state != "stopped" and time.monotonic() < until:
        time.sleep(0.01)
    status = run.read_status()
    assert_ended(trainers)
    assert status.state == "stopped" and run.checkpoint(status.step).is_dir()
    found, rejected = checkpoint.find_newest(run)
    assert found.step == status.step and rejected == []


def slow(number: int) -> object:
    """Ten seconds or more each."""
    return pytest.param(number, marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM), slow(signal.SIGINT)])
def test_a_signal_to_the_launcher_alone_leaves_no_orphan_g4(
    run_settings: Settings, tmp_path: Path, number: int
) -> None:
    run = folder_of(run_settings)
    launcher = launched(ACCELERATE, run_settings, tmp_path)
    wait_for(is_at(run, 3))
    trainers = psutil.Process(launcher.pid).children(recursive=True)
    assert len(trainers) == 1
    launcher.send_signal(number)
    assert_ended_and_saved(run, trainers)
    launcher.wait(SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, slow(signal.SIGTERM)])
def test_a_signal_to_two_processes_and_their_launcher_g3(
    run_settings: Settings, tmp_path: Path, number: int
) -> None:
    """As Ctrl-C in a terminal: the launcher passes on what the trainers have got already."""
    run = folder_of(run_settings)
    launcher = launched(TORCHRUN, run_settings, tmp_path)
    wait_for(is_at(run, 3))
    trainers = psutil.Process(launcher.pid).children(recursive=True)
    assert len(trainers) == 2
    os.killpg(launcher.pid, number)
    assert_ended_and_saved(run, trainers)
    launcher.wait(SECONDS)
    output = (tmp_path / "output").read_text()
    assert "train_sd_lora.py" not in "".join(
        line for line in output.splitlines(True) if line.lstrip().startswith('File "')
    )


def test_a_launcher_that_ends_while_libraries_are_imported_g4(
    run_settings: Settings, tmp_path: Path
) -> None:
    launcher = launched(ACCELERATE, run_settings, tmp_path)
    wait_for(lambda: psutil.Process(launcher.pid).children())
    trainers = psutil.Process(launcher.pid).children()
    wait_for(lambda: trainers[0].num_threads() > 1)  # it watches
    launcher.kill()
    launcher.wait()
    assert_ended(trainers)
    assert not folder_of(run_settings).path.exists()


def test_a_request_is_cheap_to_ask_for(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in stop_request.STOP_SIGNALS}
    try:
        stop, run = StopRequest(), RunFolder(tmp_path)
        stop.watch(run)
        began = time.perf_counter()
        assert not any(stop.requested for _ in range(10_000))
        assert time.perf_counter() - began < 0.5
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
