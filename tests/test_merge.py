"""Merged adapters equal live ones, and leave no trace."""

import random

import pytest
import torch
from conftest import make_parts, make_unet

from lora_sd import inject, layer_names
from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.errors import AdapterError
from lora_sd.merge import MergedWeights
from lora_sd.parts import BLOCKS, REST, Scales

ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
TOKENS = "text_encoder.text_model.embeddings.token_embedding"
EXTRAS = {
    "unet.conv_in": "",
    "unet.conv_out": "dora",
    "unet.down_blocks.0.downsamplers.0.conv": "dora by input",
    "unet.up_blocks.1.resnets.0.conv1": "up_bias",
    f"{ATTENTION}.to_q": "up_bias",  # the base has none
    f"{ATTENTION}.to_out.0": "up_bias",
    f"{ATTENTION}.to_v": "dora",
    f"{ATTENTION}.to_k": "dora by input",
    "unet.mid_block.attentions.0.proj_in": "",
    TOKENS: "",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": "up_bias",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": "dora",
    "text_encoder_2.text_projection": "",
}
"""A layer of every kind, and what it has besides its factors."""


def every_kind(seed: int, rank: int = 2) -> Adapter:
    """A random adapter with all that layers can have."""
    draw = torch.Generator().manual_seed(seed)

    def random_tensor(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=draw)

    layers = {}
    shapes = layer_names.layer_shapes(make_parts())
    for name, extra in EXTRAS.items():
        out, *rest = shapes[name]
        kernel, ones = rest[1:], [1] * len(rest[1:])
        norms = {"dora": (out, 1, *ones), "dora by input": (1, rest[0], *ones)}.get(extra)
        down = random_tensor(rank, out if name == TOKENS else rest[0], *kernel)
        layers[name] = LoRAWeights(
            down,
            random_tensor(rest[0] if name == TOKENS else out, rank, *ones),
            1.5,
            random_tensor(out) if extra == "up_bias" else None,
            1 + random_tensor(*norms) if norms else None,
            name == TOKENS,
        )
    return Adapter(layers)


def outputs(parts) -> list[torch.Tensor]:
    """What the parts make of the same inputs each time."""
    draw = torch.Generator().manual_seed(8)
    latents, captions = (torch.randn(2, *s, generator=draw) for s in ((4, 8, 8), (5, 8)))
    ids = torch.arange(7)[None]
    return [
        parts["unet"](latents, torch.tensor([3, 500]), captions).sample,
        parts["text_encoder"](ids).last_hidden_state,
        parts["text_encoder_2"](ids).text_embeds,
    ]


@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0, 2.0])
def test_merged_equals_live(unet, unet_inputs, adapter, scale):
    MergedWeights({"unet": unet}).set([(adapter, scale)])
    live = make_unet()
    inject.attach_adapter(live, adapter, scale)
    torch.testing.assert_close(
        unet(*unet_inputs).sample, live(*unet_inputs).sample, rtol=1e-4, atol=1e-4
    )


def test_two_adapters_add_up(unet, adapter):
    before = unet.conv_in.weight.clone()
    MergedWeights({"unet": unet}).set([(adapter, 0.25), (adapter, 0.5)])
    expected = before + 0.75 * adapter.layers["unet.conv_in"].delta()
    torch.testing.assert_close(unet.conv_in.weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_thousand_changes_leave_the_base_bit_for_bit(unet, adapter, dtype):
    unet.to(dtype)
    before = {name: p.clone() for name, p in unet.named_parameters()}
    merged = MergedWeights({"unet": unet})
    small = type(adapter)({n: adapter.layers[n] for n in ("unet.conv_in", "unet.conv_out")})
    for number in range(1000):
        merged.set([(small, (number % 37) / 9 - 2)])
    merged.set([(adapter, 1.0)])
    assert not torch.equal(unet.conv_in.weight, before["conv_in.weight"])
    fresh = make_unet().to(dtype)
    MergedWeights({"unet": fresh}).set([(adapter, 1.0)])
    assert torch.equal(unet.conv_in.weight, fresh.conv_in.weight)
    merged.set([])
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
    merged.set([(adapter, 1.0)])
    merged.set([(adapter, 0.0)])
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())


def test_only_what_changed_is_merged_anew(unet, adapter, monkeypatch):
    merged = MergedWeights({"unet": unet})
    first, second = (
        type(adapter)({name: adapter.layers[name]}) for name in ("unet.conv_in", "unet.conv_out")
    )
    merged.set([(first, 1.0), (second, 0.5)])
    seen, add_to = [], LoRAWeights.add_to
    monkeypatch.setattr(
        LoRAWeights, "add_to", lambda self, *given: (seen.append(given[1]), add_to(self, *given))
    )
    merged.set([(first, 1.0), (second, 0.7)])
    assert seen == [0.7]

    # nor is anything believed to be merged that failed
    def fail(*_):
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(LoRAWeights, "add_to", fail)
        merged.set([(first, 1.0), (second, 0.9)])
    merged.set([(first, 1.0), (second, 0.7)])
    fresh = make_unet()
    MergedWeights({"unet": fresh}).set([(first, 1.0), (second, 0.7)])
    assert torch.equal(unet.conv_out.weight, fresh.conv_out.weight)


@pytest.mark.parametrize(
    "scales",
    [
        (1.0, 0.7),
        (Scales(0.5, linear=0.3), 0.0),
        (Scales(linear=0, conv=1.3), Scales(text_encoder=-1)),
        (Scales(blocks={"mid": 0, "down.0": 2, "text_encoder": 0.2}), Scales(blocks={"rest": 0})),
    ],
    ids=str,
)
def test_several_adapters_by_part_merged_and_live_agree(scales):
    adapters = [every_kind(1), every_kind(2, rank=3)]
    merged, live, plain = make_parts(), make_parts(), outputs(make_parts())
    MergedWeights(merged).set(list(zip(adapters, scales, strict=True)))
    for name, adapter, scale in zip("ab", adapters, scales, strict=True):
        inject.attach_adapter(live, adapter, scale, name)
    for one, other, base in zip(outputs(merged), outputs(live), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(one, base, rtol=1e-2, atol=1e-2)


def test_a_part_at_scale_0_is_the_base_bit_for_bit():
    parts, before = make_parts(), make_parts()
    MergedWeights(parts).set([(every_kind(1), Scales(text_encoder=0, conv=0))])
    bases = layer_names.adaptable_layers(before)
    changed = {
        name
        for name, layer in layer_names.adaptable_layers(parts).items()
        if not torch.equal(layer.weight, bases[name].weight)
    }
    assert changed == {
        *(f"{ATTENTION}.{ending}" for ending in ("to_q", "to_k", "to_v", "to_out.0")),
        "unet.mid_block.attentions.0.proj_in",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_thousand_random_changes_leave_the_base_bit_for_bit(dtype):
    parts, draw = make_parts(), random.Random(1)
    for part in parts.values():
        part.to(dtype)
    before = {k: {n: p.clone() for n, p in m.state_dict().items()} for k, m in parts.items()}
    adapters, merged = [every_kind(seed, 1 + seed) for seed in range(3)], MergedWeights(parts)

    def random_scale() -> float | Scales:
        if draw.random() < 0.5:
            return draw.choice([0, 1, draw.uniform(-3, 3)])
        factors = [draw.choice([0, 1, draw.uniform(-2, 2)]) for _ in range(4)]
        blocks = draw.sample([*BLOCKS, REST], 3)
        return Scales(*factors, dict.fromkeys(blocks, draw.uniform(-1, 1)))

    for _ in range(1000):
        if draw.random() < 0.05:
            merged.clear()
        chosen = draw.sample(adapters, draw.randrange(3))
        merged.set([(adapter, random_scale()) for adapter in chosen])
    merged.set([(adapters[0], 1.0)])
    fresh = make_parts()
    for part in fresh.values():
        part.to(dtype)
    MergedWeights(fresh).set([(adapters[0], 1.0)])
    for name, part in parts.items():
        for key, weight in fresh[name].state_dict().items():
            assert torch.equal(part.state_dict()[key], weight), key
    draw.choice([merged.clear, lambda: merged.set([])])()
    for name, part in parts.items():
        now = part.state_dict()
        assert now.keys() == before[name].keys()
        for key, weight in before[name].items():
            assert now[key].dtype == dtype or not weight.is_floating_point()
            assert torch.equal(now[key].view(torch.uint8), weight.view(torch.uint8)), key


def test_an_adapter_for_another_model_changes_nothing(unet, adapter):
    before = unet.conv_in.weight.clone()
    adapter.layers["unet.nowhere"] = adapter.layers["unet.conv_in"]
    with pytest.raises(AdapterError, match=r"do not exist in this one, such as 'unet.nowhere'"):
        MergedWeights({"unet": unet}).set([(adapter, 1.0)])
    assert torch.equal(unet.conv_in.weight, before)
