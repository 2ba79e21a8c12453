"""Which layers are adapted, and with what rank: presets, patterns, rules."""

import pytest
from conftest import choose, make_parts
from torch import nn

from lora_sd import inject, layer_choice, layer_names, patterns
from lora_sd.errors import ConfigError
from lora_sd.layers import EmbeddingLoRA, LayerOptions


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


def test_what_matched_is_described_with_counts_and_size(unet):
    text = layer_choice.describe(choose(unet))
    assert "attn1.to_q" in text and "resnets.conv1" in text and "MB file" in text


@pytest.mark.parametrize("rs", [False, True])
def test_ruled_and_clamped_layers_keep_their_scaling(unet, rs):
    plans = choose(
        unet, "full", rank=4, alpha=2, conv_rank=64, conv_alpha=32, ranks=["to_q=2"],
        clamp_ranks=True, rs=rs,
    )  # fmt: skip
    layers = inject.attach(unet, plans, LayerOptions(rs=rs))
    assert {layer.rank for layer in layers.values()} > {2, 4}
    linear, conv = (2 / 2, 32 / 8) if rs else (2 / 4, 32 / 64)
    for plan in plans:
        wanted = conv if len(plan.weight_shape) == 4 and plan.weight_shape[2] > 1 else linear
        assert layers[plan.name].scaling == pytest.approx(wanted), plan.name


def test_a_pattern_for_the_text_encoder_says_how_to_turn_it_on(unet):
    with pytest.raises(ConfigError, match="turn on adapter.text_encoder"):
        choose(unet, include=["token_embedding"])
