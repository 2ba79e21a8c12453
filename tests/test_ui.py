"""The app without a browser: form fields, the trainer's process, handlers, server."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from lora_sd.config import Config, config_from_values
from lora_sd.errors import DataError, RunError, UserError
from lora_sd.run_folder import RunFolder, Status
from lora_sd.ui import adapters, fields, launch, pictures
from lora_sd.ui.generate_handlers import GenerateHandlers
from lora_sd.ui.launch import PROJECT, Trainer
from lora_sd.ui.loss_curve import loss_curve
from lora_sd.ui.run_view import card_html, duration, read_run
from lora_sd.ui.server import OwnPagesOnly
from lora_sd.ui.train_handlers import TrainHandlers

# As `accelerate launch` does: starts the trainer, waits, and leaves it behind when killed.
FAKE_LAUNCHER = "import subprocess, sys; sys.exit(subprocess.Popen(sys.argv[1:]).wait())"
FAKE_TRAINER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(PROJECT)!r})
from pathlib import Path
from lora_sd.config import config_from_values, read_yaml
from lora_sd.run_folder import RunFolder, Status, create_run
flag, path = sys.argv[1:]
resumed = flag == "--resume"
config = config_from_values(read_yaml(Path(path) / "config.yaml" if resumed else Path(path)))
if config.adapter.rank > 100:
    print("error: 'adapter.rank' is too large for this model.", file=sys.stderr)
    sys.exit(2)
if config.adapter.rank == 77:
    sys.exit("something nobody foresaw")
root = Path(config.output.folder)
run = RunFolder(path) if resumed else create_run(root, config.output.name, "run", config.to_yaml())
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1) if config.train.seed != 13 else None)
status = run.read_status() if resumed else Status("starting", 0, config.train.steps)
status.state = "training"
while status.step < config.train.steps and not stop:
    time.sleep(0.05)
    status.step += 1
    run.append_metrics({{"step": status.step, "loss": 1 / status.step, "lr": 1e-3, "grad_norm": 1.0,
                        "images_per_s": 8.0, "seconds": 0.05 * status.step}})
    run.write_status(status)
status.state = "stopped" if stop else "finished"
run.write_status(status)
sys.exit(75 if stop else 0)
"""


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    script = tmp_path / "fake_trainer.py"
    script.write_text(FAKE_TRAINER)
    command = [sys.executable, "-c", FAKE_LAUNCHER, sys.executable, str(script)]
    trainer = Trainer(tmp_path / "outputs", command)
    yield trainer
    for process in _trainers(trainer):
        process.kill()


def config(outputs: Path, name: str = "run", **train: Any) -> Config:
    rank = train.pop("rank", 8)
    return config_from_values(
        {
            "train": {"steps": 4000, **train},
            "adapter": {"rank": rank},
            "output": {"folder": str(outputs), "name": name},
        }
    )


def wait_for(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def state(trainer: Trainer, name: str = "run") -> str:
    return read_run(trainer, name).badge


def _trainers(trainer: Trainer) -> list[psutil.Process]:
    """Living processes that work in this test's folder, and zombies among our children."""
    mine = [c for c in psutil.Process().children(recursive=True) if c.pid != os.getpid()]
    return [
        p
        for p in mine
        if p.status() == psutil.STATUS_ZOMBIE or str(trainer.outputs.parent) in str(p.cmdline())
    ]


# --- form fields ---


@pytest.mark.parametrize("file", [None, *sorted((PROJECT / "configs").glob("*.yaml"))])
def test_every_setting_survives_the_form(file: Path | None) -> None:
    from lora_sd.config import read_yaml

    before = config_from_values(read_yaml(file)) if file else Config()
    values = fields.form_values(before, fields.FIELDS)
    form = {name: fields.component(name, values[name]).value for name in fields.FIELDS}
    assert fields.config_from_form(form) == before


def test_help_and_range_are_those_of_the_config() -> None:
    component = fields.component("adapter.rank", 8)
    assert component.label == "Rank"
    assert component.info == (
        "Inner size of the adapter in linear layers and 1x1 convolutions. 1 to 1024."
    )
    assert fields.help_text("train.learning_rate").endswith("Above 0 to 10.")


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("train.steps", math.nan, "'Steps' must be a finite number."),
        ("train.steps", True, "'Steps' is empty: write a number."),
        ("train.steps", None, "'Steps' is empty: write a number."),
        ("train.steps", 2.7, "'Steps' is 2.7, but must be a whole number."),
        ("train.steps", 0, "'Steps' is 0: input should be greater than or equal to 1."),
        ("train.steps", [3], "'Steps' is empty: write a number."),
        ("train.schedule", "sideways", "'Schedule' is 'sideways': input should be 'cosine' or"),
        ("train.gradient_checkpointing", "yes", "'Gradient checkpointing' must be on or off."),
        ("base.model", ["a"], "'Base model' must be text."),
        ("base.model", "x" * 30_000, "'Base model' is too long"),
        ("sample.scales", "0, one", "'Scales' holds 'one', which is no number."),
        ("output.name", "../x", "'Name of the run' is '../x'"),
    ],
)
def test_what_the_browser_sends_is_checked(name: str, wrong: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        fields.config_from_form({name: wrong})
    assert caught.value.problems[0].startswith(sentence)


# --- the trainer's process ---


def test_a_run_is_started_watched_and_finishes(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs, steps=3))
    assert trainer.current() == "run"
    assert state(trainer) == "Starting"
    wait_for(lambda: state(trainer) == "Finished")
    wait_for(lambda: trainer.current() is None)
    view = read_run(trainer, "run")
    assert (view.step, view.steps, len(view.losses)) == (3, 3, 3)
    assert not view.can_stop and not view.can_resume
    assert _trainers(trainer) == []


def test_stop_saves_resume_goes_on_and_nothing_is_left_behind(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    wait_for(lambda: state(trainer) == "Training")
    trainer.stop("run")
    assert state(trainer) in ("Stopping", "Stopped")
    wait_for(lambda: state(trainer) == "Stopped")
    wait_for(lambda: _trainers(trainer) == [])
    stopped_at = read_run(trainer, "run").step
    trainer.resume("run")
    wait_for(lambda: read_run(trainer, "run").step > stopped_at)
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Stopped" and _trainers(trainer) == [])


def test_a_second_start_is_refused_by_this_app_and_by_another(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    for each in (trainer, Trainer(trainer.outputs, ["false"])):
        with pytest.raises(RunError, match="'run' is being trained"):
            each.start(config(trainer.outputs, "other"))
    trainer.stop("run")
    wait_for(lambda: trainer.current() is None)


def test_of_many_starts_at_once_one_trains(trainer: Trainer) -> None:
    done: list[str] = []

    def start(number: int) -> None:
        try:
            done.append(trainer.start(config(trainer.outputs, f"run-{number}")))
        except RunError as error:
            done.append(str(error))

    threads = [threading.Thread(target=start, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = [one for one in done if " " not in one]
    assert len(done) == 8 and len(started) == 1
    trainer.stop(started[0])
    wait_for(lambda: trainer.current() is None)


def test_a_restarted_app_finds_its_trainer_and_can_stop_it(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs))
    again = Trainer(trainer.outputs)
    assert again.current() == "run"
    wait_for(lambda: state(again) == "Training")
    again.stop("run")
    wait_for(lambda: state(again) == "Stopped")


def test_a_trainer_that_does_not_stop_is_killed(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "KILL_AFTER_S", 0.5)
    trainer.start(config(trainer.outputs, seed=13))
    wait_for(lambda: state(trainer) == "Training")
    trainer.stop("run")
    wait_for(lambda: state(trainer) == "Interrupted")
    wait_for(lambda: _trainers(trainer) == [])
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


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "asleep"}', '{"state": 3}'])
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
    assert trainer.free_name("fox") == "fox-2"
    assert trainer.free_name("datasets") == "datasets-2"
    assert trainer.free_name("../ü") == "run"
    for taken in ("fox", "datasets"):
        with pytest.raises(RunError, match="already"):
            trainer.start(config(trainer.outputs, taken))


# --- what is shown ---


def test_loss_curve_ends_at_the_last_step_and_skips_what_is_no_number() -> None:
    html = loss_curve([(1, 1.0), (2, math.nan), (3, 0.5)], 6)
    assert "at step 3" in html and "nan" not in html
    assert 'style="left:50.0%' in html
    assert loss_curve([], 10) == ""
    assert html.count("<polyline") == 2


def test_a_long_curve_stays_small() -> None:
    assert len(loss_curve([(n, 1 / n) for n in range(1, 100_000)], 100_000)) < 20_000


def test_card_escapes_what_a_run_says(trainer: Trainer) -> None:
    run = RunFolder(trainer.outputs / "run")
    run.path.mkdir(parents=True)
    run.write_status(Status("failed", 3, 10, "<img src=x onerror=alert(1)>"))
    assert "<img" not in card_html(read_run(trainer, "run"))


def test_durations() -> None:
    assert [duration(s) for s in (5, 65, 900, 7500)] == ["5 s", "1 min 5 s", "15 min", "2 h 5 min"]


# --- the Train tab ---


@pytest.fixture
def handlers(trainer: Trainer) -> TrainHandlers:
    return TrainHandlers(trainer.outputs, None, trainer)


def form(handlers: TrainHandlers, **changes: Any) -> dict[str, Any]:
    start = handlers.starting_config()
    values = fields.form_values(start, fields.FIELDS)
    shown = {name: fields.component(name, values[name]).value for name in fields.FIELDS}
    return shown | {name.replace("__", "."): value for name, value in changes.items()}


def test_start_trains_the_example(handlers: TrainHandlers) -> None:
    started = handlers.start(form(handlers, train__steps=2), "folder", "example/ink-icons", {})
    assert started.problems == [] and started.run == "ink-icons"
    wait_for(lambda: state(handlers.trainer, "ink-icons") == "Finished")
    assert handlers.run_names() == ["ink-icons"]
    view = handlers.look(None)
    assert view and view.name == "ink-icons"


@pytest.mark.parametrize("folder", ["../..", "/etc", "example/../..", None, ["example"], 3])
def test_only_offered_folders_are_read(handlers: TrainHandlers, folder: Any) -> None:
    started = handlers.start(form(handlers), "folder", folder, {})
    assert started.run is None
    assert started.problems == ["Choose a folder of pictures, or upload some."]
    assert handlers.show_folder(folder).pairs == []


def test_all_problems_come_at_once_and_nothing_is_started(handlers: TrainHandlers) -> None:
    wrong = form(handlers, train__steps=0, adapter__rank=-1)
    started = handlers.start(wrong, "folder", "nowhere", {})
    assert started.run is None and len(started.problems) == 3
    assert handlers.trainer.current() is None and not handlers.outputs.exists()


def test_folders_of_runs_and_pictures_are_not_the_browsers_to_choose(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    sent = form(handlers, output__folder=str(tmp_path / "elsewhere"), data__folder="/etc")
    handlers.start(sent | {"train.steps": 1}, "folder", "example/ink-icons", {})
    text = (handlers.outputs / ".app" / "ink-icons.yaml").read_text()
    assert "elsewhere" not in text and "/etc" not in text
    wait_for(lambda: handlers.trainer.current() is None)


def upload(tmp_path: Path) -> list[str]:
    folder = tmp_path / "uploaded"
    folder.mkdir()
    for name in ("fox.png", "my owl.png"):
        Image.new("RGB", (80, 64), "orange").save(folder / name)
    (folder / "fox.txt").write_text("a fox\n")
    return [str(file) for file in sorted(folder.iterdir())]


def test_uploads_become_a_data_set_with_the_captions_of_the_table(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    files = upload(tmp_path)
    shown = handlers.show_upload(files)
    assert [(file.name, caption) for file, caption in shown.pairs] == [
        ("fox.png", "a fox"),
        ("my owl.png", ""),
    ]
    table = [["fox.png", "a red fox"], ["my owl.png", "an\nowl"], ["../x", "y"]]
    sent = {"name": "forest", "files": files, "captions": table}
    started = handlers.start(form(handlers, train__steps=1), "upload", None, sent)
    assert started.problems == [] and started.run == "forest"
    saved = handlers.outputs / "datasets" / "forest"
    assert sorted(file.name for file in saved.iterdir()) == [
        "fox.png", "fox.txt", "my-owl.png", "my-owl.txt",
    ]  # fmt: skip
    assert (saved / "fox.txt").read_text() == "a red fox\n"
    assert (saved / "my-owl.txt").read_text() == "an owl\n"
    assert "mine/forest" in [one.id for one in handlers.folders()]
    wait_for(lambda: handlers.trainer.current() is None)
    again = handlers.start(form(handlers), "upload", None, sent)
    assert again.problems == ["There is a data set 'forest' already. Choose another name."]


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "x" * 70, None])
def test_data_sets_have_safe_names(handlers: TrainHandlers, tmp_path: Path, name: Any) -> None:
    sent = {"name": name, "files": upload(tmp_path), "captions": None}
    started = handlers.start(form(handlers), "upload", None, sent)
    assert started.run is None and "Name the data set" in " ".join(started.problems)
    assert not (handlers.outputs / "datasets").exists() or not any(
        (handlers.outputs / "datasets").iterdir()
    )


def test_bad_uploads_are_named_all_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "u"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    for name in ("broken.png", "notes.pdf", "lonely.txt"):
        (folder / name).write_text("text")
    with pytest.raises(DataError) as caught:
        pictures.match_uploads(sorted(folder.iterdir()))
    said = " ".join(caught.value.problems)
    assert all(word in said for word in ("'a'", "'broken.png'", "'notes.pdf'", "'lonely.txt'"))


@pytest.mark.parametrize("run", ["../run", "", None, 3, "no-such-run"])
def test_stop_and_resume_take_only_names_of_runs(handlers: TrainHandlers, run: Any) -> None:
    assert handlers.stop(run) and handlers.resume(run)


# --- the Generate tab ---


def wish(**changes: Any) -> dict[str, Any]:
    plain = {
        "adapter": "run", "scale": 1.0, "prompt": "a fox", "negative": "", "seed": 1,
        "steps": 2, "guidance": 4.0, "base": "tiny-sd",
    }  # fmt: skip
    return plain | changes


def finished_run(outputs: Path, name: str = "run") -> RunFolder:
    """A run whose adapter changes pictures: random, for tiny-sd."""
    import torch

    from lora_sd import inject
    from lora_sd.base_model import load_base_model
    from lora_sd.formats import save_adapter

    run = RunFolder(outputs / name)
    run.path.mkdir(parents=True)
    run.config_file.write_text("base: {model: tiny-sd}\nsample: {prompts: [an owl]}\n")
    base = load_base_model("tiny-sd", torch.device("cpu"), torch.float32)
    plans = inject.choose_layers(base.unet, "attention", 4, 4.0, 4, 4.0)
    layers = inject.attach(base.unet, plans)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_up.weight, std=0.3)
    save_adapter(inject.collect(base.unet), run.adapter_file)
    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": "/etc/passwd"}, "Choose an adapter"),
        ({"adapter": "../run"}, "Choose an adapter"),
        ({"adapter": ["run"]}, "Choose an adapter"),
        ({"scale": math.nan}, "Scale must be a number from 0 to 1.5."),
        ({"scale": 9}, "Scale must"),
        ({"scale": True}, "Scale must"),
        ({"seed": -1}, "Seed must be a whole number"),
        ({"seed": 1.5}, "Seed must"),
        ({"seed": None}, "Seed must"),
        ({"steps": 10_000}, "Steps must"),
        ({"guidance": "much"}, "Guidance must"),
        ({"prompt": 3}, "The prompt must"),
        ({"prompt": "x" * 5000}, "The prompt must"),
    ],
)
def test_wishes_are_checked(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config_file.write_text("{}")
    run.adapter_file.write_bytes(b"")
    with pytest.raises(UserError, match=words) as caught:
        GenerateHandlers(tmp_path).request(wish(**changes))
    assert len(caught.value.problems) == 1


def test_pictures_by_scale_and_uploads(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    handlers = GenerateHandlers(tmp_path)
    counted: list[int] = []

    def count(done: int, total: int) -> bool:
        counted.append(done)
        return False

    before, after = handlers.before_and_after(handlers.request(wish()), count)
    assert before.tobytes() != after.tobytes() and len(counted) == 4
    assert json.loads(after.info["lora_sd"])["scale"] == 1.0

    # another scale draws only the picture that is new, and scale 0 is the base itself
    counted.clear()
    again, _ = handlers.before_and_after(handlers.request(wish(scale=0.5)), count)
    assert again.tobytes() == before.tobytes() and len(counted) == 2
    off, on = handlers.before_and_after(handlers.request(wish(scale=0)), count)
    assert off.tobytes() == on.tobytes() == before.tobytes()
    strip = handlers.strip(handlers.request(wish()), count)
    assert strip.width > 5 * before.width

    # a file from elsewhere is kept under a safe name, drawn with, and offered by id
    sent = tmp_path / "My adapter (1).safetensors"
    sent.write_bytes(run.adapter_file.read_bytes())
    added = handlers.add_file(str(sent), "tiny-sd")
    assert added.id == "upload:My-adapter-1"
    _, same = handlers.before_and_after(handlers.request(wish(adapter=added.id)), count)
    assert same.tobytes() == after.tobytes()

    # one that is none is refused without its path, and not kept
    sent.write_bytes(b"pickle" * 100)
    with pytest.raises(UserError) as caught:
        handlers.add_file(str(sent), "tiny-sd")
    assert str(tmp_path) not in str(caught.value) and sent.name in str(caught.value)
    assert len(adapters.offered_adapters(tmp_path)) == 2
    with pytest.raises(UserError, match="base model"):
        handlers.add_file(str(sent), "no-such-model")


def test_downloads_are_copies_under_the_runs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    run = RunFolder(tmp_path / "outputs" / "fox")
    run.checkpoint(100).mkdir(parents=True)
    run.config_file.write_text("base: {model: tiny-sd}")
    for file in (run.adapter_file, run.checkpoint(100) / "adapter.safetensors"):
        file.write_bytes(file.parent.name.encode())
    offered = adapters.offered_adapters(tmp_path / "outputs")
    assert [one.id for one in offered] == ["fox", "fox/step_000100"]
    copies = [adapters.download_copy(one) for one in offered]
    assert [copy.name for copy in copies] == ["fox.safetensors", "fox-step_000100.safetensors"]
    assert copies[0].read_bytes() == b"fox"
    assert all(copy.is_relative_to(tmp_path / "cache") for copy in copies)


# --- the server ---


def test_the_page_is_built_without_torch() -> None:
    code = (
        "import sys, pathlib; from lora_sd.ui.page import build_page; "
        "build_page(pathlib.Path('no-such-outputs')); "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "192.168.1.5"}, 200),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:7860"}, 403),
        ({"host": ""}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8000"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
    ],
)
def test_other_sites_are_refused(headers: dict[str, str], status: int) -> None:
    import asyncio

    async def ask() -> int:
        transport = httpx.ASGITransport(OwnPagesOnly(_app, "127.0.0.1"))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.post("/upload", headers=headers)).status_code

    assert asyncio.run(ask()) == status


def test_a_taken_port_and_a_wrong_folder_are_sentences(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (tmp_path / "file").touch()
        for arguments, words in (
            (["--port", port, "--outputs", str(tmp_path)], f"error: Port {port} of"),
            (["--port", "99999", "--outputs", str(tmp_path)], "error: Port 99999 of"),
            (["--outputs", str(tmp_path / "file")], "cannot be used"),
            (["--pictures", str(tmp_path / "none")], "is not a folder"),
        ):
            done = subprocess.run(
                [sys.executable, "app.py", *arguments], cwd=PROJECT, capture_output=True, text=True
            )
            assert done.returncode == 2, done.stderr
            assert words in done.stderr and "Traceback" not in done.stderr
