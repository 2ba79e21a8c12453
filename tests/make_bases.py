"""Base models of random weights on disk: miniatures of Stable Diffusion 1, 2 and XL, and models of
the published sizes."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import make_unet
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Size, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from lora_sd.adapter import Adapter
from lora_sd.base_files import WEIGHTS, BaseFiles, open_base
from lora_sd.base_files.baking import Recipe, write_single_file
from lora_sd.base_files.metadata import checkpoint_metadata
from lora_sd.base_files.tensor_stream import write_tensor_file
from lora_sd.known_bases import CLIP_TOKENIZER, PUBLISHED, published_configs

CONFIGS = {family: published_configs(family) for family in PUBLISHED}
KINDS = ("sd1", "sd2", "sdxl")
LATER = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def make_base(kind: str, folder: Path, predicts_v: bool = False, **save: Any) -> Path:
    """A miniature of one of KINDS as a diffusers folder, with norms and biases other than 1 and 0.

    Args:
        predicts_v: v instead of the noise; SDXL with zero terminal SNR then, as its fine-tunes.
        save: for `save_pretrained`: a variant, a shard size.
    """
    tokenizer, padded = clip_tokenizer(), clip_tokenizer("!")
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            layers_per_block=2,
        ),
        "text_encoder": CLIPTextModel(_text(tokenizer, "gelu" if kind == "sd2" else "quick_gelu")),
        "tokenizer": padded if kind == "sd2" else tokenizer,
        "scheduler": DDIMScheduler(
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction" if predicts_v else "epsilon",
            rescale_betas_zero_snr=predicts_v and kind == "sdxl",
        ),
    }
    if kind == "sdxl":
        second = _text(tokenizer, "gelu", hidden_size=12, projection_dim=20)
        unet = make_unet(
            layers_per_block=2,
            cross_attention_dim=20,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 20,
        )
        parts |= {
            "unet": unet,
            "text_encoder_2": CLIPTextModelWithProjection(second),
            "tokenizer_2": padded,
        }
        pipeline: Any = StableDiffusionXLPipeline(**parts)
    else:
        parts["unet"] = make_unet(use_linear_projection=kind == "sd2")
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    torch.manual_seed(8)
    for part in parts.values():
        if isinstance(part, nn.Module):
            for weight in part.parameters():
                weight.data = torch.randn(weight.shape) / 4
    pipeline.save_pretrained(folder / "model", **save)
    return folder / "model"


def save_single_file(folder: Path | str, path: Path) -> Path:
    """The model of a folder as one file, as `bake` writes it."""
    base = open_base(str(folder))
    recipe = Recipe(base, {}, None)
    write_single_file(recipe, path, checkpoint_metadata(base, path.stem, []))
    return path


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer that ships with the project; SD 2 and SDXL's second encoder pad with '!'."""
    tokenizer = CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER))
    tokenizer.pad_token = pad
    return tokenizer


def _text(tokenizer: Any, hidden_act: str, **changes: Any) -> CLIPTextConfig:
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "hidden_act": hidden_act,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**options, **changes})


def make_published(family: str, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """A model of a published size with random weights, as a diffusers folder."""
    shapes = published_shapes(family)
    noise = torch.Generator().manual_seed(0)
    classes: dict[str, list[str]] = {}
    for component, config in CONFIGS[family].items():
        (folder / component).mkdir(parents=True)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / component / name).write_text(json.dumps(config))
        kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **LATER}
        if component == "scheduler":
            classes[component] = ["diffusers", config["_class_name"]]
            continue
        library = "transformers" if component in LATER else "diffusers"
        classes[component] = [library, kinds[component].__name__]
        own = {n.partition(".")[2]: s for n, s in shapes.items() if n.startswith(f"{component}.")}
        write_tensor_file(
            folder / component / f"{WEIGHTS[component]}.safetensors",
            {key: (dtype, shape) for key, shape in own.items()},
            lambda key, own=own: (torch.randn(own[key], generator=noise) / 50).to(dtype),
            {},
        )
    for name in ("tokenizer", "tokenizer_2")[: 1 + (family == "sdxl")]:
        pad = "!" if family == "sd21" or name == "tokenizer_2" else "<|endoftext|>"
        clip_tokenizer(pad).save_pretrained(folder / name)
        classes[name] = ["transformers", "CLIPTokenizer"]
    pipeline = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    index = {"_class_name": pipeline, **classes}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def published_shapes(family: str) -> dict[str, Size]:
    """Every tensor of 'sd15', 'sd21' or 'sdxl', named as in `base_files.original`."""
    shapes = {}
    for component, config in CONFIGS[family].items():
        if component == "scheduler":
            continue
        with torch.device("meta"):
            if component in LATER:
                part = LATER[component](CLIPTextConfig(**config))
            else:
                kind = UNet2DConditionModel if component == "unet" else AutoencoderKL
                part = kind.from_config(config)
        for key, tensor in part.state_dict().items():
            is_flat = component == "text_encoder" and not key.startswith("text_model.")
            shapes[f"{component}.{'text_model.' * is_flat}{key}"] = tensor.shape
    return shapes


def tensors_of(base: BaseFiles) -> dict[str, torch.Tensor]:
    """All tensors of a base by name."""
    return {name: base.tensor(name) for name in base.tensor_shapes}


def assert_same_tensors(one: BaseFiles, other: BaseFiles) -> None:
    """Both hold the same tensors, bit for bit."""
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def without(adapter: Adapter, ending: str) -> Adapter:
    """The adapter without the layers whose names end so."""
    return Adapter({n: w for n, w in adapter.layers.items() if not n.endswith(ending)})
