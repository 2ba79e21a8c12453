"""A run that goes on is the same run, to the bit, or says why it is not.

The letters are rows of the table of faults: A crash and resume, G processes.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from test_full_disk import losses, plain, saved, straight

import train_sd_lora
from lora_sd import changes, checkpoint, resume
from lora_sd import train as trainer
from lora_sd.config import Config, config_from_values, parse_command_line
from lora_sd.data.training_data import TrainingData
from lora_sd.errors import EXIT_RESUMABLE, ConfigError, RunError
from lora_sd.run_folder import RunFolder, create_run
from lora_sd.run_record import RunRecord

Settings = dict[str, dict]


def go_on(run: RunFolder, *arguments: str) -> int:
    return train_sd_lora.main(["--resume", str(run.path), *arguments])


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch):
    """A set of steps; the trainer gets a signal when one of them is done."""
    steps: set[int] = set()
    append = RunFolder.append_metrics

    def append_and_stop(self: RunFolder, values: dict) -> None:
        append(self, values)
        if values["step"] in steps:
            steps.discard(values["step"])
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "append_metrics", append_and_stop)
    return steps


def stopped(settings: Settings, stop_at: set[int], *steps: int) -> RunFolder:
    """A run that was stopped at each of the steps, and went on in between."""
    stop_at |= set(steps)
    run = RunFolder(Path(settings["output"]["folder"]) / settings["output"]["name"])
    assert trainer.train(config_from_values(settings), "run") == EXIT_RESUMABLE
    for _ in steps[1:]:
        assert go_on(run) == EXIT_RESUMABLE
    return run


def rates(run: RunFolder) -> list[float]:
    return [record["lr"] for record in run.read_metrics()]


def content(run: RunFolder, *but: Path) -> dict[Path, bytes]:
    files = [file for file in run.path.rglob("*") if file.is_file() and file not in but]
    return {file: file.read_bytes() for file in files}


def shown_pictures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What steps see from now on: pictures, captions, timesteps, noise."""
    seen: list[object] = []
    batches = TrainingData.batches

    def noting(self, step, *arguments):
        found = batches(self, step, *arguments)
        seen.extend((step, plain(vars(batch) | {"text": None})) for batch in found)
        return found

    monkeypatch.setattr(TrainingData, "batches", noting)
    return seen


@pytest.mark.parametrize("stops", [(3,), (2, 4), (1, 2, 3, 4, 5)])
def test_the_same_to_the_bit_a9_a14(
    run_settings: Settings, stop_at: set[int], monkeypatch: pytest.MonkeyPatch, stops
) -> None:
    """Six steps of four pictures, of which there are five: saved at the first step, within epochs,
    at their first and last steps; resumed once, twice and five times."""
    run_settings["train"]["gradient_accumulation"] = 2
    run_settings["adapter"] |= {"dropout": 0.1, "module_dropout": 0.1, "text_encoder": True}
    run_settings["data"] |= {"flip": True, "caption_dropout": 0.3}
    seen = shown_pictures(monkeypatch)
    whole = straight(run_settings)
    expected = seen.copy()
    seen.clear()
    run = stopped(run_settings, stop_at, *stops)
    assert go_on(run) == 0
    assert seen == expected
    assert losses(run) == losses(whole) and rates(run) == rates(whole)
    assert saved(run, 6) == saved(whole, 6)
    assert run.adapter_file.read_bytes() == whole.adapter_file.read_bytes()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "cosine_with_restarts"])
def test_learning_rates_go_on_a10(run_settings: Settings, stop_at: set[int], schedule: str) -> None:
    """Stopped while they rise and after that."""
    run_settings["optimizer"] |= {"schedule": schedule, "warmup_steps": 3, "schedule_cycles": 2}
    whole = straight(run_settings)
    run = stopped(run_settings, stop_at, 2, 5)
    assert go_on(run) == 0
    assert rates(run) == rates(whole) and saved(run, 6) == saved(whole, 6)


def test_a_longer_run_goes_on_at_its_own_rates_a11(run_settings: Settings) -> None:
    """Those of a run that was of that length from the start; never 0, where the short one ended."""
    run_settings["train"]["steps"] = 9
    long = straight(run_settings)
    run_settings["train"]["steps"] = 4
    run_settings["output"]["folder"] += "-short"
    run = straight(run_settings)
    short = run.adapter_file.read_bytes()
    with pytest.raises(RunError, match=r"'train.steps' was 4 and is now 9.*allow-change train.ste"):
        go_on(run, "--train.steps", "9")
    assert go_on(run, "--train.steps", "9", "--allow-change", "train.steps") == 0
    assert rates(run)[4:] == rates(long)[4:] and min(rates(run)[4:]) > 0
    assert run.adapter_file.read_bytes() != short and run.read_status().step == 9
    assert yaml.safe_load(run.config_file.read_text())["train"]["steps"] == 9
    noted = json.loads(run.changes_file.read_text())
    assert [(one["at_step"], one["name"], one["was"], one["now"]) for one in noted] == [
        (4, "train.steps", 4, 9)
    ]


def test_what_was_allowed_once_stays_allowed(run_settings: Settings, stop_at: set[int]) -> None:
    """Killed before the first save after a change, it goes on without being asked again."""
    run = stopped(run_settings, stop_at, 3)
    crash = ["--train.steps", "9", "--allow-change", "train.steps"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingData, "encode", None)
        with pytest.raises(TypeError):
            go_on(run, *crash)
    assert go_on(run) == 0 and run.read_status().step == 9
    with pytest.raises(RunError, match="was 9 and is now 12"):
        go_on(run, "--train.steps", "12")


def test_fewer_steps_than_are_done_are_refused_a11(run_settings: Settings) -> None:
    run = straight(run_settings)
    before = content(run, run.log_file)
    with pytest.raises(RunError, match="stands at step 6 already, beyond the 3"):
        go_on(run, "--train.steps", "3", "--allow-change", "train.steps")
    assert content(run, run.log_file) == before


CHANGED = {
    "optimizer.learning_rate": "0.02",
    "optimizer.weight_decay": "0.5",
    "train.seed": "7",
    "train.batch_size": "1",
    "data.flip": "true",
    "adapter.dropout": "0.5",
    "objective.weighting": "min_snr",
    "memory.channels_last": "true",
}
FIXED = {
    "adapter.rank": "3",
    "adapter.alpha": "1",
    "adapter.preset": "full",
    "optimizer.name": "lion",
    "optimizer.block_learning_rates": "block:mid=0.5",
    "train.ema_decay": "0.9",
    "output.name": "other",
}


def flags(settings: dict[str, str]) -> list[str]:
    pairs = [[f"--{name}"] + [value] * (value != "true") for name, value in settings.items()]
    return [text for pair in pairs for text in pair]


def test_every_changed_setting_is_named_a12(run_settings: Settings, stop_at: set[int]) -> None:
    run = stopped(run_settings, stop_at, 3)
    before = content(run)
    with pytest.raises(RunError) as caught:
        go_on(run, *flags(CHANGED | FIXED))
    said = "\n".join(caught.value.problems)
    assert [name for name in CHANGED | FIXED if f"'{name}' was" not in said] == []
    asked = said.partition("--allow-change ")[2].rstrip(".").split(",")
    assert set(asked) == set(CHANGED)
    assert content(run) == before
    values = yaml.safe_load(run.config_file.read_text())  # the same by hand
    values["optimizer"]["learning_rate"] = 0.02
    run.config_file.write_text(yaml.safe_dump(values))
    with pytest.raises(RunError, match="'optimizer.learning_rate' was 0.01 and is now 0.02"):
        go_on(run)


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_change_is_refused_even_if_allowed(tmp_path: Path, name: str) -> None:
    run = create_run(tmp_path, "run", "run", Config().to_yaml())
    with pytest.raises(RunError, match=f"'{name}' was .* or start a new run") as caught:
        go_on(run, *flags({name: FIXED[name]}), "--allow-change", name)
    assert "--allow-change" not in str(caught.value)


def test_allowed_changes_count(run_settings: Settings, stop_at: set[int]) -> None:
    run = stopped(run_settings, stop_at, 3)
    assert go_on(run, *flags(CHANGED), "--allow-change", ",".join(CHANGED)) == 0
    last = run.read_metrics()[-1]
    assert last["step"] == 6 and rates(run)[3] > 0.01
    for name in CHANGED:
        assert f"'{name}' was" in run.log_file.read_text()
    assert {one["name"] for one in changes.read(run)} == set(CHANGED)


def test_what_changes_nothing_that_is_learned_is_free(
    run_settings: Settings, stop_at: set[int], tmp_path: Path
) -> None:
    whole = straight(run_settings)
    run = stopped(run_settings, stop_at, 3)
    folder = Path(run_settings["data"]["folder"])
    folder.rename(tmp_path / "moved")
    model = shutil.copytree(run_settings["base"]["model"], tmp_path / "model")
    free = {
        "data.folder": str(tmp_path / "moved"),
        "data.cache": "memory",
        "base.model": str(model),
        "sample.prompts": "a red wall",
        "sample.steps": "2",
        "sample.every_steps": "4",
        "output.save_every_steps": "1",
        "output.keep_checkpoints": "3",
        "memory.gradient_checkpointing": "true",
    }
    assert go_on(run, *flags(free)) == 0
    assert saved(run, 6)[1] == saved(whole, 6)[1] and losses(run) == losses(whole)
    assert len(list(run.checkpoints.iterdir())) == 3 and not run.changes_file.exists()
    assert yaml.safe_load(run.config_file.read_text())["output"]["save_every_steps"] == 1


def test_free_settings_exist() -> None:
    known = {
        f"{group}.{name}" for group, values in Config().model_dump().items() for name in values
    }
    assert {name for name in changes.FREE if not name.endswith(".")} <= known


def test_a_finished_run_is_not_written_to_a13(run_settings: Settings, caplog) -> None:
    run = straight(run_settings)
    before = content(run, run.log_file, run.lock_file)
    times = {file: file.stat().st_mtime_ns for file in before}
    assert go_on(run) == 0
    assert "complete already" in run.log_file.read_text()
    assert content(run, run.log_file, run.lock_file) == before
    assert {file: file.stat().st_mtime_ns for file in before} == times


def test_the_first_step_after_it_uses_what_was_loaded_a16(
    run_settings: Settings, stop_at: set[int]
) -> None:
    run = stopped(run_settings, stop_at, 3, 4)
    before, after = saved(run, 3), saved(run, 4)
    moments = after[1]["optimizer"]["state"].values()
    assert all(any(one["exp_avg"][1]) and any(one["exp_avg_sq"][1]) for one in moments)
    factors = [name for name in before[0] if not name.endswith("alpha")]
    assert [name for name in factors if before[0][name] == after[0][name]] == []


def test_changed_pictures_are_named_a19(run_settings: Settings, stop_at: set[int]) -> None:
    run = stopped(run_settings, stop_at, 3)
    folder = Path(run_settings["data"]["folder"])
    (folder / "1.png").unlink()
    Image.new("RGB", (16, 16), "pink").save(folder / "2.png")
    (folder / "3.txt").write_text("another wall")
    Image.new("RGB", (16, 16), "gray").save(folder / "new.png")
    (folder / "new.txt").write_text("a gray wall")
    before = content(run, run.log_file, run.lock_file)
    with pytest.raises(RunError) as caught:
        go_on(run)
    said = str(caught.value)
    assert "'new.png' were added; '1.png' were removed; '2.png' and '3.png' were changed" in said
    assert said.endswith("--allow-change data.")
    assert content(run, run.log_file, run.lock_file) == before
    assert go_on(run, "--allow-change", "data") == 0
    assert run.read_status().step == 6


def test_another_base_model_is_named_a12(run_settings: Settings, stop_at: set[int]) -> None:
    run = stopped(run_settings, stop_at, 3)
    other = shutil.copytree(run_settings["base"]["model"], run.path.parent / "other")
    weights = next((other / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunError, match="base model has changed.*--allow-change base"):
        go_on(run, "--base.model", str(other))
    assert go_on(run, "--base.model", str(other), "--allow-change", "base") == 0


def test_other_versions_are_told_a20(
    run_settings: Settings, stop_at: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(run_settings, stop_at, 3)
    now = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: {**now, "torch": "9.9"})
    assert go_on(run) == 0
    assert f"torch {now['torch']} then and 9.9 now" in run.log_file.read_text()
    manifest = json.loads((run.checkpoint(6) / checkpoint.MANIFEST).read_text())
    assert manifest["versions"]["torch"] == "9.9"


def test_leftovers_are_removed_under_the_lock_and_counted_a21(
    run_settings: Settings, stop_at: set[int]
) -> None:
    run = stopped(run_settings, stop_at, 3)
    (run.checkpoints / ".tmp-step_000004-0-1-2").mkdir()
    (run.path / ".tmp-metrics.jsonl-0-1-2").touch()
    run.lock_file.write_text("999999")  # of a process that is no more
    with RunRecord(run, 6, True):
        with pytest.raises(RunError, match="by process"):
            go_on(run)
        assert (run.path / ".tmp-metrics.jsonl-0-1-2").exists()
    assert go_on(run) == 0
    assert "Removed 2 unfinished files" in run.log_file.read_text()
    assert list(run.path.rglob(".tmp*")) == []


def test_the_one_who_has_locked_it_is_named_a22(run_settings: Settings, stop_at: set[int]) -> None:
    """Even before it has written a status of its own."""
    run = stopped(run_settings, stop_at, 3)
    status = run.read_status()
    values = {**vars(status), "pid": 999_999}
    run.status_file.write_text(json.dumps(values))
    with RunRecord(run, 6, True), pytest.raises(RunError, match=f"by process {os.getpid()} now"):
        go_on(run)


def test_a_state_that_does_not_fit_is_a_sentence(
    run_settings: Settings, stop_at: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(run_settings, stop_at, 3)
    found, _ = checkpoint.find_newest(run)
    state = found.state(torch.device("cpu"))
    for wrong, said in [
        ({**state, "ema": {}}, "holds a state of 'ema', unknown here"),
        (
            {name: one for name, one in state.items() if name != "optimizer"},
            "lacks the state of 'optimizer'",
        ),
        ({**state, "optimizer": {}}, "does not fit"),
        ({**state, "schedule": 3}, "does not fit"),
    ]:
        monkeypatch.setattr(checkpoint.Checkpoint, "state", lambda *_, wrong=wrong: wrong)
        with pytest.raises(RunError, match=f"'{found.folder}' {said}.*of another version"):
            go_on(run)


def test_a_damaged_one_is_set_aside_and_two_good_ones_stay(
    run_settings: Settings, stop_at: set[int]
) -> None:
    run = stopped(run_settings, stop_at, 5)
    (run.checkpoint(5) / checkpoint.STATE).write_bytes(b"")
    assert go_on(run) == 0
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == [
        "damaged_step_000005", "step_000004", "step_000006",
    ]  # fmt: skip
    assert "state.pt is damaged" in run.log_file.read_text()


def test_checkpoints_that_were_taken_away_do_not_make_a_new_run(
    run_settings: Settings, stop_at: set[int]
) -> None:
    run = stopped(run_settings, stop_at, 5)
    shutil.rmtree(run.checkpoints)
    before = content(run, run.log_file, run.lock_file)
    with pytest.raises(RunError, match="was at step 5, and its checkpoints have gone"):
        go_on(run)
    assert content(run, run.log_file, run.lock_file) == before


def test_what_is_no_run_is_told_a8(tmp_path: Path) -> None:
    run = create_run(tmp_path, "run", "run", Config().to_yaml())
    adapter, text = tmp_path / "a.safetensors", tmp_path / "notes.txt"
    adapter.touch()
    text.touch()
    run.checkpoint(2).mkdir()
    (tmp_path / "pictures").mkdir()
    for path, said in [
        (tmp_path / "rum", f"There is no run '.*rum'. That folder holds the runs '{run.path}'"),
        (tmp_path / "no" / "where", "There is no run '.*where'.$"),
        (adapter, "is an adapter, and --resume wants the folder of a run. --like takes"),
        (text, "is a file, and --resume wants"),
        (run.checkpoint(2), f"is a part of the run '{run.path}'"),
        (run.checkpoints, f"is a part of the run '{run.path}'"),
        (tmp_path, f"holds runs: give one of '{run.path}'"),
        (tmp_path / "pictures", "holds no config.yaml"),
    ]:
        with pytest.raises(RunError, match=said):
            train_sd_lora.main(["--resume", str(path)])
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "a.safetensors", "notes.txt", "pictures", "run",
    ]  # fmt: skip


def test_how_changes_are_allowed_on_the_command_line() -> None:
    line = parse_command_line(
        ["--resume", "x", "--allow-change", "train.steps, data", "--allow-change", "base"], "p"
    )
    assert line.allowed == {"train.steps", "data", "base"}
    with pytest.raises(ConfigError, match="no setting 'train.step'. Did you mean 'train.steps'"):
        parse_command_line(["--resume", "x", "--allow-change", "train.step"], "p")
    with pytest.raises(ConfigError, match="give --resume, too"):
        parse_command_line(["--allow-change", "data"], "p")


def test_more_processes_are_a_change_only_where_a_step_holds_more() -> None:
    def identity(pictures: int, batch: int) -> checkpoint.Identity:
        train = {"batch_size": batch, "gradient_accumulation": 1}
        return checkpoint.Identity({"train": train}, {}, "base", pictures)

    found = [one.name for one in resume._changes(identity(2, 1), identity(1, 1))]
    assert found == ["processes"]
    found = [one.name for one in resume._changes(identity(2, 1), identity(2, 2))]
    assert found == ["train.batch_size"]
    found = [one.name for one in resume._changes(identity(2, 1), identity(4, 2))]
    assert found == ["train.batch_size"]


def test_what_a_kill_left_half_removed_goes_when_the_run_goes_on(run_settings, stop_at):
    run = stopped(run_settings, stop_at, 5)
    half = run.checkpoint(1)
    shutil.copytree(run.checkpoint(4), half)
    (half / "adapter.safetensors").unlink()
    assert go_on(run) == 0
    assert not half.exists() and run.checkpoint(6).is_dir()
    shutil.copytree(run.checkpoint(6), half)
    assert go_on(run) == 0  # complete already
    assert not half.exists()


def test_precision_that_was_left_to_the_launcher_is_part_of_the_run(
    run_settings: Settings, stop_at: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(True)  # as in a process of its own
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = stopped(run_settings, stop_at, 3)
    AcceleratorState._reset_state(True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    with pytest.raises(RunError, match="'train.mixed_precision' was 'bf16' and is now 'no'"):
        go_on(run)
