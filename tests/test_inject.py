"""Attaching, detaching and collecting adapters."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import choose, make_parts, make_unet, randomise
from torch import nn

from lora_sd import inject, layer_choice, layer_names
from lora_sd.adapter import Adapter
from lora_sd.errors import AdapterError
from lora_sd.layers import ConvLoRA, LayerOptions
from lora_sd.parts import Scales


def test_injecting_again_and_again_chooses_and_starts_the_same_layers():
    parts, firsts = make_parts(), None
    for number in range(20):
        plans = choose(parts, include=["token_embedding"] if number % 2 else [])
        layers = inject.attach(parts, plans, seed=3)
        starts = {name: layer.lora_down.weight for name, layer in layers.items()}
        assert len(starts) == len(plans)
        starts = {name: start for name, start in starts.items() if "token" not in name}
        firsts = firsts or starts
        assert list(starts) == list(firsts)
        assert all(torch.equal(starts[name], firsts[name]) for name in firsts)
        inject.detach(parts)


@pytest.mark.parametrize("preset", list(layer_choice.PRESETS))
def test_a_fresh_adapter_changes_nothing_to_the_last_bit(unet, unet_inputs, preset):
    before = unet(*unet_inputs).sample
    inject.attach(unet, choose(unet, preset))
    assert torch.equal(unet(*unet_inputs).sample, before)


def test_only_adapter_weights_learn(unet, unet_inputs):
    inject.attach(unet, choose(unet))
    frozen = {n: p.clone() for n, p in unet.named_parameters() if not p.requires_grad}
    learning = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.1)
    for _ in range(2):
        unet(*unet_inputs).sample.square().mean().backward()
        optimizer.step()
    assert len(learning) == 2 * len(inject.lora_layers(unet))
    assert all(torch.equal(unet.get_parameter(name), was) for name, was in frozen.items())
    assert all(layer.lora_up.weight.any() for layer in inject.lora_layers(unet).values())


def test_every_single_layer_has_an_effect(unet, unet_inputs):
    before = unet(*unet_inputs).sample
    for plan in choose(unet, "full"):
        inject.attach(unet, [plan])
        randomise(unet)
        assert not torch.equal(unet(*unet_inputs).sample, before), plan.name
        inject.detach(unet)


def test_detach_leaves_the_model_as_it_was(unet, unet_inputs):
    names, before = [n for n, _ in unet.named_modules()], unet(*unet_inputs).sample
    inject.attach(unet, choose(unet))
    randomise(unet)
    assert not torch.equal(unet(*unet_inputs).sample, before)
    for layer in inject.lora_layers(unet).values():
        layer.merge()
    inject.detach(unet)
    assert [n for n, _ in unet.named_modules()] == names
    assert torch.equal(unet(*unet_inputs).sample, before)


def test_attaching_again_gives_the_same_layers_and_start():
    unet = make_unet()
    first = inject.attach(unet, choose(unet), seed=3)
    inject.detach(unet)
    second = inject.attach(unet, choose(unet), seed=3)
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name].lora_down.weight, second[name].lora_down.weight)


def test_another_seed_gives_another_start(unet):
    first = inject.attach(unet, choose(unet), seed=0)
    inject.detach(unet)
    second = inject.attach(unet, choose(unet), seed=1)
    assert not any(
        torch.equal(first[name].lora_down.weight, second[name].lora_down.weight) for name in first
    )


def test_another_choice_or_order_of_layers_does_not_change_a_layer_s_start(unet):
    many = inject.attach(unet, choose(unet))["unet.mid_block.resnets.0.conv1"]
    inject.detach(unet)
    plan = [p for p in choose(unet) if p.name == "unet.mid_block.resnets.0.conv1"]
    alone = inject.attach(unet, plan)[plan[0].name]
    assert torch.equal(many.lora_down.weight, alone.lora_down.weight)


def test_collected_and_attached_elsewhere_it_does_the_same(unet, unet_inputs):
    inject.attach(unet, choose(unet, "full"))
    randomise(unet)
    other = make_unet()
    layers = inject.attach_adapter(other, inject.collect(unet))
    assert not any(weight.requires_grad for weight in other.parameters())
    with torch.no_grad():
        assert torch.equal(other(*unet_inputs).sample, unet(*unet_inputs).sample)
    assert isinstance(layers["unet.conv_in"], ConvLoRA)
    inject.set_scale(other, 0)
    assert torch.equal(other(*unet_inputs).sample, make_unet()(*unet_inputs).sample)


@pytest.mark.parametrize("options", [{}, {"dora": "output"}, {"up_bias": True}, {"init": "pissa"}])
def test_a_strip_of_scales_in_one_pass_is_a_pass_for_each_scale(unet, unet_inputs, options):
    before = unet(*unet_inputs).sample
    inject.attach(unet, choose(unet, "full"), LayerOptions(**options))
    randomise(unet)
    latents, timesteps, captions = unet_inputs
    inject.set_scale(unet, torch.tensor([0, 0.4, 1.0]))
    six = [
        torch.cat([part[:1].expand(3, *part.shape[1:]), part[1:].expand(3, *part.shape[1:])])
        for part in (latents, timesteps, captions)
    ]
    strip = unet(*six).sample
    for place, scale in enumerate([0, 0.4, 1.0]):
        inject.set_scale(unet, scale)
        one = unet(*unet_inputs).sample
        torch.testing.assert_close(strip[place::3], one, rtol=1e-4, atol=1e-4)
        assert (scale == 0) == torch.equal(one, before)


def test_a_saved_adapter_may_have_more_ranks_than_are_useful(unet, unet_inputs):
    inject.attach(unet, choose(unet, "full", conv_rank=4), LayerOptions(init="pissa"))
    randomise(unet)
    saved, other = inject.collect(unet), make_unet()
    assert saved.layers["unet.conv_out"].rank == 8 > other.conv_out.out_channels
    inject.attach_adapter(other, saved)
    outputs = other(*unet_inputs).sample, unet(*unet_inputs).sample
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def attach_named(model, name: str, seed: int, **options):
    """One more adapter, as if trained, for all layers."""
    layers = inject.attach(model, choose(model, "full"), LayerOptions(**options), 0, name)
    torch.manual_seed(seed)
    for layer in layers.values():
        nn.init.normal_(layer.lora_up.weight, std=0.3)
    return layers


def test_several_adapters_have_a_scale_each_and_leave_one_by_one(unet, unet_inputs):
    def out(of=unet):
        with torch.no_grad():
            return of(*unet_inputs).sample

    plain = out()
    attach_named(unet, "ink", 1)
    ink = out()
    attach_named(unet, "cat", 2, dora="output")
    both = out()
    with pytest.raises(ValueError, match="adapted already"):
        attach_named(unet, "ink", 3)
    inject.set_scale(unet, 0, "cat")
    assert torch.equal(out(), ink)
    inject.set_scale(unet, 0, "ink")
    assert torch.equal(out(), plain)
    inject.set_scale(unet, 1, "ink")
    inject.set_scale(unet, 1, "cat")
    assert torch.equal(out(), both)
    saved = inject.collect(unet, "cat")
    inject.detach(unet, "ink")
    assert list(inject.lora_layers(unet, "ink")) == []
    assert inject.lora_layers(unet, "cat").keys() == saved.layers.keys()
    cat = out()
    other = make_unet()
    inject.attach_adapter(other, saved)
    assert torch.equal(cat, out(other))
    inject.detach(unet)
    assert torch.equal(out(), plain)


def test_a_part_s_scale_acts_on_that_part_alone():
    parts = make_parts()
    layers = attach_named(parts, "default", 1)
    inject.set_scale(parts, Scales(2, linear=3, conv=5, text_encoder=7, blocks={"mid": 0.5}))
    attention = "transformer_blocks.0.attn1.to_q"
    assert layers["unet.conv_in"].scale == 10
    assert layers["unet.mid_block.resnets.0.conv1"].scale == 5
    assert layers[f"unet.mid_block.attentions.0.{attention}"].scale == 3
    assert layers[f"unet.down_blocks.0.attentions.0.{attention}"].scale == 6
    assert layers["text_encoder.text_model.encoder.layers.0.mlp.fc1"].scale == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_changes_of_live_adapters_leave_the_base_bit_for_bit(dtype):
    parts, draw = make_parts(), random.Random(0)
    for part in parts.values():
        part.to(dtype)
    names = {key: [n for n, _ in part.named_modules()] for key, part in parts.items()}
    weights = {(k, n): p for k, part in parts.items() for n, p in part.named_parameters()}
    before = {key: p.detach().clone() for key, p in weights.items()}
    on: set[str] = set()
    for _ in range(40):
        name = draw.choice("abc")
        if name not in on:
            options = draw.choice([{}, {"dora": "output"}, {"up_bias": True}, {"init": "pissa"}])
            attach_named(parts, name, draw.randrange(9), **options)
            on.add(name)
        elif draw.random() < 0.5:
            inject.set_scale(parts, Scales(draw.uniform(-2, 2), blocks={"mid": 0}), name)
        else:
            inject.detach(parts, name)
            on.discard(name)
    inject.detach(parts)
    for key, part in parts.items():
        assert [n for n, _ in part.named_modules()] == names[key]
        for n, p in part.named_parameters():
            assert p is weights[key, n] and torch.equal(p, before[key, n])


@pytest.mark.parametrize("options", [{}, {"dora": "output"}, {"init": "pissa"}, {"up_bias": True}])
def test_a_half_precision_unet_trains_under_autocast(unet, unet_inputs, options):
    unet.bfloat16()
    layers = inject.attach(unet, choose(unet, "full"), LayerOptions(**options))
    latents, timesteps, captions = unet_inputs
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(latents.bfloat16(), timesteps, captions.bfloat16()).sample
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    for layer in layers.values():
        assert layer.lora_up.weight.grad.dtype == torch.float32
        assert layer.lora_up.weight.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"dora": "output"}, {"init": "pissa"}, {"up_bias": True}])
def test_an_adapter_is_planned_on_a_model_without_weights(unet, options):
    with torch.device("meta"):
        empty = make_unet()
    assert layer_names.layer_shapes(empty) == layer_names.layer_shapes(unet)
    layers = inject.attach(empty, choose(empty, "full"), LayerOptions(**options))
    assert all(weight.is_meta for weight in empty.parameters())
    real = inject.attach(unet, choose(unet, "full"), LayerOptions(**options))
    count = {n: sum(p.numel() for p in layer.parameters()) for n, layer in layers.items()}
    assert count == {n: sum(p.numel() for p in layer.parameters()) for n, layer in real.items()}


def test_loading_tells_every_difference_at_once(unet):
    layers = inject.attach(unet, choose(unet))
    adapter = inject.collect(unet)
    names = list(adapter.layers)
    del adapter.layers[names[0]]
    adapter.layers["unet.strange"] = adapter.layers[names[1]]
    with pytest.raises(AdapterError) as caught:
        inject.load(layers, adapter)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("alpha", [0.1, 16 * 8**0.5])
def test_an_alpha_that_float32_does_not_hold_attaches(unet, adapter, alpha):
    layers = {name: replace(one, alpha=alpha) for name, one in adapter.layers.items()}
    attached = inject.attach_adapter(unet, Adapter(layers))
    assert {layer.alpha for layer in attached.values()} == {
        layer.alpha for layer in Adapter(layers).layers.values()
    }


def test_dora_over_a_merged_adapter_is_refused(unet, unet_inputs, adapter):
    attach_named(unet, "cat", 2)
    attach_named(unet, "ink", 2, dora="input")
    for layer in inject.lora_layers(unet, "cat").values():
        layer.merge()
    with pytest.raises(ValueError, match="has lost its base"):
        unet(*unet_inputs)
