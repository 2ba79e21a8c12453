"""The Train tab's form: data sets, recipes, what is wrong with it, its plan and its start."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ui_fake_trainer import fake_trainer, state, wait_for  # noqa: F401

from lora_sd.config import Config, config_from_values, read_yaml
from lora_sd.errors import UserError
from lora_sd.ui import bases, fields
from lora_sd.ui.launch import Trainer
from lora_sd.ui.train import further
from lora_sd.ui.train.handlers import EXAMPLE, TrainHandlers
from lora_sd.ui.train.plan import PlanCancelled, Planner
from lora_sd.ui.train.plan_view import plan_html
from lora_sd.ui.workplace import Workplace


@pytest.fixture
def handlers(trainer: Trainer, more: Path, tmp_path: Path) -> TrainHandlers:
    models = tmp_path / "models"
    (models / "styles").mkdir(parents=True)
    (models / "styles" / "anime.safetensors").touch()
    place = Workplace(trainer.outputs, more, trainer, models)
    return TrainHandlers(place)


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """A folder of folders of pictures, in the ways that people keep them."""
    root = tmp_path / "more"
    for name in ("cats/10_sks cat/a.png", "cats/10_sks cat/b.png", "cats/c.png", "flat/d.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 20)).save(root / name)
    (root / "cats" / "10_sks cat" / "a.caption").write_text("a cat")
    (root / "flat" / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "a dog"}\n')
    (root / "flat" / "d-mask.png").write_bytes(b"")
    (root / "empty" / "deep").mkdir(parents=True)
    return root


def form(handlers: TrainHandlers, **changes: Any) -> dict[str, Any]:
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return handlers.starting_form() | changed


def test_the_form_begins_with_the_measured_example(handlers: TrainHandlers) -> None:
    config = handlers.config(form(handlers))
    own = config_from_values(read_yaml(Path("configs/tiny.yaml").resolve()))
    for group in ("base", "adapter", "train", "optimizer", "sample", "memory"):
        assert getattr(config, group) == getattr(own, group)
    assert Path(config.data.folder or "").name == "ink-icons"


def test_start_trains_the_example(handlers: TrainHandlers) -> None:
    started = handlers.start(form(handlers, train__steps=2))
    assert not started.problems and not started.by_field
    assert started.submitted and started.submitted.run == "ink-icons"
    wait_for(lambda: state(handlers.place.trainer, "ink-icons") == "Finished")


@pytest.mark.parametrize("folder", ["../..", "/etc", "example/../..", None, ["example"]])
def test_only_offered_data_sets_are_read(handlers: TrainHandlers, folder: Any) -> None:
    sent = form(handlers)
    wrong = [{"data.folder": folder}, {further.MORE: [str(folder)]}]
    wrong += [{part: folder or "gone"} for part in (further.VALIDATION, further.REGULARISATION)]
    for changes in wrong:
        started = handlers.start(sent | changes)
        assert started.submitted is None, changes
    assert handlers.show_folder(folder).pairs == []


@pytest.mark.parametrize(
    "model", ["/etc/passwd", "../x", "models/../../x", str(Path.cwd()), "", None, ["a"], "a b/c"]
)
def test_a_base_is_never_a_path_of_the_browser_s(handlers: TrainHandlers, model: Any) -> None:
    started = handlers.start(form(handlers) | {"base.model": model})
    assert started.submitted is None and [*started.by_field] == ["base.model"]
    wrong_vae = handlers.start(form(handlers) | {"base.vae": model or "/etc/passwd"})
    assert wrong_vae.submitted is None and [*wrong_vae.by_field] == ["base.vae"]


def test_bases_are_found_by_name(handlers: TrainHandlers, tmp_path: Path) -> None:
    models = tmp_path / "models"
    offered = [one.id for one in bases.offered_bases(models)]
    assert offered[:2] == ["tiny-sd", "styles/anime.safetensors"]
    found = bases.find_base(models, "styles/anime.safetensors")
    assert found == str(models / "styles" / "anime.safetensors")
    assert bases.find_base(models, "owner/some-model") == "owner/some-model"
    assert bases.find_vae(models, "") is None
    assert bases.find_vae(models, "styles/anime.safetensors") == found


def test_all_that_is_wrong_comes_at_once_beside_its_field(handlers: TrainHandlers) -> None:
    wrong = form(handlers, train__steps=0, data__folder="nowhere", sample__prompt_file="cat --q 3")
    wrong |= {"adapter.dora": "input", "adapter.up_bias": True}
    started = handlers.start(wrong)
    assert started.submitted is None
    assert {*started.by_field} == {"train.steps", "data.folder", "sample.prompt_file"}
    assert started.by_field["sample.prompt_file"].startswith("Line 1: '--q' is unknown.")
    assert len(started.problems) == 1 and "dora" in started.problems[0]
    assert handlers.place.trainer.current() is None


def test_folders_of_runs_and_pictures_are_not_the_browser_s_to_choose(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    sent = form(handlers) | {"output.folder": str(tmp_path), "data.cache_folder": "/etc"}
    config = handlers.config(sent | {"data.folders": [{"folder": "/etc"}]})
    assert config.output.folder == str(handlers.place.outputs)
    assert config.data.cache_folder is None and config.data.folders == []


def test_further_data_sets_become_folders(handlers: TrainHandlers, more: Path) -> None:
    chosen = {
        further.MORE: ["more/cats", EXAMPLE],
        further.VALIDATION: "more/flat",
        further.REGULARISATION: further.DRAWN,
        further.CLASS_CAPTION: "a photo of a cat",
        further.CLASS_PICTURES: 7,
        further.PRIOR_WEIGHT: 0.5,
    }
    config = handlers.config(form(handlers) | chosen)
    learnt, held_out, regular = config.data.folders
    assert (learnt.folder, learnt.kind) == (str(more / "cats"), "training")
    assert (held_out.folder, held_out.kind) == (str(more / "flat"), "validation")
    assert regular.kind == "regularisation" and regular.loss_weight == 0.5
    assert regular.class_pictures == 7 and regular.caption == "a photo of a cat"
    assert Path(regular.folder).parent == handlers.place.outputs / "datasets"
    again = handlers.config(form(handlers) | chosen | {further.CLASS_PICTURES: 9})
    assert again.data.folders[2].folder == regular.folder


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (further.CLASS_CAPTION, " "),
        (further.CLASS_CAPTION, 3),
        (further.CLASS_PICTURES, float("nan")),
        (further.CLASS_PICTURES, "7"),
        (further.PRIOR_WEIGHT, 101),
        (further.PRIOR_WEIGHT, True),
    ],
)
def test_wrong_regularisation_is_a_sentence(handlers: TrainHandlers, part: str, value: Any) -> None:
    chosen = {further.REGULARISATION: further.DRAWN, further.CLASS_CAPTION: "a cat", part: value}
    started = handlers.start(form(handlers) | chosen)
    assert started.submitted is None
    assert fields.label(part) in started.by_field[further.REGULARISATION]


def test_prompts_with_options_become_a_file(handlers: TrainHandlers) -> None:
    text = "a cat --d 7 --s 5\n# nothing\n\na dog"
    config = handlers.config(form(handlers, sample__prompt_file=text))
    file = Path(str(config.sample.prompt_file))
    assert file.read_text() == text and file.is_relative_to(handlers.place.outputs)
    assert handlers.config(form(handlers)).sample.prompt_file is None


def test_a_second_start_waits_in_the_queue_by_its_name(handlers: TrainHandlers) -> None:
    assert not handlers.is_busy()
    assert handlers.start(form(handlers, train__steps=400)).submitted
    assert handlers.is_busy()
    second = handlers.start(form(handlers))
    assert second.submitted and second.submitted.run == "ink-icons-2" and second.submitted.place
    handlers.place.queue.hold()
    handlers.running.stop("ink-icons")
    wait_for(lambda: not handlers.is_busy())


def test_the_recipe_follows_base_pictures_and_subject(handlers: TrainHandlers) -> None:
    before = form(handlers)
    sent = before | {"base.model": "nobody/some-xl-model", "recipe.card": "large", "train.seed": 4}
    followed = handlers.follow(sent, before)
    assert followed.updates["data.resolution_px"] == "1024"
    assert followed.updates["train.steps"] == 1000
    assert followed.reasons[0].startswith("'nobody/some-xl-model' is not on this machine yet;")
    few = handlers.follow(before | {"data.folder": "more/cats"}, before)
    assert few.updates["train.steps"] == 200 and "sks cat" in few.updates["sample.prompts"]
    unknown = handlers.follow(before | {"base.model": "/etc/passwd"}, before)
    assert {*unknown.updates} == {"sample.prompts"} and "There is no base model" in unknown.reasons[
        0
    ]


def test_everything_can_be_set_as_the_recipe_has_it(handlers: TrainHandlers) -> None:
    before = form(handlers)
    sent = before | {"adapter.rank": 3, "optimizer.weight_decay": 9.0, "output.name": "mine"}
    assert "adapter.rank" not in handlers.follow(sent, before).updates
    followed = handlers.follow(sent, before, all_of_it=True)
    assert sent | dict(followed.updates) == before | {"output.name": "mine"}


@pytest.mark.parametrize("before", [None, 3, [], {"train.steps": []}])
def test_what_the_page_set_may_be_anything(handlers: TrainHandlers, before: Any) -> None:
    assert handlers.follow(form(handlers), before).reasons


@pytest.mark.parametrize("garbage", [None, True, -3, float("inf"), "x" * 30_000, [[]], {"a": []}])
def test_no_form_is_too_strange(handlers: TrainHandlers, garbage: Any) -> None:
    whole = dict.fromkeys(form(handlers), garbage)
    assert handlers.start(whole).submitted is None
    assert handlers.follow(whole, garbage).updates is not None
    assert handlers.totals(whole) == handlers.mask_note(garbage, garbage) == ""
    assert handlers.show_folder(garbage).pairs == []
    assert handlers.plan(whole, lambda seconds: False).problems
    restored = handlers.restored(whole)
    assert "data.folder" not in restored and handlers.restored(garbage) == {}


def test_prompts_fit_the_pictures(handlers: TrainHandlers, more: Path) -> None:
    def prompts(folder: object, trigger: str = "", common: str = "") -> str | None:
        changes = {"data.folder": folder, "data.trigger_word": trigger, "data.caption": common}
        cleared = {"sample.prompts": ""}
        sent = form(handlers) | changes | cleared
        return handlers.follow(sent, cleared).updates.get("sample.prompts", "")

    assert "tiger, ink drawing" in str(prompts(EXAMPLE, "myfox"))
    assert prompts("more/cats") == "a cat\nsks cat"
    assert prompts("more/cats", "mycat") == "mycat, a cat\nmycat, sks cat"
    (more / "bare").mkdir()
    Image.new("RGB", (60, 20)).save(more / "bare" / "a.png")
    assert prompts("more/bare") == ""
    assert prompts("more/bare", "mycat", "a photo") == "mycat, a photo"
    assert prompts("more/none") == prompts(None) == ""


def test_a_kept_form_comes_back_as_far_as_it_still_fits(handlers: TrainHandlers) -> None:
    kept = form(handlers, train__steps=77) | {further.VALIDATION: "more/flat"}
    assert handlers.restored(kept) == kept
    strange = {
        "train.steps": "many", "train.seed": [1], "optimizer.name": "sgd", "no.setting": 1,
        "data.folder": "more/gone", further.MORE: "more/cats", "recipe.card": "huge",
        further.CLASS_CAPTION: 3, "output.folder": "/etc",
    }  # fmt: skip
    assert handlers.restored(strange) == {}
    assert handlers.restored([1]) == handlers.restored(None) == {}


def test_the_secret_outlives_the_app(handlers: TrainHandlers) -> None:
    secret = handlers.secret()
    assert len(secret) > 10 and TrainHandlers(handlers.place).secret() == secret


def test_totals_and_masks_are_told(handlers: TrainHandlers, more: Path) -> None:
    assert handlers.totals(form(handlers)) == (
        "500 steps of 8: 4,000 pictures seen, 166.7 epochs of 24."
    )
    for wrong in (None, 0, "many", 2.5, float("nan"), [3]):
        assert handlers.totals(form(handlers, train__batch_size=wrong)) == ""
    assert "1 mask file is not used" in handlers.mask_note("more/flat", "off")
    assert handlers.mask_note("more/flat", "file") == handlers.mask_note("nowhere", "off") == ""


def test_data_sets_are_captioned_as_training_reads_them(handlers: TrainHandlers) -> None:
    offered = [one.id for one in handlers.folders()]
    assert {"more/cats", "more/flat", EXAMPLE} <= {*offered} and "more/empty" not in offered
    shown = handlers.show_folder("more/cats")
    assert {file.name: caption for file, caption in shown.pairs} == {
        "a.png": "a cat", "b.png": "sks cat", "c.png": "",
    }  # fmt: skip


PLAN = """
import json, sys, time
from pathlib import Path
Path({calls!r}).open("a").write("x")
text = Path(sys.argv[sys.argv.index("--config") + 1]).read_text()
if "seed: 13" in text:
    time.sleep(60)
if "seed: 14" in text:
    print("error: 'train.seed' is unlucky.", file=sys.stderr)
    sys.exit(2)
print(json.dumps(dict(
    device="cpu", steps=5, pictures=None, pictures_seen=40, epochs=None, highest=10**9,
    time_s=None if "--shapes" in sys.argv else 70.0, adapter_bytes=5, checkpoint_bytes=6, layers=7,
    parameters=8, phases=[dict(name="training", total=10**9)], notices=["<b>"],
    cards=[dict(gb=8, fits=True, changes=["tiles"], highest=9)],
)))
"""


@pytest.fixture
def planner(tmp_path: Path) -> Callable[[], tuple[Planner, Path]]:
    def make() -> tuple[Planner, Path]:
        program, calls = tmp_path / "plan.py", tmp_path / "calls"
        program.write_text(PLAN.format(calls=str(calls)))
        return Planner([sys.executable, str(program)]), calls

    return make


def test_plans_are_made_once_for_the_same_settings(planner: Any) -> None:
    made, calls = planner()
    config = config_from_values({"output": {"name": "a"}})
    first = made.plan(config, True, lambda seconds: False)
    assert first.time_s == 70 and first.cards == ((8, True, ("tiles",), 9),)
    renamed = config_from_values({"output": {"name": "b"}})
    assert made.plan(renamed, True, lambda seconds: False) is first
    assert made.plan(config, False, lambda seconds: False).time_s is None
    assert calls.read_text() == "xx"


def test_a_plan_ends_at_once_when_it_is_cancelled(planner: Any) -> None:
    made, _ = planner()
    began = time.monotonic()
    with pytest.raises(PlanCancelled):
        made.plan(config_from_values({"train": {"seed": 13}}), True, lambda seconds: seconds > 0.2)
    assert time.monotonic() - began < 20


def test_what_a_plan_cannot_use_is_a_sentence(planner: Any) -> None:
    with pytest.raises(UserError, match="unlucky"):
        planner()[0].plan(config_from_values({"train": {"seed": 14}}), True, lambda seconds: False)


def test_a_plan_is_shown_with_the_layers_that_learn(handlers: TrainHandlers, planner: Any) -> None:
    planning = TrainHandlers(handlers.place, planner=planner()[0])
    html = plan_html(planning.plan(form(handlers), lambda seconds: False))
    assert "1 min 10 s" in html and "fits with tiles" in html and "&lt;b&gt;" in html
    assert "96 layers" in html
    wrong = planning.plan(form(handlers, train__seed=14), lambda seconds: False)
    assert "&#x27;Seed&#x27; is unlucky." in plan_html(wrong)


def test_the_layers_of_a_text_encoder_count_as_far_as_they_are_read() -> None:
    from lora_sd.ui.train.handlers import _layers

    def text_layers(**base: Any) -> int:
        config = config_from_values({"base": base, "adapter": {"text_encoder": True}})
        lines = [line.split() for line in _layers(config)[0].splitlines() if "text_encoder" in line]
        return sum(int(words[0]) for words in lines)

    assert "text_encoder" not in _layers(Config())[0]
    assert text_layers(clip_skip=2) == text_layers() / 2 > 0
