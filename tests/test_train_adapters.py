"""Every kind of adapter trains, resumes bit for bit, and leaves a file that says what it is."""

import json
import re
from pathlib import Path

import pytest
import torch
from make_bases import make_base
from safetensors import safe_open
from safetensors.torch import load_file
from test_train import losses, resume, stop_at, tensors, train

import train_sd_lora
from lora_sd import samples
from lora_sd import train as trainer
from lora_sd.base_loading import load_base_model
from lora_sd.clients.diffusers_load import load_in_diffusers
from lora_sd.config import config_from_values
from lora_sd.errors import EXIT_RESUMABLE, ConfigError, UserError
from lora_sd.formats import load_adapter
from lora_sd.layer_names import layer_shapes
from lora_sd.parts import unread_layers
from lora_sd.run_folder import RunFolder

KINDS = {
    "text encoder": {"text_encoder": True},
    "dropouts": {"dropout": 0.2, "rank_dropout": 0.3, "module_dropout": 0.2},
    "dora by input": {"dora": "input"},
    "dora by output": {"dora": "output"},
    "pissa": {"init": "pissa"},
    "rs": {"rs": True, "alpha": 0.7},
    "up-bias": {"up_bias": True},
    "tokens": {"text_encoder": True, "include": ["token_embedding"]},
    "own ranks": {"ranks": ["attn2.to_k=3:1", "block:mid=1", "block:up.0/conv=0"]},
}


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


SLOW_KINDS = ("rs", "up-bias", "own ranks", "tokens", "dora by input")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW_KINDS)) for kind in KINDS],
)
def test_it_learns_and_a_resumed_run_is_the_same_run(run_settings, monkeypatch, base, kind):
    run_settings["adapter"] |= KINDS[kind]
    run_settings["train"]["gradient_accumulation"] = 2
    straight = train(run_settings)
    adapter = load_adapter(straight.adapter_file, layer_shapes(base.components))
    assert all(layer.up.abs().max() > 0 for layer in adapter.layers.values())

    run_settings["output"]["name"] = "stopped"
    stop_at(monkeypatch, 3)
    assert trainer.train(config_from_values(run_settings), "run") == EXIT_RESUMABLE
    monkeypatch.undo()
    run = RunFolder(straight.path.with_name("stopped"))
    assert resume(run) == 0
    assert losses(run) == losses(straight)
    assert tensors(run, 6) == tensors(straight, 6)


def test_the_text_encoder_has_its_own_learning_rate_and_its_captions_are_seen(run_settings, base):
    run_settings["adapter"] |= {"text_encoder": True}
    run_settings["train"] |= {"steps": 2}
    run_settings["optimizer"] |= {"warmup_steps": 0, "text_encoder_learning_rate": 1e-9}
    adapter = load_adapter(train(run_settings).adapter_file, layer_shapes(base.components))
    largest = {"unet": 0.0, "text_encoder": 0.0}
    for name, layer in adapter.layers.items():
        part = name.partition(".")[0]
        largest[part] = max(largest[part], float(layer.up.abs().max()))
    assert largest["unet"] > 1e-3 > 1e-6 > largest["text_encoder"]


def test_up_bias_goes_into_diffusers_format_and_is_refused_in_kohya_s(run_settings):
    run_settings["adapter"] |= {"up_bias": True}
    run = train(run_settings)
    assert "lora_adapter_metadata" in metadata_of(run.adapter_file)
    assert "kohya's format has no place for up-biases" in run.log_file.read_text()
    run_settings["output"] |= {"format": "kohya", "name": "refused"}
    with pytest.raises(UserError, match="kohya's format has no place for up-biases"):
        train(run_settings)
    assert not run.path.with_name("refused").exists()


def test_the_file_tells_how_it_was_made_and_nothing_of_this_machine(run_settings):
    run_settings["data"]["trigger_word"] = "zork"
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2}
    run = train(run_settings)
    metadata = metadata_of(run.adapter_file)
    assert json.loads(metadata["ss_tag_frequency"])["pictures"]["zork"] == 5
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["0"]["count"] == 5
    assert json.loads(metadata["lora_sd.loss_curve"])[0] == [1, round(losses(run)[0], 6)]
    assert metadata["modelspec.trigger_phrase"] == "zork"
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert len(metadata["modelspec.date"]) == 10
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    everything = json.dumps(metadata)
    for private in (run_settings["data"]["folder"], run_settings["base"]["model"], "pictures/"):
        assert private not in everything


def test_like_an_adapter_trains_the_same_adapter_again(run_settings):
    run_settings["adapter"] |= {"ranks": ["attn2.to_k=3:1"]}
    first = train(run_settings)
    common = ["--data.folder", run_settings["data"]["folder"]]
    common += ["--base.model", run_settings["base"]["model"]]
    common += ["--output.folder", run_settings["output"]["folder"], "--output.name", "again"]
    assert train_sd_lora.main(["--like", str(first.adapter_file), *common]) == 0
    again = RunFolder(first.path.with_name("again"))
    assert losses(again) == losses(first)
    hashes = [metadata_of(run.adapter_file)["sshs_model_hash"] for run in (first, again)]
    assert hashes[0] == hashes[1]


def test_like_says_all_that_the_file_leaves_out(run_settings, tmp_path, capsys):
    kept = {"folder": run_settings["data"]["folder"], "kind": "validation"}
    run_settings["data"]["folders"] = [kept]
    run = train(run_settings)
    with pytest.raises(ConfigError) as caught:
        train_sd_lora.main(["--like", str(run.adapter_file)])
    assert len(caught.value.problems) == 2 and "--data.folder" in str(caught.value)
    assert "trained on 1 further folders" in capsys.readouterr().err
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match=r"x.safetensors' is not a safetensors file"):
        train_sd_lora.main(["--like", str(tmp_path / "x.safetensors")])


def test_the_same_seed_gives_the_same_file_to_the_byte(run_settings, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2}
    first = train(run_settings).adapter_file.read_bytes()
    run_settings["output"]["folder"] += "-again"
    assert train(run_settings).adapter_file.read_bytes() == first


def test_the_result_is_read_back_and_the_log_and_status_say_so(run_settings):
    run = train(run_settings)
    assert "modules match" in run.read_status().message
    assert run.read_status().message in run.log_file.read_text()


def test_a_bfloat16_base_with_checkpointing_and_dora_learns(run_settings):
    run_settings["base"]["dtype"] = "bfloat16"
    run_settings["adapter"] |= {"text_encoder": True, "dora": "input"}
    run_settings["memory"] = {"gradient_checkpointing": True}
    assert all(torch.isfinite(torch.tensor(losses(train(run_settings)))))


def test_sample_pictures_are_drawn_without_dropout(run_settings, monkeypatch):
    training = []
    original = samples.generate

    def watched(base, *arguments):
        training.extend(part.training for part in base.components.values())
        return original(base, *arguments)

    monkeypatch.setattr(samples, "generate", watched)
    run_settings["adapter"] |= {"text_encoder": True, "dropout": 0.5}
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2, "every_steps": 3}
    train(run_settings)
    assert len(training) > 4 and not any(training)


def test_the_announced_size_is_the_file_s(run_settings):
    run_settings["output"]["dtype"] = "float32"
    run_settings["adapter"] |= {"dora": "input", "text_encoder": True, "rank": 4}
    run = train(run_settings)
    announced = float(re.search(r"([\d.]+) MB file", run.log_file.read_text())[1])
    tensors = load_file(run.adapter_file)
    stored = sum(4 * one.numel() for key, one in tensors.items() if "alpha" not in key)
    assert announced == round(stored / 1e6, 1)


def test_layers_that_nothing_reads_are_not_adapted(run_settings, base):
    run_settings["adapter"]["text_encoder"] = True
    names = load_adapter(train(run_settings).adapter_file, layer_shapes(base.components)).layers
    assert any(".layers.0." in name for name in names)
    sd1 = [f"text_encoder.text_model.encoder.layers.{n}.mlp.fc1" for n in range(12)]
    sdxl = [*sd1, *(name.replace("text_encoder", "text_encoder_2") for name in sd1)]
    assert unread_layers(sd1) == set()
    assert unread_layers(sd1, clip_skip=3) == set(sd1[-2:])
    assert unread_layers(sdxl) == unread_layers(sdxl, clip_skip=3) == {sd1[-1]}


def test_a_text_encoder_alone_can_be_adapted(run_settings):
    run_settings["adapter"] |= {"text_encoder": True, "exclude": ["unet.*"]}
    file = train(run_settings).adapter_file
    with safe_open(file, "pt") as opened:
        assert all(key.startswith("lora_te_") for key in opened.keys())  # noqa: SIM118


def test_what_sdxl_learns_loads_in_diffusers_text_encoders_too(run_settings, tmp_path):
    folder = make_base("sdxl", tmp_path / "sdxl")
    run_settings["base"]["model"] = str(folder)
    run_settings["adapter"] |= {"text_encoder": True, "rank": 1}
    run_settings["data"]["resolution_px"] = 64
    run = train(run_settings)
    assert "not in diffusers" not in run.log_file.read_text()
    base = load_base_model(str(folder), torch.device("cpu"), torch.float32)
    loaded = load_in_diffusers(run.adapter_file, base)
    parts = {name.partition(".")[0] for name in loaded}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
