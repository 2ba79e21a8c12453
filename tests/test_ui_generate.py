"""The Generate tab: its handlers, and the adapters it offers."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_sd import inject, layer_choice, layer_names
from lora_sd.base_loading import load_base_model
from lora_sd.errors import UserError
from lora_sd.formats import save_adapter
from lora_sd.run_folder import RunFolder
from lora_sd.ui.adapters import offered as adapters
from lora_sd.ui.generate.handlers import BY_HAND, GenerateHandlers
from lora_sd.ui.launch import Trainer
from lora_sd.ui.workplace import Workplace


def wish(**changes: Any) -> dict[str, Any]:
    plain = {
        "adapter": "run", "scale": 1.0, "prompt": "a fox", "negative": "", "seed": 1,
        "steps": 2, "guidance": 4.0, "base": "tiny-sd",
    }  # fmt: skip
    return plain | changes


def finished_run(outputs: Path, name: str = "run") -> RunFolder:
    """A run whose adapter changes pictures: random, for tiny-sd."""
    run = RunFolder(outputs / name)
    run.path.mkdir(parents=True)
    run.config_file.write_text("base: {model: tiny-sd}\nsample: {prompts: [an owl]}\n")
    base = load_base_model("tiny-sd", torch.device("cpu"), torch.float32)
    plans = layer_choice.choose_layers(
        layer_names.layer_shapes(base.unet), "attention", 4, 4.0, 4, 4.0
    )
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
        GenerateHandlers(Workplace(tmp_path, None, Trainer(tmp_path))).request(wish(**changes))
    assert len(caught.value.problems) == 1


def test_pictures_by_scale_and_uploads(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    handlers = GenerateHandlers(Workplace(tmp_path, None, Trainer(tmp_path)))
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

    # cancelled: a sentence, and the weights are the base's again
    handlers.cancelling.begin("page")
    handlers.cancelling.cancel("page")
    with pytest.raises(UserError, match="Cancelled"):
        handlers.strip(
            handlers.request(wish(seed=7)), lambda *_: handlers.cancelling.is_cancelled("page")
        )
    handlers._pictures.clear()
    again, _ = handlers.before_and_after(handlers.request(wish()), count)
    assert again.tobytes() == before.tobytes()

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


def test_the_newest_result_is_chosen_unless_another_was_by_hand(tmp_path: Path) -> None:
    handlers = GenerateHandlers(Workplace(tmp_path, None, Trainer(tmp_path)))
    assert handlers.to_choose(None, None) is None

    def write(name: str, at: int, checkpoint: int | None = None) -> None:
        run = RunFolder(tmp_path / name)
        file = run.checkpoint(checkpoint) / "adapter.safetensors" if checkpoint else None
        file = file or run.adapter_file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
        run.config_file.write_text("{}")
        os.utime(run.config_file, (at, at))

    write("cat", 100, checkpoint=9)
    assert handlers.to_choose(None, None) == "cat/step_000009"
    seen = handlers.newest_result()
    assert handlers.to_choose("cat/step_000009", seen) == "cat/step_000009"
    write("fox", 200)
    assert handlers.to_choose("cat/step_000009", seen) == "fox"
    assert handlers.to_choose("cat/step_000009", BY_HAND) == "cat/step_000009"
    assert handlers.to_choose("gone", BY_HAND) == "fox"

    # what is chosen stays until there is a newer result, whatever is under way
    seen = handlers.newest_result()
    write("owl", 300, checkpoint=5)
    assert handlers.to_choose("fox", seen) == "fox"
    assert [one.id for one in handlers.adapters()] == ["fox", "owl/step_000005", "cat/step_000009"]
    write("owl", 300)
    assert handlers.to_choose("fox", seen) == "owl"
    assert handlers.to_choose("fox", handlers.newest_result()) == "fox"
