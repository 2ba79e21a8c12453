"""Choosing layers of a model, attaching, detaching and collecting adapters."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import choose, make_parts, make_unet, randomise
from torch import nn

from lora_sd import inject, layer_choice, layer_names, patterns
from lora_sd.adapter import Adapter
from lora_sd.errors import AdapterError, ConfigError
from lora_sd.layers import ConvLoRA, EmbeddingLoRA, LayerOptions
from lora_sd.parts import Scales


@pytest.mark.parametrize(
    ("preset", "endings"),
    [
        ("attention", {"to_q", "to_k", "to_v", "0"}),
        ("attention-ff", {"to_q", "to_k", "to_v", "0", "proj", "2"}),
        ("attention-conv", {"to_q", "to_k", "to_v", "0", "proj", "2", "conv1", "conv2", "conv"}),
    ],
)
def test_a_preset_names_its_layers(unet, preset, endings):
    assert {plan.name.rsplit(".", 1)[-1] for plan in choose(unet, preset)} == endings


def test_full_means_every_linear_and_convolution_layer(unet):
    every = {n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {plan.name for plan in choose(unet, "full")} == {f"unet.{name}" for name in every}


def test_convolutions_have_their_own_rank_and_1x1_ones_do_not(unet):
    plans = {plan.name: plan for plan in choose(unet, "full")}
    assert plans["unet.conv_in"].rank == 3 and plans["unet.conv_in"].alpha == 1
    assert plans["unet.mid_block.attentions.0.proj_in"].rank == 2


def test_alpha_follows_the_rank_unless_given(unet):
    plans = {p.name: p for p in choose(unet, "full", alpha=None, conv_alpha=None)}
    assert (
        plans["unet.conv_in"].alpha == 3 and plans["unet.mid_block.attentions.0.proj_in"].alpha == 2
    )


def test_patterns_add_and_remove_layers(unet):
    names = {p.name for p in choose(unet, "attention", include=["conv_in"], exclude=["attn1.to_q"])}
    assert "unet.conv_in" in names and not any(name.endswith("attn1.to_q") for name in names)
    names = {p.name for p in choose(unet, "attention", exclude=["*attn1*", "re:mid_block.*"])}
    assert names and not any("attn1" in name or name.startswith("unet.mid") for name in names)


def test_a_suffix_matches_at_a_dot_only():
    assert patterns.matches("to_q", "attn1.to_q") and not patterns.matches("to_q", "attn1.not_to_q")


def test_a_pattern_that_matches_nothing_names_the_nearest(unet):
    with pytest.raises(ConfigError, match="Did you mean 'to_q'"):
        choose(unet, include=["to_qq"])


def test_a_wrong_expression_is_told_with_the_other_problems(unet):
    with pytest.raises(ConfigError) as caught:
        choose(unet, include=["re:["], exclude=["nowhere"], rank=500)
    assert len(caught.value.problems) == 3 and "'re:['" in str(caught.value)


def test_a_rank_above_the_limit_names_layer_and_limit(unet):
    with pytest.raises(ConfigError, match=r"'adapter.rank' is 9.*at most 8"):
        choose(unet, rank=9)


def test_a_rank_above_the_limit_is_clamped_when_asked_and_shown(unet):
    plans = choose(unet, "full", conv_rank=64, conv_alpha=32, clamp_ranks=True)
    conv_out = next(plan for plan in plans if plan.name == "unet.conv_out")
    assert (conv_out.rank, conv_out.alpha) == (4, 2)
    assert "1 x conv_out                 rank 4    alpha 2" in layer_choice.describe(plans)


def test_everything_excluded_is_an_error(unet):
    with pytest.raises(ConfigError, match="leaves no layer"):
        choose(unet, exclude=["*"])


def ranks_of(unet, *ranks, **changes):
    """Rank and alpha by layer name, without 'unet.'."""
    plans = choose(unet, "full", ranks=ranks, **changes)
    return {plan.name.removeprefix("unet."): (plan.rank, plan.alpha) for plan in plans}


def test_a_pattern_may_have_a_rank_and_alpha_of_its_own(unet):
    found = ranks_of(unet, "attn1.to_q=4", "re:.*attn2.to_k = 3 : 0.5", "conv_in=0", alpha=1)
    attention = "mid_block.attentions.0.transformer_blocks.0"
    assert found[f"{attention}.attn1.to_q"] == (4, 2)  # the scaling stays 1/2
    assert found[f"{attention}.attn2.to_k"] == (3, 0.5)
    assert found[f"{attention}.attn2.to_q"] == (2, 1)
    assert "conv_in" not in found and "conv_out" in found


def test_the_last_rank_that_fits_counts(unet):
    found = ranks_of(unet, "*=0", "attn1.to_q=4", "re:mid_block.*attn1.to_q=1", alpha=1)
    assert {name.split(".")[-1] for name in found} == {"to_q"}
    assert {name.startswith("mid"): pair for name, pair in found.items()} == {
        False: (4, 2),
        True: (1, 0.5),
    }


def test_a_block_may_have_ranks_of_its_own_for_convolutions_and_the_others(unet):
    found = ranks_of(unet, "block:mid=4", "block:up.1/conv=1:1", "block:down.0/linear=0")
    assert {pair for name, pair in found.items() if name.startswith("mid")} == {(4, 4), (4, 4 / 3)}
    assert found["up_blocks.1.resnets.0.conv1"] == (1, 1)
    assert found["up_blocks.1.resnets.0.time_emb_proj"] == (2, 2)
    down = [name for name in found if name.startswith("down_blocks.0")]
    assert down and all(".conv" in name for name in down)


def test_blocks_are_chosen_and_left_out(unet):
    names = [plan.name for plan in choose(unet, exclude=["block:mid", "block:up.0/conv"])]
    assert not any(name.startswith("unet.mid") for name in names)
    assert {name for name in names if "up_blocks.0" in name} == set()
    names = {plan.name for plan in choose(unet, "attention", include=["block:rest"])}
    assert {"unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"} <= names
    with pytest.raises(ConfigError, match="The blocks are .*mid"):
        choose(unet, include=["block:middle"])


@pytest.mark.parametrize("rule", ["to_q", "to_q=", "to_q=x", "to_q=4:0", "to_q=-1", "=4"])
def test_a_rank_that_cannot_be_read_is_told(unet, rule):
    with pytest.raises(ConfigError, match="write PATTERN=RANK"):
        ranks_of(unet, rule)


def test_a_rank_for_a_layer_that_is_not_chosen_or_too_small_is_told(unet):
    with pytest.raises(ConfigError, match=r"'adapter.ranks': no layer matches 'conv_in'"):
        choose(unet, "attention", ranks=["conv_in=4"])
    with pytest.raises(
        ConfigError, match="'adapter.ranks' gives 'conv_in' 30, but 'conv_in' allows"
    ):
        ranks_of(unet, "conv_in=30")
    assert ranks_of(unet, "conv_in=30:15", clamp_ranks=True)["conv_in"] == (8, 4)


def test_rank_0_leaves_the_linear_layers_or_the_convolutions_alone(unet):
    assert {plan.rank for plan in choose(unet, rank=0)} == {3}
    assert all(".conv" in plan.name for plan in choose(unet, rank=0))
    assert {plan.rank for plan in choose(unet, conv_rank=0)} == {2}
    with pytest.raises(ConfigError, match="Every chosen layer has rank 0"):
        choose(unet, rank=0, conv_rank=0)


def test_layers_of_text_encoders_are_called_text_model_whatever_transformers_says():
    parts = make_parts()
    names = {name for name in layer_names.layer_shapes(parts) if not name.startswith("unet.")}
    own = {name for name, _ in parts["text_encoder"].named_modules()}
    attention = "text_model.encoder.layers.0.self_attn.q_proj"
    assert not any(name.startswith("text_model") for name in own)  # else nothing is renamed here
    assert {f"text_encoder.{attention}", f"text_encoder_2.{attention}"} <= names
    assert "text_encoder_2.text_projection" in names
    assert all(".text_model." in name or name.endswith("text_projection") for name in names)


@pytest.mark.parametrize("preset", list(layer_choice.PRESETS))
def test_text_encoders_train_all_of_an_attention_and_no_token_table(preset):
    plans = [p for p in choose(make_parts(), preset) if not p.name.startswith("unet.")]
    endings = {plan.name.split(".")[-1] for plan in plans}
    attention = {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert endings == attention | (set() if preset == "attention" else {"fc1", "fc2"})


@pytest.mark.parametrize("pattern", ["token_embedding", "re:text_encoder\\..*token_embedding"])
def test_a_token_table_is_chosen_only_by_name(pattern):
    parts, table = make_parts(), "text_encoder.text_model.embeddings.token_embedding"
    for other in ("*", "block:text_encoder", "re:.*"):
        assert table not in [plan.name for plan in choose(parts, include=[other])]
    plans = choose(parts, include=[pattern])
    assert table in [plan.name for plan in plans]
    assert isinstance(inject.attach(parts, plans)[table], EmbeddingLoRA)


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
    def out():
        return unet(*unet_inputs).sample

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
    assert torch.equal(cat, other(*unet_inputs).sample)
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


def test_what_matched_is_described_with_counts_and_size(unet):
    text = layer_choice.describe(choose(unet))
    assert "attn1.to_q" in text and "resnets.conv1" in text and "MB file" in text


@pytest.mark.parametrize("rs", [False, True])
def test_ruled_and_clamped_layers_keep_their_scaling(unet, rs):
    plans = choose(
        unet, "full", rank=4, alpha=2, conv_rank=64, conv_alpha=32, ranks=["to_q=1"],
        clamp_ranks=True, rs=rs,
    )  # fmt: skip
    layers = inject.attach(unet, plans, LayerOptions(rs=rs))
    assert {layer.rank for layer in layers.values()} > {1, 4}
    linear, conv = (2 / 2, 32 / 8) if rs else (2 / 4, 32 / 64)
    for plan in plans:
        wanted = conv if len(plan.weight_shape) == 4 and plan.weight_shape[2] > 1 else linear
        assert layers[plan.name].scaling == pytest.approx(wanted), plan.name


def test_a_pattern_for_the_text_encoder_says_how_to_turn_it_on(unet):
    with pytest.raises(ConfigError, match="turn on adapter.text_encoder"):
        choose(unet, include=["token_embedding"])


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
