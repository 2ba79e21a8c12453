"""Choosing layers of a UNet, attaching, detaching and collecting adapters."""

import pytest
import torch
from conftest import choose, make_unet, randomise
from torch import nn

from lora_sd import inject
from lora_sd.errors import AdapterError, ConfigError
from lora_sd.layers import ConvLoRA


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
    assert inject.matches("to_q", "attn1.to_q") and not inject.matches("to_q", "attn1.not_to_q")


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
    assert "1 x conv_out                 rank 4    alpha 2" in inject.describe(plans)


def test_everything_excluded_is_an_error(unet):
    with pytest.raises(ConfigError, match="leaves no layer"):
        choose(unet, exclude=["*"])


@pytest.mark.parametrize("preset", list(inject.PRESETS))
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
    assert torch.equal(other(*unet_inputs).sample, unet(*unet_inputs).sample)
    assert isinstance(layers["unet.conv_in"], ConvLoRA)
    inject.set_scale(other, 0)
    assert torch.equal(other(*unet_inputs).sample, make_unet()(*unet_inputs).sample)


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
    text = inject.describe(choose(unet))
    assert "attn1.to_q" in text and "resnets.conv1" in text and "MB file" in text
