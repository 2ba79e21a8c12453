"""What each client does with a file, as running the clients themselves has shown."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Size, Tensor

from lora_sd import clients
from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.clients import judge
from lora_sd.clients.metadata import metadata_notes
from lora_sd.clients.outline import outline_of
from lora_sd.clients.report import TITLES, ClientReport
from lora_sd.clients.sentences import layer_of_keys, sentences
from lora_sd.clients.stand_in import stand_in_tables
from lora_sd.formats import diffusers, kohya
from lora_sd.formats.layer_tables import layer_shapes
from lora_sd.layer_choice import LayerPlan, choose_layers, planned_adapter
from lora_sd.layers import LayerOptions

FAMILIES = ("sd15", "sd21", "sdxl")
OUTSIDE = {"sd15": 4, "sd21": 4, "sdxl": 6}  # conv_in, conv_out, time and label embeddings
Tensors = dict[str, Tensor]


def names_of(family: str, preset: str = "attention-conv") -> list[str]:
    """The layers of a preset, text encoders included."""
    plans = choose_layers(layer_shapes(family), preset, 1, 1, 1, 1)
    return [plan.name for plan in plans]


def adapter_of(family: str, names: list[str] | None = None, alpha: float = 2) -> Adapter:
    """An adapter of rank 1 without values."""
    shapes, layers = layer_shapes(family), {}
    for name in names or names_of(family):
        shape = shapes[name]
        ones = (1,) * (len(shape) - 2)
        with torch.device("meta"):
            down, up = torch.empty(1, *shape[1:]), torch.empty(shape[0], 1, *ones)
        layers[name] = LoRAWeights(down, up, alpha)
    return Adapter(layers)


def tensors_of(family: str, names: list[str] | None = None) -> Tensors:
    """The tensors of a kohya file."""
    return kohya.to_tensors(adapter_of(family, names), torch.float16)


def reports_of(tensors: Tensors, family: str, **metadata: str) -> dict[str, ClientReport]:
    return clients.check(outline_of(tensors, metadata), family)


def told(tensors: Tensors, family: str) -> list[str]:
    """The sentences for a person."""
    layer_of = layer_of_keys(tensors, layer_shapes(family))
    return sentences(reports_of(tensors, family).values(), layer_of)


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(key): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("preset", ["attention", "attention-ff", "attention-conv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_write_is_whole_in_seven_clients(family: str, preset: str) -> None:
    reports = reports_of(tensors_of(family, names_of(family, preset)), family)
    assert len(reports) == 7
    assert [client for client, report in reports.items() if not report.ok] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_only_kohyas_tools_ignore_layers_of_the_full_preset(family: str) -> None:
    names = names_of(family, "full")
    reports = reports_of(tensors_of(family, names), family)
    assert [client for client, report in reports.items() if not report.ok] == ["kohya"]
    (sentence,) = told(tensors_of(family, names), family)
    count = f"In kohya's tools {OUTSIDE[family]} of {len(names)} layers are ignored: 'unet.conv_in'"
    assert sentence.startswith(count)


def test_a_missing_alpha_is_told_for_the_clients_that_stumble() -> None:
    tensors = tensors_of("sd15")
    key = "lora_unet_mid_block_resnets_0_conv1"
    del tensors[f"{key}.alpha"]
    reports = reports_of(tensors, "sd15")
    assert {c for c, report in reports.items() if not report.ok} == {
        "kohya",
        "lycoris",
        "diffusers",
    }
    assert reports["lycoris"].fatal[0].startswith(f"{key}: no alpha")
    assert reports["kohya"].warnings == [f"{key}: no alpha, taken as rank"]


def test_text_attention_without_out_proj_is_dropped() -> None:
    names = [name for name in names_of("sd21") if not name.endswith("out_proj")]
    reports = reports_of(tensors_of("sd21", names), "sd21")
    dropped = {"a1111": 23 * 3 * 3, "diffusers": 23 * 3 * 3}  # blocks, q/k/v, tensors
    found = {c: len(report.ignored) for c, report in reports.items() if report.ignored}
    assert found == dropped
    (sentence,) = told(tensors_of("sd21", names), "sd21")
    assert sentence.startswith("In A1111 and diffusers 69 of ")
    first = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"
    assert first in sentence


def test_text_attention_of_q_and_v_alone_is_refused_by_diffusers() -> None:
    names = [
        n for n in names_of("sd15") if n.startswith("unet.") or n.endswith(("q_proj", "v_proj"))
    ]
    reports = reports_of(tensors_of("sd15", names), "sd15")
    assert [c for c, report in reports.items() if not report.ok] == ["diffusers"]
    assert "without any out_proj" in reports["diffusers"].fatal[0]
    assert reports["diffusers"].used == set()


@pytest.mark.parametrize(
    ("layer", "lost"),
    [("attn1_to_q", True), ("ff_net_2", False), ("text_model_encoder_layers_3_mlp_fc1", True)],
)
def test_diffusers_loses_a_minority_alpha(layer: str, lost: bool) -> None:
    tensors = tensors_of("sd15")
    key = next(key for key in tensors if key.endswith(f"{layer}.alpha"))
    tensors[key] = torch.tensor(1.0)
    reports = reports_of(tensors, "sd15")
    assert [c for c, report in reports.items() if not report.ok] == (["diffusers"] if lost else [])
    if lost:
        assert reports["diffusers"].warnings[0].startswith(f"{key.removesuffix('.alpha')}: alpha 1")


def in_diffusers_names(key: str) -> str:
    """Of an SDXL file's UNet key, the spelling with diffusers' path."""
    ldm_names = judge.load_tables("sdxl").ldm_names
    prefix, dot, part = key.partition(".")
    return ldm_names.get(prefix, prefix) + dot + part


def test_mixed_names_of_sdxl() -> None:
    tensors = tensors_of("sdxl")
    mixed = renamed(tensors, lambda key: in_diffusers_names(key) if "_input_" in key else key)
    reports = reports_of(mixed, "sdxl")
    assert "mixed in one SDXL file" in reports["invoke"].fatal[0]
    assert any("output_blocks" in key for key in reports["diffusers"].ignored)
    assert all("down_blocks" in key for key in reports["lycoris"].unrecognised)
    assert all(reports[client].ok for client in ("comfy", "forge", "a1111", "kohya"))


# What running the clients has shown of spellings, in the order of TITLES: ComfyUI, Forge, A1111,
# InvokeAI, diffusers, kohya, LyCORIS. y: loads, W: with some versions, n: ignores the renamed keys,
# R: refuses the file, as Forge does instead of ignoring more than 12 keys.
SPELLINGS = {
    "SD 1.5, te1": ("sd15", "lora_te_", "lora_te1_", "yyynynn"),
    "SD 2.1, te1": ("sd21", "lora_te_", "lora_te1_", "yynnynn"),
    "SDXL, te": ("sdxl", "lora_te1_", "lora_te_", "yynRynn"),
    "without text_model_": ("sd15", "lora_te_text_model_", "lora_te_", "nRnnWnn"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings_of_text_encoders(case: str) -> None:
    family, old, new, expected = SPELLINGS[case]
    tensors = renamed(tensors_of(family), lambda key: key.replace(old, new))
    changed = {key for key in tensors if key.startswith(new)}
    assert (
        "".join(
            "R"
            if report.fatal
            else "W"
            if report.warnings
            else "n"
            if changed & set(report.unrecognised)
            else "y"
            for report in reports_of(tensors, family).values()
        )
        == expected
    )


def test_invokeai_wants_numbered_text_encoders_in_sdxl() -> None:
    tensors = renamed(tensors_of("sdxl"), lambda key: key.replace("lora_te1_", "lora_te_"))
    fatal = reports_of(tensors, "sdxl")["invoke"].fatal
    assert "InvokeAI takes the file for sd15" in fatal[0]
    assert "unrecognised SDXL key prefix lora_te_" in fatal[1]


def test_sdxl_in_diffusers_names() -> None:
    tensors = renamed(tensors_of("sdxl"), in_diffusers_names)
    reports = reports_of(tensors, "sdxl")
    left_out = {client: len(report.unrecognised) for client, report in reports.items()}
    unet = sum(key.startswith("lora_unet_") for key in tensors)
    assert left_out.pop("lycoris") == unet
    assert left_out.pop("a1111") == 3  # up_blocks.0.upsamplers.0.conv
    assert set(left_out.values()) == {0}


def test_other_keys_make_diffusers_refuse_the_file() -> None:
    tensors = tensors_of("sd15")
    tensors["lora_unet_mid_block_resnets_0_conv1.diff_b"] = torch.empty(1280)
    reports = reports_of(tensors, "sd15")
    assert "not converted" in reports["diffusers"].fatal[0]
    assert reports["comfy"].ok and reports["forge"].ok
    assert len(reports["a1111"].ignored) == len(reports["invoke"].ignored) == 1


def test_a_shortcut_that_does_not_exist_makes_a1111_refuse_the_file() -> None:
    tensors = tensors_of("sd15")
    key = "lora_unet_down_blocks_0_resnets_0_conv_shortcut"
    tensors[f"{key}.lora_down.weight"] = torch.empty(1, 320, 1, 1)
    tensors[f"{key}.lora_up.weight"] = torch.empty(320, 1, 1, 1)
    reports = reports_of(tensors, "sd15")
    assert key in reports["a1111"].fatal[0]
    assert not reports["comfy"].fatal and not reports["comfy"].ok


def test_a_flat_1x1_convolution_fails_where_shapes_must_be_exact() -> None:
    tensors = tensors_of("sd15", names_of("sd15", "full"))
    key = "lora_unet_mid_block_attentions_0_proj_in"
    for part in ("lora_down.weight", "lora_up.weight"):
        tensors[f"{key}.{part}"] = tensors[f"{key}.{part}"].flatten(1)
    reports = reports_of(tensors, "sd15")
    refusing = {client for client, report in reports.items() if report.fatal}
    assert refusing == {"diffusers", "kohya", "lycoris"}
    assert reports["lycoris"].shape_errors[0].startswith(f"{key}: down(1, 1280)")


def test_a_wrong_width_is_told_everywhere() -> None:
    tensors = tensors_of("sd15")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
    tensors[key] = torch.empty(1, 640)
    reports = reports_of(tensors, "sd15")
    assert all(report.shape_errors for report in reports.values())


def test_invokeai_must_tell_the_base() -> None:
    names = [name for name in names_of("sd15", "full") if name.endswith("time_emb_proj")]
    assert "for sdxl" in reports_of(tensors_of("sd15", names), "sd15")["invoke"].fatal[0]
    names = [name for name in names_of("sd15") if ".attn1." in name]
    assert "cannot tell" in reports_of(tensors_of("sd15", names), "sd15")["invoke"].fatal[0]


def test_the_diffusers_format_reaches_diffusers_only() -> None:
    adapter = adapter_of("sd15", names_of("sd15", "full"))
    tensors = diffusers.to_tensors(adapter, torch.float16)
    config = diffusers.lora_config(adapter)
    reports = reports_of(tensors, "sd15", lora_adapter_metadata=config)
    assert [client for client, report in reports.items() if report.ok] == ["diffusers"]
    assert len(reports["comfy"].unrecognised) == 256
    assert [c for c, r in reports.items() if not r.matched] == [
        "a1111",
        "invoke",
        "kohya",
        "lycoris",
    ]
    assert reports_of(tensors, "sd15")["diffusers"].warnings  # no alphas without the config


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_naming_rules_agree_with_the_tables(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tensors_of(family, names_of(family, preset)) for preset in ("attention", "full")]
    known = [reports_of(tensors, family) for tensors in files]
    tables = stand_in_tables(family, layer_shapes(family))
    monkeypatch.setattr(judge, "load_tables", lambda name: tables)
    assert [reports_of(tensors, family) for tensors in files] == known


def planned(names: list[str], family: str, **options: Any) -> Adapter:
    """An adapter of these layers as it is planned before training; unknown layers are 8 x 8."""
    shapes = {**layer_shapes("tiny-sd"), **layer_shapes(family)}
    plans = [LayerPlan(name, 1, 1.0, shapes.get(name, Size((8, 8)))) for name in names]
    return planned_adapter(plans, LayerOptions(**options))


def test_what_is_ignored_is_known_before_training() -> None:
    full = planned(names_of("sd15", "full"), "sd15")
    outside = [n for n in full.layers if n.startswith(("unet.conv_", "unet.time_"))]
    for family in ("sd15", "tiny-sd", "unknown"):
        some = planned(outside + names_of("tiny-sd"), "sd15")
        assert clients.ignored(some, family, "kohya") == {"kohya": outside}
    usual = planned(names_of("sd15"), "sd15")
    assert clients.ignored(usual, "sd15", "kohya") == {}
    assert clients.ignored_layers(usual, "sd15", "kohya") == []
    assert set(clients.ignored(full, "sd15", "diffusers")) == {*TITLES} - {"diffusers"}


def test_who_misreads_dora_is_known_before_training() -> None:
    names = names_of("sd15")
    by_input = " ".join(
        clients.ignored_layers(planned(names, "sd15", dora="input"), "sd15", "kohya")
    )
    assert "In diffusers and kohya's tools" in by_input
    assert "ComfyUI" not in by_input and "A1111" not in by_input and "InvokeAI" not in by_input
    by_output = " ".join(
        clients.ignored_layers(planned(names, "sd15", dora="output"), "sd15", "kohya")
    )
    assert "In ComfyUI and Forge the file is read otherwise than meant" in by_output
    assert "In A1111 and InvokeAI the file is read otherwise than meant" in by_output
    assert "LyCORIS" not in by_output


def test_q_and_v_of_a_text_encoder_are_made_whole_on_saving() -> None:
    names = [
        n for n in names_of("sd15") if n.startswith("unet.") or n.endswith(("q_proj", "v_proj"))
    ]
    assert clients.ignored(planned(names, "sd15"), "sd15", "kohya") == {}


def test_metadata_that_clients_trip_over() -> None:
    good = {
        "ss_network_dim": "1", "ss_network_alpha": "1", "ss_network_module": "networks.lora",
        "ss_base_model_version": "sd_v1", "ss_output_name": "a", "sshs_model_hash": "0",
    }  # fmt: skip
    assert metadata_notes(good, "sd15") == []
    assert "ss_v2" in metadata_notes(good, "sd21")[0]
    assert "sdxl_" in metadata_notes(good, "sdxl")[0]
    assert "ss_tag_frequency" in metadata_notes({**good, "ss_tag_frequency": "null"}, "sd15")[0]


def test_a_model_of_our_own_shapes() -> None:
    shapes = {name: Size(shape) for name, shape in layer_shapes("tiny-sd").items()}
    tensors = tensors_of("tiny-sd")
    reports = clients.check(outline_of(tensors, {}), "my-model", shapes)
    assert all(report.ok for report in reports.values())
    key = next(key for key in tensors if key.endswith("attn1_to_q.lora_down.weight"))
    tensors[key] = tensors[key][:, 1:]
    reports = clients.check(outline_of(tensors, {}), "my-model", shapes)
    assert all(report.shape_errors for report in reports.values())
