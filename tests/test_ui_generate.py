"""The Generate tab: what its handlers take, draw and bring back."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_sd import inject, layer_choice, layer_names
from lora_sd.base_loading import load_base_model
from lora_sd.config import config_from_values
from lora_sd.errors import UserError
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.generate import PictureSettings, generate, save_picture
from lora_sd.layer_names import layer_shapes
from lora_sd.merge import MergedWeights
from lora_sd.parts import Scales
from lora_sd.run_folder import RunFolder
from lora_sd.ui.adapters.handlers import AdapterHandlers
from lora_sd.ui.generate import pictures, studio
from lora_sd.ui.generate.handlers import BY_HAND, GenerateHandlers
from lora_sd.ui.launch import Trainer
from lora_sd.ui.workplace import Workplace

CPU = torch.device("cpu")


def wish(**changes: Any) -> dict[str, Any]:
    """What a page sends."""
    plain = {
        "adapter": "run", "scale": 1.0, "prompt": "a fox", "negative": "", "seed": 1,
        "steps": 2, "guidance": 4.0, "base": "",
    }  # fmt: skip
    return plain | changes


def go_on(done: int, total: int) -> bool:
    return False


def finished_run(
    outputs: Path, model: Path, name: str = "run", steps: tuple[int, ...] = ()
) -> None:
    """A run whose adapters change pictures: random, for all layers."""
    run = RunFolder(outputs / name)
    run.path.mkdir(parents=True)
    run.config_file.write_text(f"base: {{model: '{model}'}}\nsample: {{prompts: [an owl]}}\n")
    base = load_base_model(str(model), CPU, torch.float32)
    plans = layer_choice.choose_layers(layer_shapes(base.components), "full", 2, 2.0, 2, 2.0)
    for number, file in enumerate(
        [run.adapter_file, *(run.checkpoint(step) / "adapter.safetensors" for step in steps)]
    ):
        layers = inject.attach(base.components, plans)
        torch.manual_seed(number + len(name))
        for layer in layers.values():
            torch.nn.init.normal_(layer.lora_up.weight, std=0.3)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(inject.collect(base.components), file)
        inject.detach(base.components)


@pytest.fixture(scope="session")
def run_outputs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder of one run, for the base `model_folder`. To be copied, not changed."""
    outputs = tmp_path_factory.mktemp("generate") / "outputs"
    finished_run(outputs, model_folder, "run", (5, 10))
    return outputs


@pytest.fixture
def handlers(
    tmp_path: Path, run_outputs: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> GenerateHandlers:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    outputs = tmp_path / "outputs"
    shutil.copytree(run_outputs, outputs)
    return GenerateHandlers(Workplace(outputs, None, Trainer(outputs), model_folder.parent))


def after(handlers: GenerateHandlers, **changes: Any) -> Image.Image:
    """The first picture with the adapters."""
    return handlers.draw(handlers.request(wish(**changes)), go_on)[0].after


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": "/etc/passwd"}, "Choose an adapter"),
        ({"adapter": "../run"}, "Choose an adapter"),
        ({"adapter": ["run"]}, "Choose an adapter"),
        ({"adapter_2": "gone"}, "Adapter 2 is not offered"),
        ({"adapter_3": "run", "scale_3": 9}, "Scale of adapter 3 must"),
        ({"scale": math.nan}, "Scale must be a number from 0 to 1.5."),
        ({"scale": 9}, "Scale must"),
        ({"scale": True}, "Scale must"),
        ({"conv": -1}, "Convolutions must"),
        ({"seed": -1}, "Seed must be a whole number"),
        ({"seed": 1.5}, "Seed must"),
        ({"seed": None}, "Seed must"),
        ({"steps": 10_000}, "Denoising steps must"),
        ({"guidance": "much"}, "Guidance must"),
        ({"prompt": 3}, "Prompt must"),
        ({"prompt": "x" * 5000}, "Prompt must"),
        ({"width": 5}, "Width"),
        ({"height": 1e9}, "Height"),
        ({"count": 1000}, "Pictures must"),
        ({"scheduler": "os"}, "Choose a scheduler"),
        ({"base": "/etc/passwd"}, "passwd"),
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


def test_pictures_by_scale(handlers: GenerateHandlers) -> None:
    counted: list[tuple[int, int]] = []

    def count(done: int, total: int) -> bool:
        counted.append((done, total))
        return False

    (one,) = handlers.draw(handlers.request(wish()), count)
    assert one.before.tobytes() != one.after.tobytes()
    assert counted == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]

    # another scale draws only the picture that is new, and scale 0 is the base itself
    counted.clear()
    alone = handlers.picture(handlers.request(wish(seed=1, count=2)), go_on)
    assert alone.tobytes() == one.after.tobytes() and alone.info == one.after.info
    (half,) = handlers.draw(handlers.request(wish(scale=0.5)), count)
    assert half.before.tobytes() == one.before.tobytes() and counted[-1] == (2, 2)
    (off,) = handlers.draw(handlers.request(wish(scale=0)), count)
    assert off.after.tobytes() == off.before.tobytes() == one.before.tobytes()

    # further pictures are those of the following seeds
    drawn = handlers.draw(handlers.request(wish(count=3)), go_on)
    alone = [after(handlers, seed=seed) for seed in (1, 2, 3)]
    for several, single in zip(drawn, alone, strict=True):
        assert np.abs(np.asarray(several.after, int) - np.asarray(single, int)).max() <= 1
    assert [one.request.seed for one in drawn] == [1, 2, 3]


def test_adapters_and_their_parts_act_as_merged_by_hand(
    handlers: GenerateHandlers, model_folder: Path
) -> None:
    drawn = after(
        handlers,
        scale=0.5, linear=0.5, conv=0.2, adapter_2="run/step_000005", scale_2=0.4, text_encoder_2=0,
        width=24, height=16, scheduler="Euler a",
    )  # fmt: skip
    base = load_base_model(str(model_folder), CPU, torch.float32)
    run = RunFolder(handlers.outputs / "run")
    first, second = (
        load_adapter(file, layer_names.layer_shapes(base.components))
        for file in (run.adapter_file, run.checkpoint(5) / "adapter.safetensors")
    )
    merged = MergedWeights(base.components)
    merged.set([(first, Scales(0.5, 0.5, 0.2)), (second, Scales(0.4, text_encoder=0))])
    settings = PictureSettings("a fox", "", 1, 2, 4.0, 24, 16, scheduler="Euler a")
    (expected,) = generate(base, [settings])
    assert drawn.tobytes() == expected.tobytes()
    assert drawn.tobytes() != after(handlers, scheduler="DDIM", width=24, height=16).tobytes()


def test_of_which_base(handlers: GenerateHandlers, tmp_path: Path, model_folder: Path) -> None:
    own, chosen = handlers.request(wish()), handlers.request(wish(base="sd"))
    assert dict(own.base)["name"] == dict(chosen.base)["name"] == str(model_folder)
    assert chosen.base_id == "sd" and not own.base_id
    uploads = handlers.outputs / ".app" / "adapters"
    uploads.mkdir(parents=True)
    (uploads / "mine.safetensors").write_bytes(
        (handlers.outputs / "run/adapter.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match="'mine.*does not say which"):
        handlers.request(wish(adapter="upload:mine"))
    expected = after(handlers)
    assert after(handlers, adapter="upload:mine", base="sd").tobytes() == expected.tobytes()
    other = RunFolder(handlers.outputs / "other")
    other.path.mkdir()
    other.config_file.write_text("base: {model: tiny-sd}")
    other.adapter_file.write_bytes(b"")
    with pytest.raises(UserError, match="was trained on 'sd', and 'other' on 'tiny-sd'") as caught:
        handlers.request(wish(adapter_2="other"))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ({}, ["a fox"]),
        ({"rows": "checkpoints"}, ["run, step 5", "run, step 10", "run"]),
        ({"rows": "checkpoints", "row_adapters": ["run/step_000010"]}, ["run, step 10"]),
        ({"rows": "prompts", "row_prompts": "a cat\n\nan owl "}, ["a cat", "an owl"]),
        ({"rows": "adapters", "row_adapters": ["run", "run/step_000005"]}, ["run", "run, step 5"]),
    ],
)
def test_strips_and_grids(
    handlers: GenerateHandlers, values: dict[str, Any], labels: list[str]
) -> None:
    grid = handlers.grid(wish(scales="0 .5, 1", **values))
    assert grid.row_labels == labels
    ids = {one.label: one.id for one in handlers.adapters()}
    assert grid.column_labels == ["scale 0", "scale 0.5", "scale 1"]
    drawn = handlers.studio.draw(grid.cells, go_on)
    for row, label in zip(drawn, labels, strict=True):
        for (cell,), scale in zip(row, (0, 0.5, 1), strict=True):
            changes: dict[str, Any] = {"scale": scale}
            if values.get("rows") == "prompts":
                changes["prompt"] = label
            elif values:
                changes["adapter"] = ids[label]
            expected = after(handlers, **changes)
            assert np.abs(np.asarray(cell, int) - np.asarray(expected, int)).max() <= 2
    picture = handlers.draw_grid(grid, go_on)
    assert picture.width > 3 * 16 and json.loads(picture.info["lora_sd"])["seed"] == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rows": "all"}, "Choose what the rows"),
        ({"rows": ["one"]}, "Choose what the rows"),
        ({"rows": "adapters"}, "Choose the adapters"),
        ({"rows": "adapters", "row_adapters": ["../x"]}, "not offered any more"),
        ({"rows": "adapters", "row_adapters": "run"}, "not offered any more"),
        ({"rows": "prompts", "row_prompts": "\n".join("abcdefghijklmn")}, "at most 12 rows"),
        ({"rows": "prompts", "row_prompts": 5}, "Prompts, one a line must be text"),
        ({"scales": "0, much"}, "Scales must"),
        ({"scales": "nan"}, "Scales must"),
        ({"scales": "3"}, "Scales must"),
        ({"scales": "1 " * 13}, "Scales must"),
    ],
)
def test_grids_are_checked(handlers: GenerateHandlers, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        handlers.grid(wish(**values))


def test_a_picture_brings_its_settings_back(handlers: GenerateHandlers, tmp_path: Path) -> None:
    sent = wish(
        negative="grey", scheduler="Euler", width=24, height=16, scale=0.3, linear=0.5, base="sd",
        adapter_2="run/step_000005", scale_2=0.4, count=2,
    )  # fmt: skip
    second = handlers.draw(handlers.request(sent), go_on)[1]
    file = pictures.keep(second.after)
    restored = handlers.read_picture(str(file))
    assert restored.notices == []
    assert (restored.values["seed"], restored.values["count"]) == (2, 1)
    (again,) = handlers.draw(handlers.request(restored.values), go_on)
    assert pictures.note_of(again.request) == pictures.note_of(second.request)
    assert np.abs(np.asarray(again.after, int) - np.asarray(second.after, int)).max() <= 1
    alone = handlers.read_picture(str(pictures.keep(second.before)))
    assert alone.values["adapter"] is None and alone.values["prompt"] == "a fox"

    # a run's sample does, too, and an adapter that is gone is said
    sample = tmp_path / "sample.png"
    save_picture(second.after, sample, PictureSettings("an owl", "", 3, adapter="run", scale=0.5))
    values = handlers.read_picture(str(sample)).values
    assert (values["prompt"], values["adapter"], values["scale"]) == ("an owl", "run", 0.5)
    save_picture(second.after, sample, PictureSettings("an owl", "", 3, adapter="old"))
    assert handlers.read_picture(str(sample)).notices == [
        "The adapter 'old' of this picture is not here any more: choose another one."
    ]


@pytest.mark.parametrize(
    "note",
    [
        None,
        "{",
        "[" * 10_000,
        "[1]",
        '{"prompt": 3}',
        '{"seed": -1}',
        '{"steps": NaN}',
        '{"adapters": [{"adapter": "run", "scale": "much"}]}',
        '{"width_px": {}}',
        '{"scheduler": "../x"}',
    ],
)
def test_a_foreign_picture_is_a_sentence(
    handlers: GenerateHandlers, tmp_path: Path, note: str | None
) -> None:
    info = PngInfo()
    if note is not None:
        info.add_text("lora_sd", note)
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png", pnginfo=info)
    with pytest.raises(UserError, match="settings") as caught:
        handlers.read_picture(str(tmp_path / "p.png"))
    assert str(tmp_path) not in str(caught.value)


def test_adapters_that_are_no_adapters_in_a_note_are_left_out(
    handlers: GenerateHandlers,
) -> None:
    restored = handlers.restore({"adapters": [3, {"adapter": ["run"]}, {"adapter": "run"}]})
    assert restored.values["adapter"] == "run" and len(restored.notices) == 2
    assert handlers.restore({"adapters": "run"}).values["adapter"] is None


def test_cancelled_within_a_step_and_the_next_one_is_right(handlers: GenerateHandlers) -> None:
    expected = after(handlers, seed=3)
    seen: list[int] = []

    def stop(done: int, total: int) -> bool:
        seen.append(done)
        return done == 3

    with pytest.raises(UserError, match="Cancelled"):
        handlers.draw(handlers.request(wish(seed=2)), stop)
    assert seen == [0, 1, 2, 3]
    with pytest.raises(UserError, match="Cancelled"):  # while it waited: nothing is loaded
        handlers.draw(handlers.request(wish(seed=2)), lambda done, total: True)
    handlers.studio._drawn.clear()
    assert after(handlers, seed=3).tobytes() == expected.tobytes()


def test_a_page_that_wants_another_picture_is_not_drawn_the_old_one(
    handlers: GenerateHandlers,
) -> None:
    handlers.wants_other("page", wish(scale=0.2))
    handlers.begin("page", wish())
    assert not handlers.is_stale("page", wish())
    handlers.wants_other("page", wish())
    assert not handlers.is_stale("page", wish())
    handlers.wants_other("page", wish(scale=0.2))
    assert handlers.is_stale("page", wish()) and not handlers.is_stale("other", wish())
    handlers.end("page")
    assert not handlers.is_stale("page", wish())


def test_what_goes_wrong_is_a_sentence_and_hits_one_request_alone(
    handlers: GenerateHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = after(handlers, seed=5)

    def fails_with(error: Exception, words: str) -> None:
        with monkeypatch.context() as patch, pytest.raises(UserError, match=words) as caught:

            def fail(*_: object) -> None:
                raise error

            patch.setattr("lora_sd.generate.generate", fail)
            after(handlers, seed=6)
        assert str(handlers.outputs) not in str(caught.value)
        handlers.studio._drawn.clear()
        assert after(handlers, seed=5).tobytes() == expected.tobytes()

    fails_with(RuntimeError(f"secret {handlers.outputs}"), "could not be drawn .RuntimeError")
    fails_with(torch.OutOfMemoryError("CUDA out of memory"), "Memory has run out")
    fails_with(MemoryError(), "Memory has run out")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="came out black"):
        patch.setattr("lora_sd.generate.generate", lambda *_: [Image.new("RGB", (16, 16))])
        after(handlers, seed=6)
    with pytest.raises(UserError, match="Width .px. must be a multiple of 4"):
        after(handlers, width=18)

    # an adapter that is damaged, or deleted after it was chosen
    request = handlers.request(wish(adapter="run/step_000005"))
    file = RunFolder(handlers.outputs / "run").checkpoint(5) / "adapter.safetensors"
    file.write_bytes(b"pickle" * 100)
    with pytest.raises(UserError, match="'run, step 5'") as caught:
        handlers.draw(request, go_on)
    assert str(handlers.outputs) not in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match="was deleted"):
        handlers.draw(request, go_on)
    assert after(handlers, seed=5).tobytes() == expected.tobytes()


def test_on_a_gpu_a_training_goes_first(
    handlers: GenerateHandlers, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    weights = studio._weights_bytes(str(model_folder), 4)
    base = load_base_model(str(model_folder), CPU, torch.float32)
    parts = [*base.components.values(), base.vae]
    assert weights == 4 * sum(p.numel() for part in parts for p in part.parameters())
    free = weights + studio.ROOM_TO_DRAW
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**40))
    studio._check_room("fox", weights)
    with pytest.raises(UserError, match="The training of 'fox' is using the GPU: 3.22 GB are free"):
        studio._check_room("fox", weights + 1)


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_two_users_with_different_scales(handlers: GenerateHandlers, count: int) -> None:
    """At once, and each picture equals the one made alone."""
    asked = [
        {"scale": (0.2, 0.9)[number % 2], "seed": number, "steps": 1} for number in range(count)
    ]
    with ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(lambda one: after(handlers, **one), asked))
    handlers.studio._drawn.clear()
    for one, picture in zip(asked, drawn, strict=True):
        assert after(handlers, **one).tobytes() == picture.tobytes()
    assert len({picture.tobytes() for picture in drawn}) == count


@pytest.mark.slow
def test_pictures_drawn_beside_a_training_are_those_drawn_alone(
    handlers: GenerateHandlers, run_settings: dict[str, dict[str, Any]]
) -> None:
    alone = [after(handlers, seed=seed) for seed in range(10)]
    handlers.studio._drawn.clear()
    run_settings["train"]["steps"] = 5000
    run_settings["output"] |= {"folder": str(handlers.outputs), "name": "busy"}
    trainer = handlers.place.trainer
    trainer.start(config_from_values(run_settings))
    try:
        deadline = time.monotonic() + 120
        folder = RunFolder(handlers.outputs / "busy")
        while (status := folder.read_status()) is None or status.step < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        beside = [after(handlers, seed=seed) for seed in range(10)]
        assert trainer.current() == "busy"
    finally:
        trainer.stop("busy")
    for one, other in zip(alone, beside, strict=True):
        assert one.tobytes() == other.tobytes()


def test_the_memory_of_pictures_is_bounded(
    handlers: GenerateHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio, "MOST_KEPT_PX", 3 * 16 * 16)
    for seed in range(4):
        after(handlers, seed=seed)
    assert len(handlers.studio._drawn) == 3


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
    assert handlers.newest_of("cat") == "cat/step_000009" and handlers.newest_of("none") is None


@pytest.mark.parametrize("used_before", [False, True])
def test_an_adapter_deleted_while_it_is_drawn_with(handlers, used_before):
    library = AdapterHandlers(handlers.place)
    request = handlers.request(wish(seed=3))
    if used_before:  # and in memory since
        handlers.draw(handlers.request(wish(seed=2)), go_on)

    def delete_at(step: int) -> Callable[[int, int], bool]:
        def on_step(done: int, total: int) -> bool:
            if done == step and (handlers.outputs / "run").exists():
                deleted.append(library.delete("run").id)
            return False

        return on_step

    deleted: list[str] = []
    with pytest.raises(UserError, match="'run' was deleted meanwhile"):
        handlers.draw(request, delete_at(0))  # before it is read
    library.restore(deleted[-1])
    (drawn,) = handlers.draw(request, delete_at(1))  # while it is drawn with
    assert len(deleted) == 2
    library.restore(deleted[-1])
    handlers.studio = studio.Studio(handlers.place.trainer)
    (alone,) = handlers.draw(request, go_on)
    assert np.array_equal(np.asarray(drawn.after), np.asarray(alone.after))
