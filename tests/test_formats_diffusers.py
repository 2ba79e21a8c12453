"""diffusers' format: the real diffusers loads our files at our scale, and we read theirs."""

import json

import pytest
import torch
from conftest import make_unet
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import _collate_lora_metadata
from make_adapters import (
    assert_same_layers,
    make_sdxl_unet,
    random_adapter,
    random_layer,
    token_layer,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_sd import layer_choice, layer_names
from lora_sd.adapter import Adapter
from lora_sd.errors import AdapterError
from lora_sd.formats import load_adapter, save_adapter

TOKENS = "text_encoder.text_model.embeddings.token_embedding"


@pytest.fixture
def models(base):
    return {"unet": base.unet, "text_encoder": base.text_encoder}


@pytest.fixture
def shapes(models):
    return layer_names.layer_shapes(models)


def saved(adapter: Adapter, tmp_path, **options):
    path = tmp_path / "a.safetensors"
    options = {"dtype": torch.float32, "format": "diffusers", **options}
    return path, save_adapter(adapter, path, **options)


def full_name(component: str, path: str) -> str:
    inside = f"text_model.{path.removeprefix('text_model.')}" if component != "unet" else path
    return f"{component}.{inside}"


def peft_layers(models) -> dict[str, LoraLayer]:
    """diffusers' adapted layers by our full names."""
    return {
        full_name(component, path): layer
        for component, model in models.items()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def assert_diffusers_has(adapter: Adapter, models) -> None:
    """Every layer of diffusers' computes what ours would, and there is no other one."""
    theirs = peft_layers(models)
    assert theirs.keys() == adapter.layers.keys()
    torch.manual_seed(6)
    for name, layer in adapter.layers.items():
        base = theirs[name].get_base_layer()
        if layer.embedding:
            x = torch.arange(7)
        elif layer.down.dim() == 4:
            x = torch.randn(1, base.in_channels, 6, 6)
        else:
            x = torch.randn(5, base.in_features)
        expected = theirs[name](x)
        weight, bias = base.weight + layer.delta(base.weight), getattr(base, "bias", None)
        if layer.up_bias is not None:
            bias = layer.bias_delta() + (0 if bias is None else bias)
        if layer.embedding:
            ours = torch.nn.functional.embedding(x, weight)
        elif layer.down.dim() == 4:
            ours = torch.nn.functional.conv2d(x, weight, bias, base.stride, base.padding)
        else:
            ours = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=name)


def preset(name: str, shapes) -> Adapter:
    plans = layer_choice.choose_layers(shapes, name, rank=2, alpha=1, conv_rank=3, conv_alpha=2)
    adapter = random_adapter({plan.name: shapes[plan.name] for plan in plans})
    ranks = {plan.name: (plan.rank, plan.alpha) for plan in plans}
    return Adapter({n: random_layer(shapes[n], *ranks[n]) for n in adapter.layers})


CASES = {
    "attention": lambda shapes: preset("attention", shapes),
    "full": lambda shapes: preset("full", shapes),
    "mixed": lambda shapes: random_adapter(shapes, ranks=(1, 2, 3), alphas=(1.0, 0.5, 3.0, 7.25)),
    "DoRA": lambda shapes: random_adapter(shapes, ranks=(1, 2), alphas=(1.0, 2.0), dora=True),
    "bias": lambda shapes: random_adapter(shapes, alphas=(0.5, 2.0), bias=True),
    "tokens": lambda shapes: Adapter(
        {**random_adapter(shapes).layers, TOKENS: token_layer(shapes[TOKENS], 3, 2.5)}
    ),
}


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize("case", CASES)
def test_diffusers_loads_every_layer_at_our_scale(base, models, shapes, tmp_path, case):
    adapter = CASES[case](shapes)
    path, notices = saved(adapter, tmp_path)
    assert not notices
    assert_same_layers(load_adapter(path, shapes), adapter)
    base.pipeline().load_lora_weights(str(path.parent), weight_name=path.name)
    assert_diffusers_has(adapter, models)


def test_the_metadata_has_only_fields_that_every_peft_knows(shapes, tmp_path):
    path, _ = saved(random_adapter(shapes), tmp_path)
    with safe_open(path, "pt") as opened:
        config = json.loads(opened.metadata()[LORA_ADAPTER_METADATA_KEY])
    fields = {key.partition(".")[2] for key in config}
    assert fields == {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    assert len(config["unet.target_modules"]) == sum(name.startswith("unet.") for name in shapes)


@pytest.mark.parametrize("case", ["attention", "full", "mixed"])
def test_diffusers_loads_kohya_s_format_at_our_scale(base, models, shapes, tmp_path, case):
    adapter = CASES[case](shapes)
    path, notices = saved(adapter, tmp_path, format="kohya")
    assert not notices
    base.pipeline().load_lora_weights(str(path.parent), weight_name=path.name)
    assert_diffusers_has(adapter, models)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_loads_an_sdxl_unet_s_layers_at_our_scale(tmp_path, format):
    unet = make_sdxl_unet()
    adapter = random_adapter(
        layer_names.layer_shapes({"unet": unet}), ranks=(1, 2), alphas=(1.0, 0.5, 3.0)
    )
    path, _ = saved(adapter, tmp_path, format=format)
    tensors, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        str(tmp_path), weight_name=path.name, unet_config=unet.config, return_lora_metadata=True
    )
    unet.load_lora_adapter(tensors, prefix="unet", network_alphas=alphas, metadata=metadata)
    assert_diffusers_has(adapter, {"unet": unet})


@pytest.mark.parametrize("case", ["fc only", "tokens only"])
def test_text_encoder_files_that_diffusers_refuses_are_completed(
    base, models, shapes, tmp_path, case
):
    attention = "text_encoder.text_model.encoder.layers.0.self_attn."
    name = TOKENS if case == "tokens only" else attention.replace("self_attn.", "mlp.fc1")
    layer = token_layer(shapes[name]) if name == TOKENS else random_layer(shapes[name], 2, 4.0)
    adapter = Adapter({name: layer})
    path, notices = saved(adapter, tmp_path)
    assert "do nothing" in notices[0]
    again = load_adapter(path, shapes)
    added = again.layers.keys() - {name}
    assert added <= {f"{attention}{p}_proj" for p in ("q", "k", "v", "out")} and len(added) >= 3
    assert not any(again.layers[new].delta().any() for new in added)
    base.pipeline().load_lora_weights(str(path.parent), weight_name=path.name)
    assert_diffusers_has(again, models)


def test_some_of_a_text_encoder_s_attention_is_enough_for_diffusers(base, models, shapes, tmp_path):
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    adapter = Adapter({name: random_layer(shapes[name], 2, 4.0)})
    path, notices = saved(adapter, tmp_path)
    assert notices == [] and load_adapter(path, shapes).layers.keys() == {name}
    base.pipeline().load_lora_weights(str(path.parent), weight_name=path.name)
    assert_diffusers_has(adapter, models)


def train_with_peft(models, **options) -> None:
    """Give UNet and text encoder PEFT layers of mixed ranks and alphas, as if trained."""
    torch.manual_seed(7)
    unet = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"],
        rank_pattern={"mid_block.resnets.0.conv1": 3, "attn2.to_k": 1},
        alpha_pattern={
            "attn1.to_v": 5,
            ".*mid_block.*to_q": 7,
            "^mid_block.resnets.0.conv1": 0.5,
            "to_v": 9,  # where several fit, the first one counts
            "to_q": 4,
        },
        **options,
    )
    text = LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "out_proj", "fc1"], **options)
    models["unet"].add_adapter(unet)
    models["text_encoder"].add_adapter(text)
    for layer in peft_layers(models).values():
        for parameter in (layer.lora_B["default"].weight, layer.lora_A["default"].weight):
            torch.nn.init.normal_(parameter)


def save_with_diffusers(models, folder, with_metadata: bool = True):
    """The file that diffusers' training scripts leave."""
    metadata = _collate_lora_metadata({**models}) if with_metadata else {}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(models["unet"]),
        text_encoder_lora_layers=get_peft_model_state_dict(models["text_encoder"]),
        **metadata,
    )
    return folder / "pytorch_lora_weights.safetensors"


def assert_deltas_are_peft_s(adapter: Adapter, models) -> None:
    theirs = peft_layers(models)
    assert theirs.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.delta(), theirs[name].get_delta_weight("default"))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_diffusers_is_read_with_peft_s_scales(models, shapes, tmp_path, rslora):
    train_with_peft(models, use_rslora=rslora)
    adapter = load_adapter(save_with_diffusers(models, tmp_path), shapes)
    assert "lora_sd.note" not in adapter.metadata
    assert_deltas_are_peft_s(adapter, models)


def test_without_metadata_alpha_is_the_rank_with_a_note(models, shapes, tmp_path):
    train_with_peft(models)
    adapter = load_adapter(save_with_diffusers(models, tmp_path, with_metadata=False), shapes)
    assert all(layer.alpha == layer.rank for layer in adapter.layers.values())
    assert "no alpha" in adapter.metadata["lora_sd.note"]


def test_dora_of_peft_is_read(models, shapes, tmp_path):
    train_with_peft(models, use_dora=True)
    adapter = load_adapter(save_with_diffusers(models, tmp_path), shapes)
    for name, layer in peft_layers(models).items():
        layer.merge()
        base = dict(
            layer_names.adaptable_layers({"unet": make_unet()})
        )  # the same seed, not merged
        if name.startswith("unet."):
            before = base[name].weight
            merged = before + adapter.layers[name].delta(before)
            torch.testing.assert_close(merged, layer.get_base_layer().weight, rtol=1e-4, atol=1e-5)


def test_peft_s_own_file_is_read(models, shapes, tmp_path):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"])
    wrapped = get_peft_model(models["unet"], config)
    for layer in peft_layers(models).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    wrapped.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path / "adapter_model.safetensors", shapes)
    assert {layer.alpha for layer in adapter.layers.values()} == {6.0}
    assert_deltas_are_peft_s(adapter, models)
    # To any other file beside it PEFT's config does not belong.
    other = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "cat.safetensors")
    assert {layer.alpha for layer in load_adapter(other, shapes).layers.values()} == {2.0}


def test_an_up_bias_with_dora_is_refused_and_never_written(shapes, tmp_path):
    adapter = random_adapter({n: shapes[n] for n in shapes if n.endswith("to_q")}, bias=True)
    name, *rest = adapter.layers
    alone = random_layer(shapes[name], 2, 1.0, dora=True)
    adapter.layers[name] = alone  # beside up-biases, as `combine` may make it
    path, _ = saved(adapter, tmp_path)
    assert_same_layers(load_adapter(path, shapes), adapter)
    both = load_file(path) | {f"{name}.lora_B.bias": torch.ones(len(alone.up))}
    save_file(both, path)
    with pytest.raises(AdapterError, match="1 of its .* both an up-bias and a DoRA magnitude"):
        load_adapter(path, shapes)
    assert load_adapter(path, shapes, allow_partial=True).layers.keys() == set(rest)


OLD_KEYS = {
    "attention processors": (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{way}.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ),
    "attention processors without 'unet.'": (
        "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{way}.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "lora in the layer": (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.{way}.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "text encoder, processors": (
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{way}.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ),
    "text encoder, out": (
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.{way}.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    ),
    "text encoder, lora_linear_layer": (
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.{way}.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
    ),
    "text encoder of newer transformers": (
        "text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.{way}.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
}


@pytest.mark.parametrize("kind", OLD_KEYS)
def test_keys_of_older_diffusers_are_read(shapes, tmp_path, kind):
    key, name = OLD_KEYS[kind]
    layer = random_layer(shapes[name], 2, 2.0)
    path = tmp_path / "old.safetensors"
    save_file({key.format(way="down"): layer.down, key.format(way="up"): layer.up}, path)
    assert_same_layers(load_adapter(path, shapes), Adapter({name: layer}))


BAD_CONFIGS = {
    "no JSON": "{",
    "no object": "[1]",
    "alpha 0": json.dumps({"unet.lora_alpha": 0}),
    "alpha no number": json.dumps({"unet.lora_alpha": [1]}),
    "patterns no object": json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}),
    "a slow pattern": json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(.*a.*)*x": 1}}),
    "a wrong pattern": json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_damaged_config_is_refused_with_the_file_s_name(shapes, tmp_path, kind):
    path, _ = saved(random_adapter(shapes), tmp_path)
    save_file(load_file(path), path, {LORA_ADAPTER_METADATA_KEY: BAD_CONFIGS[kind]})
    with pytest.raises(AdapterError, match=r"a\.safetensors' has a damaged lora_adapter_metadata"):
        load_adapter(path, shapes)
