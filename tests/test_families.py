"""The family of an adapter file is told from its header alone."""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROJECT
from make_adapters import random_adapter
from safetensors.torch import save_file

from lora_sd import layer_names
from lora_sd.adapter import Adapter
from lora_sd.base_loading import load_base_model
from lora_sd.errors import AdapterError
from lora_sd.formats import FORMATS, save_adapter
from lora_sd.formats.families import FAMILIES, detect_family, layer_shapes, load_any
from lora_sd.formats.safetensors_file import read_header

CHOICES = {
    "everything": lambda name: True,
    "attention": lambda name: ".attn" in name,
    "cross attention": lambda name: "attn2.to_k" in name,
    "few": lambda name: name.endswith(("attn2.to_v", "resnets.0.conv1")),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def adapter_of(family: str, keep=lambda name: True, **options) -> Adapter:
    """A random adapter of the layers whose names are kept."""
    shapes = {name: shape for name, shape in layer_shapes(family).items() if keep(name)}
    return random_adapter(shapes, **{"ranks": (1,), **options})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_found_without_metadata(path, family, choice, format):
    save_adapter(adapter_of(family, CHOICES[choice]), path, format=format)
    assert detect_family(path) == family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dora_file_is_found(path, family):
    save_adapter(adapter_of(family, CHOICES["few"], dora=True), path)
    adapter, found = load_any(path)
    assert found == family
    assert all(layer.magnitude is not None for layer in adapter.layers.values())


def is_text(name: str) -> bool:
    return name.startswith("text_encoder.")


def is_conv(name: str) -> bool:
    return name.startswith("unet.") and name.endswith(("conv1", "conv2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_encoder_s_file_in_kohya_s_format_is_found(path, family):
    adapter = adapter_of(family, is_text)
    if family == "sdxl":
        adapter.metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    save_adapter(adapter, path)
    assert detect_family(path) == family


def test_convolutions_of_sdxl_are_found_by_their_names(path):
    adapter = adapter_of("sdxl", is_conv)
    adapter.metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    save_adapter(adapter, path)
    assert detect_family(path) == "sdxl"


AMBIGUOUS = {
    "convolutions of SD 1.5 or 2.1": ("sd15", is_conv, "kohya", "sd15 and sd21"),
    "a text encoder in diffusers' format": ("sd15", is_text, "diffusers", "sd15 and sdxl"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_where_families_are_alike_the_metadata_decides(path, case):
    family, keep, format, alike = AMBIGUOUS[case]
    adapter = adapter_of(family, keep)
    save_adapter(adapter, path, format=format)
    with pytest.raises(AdapterError, match=rf"a\.safetensors' fits {alike} alike.*--base"):
        detect_family(path)
    for said in (
        {"ss_base_model_version": "sd_v1"},
        {"modelspec.architecture": "stable-diffusion-v1/lora"},
    ):
        adapter.metadata = said
        save_adapter(adapter, path, format=format)
        assert detect_family(path) == "sd15"


def test_metadata_that_the_layers_contradict_is_not_believed(path):
    adapter = adapter_of("sd15", CHOICES["attention"])
    adapter.metadata["ss_base_model_version"] = "sd_v2"
    save_adapter(adapter, path)
    assert detect_family(path) == "sd15"


def test_an_unknown_model_s_file_is_refused(path, adapter):
    save_adapter(adapter, path)
    with pytest.raises(AdapterError, match=r"a\.safetensors' is for no model that is known"):
        load_any(path)


@pytest.mark.parametrize(
    "names, said",
    [
        ([], "has no tensors"),
        (["x.weight"], "no layer with both .* such as 'x.weight'"),
        (["lora_unet_a.lora_up.weight", "lora_unet_a.lora_B.weight"], "twice.*'lora_unet_a'"),
    ],
)
def test_a_file_without_whole_layers_is_refused(path, names, said):
    save_file({name: torch.ones(1, 1) for name in names}, path)
    with pytest.raises(AdapterError, match=said):
        detect_family(path)


def test_one_foreign_layer_does_not_hide_the_family(path):
    adapter = adapter_of("sd15", CHOICES["attention"])
    adapter.layers["unet.nowhere"] = next(iter(adapter.layers.values()))
    save_adapter(adapter, path)
    with pytest.raises(AdapterError, match="3 of its .* tensors belong to no layer"):
        load_any(path)
    some, family = load_any(path, allow_partial=True)
    assert family == "sd15" and len(some.layers) == len(adapter.layers) - 1


def test_the_layers_of_tiny_sd_are_those_of_the_model():
    base = load_base_model("tiny-sd", torch.device("cpu"), torch.float32)
    models = {"unet": base.unet, "text_encoder": base.text_encoder}
    assert layer_names.layer_shapes(models).items() <= layer_shapes("tiny-sd").items()


COLD = """
import gc, sys, time
from pathlib import Path
from lora_sd.formats.families import detect_family
gc.collect()  # what importing torch has piled up takes 65 ms, and would fall due anywhere
start = time.process_time()
assert detect_family(Path(sys.argv[1])) == "sdxl"
print(time.process_time() - start)
"""


def parsing_s(path):
    """CPU time of the header's JSON alone, which tells how fast this machine is now."""
    data = path.read_bytes()
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    took = []
    for _ in range(5):
        start = time.process_time()
        json.loads(text)
        took.append(time.process_time() - start)
    return min(took)


def test_a_header_is_read_and_judged_in_a_moment(path):
    """SDXL's whole file, in 50 ms; longer only where the machine is slow at parsing JSON, too.
    Cold it is detect_family alone, which reads the header."""
    save_adapter(adapter_of("sdxl"), path)
    limit_s = max(0.05, 20 * parsing_s(path))
    took = []
    for _ in range(4):  # the first builds the tables of names; the garbage collector may run in one
        start = time.process_time()
        assert len(read_header(path).tensors) > 3000
        assert detect_family(path) == "sdxl"
        took.append(time.process_time() - start)
    assert min(took[1:]) < limit_s
    cold = [
        subprocess.check_output([sys.executable, "-c", COLD, path], cwd=PROJECT, text=True)
        for _ in range(2)
    ]
    assert min(map(float, cold)) < limit_s
