"""kohya's format: what LyCORIS writes is read with its own deltas, SDXL gets kohya's names."""

import json
import re

import pytest
import torch
from conftest import make_unet
from lycoris.modules.locon import LoConModule
from make_adapters import (
    assert_same_layers,
    make_sdxl_unet,
    random_adapter,
    random_layer,
    token_layer,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Size, nn

from lora_sd import layer_names
from lora_sd.adapter import Adapter
from lora_sd.clients.tables import load_tables
from lora_sd.errors import AdapterError
from lora_sd.formats import fitting_format, load_adapter, save_adapter
from lora_sd.formats.kohya import keys_of
from lora_sd.formats.layer_tables import layer_shapes

TEXT = "text_encoder.text_model.encoder.layers.0."
TOKENS = "text_encoder.text_model.embeddings.token_embedding"
TEXT_SHAPES = {
    **{f"{TEXT}self_attn.{p}_proj": Size((8, 8)) for p in ("q", "k", "v", "out")},
    f"{TEXT}mlp.fc1": Size((16, 8)),
    f"{TEXT}mlp.fc2": Size((8, 16)),
    TOKENS: Size((20, 8)),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.fixture
def shapes(unet):
    return {**layer_names.layer_shapes({"unet": unet}), **TEXT_SHAPES}


def written_by_lycoris(unet: nn.Module, path, **options) -> dict[str, LoConModule]:
    """A LyCORIS LoCon for every layer, as if trained; its file, and its modules by full name."""
    torch.manual_seed(8)
    modules, tensors = {}, {}
    layers = layer_names.adaptable_layers({"unet": unet})
    keys = keys_of({name: layer.weight.shape for name, layer in layers.items()}, is_sdxl=False)
    for name, layer in layers.items():
        module = LoConModule(keys[name], layer, lora_dim=3, alpha=1.5, **options)
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=0.2)
        modules[name] = module
        state = module.custom_state_dict()
        tensors |= {f"{keys[name]}.{part}": value.contiguous() for part, value in state.items()}
    save_file(tensors, path)
    return modules


LYCORIS = {
    "LoCon": {},
    "Tucker": {"use_tucker": True},
    "rank-stabilised": {"rs_lora": True},
    "DoRA by output": {"weight_decompose": True, "wd_on_out": True},
    "DoRA by input": {"weight_decompose": True, "wd_on_out": False},
    "Tucker DoRA": {"weight_decompose": True, "use_tucker": True},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_a_file_of_lycoris_is_read_with_its_own_weights(unet, shapes, path, kind):
    modules = written_by_lycoris(unet, path, **LYCORIS[kind])
    adapter = load_adapter(path, shapes)
    assert adapter.layers.keys() == modules.keys()
    for name, module in modules.items():
        base = module.org_weight
        merged = base + adapter.layers[name].delta(base)
        expected = module.get_merged_weight()[0].reshape(base.shape)
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", LYCORIS)
def test_what_lycoris_wrote_is_written_again_without_a_middle_factor(unet, shapes, path, kind):
    written_by_lycoris(unet, path, **LYCORIS[kind])
    adapter = load_adapter(path, shapes)
    save_adapter(adapter, path, torch.float32)
    assert not any("lora_mid" in key for key in load_file(path))
    assert_same_layers(load_adapter(path, shapes), adapter)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    if "DoRA" in kind:
        assert metadata["ss_network_module"] == "lycoris.kohya"
        per_output = json.loads(metadata["ss_network_args"])["wd_on_output"]
        assert per_output == str("input" not in kind)


def test_sdxl_s_keys_are_those_of_kohya_s_tools():
    keys = keys_of(layer_shapes("sdxl"), is_sdxl=True)
    known = load_tables("sdxl").kohya
    assert known.keys() <= set(keys.values())
    shapes = {keys[name]: shape for name, shape in layer_shapes("sdxl").items()}
    assert all(shapes[key] == shape for key, shape in known.items())
    a1111 = load_tables("sdxl").a1111
    unet = [key for key in keys.values() if key.startswith("lora_unet_")]
    assert len(unet) == 794 and all(key in a1111 for key in unet)


def test_a_layer_of_sdxl_alone_has_the_same_key_as_in_the_whole():
    shapes = layer_shapes("sdxl")
    whole = keys_of(shapes, is_sdxl=True)
    for name in (*list(shapes)[::20], "unet.up_blocks.0.upsamplers.0.conv"):
        assert keys_of({name: shapes[name]}, is_sdxl=True) == {name: whole[name]}


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_an_sdxl_unet_of_any_layout_comes_back(path, layers_per_block):
    unet = make_sdxl_unet(layers_per_block=layers_per_block)
    shapes = layer_names.layer_shapes({"unet": unet})
    adapter = random_adapter(shapes)
    assert not save_adapter(adapter, path, torch.float32)
    keys = load_file(path)
    assert "lora_unet_label_emb_0_2.alpha" in keys
    assert f"lora_unet_output_blocks_{layers_per_block}_2_conv.alpha" in keys
    assert_same_layers(load_adapter(path, shapes), adapter)


def test_sdxl_in_diffusers_names_is_read(path):
    shapes = layer_names.layer_shapes({"unet": make_sdxl_unet()})
    adapter = random_adapter(shapes)
    tensors = {}
    for name, key in keys_of(shapes, is_sdxl=False).items():
        layer = adapter.layers[name]
        tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, path)
    assert_same_layers(load_adapter(path, shapes), adapter)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
@pytest.mark.parametrize("path_start", ["text_model_", ""])
def test_text_encoders_are_read_under_every_prefix(path, shapes, prefix, path_start):
    layer = random_layer(shapes[f"{TEXT}mlp.fc1"], 2, 1.0)
    key = f"{prefix}{path_start}encoder_layers_0_mlp_fc1"
    tensors = {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
    save_file({**tensors, f"{key}.alpha": torch.tensor(1)}, path)
    assert_same_layers(load_adapter(path, shapes), Adapter({f"{TEXT}mlp.fc1": layer}))


def test_factors_of_1x1_convolutions_may_have_two_dimensions_or_four(path, shapes):
    adapter = random_adapter(shapes)
    save_adapter(adapter, path, torch.float32, exact=True)
    tensors = {
        key: tensor.flatten(1) if tensor.shape[2:] == (1, 1) and "proj_in" in key else tensor
        for key, tensor in load_file(path).items()
    }
    tensors = {
        key: tensor[..., None, None] if "to_q.lora" in key else tensor
        for key, tensor in tensors.items()
    }
    save_file(tensors, path)
    assert_same_layers(load_adapter(path, shapes), adapter)


def test_attention_and_each_text_encoder_get_one_alpha_to_the_same_effect(path, shapes):
    adapter = random_adapter(shapes, ranks=(1, 2), alphas=(1.0, 4.0, 0.5))
    save_adapter(adapter, path, torch.float32)
    again = load_adapter(path, shapes)
    alphas: dict[str, set[float]] = {}
    for name, layer in again.layers.items():
        attention = re.search(r"unet.*to_(q|k|v|out\.0)$", name)
        group = "attention" if attention else name.partition(".")[0]
        alphas.setdefault(group, set()).add(layer.alpha)
        torch.testing.assert_close(layer.delta(), adapter.layers[name].delta())
    assert {group: len(found) for group, found in alphas.items()} == {
        "attention": 1,
        "text_encoder": 1,
        "unet": 3,
    }


def test_exact_files_keep_every_alpha_and_factor(path, shapes):
    adapter = random_adapter(shapes, ranks=(1, 2), alphas=(1.0, 4.0, 0.5), dora=True)
    save_adapter(adapter, path, torch.float32, exact=True)
    assert_same_layers(load_adapter(path, shapes), adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_to_diffusers_and_back_gives_the_same_tensors(path, shapes, dtype):
    save_adapter(random_adapter(shapes, ranks=(1, 2), dora=True), path, dtype)
    first = path.read_bytes()
    save_adapter(load_adapter(path, shapes), path, dtype, format="diffusers")
    assert path.read_bytes() != first
    save_adapter(load_adapter(path, shapes), path, dtype)
    assert path.read_bytes() == first


@pytest.mark.parametrize("missing", ["q", "out", "qkv"])
def test_text_encoder_attention_is_written_whole(path, shapes, missing):
    some = {n: s for n, s in shapes.items() if not n.endswith(tuple(f"{m}_proj" for m in missing))}
    if missing == "qkv":
        some = {n: s for n, s in some.items() if "mlp" not in n}
    adapter = random_adapter(some)
    notices = save_adapter(adapter, path, torch.float32)
    again = load_adapter(path, shapes)
    added = again.layers.keys() - adapter.layers.keys()
    assert notices[0].startswith(f"{len(added)} text-encoder attention layers")
    assert len([name for name in again.layers if "self_attn" in name]) == 4
    assert not any(again.layers[name].delta().any() for name in added)


@pytest.mark.parametrize("what", ["up-biases", "token embeddings"])
def test_what_kohya_files_cannot_hold_goes_to_diffusers_format(path, shapes, what):
    adapter = random_adapter(shapes, bias=what == "up-biases")
    if what == "token embeddings":
        adapter.layers[TOKENS] = token_layer(shapes[TOKENS])
    notices = save_adapter(adapter, path, torch.float32)
    assert what in notices[0] and "A1111" in notices[0]
    assert fitting_format(adapter, "kohya") == ("diffusers", notices)
    assert fitting_format(adapter, "diffusers") == ("diffusers", [])
    assert any(key.endswith(".lora_A.weight") for key in load_file(path))
    assert_same_layers(load_adapter(path, shapes), adapter)


def test_dora_that_peft_cannot_express_goes_to_kohya_s_format(path, shapes):
    adapter = random_adapter(shapes)
    adapter.layers["unet.conv_in"] = random_layer(shapes["unet.conv_in"], 2, 1.0, dora=True)
    notices = save_adapter(adapter, path, torch.float32, format="diffusers")
    assert "DoRA" in notices[0]
    assert_same_layers(load_adapter(path, shapes), adapter)


def test_a_file_never_carries_another_file_s_metadata(path, shapes):
    adapter = random_adapter(shapes)
    adapter.metadata = {
        "lora_adapter_metadata": "{}",
        "lora_sd.note": "x",
        "ss_network_dim": "99",
        "ss_network_args": '{"conv_dim": "7"}',
        "ss_output_name": "kept",
    }
    save_adapter(adapter, path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert "lora_adapter_metadata" not in metadata and "lora_sd.note" not in metadata
    assert metadata["ss_network_dim"] == "2" and metadata["ss_output_name"] == "kept"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1"}
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]


def test_the_order_of_layers_and_metadata_does_not_change_the_file(path, shapes):
    adapter = random_adapter(shapes)
    adapter.metadata = {"b": "1", "a": "2"}
    save_adapter(adapter, path)
    first = path.read_bytes()
    adapter.layers = dict(reversed(adapter.layers.items()))
    adapter.metadata = {"a": "2", "b": "1"}
    save_adapter(adapter, path)
    assert path.read_bytes() == first


def test_values_lost_to_float16_are_counted(path, shapes):
    adapter = random_adapter(shapes)
    assert save_adapter(adapter, path) == []
    adapter.layers["unet.conv_in"].down[:] = 1e-9
    lost = adapter.layers["unet.conv_in"].down.numel()
    (notice,) = save_adapter(adapter, path)
    assert notice.startswith(f"{lost:,} of ") and "float16" in notice
    assert save_adapter(adapter, path, torch.bfloat16) == []


UNFIT = {
    "LoHa": {"lora_unet_conv_in.hada_w1_a": (8, 2), "lora_unet_conv_in.alpha": ()},
    "LoKr": {"lora_unet_conv_in.lokr_w1": (2, 2)},
    "OFT": {"lora_unet_conv_in.oft_blocks": (2, 2, 2)},
    "GLoRA": {"lora_unet_conv_in.a1.weight": (2, 2)},
    "IA3": {"lora_unet_conv_in.on_input": (1,)},
    "full difference": {"lora_unet_conv_in.diff": (8, 4, 3, 3)},
    "1 of its 1 layers lack lora_down or lora_up": {"lora_unet_conv_in.lora_up.weight": (8, 2)},
    "1 of its 2 tensors belong to no layer": {"lora_unet_nowhere.lora_up.weight": (8, 2)},
    "do not go together": {
        "lora_unet_conv_in.lora_up.weight": (8, 2),
        "lora_unet_conv_in.lora_down.weight": (3, 4, 3, 3),
    },
    "another shape": {
        "lora_unet_conv_in.lora_up.weight": (9, 2),
        "lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3),
    },
    "DoRA magnitude": {
        "lora_unet_conv_in.lora_up.weight": (8, 2),
        "lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3),
        "lora_unet_conv_in.dora_scale": (5, 1, 1, 1),
    },
    "under different names": {
        f"lora_unet_{name}.{part}.weight": shape
        for name in ("conv_in", "input_blocks_0_0")
        for part, shape in (("lora_up", (8, 2)), ("lora_down", (2, 4, 3, 3)))
    },
}


@pytest.mark.parametrize("problem", UNFIT)
def test_what_does_not_fit_is_refused_or_left_out_and_said(path, shapes, problem):
    unfit = {key: torch.ones(shape) for key, shape in UNFIT[problem].items()}
    if "2 tensors" in problem:
        unfit["lora_unet_nowhere.alpha"] = torch.tensor(1.0)
        problem = "2 of its 2 tensors belong to no layer"
    save_file(unfit, path)
    with pytest.raises(AdapterError, match=re.escape(problem)):
        load_adapter(path, shapes)
    good = random_adapter({name: shapes[name] for name in shapes if name.startswith(TEXT)})
    save_adapter(good, path, torch.float32)
    save_file({**load_file(path), **unfit}, path)
    with pytest.raises(AdapterError):
        load_adapter(path, shapes)
    adapter = load_adapter(path, shapes, allow_partial=True)
    assert good.layers.keys() <= adapter.layers.keys()
    assert "left out: " in adapter.metadata["lora_sd.note"]


def test_nothing_that_fits_is_refused_even_when_a_part_is_allowed(path):
    save_adapter(random_adapter(layer_names.layer_shapes({"unet": make_unet()})), path)
    with pytest.raises(AdapterError, match="another shape"):
        load_adapter(path, {"unet.conv_in": Size((9, 4, 3, 3))}, allow_partial=True)
