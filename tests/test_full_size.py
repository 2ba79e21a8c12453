"""Models of the published sizes: bake and extract in a process of their own, and the figures."""

import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import PROJECT, randomise
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from make_adapters import random_adapter
from make_bases import make_published, save_single_file
from PIL import Image

from lora_sd import inject
from lora_sd.base_files import open_base
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.formats.safetensors_file import read_header
from lora_sd.known_bases import published_configs
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


USED = """
import hashlib, sys, torch
from lora_sd.base_loading import load_base_model
from lora_sd.generate import PictureSettings, generate
torch.set_num_threads(2)
base = load_base_model(sys.argv[1], torch.device("cpu"), torch.bfloat16)
print("loaded", next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
digest, count = hashlib.sha256(), 0
for part in (*base.components.values(), base.vae):
    for name, tensor in part.state_dict().items():
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
        count += tensor.numel()
print("model", base.family, count, base.resolution_px, base.size_step_px, digest.hexdigest())
settings = PictureSettings("a cat", seed=1, steps=2, guidance=5, width_px=128, height_px=64)
(picture,) = generate(base, [settings])
print("picture", picture.size, hashlib.sha256(picture.tobytes()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family, resolution_px", [("sd15", 512), ("sd21", 768), ("sdxl", 1024)])
def test_folder_and_single_file_load_alike_in_little_more_than_their_size(
    family, resolution_px, tmp_path
):
    """In bfloat16, and each draws the same picture."""
    folder = make_published(family, tmp_path / "base")
    single = save_single_file(folder, tmp_path / "one.safetensors")
    lines = []
    for path in (folder, single):
        done = subprocess.run(
            [sys.executable, "-c", USED, str(path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        loaded, model, picture = done.stdout.split("\n\n")[0], *done.stdout.splitlines()[-2:]
        size_kb = int(model.split()[2]) * 2 / 1024
        assert int(loaded.split()[-2]) < size_kb + MOST_MEMORY_KB
        assert model.split()[1:5:2] == [family, str(resolution_px)]
        lines.append((model, picture))
    assert lines[0] == lines[1]
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("source", ["folder", "single file"])
def test_a_model_of_the_size_of_sd15_is_trained(source, tmp_path):
    """Two steps by the command that a user types, and the result goes back on the model."""
    base = make_published("sd15", tmp_path / "base")
    if source == "single file":
        base = save_single_file(base, tmp_path / "one.safetensors")
    (tmp_path / "pictures").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "pictures" / f"{colour}.png")
        (tmp_path / "pictures" / f"{colour}.txt").write_text(f"a {colour} wall")
    settings = {
        "base": {"model": str(base)},
        "data": {"folder": str(tmp_path / "pictures"), "resolution_px": 64},
        "adapter": {"rank": 2, "conv_rank": 2, "text_encoder": True},
        "train": {"steps": 2},
        "optimizer": {"warmup_steps": 0},
        "output": {"folder": str(tmp_path), "name": "run"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "train_sd_lora.py", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    adapter = load_adapter(tmp_path / "run" / "adapter.safetensors", open_base(str(base)).shapes)
    assert adapter.metadata["ss_base_model_version"] == "sd_v1"
    assert any(name.startswith("text_encoder.") for name in adapter.layers)
    assert sum(float(layer.delta().abs().sum()) for layer in adapter.layers.values()) > 0
    shutil.rmtree(tmp_path)


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
