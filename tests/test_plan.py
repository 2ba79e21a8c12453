"""The plan of a run: what it says of memory is what is measured, and its advice can be followed."""

import json
from dataclasses import replace
from functools import cache

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from make_bases import make_base
from torch import nn

from lora_sd import layer_choice, layer_names
from lora_sd.__main__ import main
from lora_sd.base_loading import load_base_model
from lora_sd.config import config_from_values, parse_command_line
from lora_sd.errors import BaseModelError, ConfigError
from lora_sd.layers import LayerOptions
from lora_sd.memory.quantization import quantize, weight_bytes
from lora_sd.optimizers import make_optimizer
from lora_sd.optimizers.by_name import KINDS
from lora_sd.plan import make_plan
from lora_sd.plan.base_configs import base_configs
from lora_sd.plan.cards import GIB, fit_cards, steps_down, with_overhead
from lora_sd.plan.live_memory import LiveMemory
from lora_sd.plan.measurement import _flat, measure, peak_on_cpu
from lora_sd.plan.optimizer_states import states_bytes
from lora_sd.plan.packed import pack
from lora_sd.plan.prediction import Phase, Prediction
from lora_sd.plan.setting import Setting
from lora_sd.plan.shaped_base import shaped_base

BFLOAT16 = torch.bfloat16
TOLERANCE = 0.1  # what is promised


@cache
def plans_for(name, preset, trains_text):
    shaped = shaped_base(name, base_configs(name).configs)
    shapes = layer_names.layer_shapes(shaped.components if trains_text else {"unet": shaped.unet})
    return tuple(layer_choice.choose_layers(shapes, preset, 4, 4, 4, 4))


def setting(name, preset="attention-conv", **changes):
    """A setting for a base at 64 px, adapted with rank 4."""
    plans = plans_for(name, preset, changes.get("text") == "trained")
    options = {"size_px": (64, 64), "batch_size": 1, "adds_up": False, "options": LayerOptions()}
    return Setting(plans=plans, **{**options, **changes})


def said(name, one):
    return Prediction(name, base_configs(name).configs, one).training()


def measured(name, one):
    """A real step of a base on the CPU."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16" if one.autocast else "no", cpu=True)
    base = load_base_model(name, torch.device("cpu"), one.dtype)
    options = {
        "base_weights": one.base_weights,
        "adapter_dtype": str(one.adapter_dtype).removeprefix("torch."),
    }
    return measure(base, accelerator, one, memory_options=options, timed_steps=0)


# --- what is said is what is measured ---


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 2, "gradient_checkpointing": True, "text": "trained", "adds_up": True},
        {"preset": "attention", "autocast": BFLOAT16, "dtype": BFLOAT16, "batch_size": 4},
        {"gradient_checkpointing": True, "optimizer": "adamw_8bit", "size_px": (128, 64)},
        {"base_weights": "nf4", "dtype": BFLOAT16, "text": "frozen", "batch_size": 4},
    ],
    ids=["checkpointing, text, accumulation", "bf16", "8 bits, oblong", "nf4"],
)
def test_a_step_of_the_embedded_base_takes_what_was_said(changes):
    one = setting("tiny-sd", **changes)
    found = measured("tiny-sd", one)
    assert said("tiny-sd", one).total == pytest.approx(found.highest, rel=TOLERANCE)


def test_a_step_of_a_miniature_of_sdxl_takes_what_was_said(tmp_path):
    name = str(make_base("sdxl", tmp_path / "base"))
    one = setting(name, "attention", batch_size=2, size_px=(128, 128))
    found = measured(name, one)
    assert said(name, one).total == pytest.approx(found.highest, rel=TOLERANCE)


def test_loaded_and_working_memory_are_each_what_was_said():
    one = setting("tiny-sd", optimizer="lion", batch_size=4)
    found, phase = measured("tiny-sd", one), said("tiny-sd", one)
    working = sum(phase.parts.get(part, 0) for part in ("activations", "gradients"))
    assert phase.total - working == pytest.approx(found.loaded, rel=1e-4)
    assert working == pytest.approx(found.highest - found.loaded, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("name", KINDS)
def test_states_of_optimizers_are_as_large_as_said(name, dtype):
    shapes = ((32, 256), (8, 3), (5,), (64, 16, 3, 3), (6, 4, 1, 1))
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    group = {"params": parameters, "lr": 1.0 if name == "prodigy" else 1e-4, "weight_decay": 0.0}
    optimizer = make_optimizer(name, [group], [], torch.device("cpu"))
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    kept = _flat(one for state in optimizer.state.values() for one in state.values())
    sizes = sum(one.numel() * one.itemsize for one in kept)
    assert sizes - 8 * len(shapes) <= states_bytes(name, parameters) <= sizes  # counters apart


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_weights_in_few_bits_are_as_large_as_said(kind):
    base = load_base_model("tiny-sd", torch.device("cpu"), BFLOAT16)
    shaped = shaped_base("tiny-sd", base_configs("tiny-sd").configs)
    shaped.unet.to(BFLOAT16)
    assert quantize(base.unet, kind)[0] > 50
    pack(shaped.unet, kind, None)
    assert weight_bytes(shaped.unet) == weight_bytes(base.unet)


def test_live_memory_counts_storages_once_and_until_they_are_let_go():
    known = torch.ones(1000)
    with LiveMemory([known]) as live:
        a = known + 1
        b = a.view(10, 100).t()  # the same storage
        known.add_(1)
        del a
        assert live.live == 4000
        del b
        assert live.live == 0
        c = torch.cat([known * 2, known * 3])
        assert (live.live, live.peak) == (8000, 16000)
        del c


def test_the_cpus_peak_is_what_was_given_out_at_a_time():
    def work():
        one = torch.ones(1_000_000)
        del one
        two = torch.ones(500_000), torch.ones(250_000)
        del two

    assert peak_on_cpu(work) == pytest.approx(4_000_000, abs=1000)


def test_mixed_precision_of_cuda_keeps_more_than_the_cpus():
    one = setting("tiny-sd", autocast=BFLOAT16, dtype=BFLOAT16, batch_size=4)
    cpu, cuda = (said("tiny-sd", replace(one, like_cuda=like)).total for like in (False, True))
    assert 1.05 * cpu < cuda < 2 * cpu


# --- which cards it fits ---


def plan_of(**values):
    return make_plan(config_from_values(values), measured=False, device="cuda")


@pytest.mark.slow
def test_each_step_down_takes_less_than_the_one_before():
    one = setting("tiny-sd", batch_size=8, like_cuda=True, autocast=BFLOAT16)
    steps = steps_down(one, accumulation=2, tile_px=64)
    assert [step.changes[-1] for step in steps[1:]] == [
        "gradient checkpointing",
        "batches of 1, 16 to a step",
        "the base in bfloat16",
        "the base's weights in int8",
        "the base's weights in nf4",
        "adapting attention only",
    ]
    taken = [said("tiny-sd", step.setting).total for step in steps]
    assert taken == sorted(taken, reverse=True) and len(set(taken)) == len(taken)


def test_dora_has_no_weights_in_few_bits():
    one = setting("tiny-sd", options=LayerOptions(dora="output"))
    assert not any("memory.base_weights" in step.flags for step in steps_down(one))


def test_flags_of_cards_are_flags_of_the_trainer():
    one = setting("tiny-sd", batch_size=8)
    flags = [
        part
        for name, value in steps_down(one, tile_px=32)[-1].flags.items()
        for part in (f"--{name}", *([value] if value else []))
    ]
    config = config_from_values(parse_command_line(flags, "x").over({}))
    assert config.memory.gradient_checkpointing and config.memory.vae_slicing
    assert config.memory.base_weights == "nf4" and config.base.dtype == "bfloat16"
    assert (config.train.batch_size, config.train.gradient_accumulation) == (1, 8)
    assert config.adapter.preset == "attention"


def test_a_card_gets_the_first_step_that_fits_it():
    one, asked = setting("tiny-sd", batch_size=4, dtype=BFLOAT16), []

    def predict(this):
        asked.append(this)
        yield Phase("loading the base", {"UNet": 3 * GIB})
        yield Phase("training", {"activations": (1 if this.gradient_checkpointing else 9) * GIB})

    cards = fit_cards(one, 1, predict, 64, (2, 8, 24))
    assert [(card.gb, card.fits, len(card.changes)) for card in cards] == [
        (2, False, 1),
        (8, True, 1),
        (24, True, 0),
    ]
    assert cards[0].phase == "loading the base"
    assert cards[2].highest == with_overhead(9 * GIB) and len(asked) == 2


# --- the plan ---


def test_a_family_is_planned_without_its_weights(image_folder):
    data = {"folder": str(image_folder), "resolution_px": 64, "upscale": True}
    plan = plan_of(base={"model": "sd15"}, data=data, memory={"gradient_checkpointing": True})
    assert plan.device == "cuda" and plan.measured is None and plan.time_s is None
    assert plan.phases[0].parts["UNet"] == 859_520_964 * 2
    assert plan.highest.total > plan.training.total
    assert (plan.pictures, plan.size_px, plan.pictures_seen) == (5, (64, 64), 1500)
    assert plan.epochs == 300
    assert len(plan.cards) == 5 and all(card.fits and not card.changes for card in plan.cards)


def test_a_model_of_the_hub_that_is_not_here_goes_by_its_name():
    found = base_configs("somebody/anime-xl")
    assert not found.is_here and "taken for sdxl" in found.notice
    assert "text_encoder_2" in found.configs
    with pytest.raises(BaseModelError, match="name its family"):
        base_configs("nowhere/at-all.safetensors")


def test_pictures_that_are_not_there_are_squares_of_the_resolution(tmp_path):
    data = {"folder": str(tmp_path / "none"), "resolution_px": [64, 104]}
    plan = plan_of(data=data)
    assert plan.size_px == (96, 96) and plan.pictures is None and plan.epochs is None
    assert any("squares of 96 px" in one for one in plan.notices)


def test_the_largest_pictures_count(image_folder):
    data = {"folder": str(image_folder), "resolution_px": [16, 32, 64], "upscale": True}
    assert plan_of(data=data).size_px == (64, 64)
    assert plan_of(data={**data, "upscale": False}).size_px == (16, 16)


def test_what_is_kept_on_disk(image_folder):
    data = {"folder": str(image_folder), "resolution_px": 16, "flip": True}
    plan = plan_of(data=data, train={"ema_decay": 0.999}, output={"dtype": "float32"})
    assert plan.adapter_bytes == 4 * plan.parameters
    assert plan.checkpoint_bytes == 4 * 4 * plan.parameters  # weights, two states, average
    assert plan.encoded_bytes == 5 * 2 * (4 * 4) * 4 * 8  # pictures, variants, latents


def test_phases_that_settings_ask_for(image_folder):
    data = {"folder": str(image_folder), "resolution_px": 16}
    plan = plan_of(
        data={**data, "folders": [{"folder": str(image_folder), "kind": "validation"}]},
        sample={"prompts": ["a"]},
        adapter={"text_encoder": True},
        memory={"idle_parts": "keep"},
    )
    assert [phase.name for phase in plan.phases] == [
        "loading the base",
        "encoding pictures",
        "drawing samples",
        "drawing the grid",
        "training",
        "validating",
    ]
    assert {"VAE", "text encoder"} <= plan.training.parts.keys()
    assert "gradients" not in plan.phases[-1].parts


def test_settings_that_do_not_go_together_are_told():
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        plan_of(adapter={"rank": 1000})


def test_nothing_is_measured_that_would_not_fit(monkeypatch):
    class Free:
        available = 1_000_000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Free)
    plan = make_plan(config_from_values({}), cards_gb=())
    assert plan.measured is None and any("are free" in one for one in plan.notices)


# --- the verb ---


def test_the_verb_measures_and_says_so(capsys, image_folder):
    arguments = ["plan", "--data.folder", str(image_folder), "--data.resolution_px", "16"]
    assert main([*arguments, "--train.steps", "10", "--train.batch_size=2"]) == 0
    printed = capsys.readouterr().out
    assert "10 steps of 2: 20 pictures seen, 4.0 epochs of 5" in printed
    assert "measured in a real step" in printed and "time: " in printed
    assert "24 GB" in printed and "as set" in printed


def test_the_verb_gives_json(capsys, image_folder):
    arguments = ["plan", "--data.folder", str(image_folder), "--shapes", "--json"]
    assert main([*arguments, "--device", "cuda"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["measured"] is None and values["time_s"] is None
    assert values["highest"] == max(phase["total"] for phase in values["phases"])
    assert [card["gb"] for card in values["cards"]] == [6, 8, 12, 16, 24]
