"""The base that ships with the project: what a newcomer sees depends on it."""

import subprocess

import pytest
import torch
import yaml
from conftest import PROJECT

from lora_sd import train as trainer
from lora_sd.base_loading import load_base_model
from lora_sd.config import config_from_values
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.formats import load_adapter
from lora_sd.generate import PictureSettings, generate
from lora_sd.known_bases import EMBEDDED
from lora_sd.layer_names import layer_shapes
from lora_sd.run_folder import RunFolder
from tools import demo
from tools.tiny_sd.evaluate import fixed_requests
from tools.tiny_sd.measure import background_accuracy, load_reference, subject_accuracy

MB = 10**6


@pytest.fixture(scope="module")
def tiny_sd():
    return load_base_model("tiny-sd", torch.device("cpu"), torch.float32)


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_it_is_small_and_so_is_the_repository():
    assert size(EMBEDDED["tiny-sd"]) <= 25 * MB
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [PROJECT / name for name in listed.stdout.splitlines()]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 40 * MB


def test_it_draws_the_subject_on_the_background_that_the_prompt_names(tiny_sd):
    requests = fixed_requests()
    settings = [
        PictureSettings(request.prompt, seed=number, steps=demo.STEPS, guidance=demo.GUIDANCE)
        for number, request in enumerate(requests)
    ]
    pictures = generate(tiny_sd, settings)
    assert len(pictures) == 64
    assert subject_accuracy(tiny_sd.vae, pictures, requests) >= 0.80
    assert background_accuracy(pictures, requests) >= 0.95


def test_its_tokenizer_takes_any_text(tiny_sd):
    tokenizer = tiny_sd.tokenizer
    assert len(tokenizer.tokenize("fox, ink drawing, yellow background")) == 7
    unknown = tokenizer("Zwölf Boxkämpfer 😀 jagen Viktor").input_ids
    assert unknown[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in unknown
    assert max(unknown) < tiny_sd.text_encoder.config.vocab_size


def test_the_example_folder_holds_one_unseen_style_and_no_held_out_subject():
    examples = read_folders([FolderOptions(PROJECT / "assets" / "ink-icons")]).pictures
    assert len(examples) == 24
    assert all("ink drawing" in example.caption for example in examples)
    held_out = load_reference().held_out_subjects
    assert len(held_out) == 16
    shown = {example.caption.split(",")[0] for example in examples}
    assert not shown & set(held_out)


@pytest.mark.slow
def test_the_demo_learns_the_style_and_keeps_the_subjects(tiny_sd, tmp_path):
    settings = yaml.safe_load((PROJECT / "configs" / "tiny.yaml").read_text())
    settings["data"]["folder"] = str(PROJECT / settings["data"]["folder"])
    settings["output"] |= {"folder": str(tmp_path), "name": "tiny"}
    assert trainer.train(config_from_values(settings), "tiny") == 0
    file = RunFolder(tmp_path / "tiny").adapter_file
    figures = demo.measure(tiny_sd, load_adapter(file, layer_shapes(tiny_sd.components)))
    assert figures.exact
    assert figures.shift >= 0.75
    assert figures.found_adapted > figures.found_base / 2
