"""Models of the published sizes: bake and extract in a process of their own, and the figures."""

import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import randomise
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from make_adapters import random_adapter
from make_bases import make_published

from lora_sd import inject
from lora_sd.base_files import open_base
from lora_sd.base_files.configs import published_configs
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.formats.safetensors_file import read_header
from lora_sd.layer_choice import choose_layers
from lora_sd.layer_names import layer_shapes
from lora_sd.merge import MergedWeights

MOST_MEMORY_KB = 1_200_000  # torch alone takes 300,000
# Not getrusage: a child's highest memory counts that of the process that started it.
MEASURED = """
import sys
from lora_sd.__main__ import main
assert main(sys.argv[1:]) == 0
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def run(*arguments):
    """`python -m lora_sd ...`; asserts that it went well and stayed small."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-2]) < MOST_MEMORY_KB


@pytest.fixture
def made(request, tmp_path):
    """(family, folder with base/ and adapter.safetensors of rank 16 in every layer)."""
    shapes = open_base(str(make_published(request.param, tmp_path / "base"))).shapes
    adapter = random_adapter(shapes, (16,), (1.0,))
    save_adapter(adapter, tmp_path / "adapter.safetensors", torch.float32)
    yield request.param, tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("made", ["sd15", "sd21", "sdxl"], indirect=True)
def test_bake_to_a_single_file_that_diffusers_reads(made):
    family, folder = made
    base, adapter = open_base(str(folder / "base")), folder / "adapter.safetensors"
    assert base.family == family
    run("bake", folder / "base", adapter, "-o", folder / "one.safetensors")
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_single_file(
        folder / "one.safetensors",
        config=str(folder / "base"),
        local_files_only=True,
        torch_dtype=torch.float16,
    )
    updates = load_adapter(adapter, base.shapes).layers
    seen = 0
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if not hasattr(pipeline, component):
            continue
        for key, tensor in getattr(pipeline, component).state_dict().items():
            is_flat = component == "text_encoder" and not key.startswith("text_model.")
            name = f"{component}.{'text_model.' * is_flat}{key}"
            expected = base.tensor(name)
            if (update := updates.get(name.removesuffix(".weight"))) and name.endswith(".weight"):
                expected = (expected.float() + update.delta()).half()
                torch.testing.assert_close(tensor, expected, rtol=2e-3, atol=1e-5)
            else:
                assert torch.equal(tensor, expected), name
            seen += 1
    assert seen == len(base.tensor_shapes)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("made", ["sd15"], indirect=True)
def test_extract_undoes_bake(made):
    _, folder = made
    run("bake", folder / "base", folder / "adapter.safetensors", "-o", folder / "one.safetensors")
    output = folder / "out.safetensors"
    run("extract", folder / "one.safetensors", folder / "base", "-o", output, "--rank", 16)
    shapes = open_base(str(folder / "base")).shapes
    found, expected = (
        load_adapter(path, shapes).layers for path in (output, folder / "adapter.safetensors")
    )
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        gap = (found[name].delta() - layer.delta()).norm() / layer.delta().norm()
        assert gap < 0.05, name  # the base's float16 rounds the sum


@pytest.mark.slow
def test_attaching_merging_and_reading_headers_are_as_quick_as_promised(tmp_path):
    unet = UNet2DConditionModel.from_config(published_configs("sd15")["unet"])
    plans = choose_layers(layer_shapes(unet), "attention-conv", 16, 16, 16, 16)

    def timed(action, *arguments):
        started = time.process_time()
        result = action(*arguments)
        return time.process_time() - started, result

    attached, _ = timed(inject.attach, unet, plans)
    scaled, _ = timed(inject.set_scale, unet, 0.5)
    randomise(unet)
    adapter = inject.collect(unet)
    detached, _ = timed(inject.detach, unet)
    assert attached + scaled + detached < 1.0
    # The first merge keeps a copy of 3 GB, which takes as long as memory takes to be had.
    copied, copies = timed(lambda: [weight.clone() for weight in unet.parameters()])
    del copies
    merged = MergedWeights({"unet": unet})
    first, _ = timed(merged.set, [(adapter, 1.0)])
    change, _ = timed(merged.set, [(adapter, 0.5)])
    assert first < copied + 3.0 and change < 3.0
    save_adapter(adapter, tmp_path / "a.safetensors")
    header, _ = timed(read_header, tmp_path / "a.safetensors")
    assert header < 0.05
    print(f"{attached=:.3f} {scaled=:.3f} {detached=:.3f} {header=:.4f}")
    print(f"{copied=:.2f} {first=:.2f} {change=:.2f}")
