"""What learns, at which rate."""

import pytest
from conftest import choose, make_parts, make_unet

from lora_sd import inject
from lora_sd.errors import ConfigError
from lora_sd.layers import LayerOptions
from lora_sd.optimizers import parameter_groups

DEFAULTS = {
    "learning_rate": 1.0,
    "conv_learning_rate": None,
    "text_encoder_rates": {"text_encoder": 0.5, "text_encoder_2": 0.25},
    "block_learning_rates": [],
    "lora_plus_ratio": 1.0,
    "weight_decay": 0.1,
}


def attached(parts=None, preset="full", **options):
    parts = parts or make_unet()
    return inject.attach(parts, choose(parts, preset), LayerOptions(**options))


def rates(layers, **changes):
    """(learning rate, weight decay) of each parameter that learns, by its full name."""
    groups = parameter_groups(layers, **{**DEFAULTS, **changes})
    names = {id(p): f"{n}.{part}" for n, la in layers.items() for part, p in la.named_parameters()}
    found = [(names[id(p)], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]]
    assert len({name for name, *_ in found}) == len(found)
    return {name: (rate, decay) for name, rate, decay in found}


def test_a_unet_of_one_rate_is_one_group_in_the_layers_order():
    layers = attached()
    (group,) = parameter_groups(layers, **DEFAULTS)
    assert (group["name"], group["lr"], group["weight_decay"]) == ("unet", 1.0, 0.1)
    factors = [f.weight for la in layers.values() for f in (la.lora_down, la.lora_up)]
    assert all(a is b for a, b in zip(group["params"], factors, strict=True))


def test_each_part_learns_at_its_own_rate():
    layers = attached(make_parts())
    for name, (rate, _) in rates(layers, conv_learning_rate=2.0).items():
        if name.startswith("text_encoder_2"):
            assert rate == 0.25
        elif name.startswith("text_encoder"):
            assert rate == 0.5
        else:
            is_conv = layers[name.rpartition(".lora_")[0]].weight.shape[2:] == (3, 3)
            assert rate == (2.0 if is_conv else 1.0)


def test_groups_have_names_that_set_them_apart():
    groups = parameter_groups(
        attached(make_parts(), dora="input"),
        **DEFAULTS | {"conv_learning_rate": 2.0, "block_learning_rates": ["block:mid=0.5"]}
        | {"lora_plus_ratio": 4.0},
    )  # fmt: skip
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    assert {"unet", "unet up", "unet norms", "unet conv", "unet conv up", "unet x0.5",
            "unet conv x0.5 up", "text_encoder", "text_encoder_2 norms"} <= set(names)  # fmt: skip


def test_the_last_pattern_that_fits_gives_the_factor():
    patterns = ["*attn1*=0.5", "block:mid=0.25", "re:.*=1", "to_q=3"]
    found = rates(attached(preset="attention"), block_learning_rates=patterns)
    assert {rate for name, (rate, _) in found.items() if ".to_q." in name} == {3.0}
    assert {rate for name, (rate, _) in found.items() if ".to_q." not in name} == {1.0}
    found = rates(attached(preset="attention"), block_learning_rates=["block:mid=0.25"])
    assert all((rate == 0.25) == ("mid_block" in name) for name, (rate, _) in found.items())


def test_a_factor_of_0_leaves_a_layer_as_it_starts():
    layers = attached(dora="output")
    found = rates(layers, block_learning_rates=["block:mid=0", "block:mid/conv=1"])
    for name, layer in layers.items():
        stays = "mid_block" in name and layer.weight.shape[2:] != (3, 3)
        own = [p for part, p in layer.named_parameters() if not part.startswith("base.")]
        assert all(p.requires_grad != stays for p in own)
        assert any(key.startswith(f"{name}.") for key in found) != stays


def test_lora_up_learns_faster_with_lora_plus():
    found = rates(attached(make_parts(), up_bias=True), lora_plus_ratio=16.0)
    for name, (rate, _) in found.items():
        slow = {"text_encoder": 0.5, "text_encoder_2": 0.25}.get(name.partition(".")[0], 1.0)
        assert rate == (16 * slow if ".lora_up." in name else slow)


def test_only_factors_are_pulled_to_zero():
    for options in ({"dora": "input"}, {"dora": "output"}, {"up_bias": True}):
        found = rates(attached(**options))
        assert all((decay == 0.1) == name.endswith("weight") for name, (_, decay) in found.items())
        assert any(decay == 0 for _, decay in found.values())


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("to_qq=0.5", "no layer that learns matches 'to_qq'. Did you mean 'to_q'"),
        ("block:midd=0.5", "The blocks are "),
        ("re:[=0.5", "'re:[' is not a valid regular expression"),
        ("to_q", "holds 'to_q': write PATTERN=FACTOR"),
        ("to_q=fast", "write PATTERN=FACTOR"),
        ("to_q=-1", "write PATTERN=FACTOR"),
        ("to_q=inf", "write PATTERN=FACTOR"),
        ("=1", "write PATTERN=FACTOR"),
    ],
)
def test_a_wrong_rule_is_told_in_a_sentence(rule, sentence):
    with pytest.raises(ConfigError) as caught:
        rates(attached(preset="attention"), block_learning_rates=[rule, "nowhere=1"])
    assert sentence in caught.value.problems[0] and len(caught.value.problems) == 2


def test_nothing_at_all_that_learns_is_an_error():
    with pytest.raises(ConfigError, match="Nothing learns"):
        rates(attached(), block_learning_rates=["*=0"])
