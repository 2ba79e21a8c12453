"""The original layout's names against diffusers' own conversion, and there and back."""

import pytest
import torch
from diffusers.loaders import single_file_utils as oracle
from make_bases import CONFIGS, KINDS, make_base, published_shapes

from lora_sd.base_files import open_base
from lora_sd.base_files.original import Piece, from_original, to_original, unet_folder_names
from lora_sd.errors import BaseModelError
from lora_sd.formats.ldm_names import unet_ldm_names

FAMILIES = ("sd15", "sd21", "sdxl")
KEYS = {"sd15": 1130, "sd21": 1214, "sdxl": 2513}
MODEL_TYPES = {"sd15": "v1", "sd21": "v2", "sdxl": "xl_base"}


def single_file_of(family):
    """(pieces, shapes of the single file) of a published model."""
    shapes = published_shapes(family)
    pieces = to_original(shapes, open_clip=family == "sd21")
    return pieces, {p.key: p.joined_shape([shapes[name] for name in p.names]) for p in pieces}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_models_come_back_from_the_single_file(family):
    pieces, shapes = single_file_of(family)
    again, rest = from_original(shapes)
    assert again == pieces and rest == [] and len(shapes) == len(pieces) == KEYS[family]
    assert {n: p.split_shape(shapes[p.key]) for p in pieces for n in p.names} == published_shapes(
        family
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_finds_every_tensor_of_unet_and_vae(family):
    _, shapes = single_file_of(family)
    file = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert oracle.infer_diffusers_model_type(file) == MODEL_TYPES[family]
    found = {
        "unet": oracle.convert_ldm_unet_checkpoint(file, CONFIGS[family]["unet"]),
        "vae": oracle.convert_ldm_vae_checkpoint(file, CONFIGS[family]["vae"]),
    }
    for component, tensors in found.items():
        expected = {
            name.removeprefix(f"{component}."): shape
            for name, shape in published_shapes(family).items()
            if name.startswith(f"{component}.")
        }
        assert {key: tensor.shape for key, tensor in tensors.items()} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_names_there_and_back(family):
    paths = {n.removeprefix("unet.").rpartition(".")[0] for n in published_shapes(family)
             if n.startswith("unet.")}  # fmt: skip
    ldm = unet_ldm_names(paths)
    assert ldm.keys() == paths
    back = unet_folder_names(f"{name}.weight" for name in ldm.values())
    assert back == {f"{name}.weight": f"{path}.weight" for path, name in ldm.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_miniature_keeps_every_value(kind, tmp_path):
    base = open_base(str(make_base(kind, tmp_path / "base")))
    pieces = to_original(base.tensor_shapes, base.has_open_clip)
    seen = set()
    for piece in pieces:
        parts = [base.tensor(name) for name in piece.names]
        joined = piece.join(parts)
        assert joined.shape == piece.joined_shape([part.shape for part in parts])
        assert all(map(torch.equal, piece.split(joined), parts))
        seen |= set(piece.names)
    assert seen == base.tensor_shapes.keys()


def test_the_vae_s_attention_is_convolutions_in_the_file():
    pieces, shapes = single_file_of("sd15")
    assert shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes["first_stage_model.encoder.mid.attn_1.q.bias"] == (512,)
    already_linear = {"first_stage_model.encoder.mid.attn_1.q.weight": torch.Size((512, 512))}
    assert from_original(already_linear)[0][0].kind == "same"


def test_open_clip_stacks_q_k_v_and_transposes_its_projection():
    q, k, v = torch.randn(3, 4, 4).unbind()
    stacked = Piece("in_proj_weight", ("q", "k", "v"), "stacked")
    assert torch.equal(stacked.join([q, k, v])[4:8], k)
    projection = torch.randn(5, 3)
    assert torch.equal(
        Piece("text_projection", ("p",), "transposed").join([projection]), projection.T
    )


def test_what_a_folder_has_no_place_for_is_told_apart():
    keys = [
        "model_ema.decay",
        "alphas_cumprod",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.text_projection",
        "first_stage_model.loss.logvar",
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
    ]
    assert from_original({key: torch.Size(()) for key in keys}) == ([], keys)


def test_what_the_original_layout_has_no_place_for_is_refused():
    shapes = {"unet.down_blocks.0.motion_modules.0.proj_in.weight": torch.Size((4, 4))}
    with pytest.raises(BaseModelError, match="no place for 1 tensors.*motion_modules"):
        to_original(shapes, open_clip=False)


def test_half_an_open_clip_attention_is_refused():
    shapes = {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight": torch.Size((4, 4))
    }
    with pytest.raises(BaseModelError, match="lacks .*k_proj.*v_proj"):
        to_original(shapes, open_clip=True)
