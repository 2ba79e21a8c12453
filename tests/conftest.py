"""A Stable Diffusion of a few thousand random weights, and pictures to train it on."""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import settings
from PIL import Image
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from lora_sd import inject, layer_choice, layer_names
from lora_sd.adapter import Adapter
from lora_sd.base_loading import load_base_model
from lora_sd.base_model import BaseModel

PROJECT = Path(__file__).resolve().parent.parent
pytest_plugins = ["browser"]  # the fixtures of the app in a real browser
settings.register_profile("busy", deadline=None)  # machines differ, and so do their moments
settings.load_profile("busy")
PICTURE_PX = 16


def make_unet(**changes: object) -> UNet2DConditionModel:
    """A UNet with every kind of layer that Stable Diffusion's has, of 40 thousand weights."""
    torch.manual_seed(0)
    options: dict[str, object] = {
        "sample_size": PICTURE_PX // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**options, **changes}).eval()


def make_parts() -> dict[str, nn.Module]:
    """A small UNet and SDXL's two text encoders: transformers names their layers in two ways."""
    torch.manual_seed(3)
    text = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=6,
    )
    return {
        "unet": make_unet(),
        "text_encoder": CLIPTextModel(text).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(text).eval(),
    }


def choose(
    unet: inject.Model, preset: str = "attention-conv", **changes: Any
) -> list[layer_choice.LayerPlan]:
    """Layers of a small UNet or of its parts, with ranks that fit all of them."""
    options = {"rank": 2, "alpha": 2, "conv_rank": 3, "conv_alpha": 1, **changes}
    return layer_choice.choose_layers(layer_names.layer_shapes(unet), preset, **options)


def randomise(unet: nn.Module) -> None:
    """Give every lora_up values, as training does."""
    torch.manual_seed(5)
    for layer in inject.lora_layers(unet).values():
        nn.init.normal_(layer.lora_up.weight, std=0.3)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer that knows single letters only."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def make_model_folder(root: Path) -> Path:
    """A diffusers folder with random weights, inside an empty folder."""
    tokenizer = make_tokenizer(root / "tokens")
    torch.manual_seed(1)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "sd")
    return root / "sd"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights."""
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def base(model_folder: Path) -> BaseModel:
    """The model of `model_folder`, loaded anew for each test."""
    return load_base_model(str(model_folder), torch.device("cpu"), torch.float32)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """A small UNet."""
    return make_unet()


@pytest.fixture
def adapter() -> Adapter:
    """An adapter of every layer of `unet`, as if trained."""
    unet = make_unet()
    inject.attach(unet, choose(unet, "full"))
    randomise(unet)
    return inject.collect(unet)


@pytest.fixture
def unet_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents, timesteps, captions) that fit `unet`."""
    torch.manual_seed(2)
    side = PICTURE_PX // 2
    return torch.randn(2, 4, side, side), torch.tensor([3, 500]), torch.randn(2, 5, 8)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Five pictures of one colour each, with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(["red", "green", "blue", "white", "black"]):
        Image.new("RGB", (PICTURE_PX, PICTURE_PX), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} wall")
    return folder


@pytest.fixture
def run_settings(model_folder: Path, image_folder: Path, tmp_path: Path) -> dict[str, dict]:
    """Settings of a run of six steps that takes a second."""
    return {
        "base": {"model": str(model_folder)},
        "data": {"folder": str(image_folder), "resolution_px": PICTURE_PX},
        "adapter": {"rank": 2, "alpha": 2, "conv_rank": 2, "conv_alpha": 1},
        "train": {"steps": 6, "batch_size": 2},
        "optimizer": {"warmup_steps": 2, "learning_rate": 1e-2},
        "output": {"folder": str(tmp_path / "outputs"), "name": "run", "save_every_steps": 2},
    }
