"""The Adapters tab: its cards, its files, and what it does with them."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from make_adapters import random_adapter
from PIL import Image

from lora_sd.adapter import Adapter
from lora_sd.algebra.comparison import compare
from lora_sd.errors import UserError
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.formats.families import load_any
from lora_sd.formats.layer_tables import layer_shapes
from lora_sd.run_folder import RunFolder, Status
from lora_sd.ui import fields
from lora_sd.ui.adapters import cards, html
from lora_sd.ui.adapters.handlers import AdapterHandlers
from lora_sd.ui.adapters.offered import offered_adapters
from lora_sd.ui.launch import Trainer
from lora_sd.ui.workplace import Workplace
from lora_sd.verbs.source import format_of

SHAPES = {name: shape for name, shape in layer_shapes("tiny-sd").items() if "up_blocks.1" in name}
QUIET = lambda done, total: False  # noqa: E731


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterHandlers:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    place = Workplace(outputs, None, Trainer(outputs), models=tmp_path / "models")
    return AdapterHandlers(place)


def write_adapter(file: Path, **metadata: str) -> Adapter:
    """A file for tiny-sd of random weights."""
    adapter = random_adapter(SHAPES)
    adapter.metadata |= {"ss_base_model_version": "tiny-sd", **metadata}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(adapter, file, torch.float32)
    return adapter


def write_run(outputs: Path, name: str = "cat", state: Any = "finished") -> RunFolder:
    """A run with a result, a best, a checkpoint and a sample."""
    run = RunFolder(outputs / name)
    run.samples.mkdir(parents=True)
    run.config_file.write_text("base: {model: tiny-sd}\ndata: {trigger_word: sks}\n")
    run.write_status(Status(state, 9, 9))
    for file in (run.adapter_file, run.best_file, run.checkpoint(9) / "adapter.safetensors"):
        write_adapter(file)
    Image.new("RGB", (64, 64), "red").save(run.sample_file(9, 0))
    run.metrics_file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    return run


def forbidden(text: str, tmp_path: Path) -> bool:
    """Whether a text names a path of this machine."""
    return str(tmp_path) in text


def test_cards_say_what_a_run_and_a_file_are(handlers: AdapterHandlers, tmp_path: Path) -> None:
    write_run(handlers.outputs)
    (handlers.outputs / "new").mkdir()
    (handlers.outputs / "new" / "config.yaml").write_text("{}")
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(buffer, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    write_adapter(
        tmp_path / "pen style.safetensors",
        **{
            "modelspec.trigger_phrase": "ink <b>",
            "modelspec.thumbnail": picture,
            "lora_sd.loss_curve": "[[1, 0.9], [2, 0.5]]",
        },
    )
    handlers.import_file(str(tmp_path / "pen style.safetensors"), "")
    found = {card.id: card for card in handlers.cards().cards}
    assert set(found) == {"cat", "new", "upload:pen-style"}
    run, file = found["cat"], found["upload:pen-style"]
    ids = [one.id for one in run.versions]
    assert ids == ["cat", "cat/best", "cat/step_000009"]
    assert (run.facts.trigger, run.facts.base, run.facts.rank) == ("sks", "tiny-sd", "2")
    assert len(run.facts.losses) == 2 and run.facts.thumbnail.startswith("data:image/webp")
    assert file.facts.losses == [(1, 0.9), (2, 0.5)]
    assert file.facts.thumbnail.startswith("data:image/webp")
    assert found["new"].versions == ()

    shown = html.cards_html(handlers.cards(), "cat", searched=False)
    assert shown.count("<li>") == 3 and shown.count('aria-pressed="true"') == 1
    assert "ink &lt;b&gt;" in shown and "<b>ink" not in shown
    assert [card.id for card in handlers.cards("INK tiny").cards] == ["upload:pen-style"]
    assert handlers.cards("nothing like it").cards == []


@pytest.mark.parametrize(
    "thumbnail",
    [
        "javascript:alert(1)",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:image/png;base64,not base64",
        "data:image/png;base64," + "A" * 2_000_000,
    ],
)
def test_a_strange_thumbnail_is_none(thumbnail: str) -> None:
    assert cards._own_thumbnail({"modelspec.thumbnail": thumbnail}) == ""


def test_a_damaged_file_has_a_card_that_says_so(handlers: AdapterHandlers, tmp_path: Path) -> None:
    folder = handlers.outputs / ".app" / "adapters"
    folder.mkdir(parents=True)
    (folder / "bad.safetensors").write_bytes(b"pickle" * 9)
    (card,) = handlers.cards().cards
    assert "not a safetensors file" in card.facts.problem
    assert not forbidden(card.facts.problem, tmp_path)


def test_only_what_can_be_read_wholly_is_imported(
    handlers: AdapterHandlers, tmp_path: Path
) -> None:
    file = tmp_path / "cat.safetensors"
    file.write_bytes(b"pickle" * 100)
    for sent in (str(file), None, 7, ""):
        with pytest.raises(UserError) as caught:
            handlers.import_file(sent, "")
        assert not forbidden(str(caught.value), tmp_path)
    with pytest.raises(UserError):
        handlers.import_file(str(file), str(tmp_path))
    assert offered_adapters(handlers.outputs) == []
    write_adapter(file)
    first, second = (handlers.import_file(str(file), "tiny-sd") for _ in range(2))
    assert (first.id, second.id) == ("upload:cat", "upload:cat-2")
    assert first.base() == "tiny-sd"


def test_a_new_name_for_a_run_and_a_file(handlers: AdapterHandlers, tmp_path: Path) -> None:
    run = write_run(handlers.outputs)
    write_run(handlers.outputs, "dog")
    write_adapter(tmp_path / "ink.safetensors")
    file = handlers.import_file(str(tmp_path / "ink.safetensors"), "tiny-sd")
    for wish in ("", "../up", "a/b", "nul", "x" * 65, "dog", "datasets", 5, None):
        with pytest.raises(UserError):
            handlers.rename("cat", wish)
    assert run.path.is_dir()
    assert handlers.rename("cat/best", "fox") == "fox"
    assert [one.id for one in handlers.choose("fox").card.versions][0] == "fox"
    assert handlers.rename(file.id, "pen") == "upload:pen"
    assert handlers.choose("upload:pen").version.base() == "tiny-sd"
    with pytest.raises(UserError, match="Choose an adapter"):
        handlers.rename("cat", "again")


def test_deleted_taken_back_and_deleted_for_good(handlers: AdapterHandlers, tmp_path: Path) -> None:
    run = write_run(handlers.outputs)
    kept = run.adapter_file.read_bytes()
    console = handlers.outputs / ".app" / "cat.log"
    console.parent.mkdir()
    console.write_text("begun")
    write_adapter(tmp_path / "ink.safetensors")
    file = handlers.import_file(str(tmp_path / "ink.safetensors"), "tiny-sd")
    deleted = [handlers.delete("cat/step_000009"), handlers.delete(file.id)]
    assert handlers.cards().cards == [] and not run.path.exists()
    assert {one.name for one in handlers.trashed()} == {"cat", "ink.safetensors"}
    write_run(handlers.outputs)  # meanwhile another has its name
    assert not console.exists()  # else the run would be one that never began
    assert handlers.restore(deleted[0].id) == "cat-2"
    assert console.with_name("cat-2.log").read_text() == "begun"
    assert (handlers.outputs / "cat-2" / "adapter.safetensors").read_bytes() == kept
    assert handlers.restore(deleted[1].id) == "upload:ink"
    assert handlers.choose("upload:ink").version.base() == "tiny-sd"
    for wish in (deleted[0].id, "..", "../../cat", None, 3):
        with pytest.raises(UserError, match="no longer in the trash"):
            handlers.restore(wish)
    handlers.delete("cat")
    handlers.empty_trash()
    assert handlers.trashed() == []
    assert [card.id for card in handlers.cards().cards] == ["cat-2", "upload:ink"]


def test_what_is_at_work_queued_or_in_use_is_not_deleted(
    handlers: AdapterHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(handlers.outputs, state="training")  # by this very process
    for act in (lambda: handlers.delete("cat"), lambda: handlers.rename("cat", "fox")):
        with pytest.raises(UserError, match="being trained"):
            act()
    run.write_status(Status("finished", 9, 9))
    with (
        FileLock(run.lock_file),  # as the trainer holds it before it writes its state
        pytest.raises(UserError, match="being trained"),
    ):
        handlers.delete("cat")
    with handlers._using("cat/best"), pytest.raises(UserError, match="in use"):
        handlers.delete("cat")
    assert run.adapter_file.is_file()
    handlers.delete("cat")
    assert not run.path.exists()


def test_a_run_that_waits_in_the_queue_is_not_deleted(
    handlers: AdapterHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_sd.ui.queue import QueuedRun, QueueState

    write_run(handlers.outputs)
    state = QueueState((QueuedRun("1", "cat"),))
    monkeypatch.setattr(type(handlers.place.queue), "state", lambda _: state)
    with pytest.raises(UserError, match="waits in the queue"):
        handlers.delete("cat")


def test_a_download_in_another_format_holds_the_same(
    handlers: AdapterHandlers, tmp_path: Path
) -> None:
    run = write_run(handlers.outputs)
    same, _ = handlers.download("cat", "kohya")
    assert same.name == "cat.safetensors" and same.read_bytes() == run.adapter_file.read_bytes()
    other, notices = handlers.download("cat", "diffusers")
    assert other.name == "cat-diffusers.safetensors" and format_of(other) == "diffusers"
    assert other.is_relative_to(tmp_path / "cache")
    assert compare(load_any(other)[0], load_any(run.adapter_file)[0]).ok
    assert not any(forbidden(notice, tmp_path) for notice in notices)
    for wish in ("../cat", "/etc/passwd", ["cat"], None, "cat/step_9"):
        with pytest.raises(UserError, match="Choose an adapter"):
            handlers.download(wish, "kohya")


def test_inspected_and_compared(handlers: AdapterHandlers, tmp_path: Path) -> None:
    write_run(handlers.outputs)
    shown = html.inspection_html(handlers.inspect("cat", QUIET))
    assert "up.1 linear" in shown and "Of base" in shown and "100.0 %" not in shown
    config = {"train": {"steps": 5, "seed": 1}}
    other = {"train": {"steps": 7, "seed": 1}}
    for name, said in (("a", config), ("b", other)):
        write_adapter(tmp_path / f"{name}.safetensors", **{"lora_sd.config": json.dumps(said)})
        handlers.import_file(str(tmp_path / f"{name}.safetensors"), "")
    found = handlers.compare("upload:a", "upload:b", QUIET)
    assert found.similarity.whole.cosine == pytest.approx(1)
    assert found.settings == [("train.steps", "5", "7")]
    shown = html.compared_html(found)
    assert "practically the same" in shown
    assert fields.label("train.steps") in shown and "train.steps" not in shown
    with pytest.raises(UserError, match="Choose another"):
        handlers.compare("cat", None, QUIET)


def test_combined_resized_and_baked(handlers: AdapterHandlers, tmp_path: Path) -> None:
    run = write_run(handlers.outputs)
    source = load_adapter(run.adapter_file, layer_shapes("tiny-sd"))
    values: dict[str, Any] = {
        "adapter": "cat", "scale": 1.0, "other_1": "cat/best", "scale_1": -0.5, "name": "half",
        "rank": None,
    }  # fmt: skip
    made = handlers.combine(values, QUIET)
    assert made.adapter.id == "upload:half" and made.adapter.base() == "tiny-sd"
    half = load_adapter(made.adapter.file, layer_shapes("tiny-sd"))
    for name, layer in source.layers.items():
        torch.testing.assert_close(half.layers[name].low_rank(), 0.5 * layer.low_rank())
    with pytest.raises(UserError, match="there already"):
        handlers.combine(values, QUIET)
    small = handlers.resize(
        {"adapter": "upload:half", "by": "rank", "rank": 2, "name": "small"}, QUIET
    )
    assert "rank 2" in small.facts and "error" in small.facts[-1]
    assert not any(forbidden(one, tmp_path) for one in [*made.notices, *small.notices])
    baked = handlers.bake(
        {"adapter": "cat", "scale": 0.5, "base": "", "name": "inky", "single_file": False}, QUIET
    )
    assert baked.place == "models/inky"
    assert (tmp_path / "models" / "inky" / "model_index.json").is_file()
    assert ("inky", "inky") in handlers.bases()


@pytest.mark.parametrize(
    ("tool", "changes", "words"),
    [
        ("combine", {"scale": math.nan}, "'Scale' must be a number"),
        ("combine", {"scale_1": "1"}, "'Scale' must be a number"),
        ("combine", {"rank": 1.5}, "'Rank' must be a whole number"),
        ("combine", {"other_1": None}, "Choose another"),
        ("combine", {"other_1": "/etc/passwd"}, "Choose an adapter"),
        ("combine", {"name": "../x"}, "A name has"),
        ("resize", {"by": "luck"}, "Choose whether"),
        ("resize", {"rank": 0}, "'Rank' must be a number from 1"),
        ("resize", {"by": "size", "size": math.inf}, "'Size' must be"),
        ("resize", {"by": "energy", "energy": None}, "'Energy"),
        ("bake", {"base": "/etc"}, "base model"),
        ("bake", {"scale": True}, "'Scale' must be a number"),
        ("bake", {"name": None}, "A name has"),
    ],
)
def test_wishes_are_checked(
    handlers: AdapterHandlers, tmp_path: Path, tool: str, changes: dict[str, Any], words: str
) -> None:
    write_run(handlers.outputs)
    before = sorted(tmp_path.rglob("*"))
    plain: dict[str, Any] = {
        "adapter": "cat", "scale": 1.0, "other_1": "cat/best", "scale_1": 1.0, "name": "x",
        "rank": 2, "by": "rank", "base": "tiny-sd", "single_file": True,
    }  # fmt: skip
    with pytest.raises(UserError, match=words):
        getattr(handlers, tool)(plain | changes, QUIET)
    assert not list(tmp_path.rglob("x*")) and set(before) <= set(tmp_path.rglob("*"))


@pytest.mark.parametrize("tool", ["combine", "resize", "bake"])
def test_what_is_cancelled_ends_at_once_and_leaves_nothing(
    handlers: AdapterHandlers, tmp_path: Path, tool: str
) -> None:
    write_run(handlers.outputs)
    asked: list[int] = []

    def cancel(done: int, total: int) -> bool:
        asked.append(done)
        return done == 2

    values: dict[str, Any] = {
        "adapter": "cat", "scale": 1.0, "other_1": "cat/best", "scale_1": 1.0, "name": "x",
        "rank": 1, "by": "rank", "base": "tiny-sd", "single_file": True,
    }  # fmt: skip
    with pytest.raises(UserError, match="Cancelled"):
        getattr(handlers, tool)(values, cancel)
    assert asked == [0, 1, 2] and not list(tmp_path.rglob("x*"))
    handlers.delete("cat")  # nothing is in use any more


def test_adapters_of_different_models_do_not_go_together(
    handlers: AdapterHandlers, tmp_path: Path
) -> None:
    write_run(handlers.outputs)
    names = list(layer_shapes("sd15"))[:4]
    other = random_adapter({name: layer_shapes("sd15")[name] for name in names})
    file = tmp_path / "other.safetensors"
    save_adapter(other, file)
    with pytest.raises(UserError, match="sd15 and sd21 alike.*'Base model'"):
        handlers.import_file(str(file), "")
    handlers.import_file(str(file), "sd15")
    assert handlers.choose("upload:other").card.facts.base == "SD 1.5"
    with pytest.raises(UserError, match="different models") as caught:
        handlers.compare("cat", "upload:other", QUIET)
    assert not forbidden(str(caught.value), tmp_path)


def test_which_programs_load_it(handlers: AdapterHandlers, tmp_path: Path) -> None:
    names = list(layer_shapes("sd15"))[:4]
    adapter = random_adapter({name: layer_shapes("sd15")[name] for name in names})
    adapter.metadata["ss_base_model_version"] = "sd_v1"
    save_adapter(adapter, tmp_path / "one.safetensors")
    handlers.import_file(str(tmp_path / "one.safetensors"), "")
    family, report = handlers.verify("upload:one", QUIET)
    shown = html.verified_html(family, report)
    with pytest.raises(UserError, match="Cancelled"):
        handlers.verify("upload:one", lambda done, total: True)
    assert family == "sd15" and "ComfyUI" in shown and shown.count("<li") >= 7


def test_many_cards_are_read_once(
    handlers: AdapterHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(70):
        run = RunFolder(handlers.outputs / f"cat-{number}")
        run.path.mkdir()
        run.config_file.write_text("base: {model: tiny-sd}")
    found = handlers.cards()
    assert len(found.cards) == 60 and found.more == 10
    monkeypatch.setattr(cards, "read_yaml", lambda _: pytest.fail("read again"))
    assert handlers.cards() == found
