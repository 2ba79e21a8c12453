"""A step of Stable Diffusion 1.5, of random weights, takes what its plan says of it."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from transformers import CLIPTokenizer

from lora_sd import layer_choice
from lora_sd.base_files.components import empty_part
from lora_sd.base_model import BaseModel
from lora_sd.formats.layer_tables import layer_shapes
from lora_sd.known_bases import CLIP_TOKENIZER, published_configs
from lora_sd.layers import LayerOptions
from lora_sd.plan.measurement import measure
from lora_sd.plan.prediction import Prediction
from lora_sd.plan.setting import Setting

CONFIGS = published_configs("sd15")
SETTINGS = {
    "256 px": {"size_px": (256, 256)},
    "256 px, bf16, checkpointing, text": {
        "size_px": (256, 256),
        "dtype": torch.bfloat16,
        "autocast": torch.bfloat16,
        "gradient_checkpointing": True,
        "text": "trained",
    },
    "512 px, checkpointing": {"size_px": (512, 512), "gradient_checkpointing": True},
}


def random_base(dtype):
    """Stable Diffusion 1.5 whose weights are all the same small number."""
    parts = {}
    for part in ("unet", "text_encoder", "vae"):
        with torch.device("meta"):
            module = empty_part(part, CONFIGS[part]).requires_grad_(False).eval().to(dtype)
        parts[part] = module.to_empty(device="cpu")
        for parameter in module.parameters():
            parameter.fill_(0.001)
    for embeddings in (parts["text_encoder"].get_submodule("embeddings"),):
        length = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(length)[None]
    return BaseModel(
        name="random",
        tokenizer=CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER)),
        scheduler=DDPMScheduler(prediction_type="epsilon"),
        **parts,
    )


def resident(what="VmRSS"):
    """The process's memory in bytes, or its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_of_full_size_takes_what_was_said(name):
    changes = SETTINGS[name]
    text = changes.get("text") == "trained"
    shapes = {k: v for k, v in layer_shapes("sd15").items() if text or k.startswith("unet")}
    plans = layer_choice.choose_layers(shapes, "attention-conv", 16, 16, 8, 8)
    setting = Setting(
        plans=tuple(plans),
        **{
            "batch_size": 1,
            "adds_up": False,
            "options": LayerOptions(),
            "keeps_idle_parts": True,
            **changes,
        },
    )
    said = Prediction("sd15", CONFIGS, setting).training().total
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16" if setting.autocast else "no", cpu=True)
    before = resident()
    base = random_base(setting.dtype)
    options = {"idle_parts": "keep"}
    found = measure(base, accelerator, setting, memory_options=options, timed_steps=0)
    grown = resident("VmHWM") - before
    print(
        f"{name}: said {said / 1e6:.0f} MB, measured {found.highest / 1e6:.0f} MB, ratio "
        f"{said / found.highest:.3f}; process grew by {grown / 1e6:.0f} MB, {found.pass_s:.1f} s"
    )
    assert said == pytest.approx(found.highest, rel=0.1)
