"""LoRA on any torch model."""

import pytest
import torch
from torch import nn

from lora_sd import inject
from lora_sd.any_model import (
    LoraConfig,
    apply_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_all_lora,
    replace_linear_with_lora,
    set_lora_trainable,
    set_scale,
    unmerge_all_lora,
)
from lora_sd.errors import AdapterError, ConfigError
from lora_sd.layers import ConvLoRA, EmbeddingLoRA, LinearLoRA

EVERYTHING = LoraConfig(r=2, lora_alpha=3, target_modules=("*",))


class Net(nn.Module):
    """One layer of every kind that can be adapted, and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.ModuleDict({"fc1": nn.Linear(4, 6), "fc10": nn.Linear(6, 4)})
        self.norm = nn.LayerNorm(4)

    def forward(self, ids):
        x = self.conv(self.words(ids)[:, None])
        return self.norm(self.body["fc10"](self.body["fc1"](x).relu()))


IDS = torch.tensor([[1, 2, 8], [4, 4, 0]])


def trained(config=EVERYTHING, net=None):
    """A net with an adapter, as if trained."""
    net = net or Net()
    for layer in apply_lora(net, config).values():
        nn.init.normal_(layer.lora_up.weight)
    return net


def weights_of(net):
    return {name: weight.clone() for name, weight in net.state_dict().items()}


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[k], others[k]) for k in some)


def test_a_fresh_adapter_of_every_kind_changes_nothing():
    net = Net()
    plain = net(IDS)
    kinds = {path: type(layer) for path, layer in apply_lora(net, EVERYTHING).items()}
    assert kinds == {
        "words": EmbeddingLoRA,
        "conv": ConvLoRA,
        "body.fc1": LinearLoRA,
        "body.fc10": LinearLoRA,
    }
    assert torch.equal(net(IDS), plain)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("fc1", ["body.fc1"]),
        ("body.fc10", ["body.fc10"]),
        ("body.*", ["body.fc1", "body.fc10"]),
        (r"re:.*\.fc\d+|conv", ["conv", "body.fc1", "body.fc10"]),
    ],
)
def test_a_pattern_names_what_it_says_and_no_more(pattern, named):
    assert list(apply_lora(Net(), LoraConfig(r=2, target_modules=pattern))) == named


def test_a_part_called_model_is_not_taken_for_the_whole():
    net = nn.ModuleDict({"model": nn.Sequential(nn.Linear(3, 3)), "head": nn.Linear(3, 3)})
    assert list(apply_lora(net, LoraConfig(r=1, target_modules="model.*"))) == ["model.0"]


def test_all_that_is_wrong_with_a_config_is_told_at_once_and_nothing_is_changed():
    net = Net()
    before = str(net)
    config = LoraConfig(r=5, target_modules=("body.fc2", "re:(", "conv", "words"))
    with pytest.raises(ConfigError) as error:
        apply_lora(net, config)
    assert len(error.value.problems) == 4
    assert "Did you mean 'body.fc1" in error.value.problems[0]
    assert "'conv' allows at most 4" in str(error.value)
    assert str(net) == before


def test_a_grouped_convolution_needs_a_rank_of_its_groups():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(ConfigError, match="'0' needs a multiple of 2"):
        apply_lora(net, LoraConfig(r=3, target_modules="0"))


@pytest.mark.parametrize(
    "settings", [{"r": -1}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"target_modules": ()}]
)
def test_a_config_refuses_what_means_nothing(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LoraConfig(**{"target_modules": "*", **settings})


def test_alpha_and_dropout_reach_the_layers_and_rank_0_leaves_them_alone():
    config = LoraConfig(r=2, lora_alpha=None, lora_dropout=0.25, target_modules=["fc1"])
    layer = apply_lora(Net(), config)["body.fc1"]
    assert (layer.rank, layer.alpha, layer.dropout) == (2, 2, 0.25)
    assert apply_lora(Net(), LoraConfig(r=0, target_modules="*")) == {}


def test_layers_are_adapted_once():
    net = trained(LoraConfig(r=2, target_modules="fc1"))
    with pytest.raises(ConfigError, match="adapted already"):
        apply_lora(net, EVERYTHING)
    assert list(replace_linear_with_lora(net, 2)) == ["body.fc10"]
    with pytest.raises(ConfigError, match="not adapted yet"):
        replace_linear_with_lora(net, 2)


def test_a_layers_start_depends_on_its_path_alone():
    first, second = Net(), Net()
    every = apply_lora(first, EVERYTHING)
    torch.manual_seed(7)
    alone = apply_lora(second, LoraConfig(r=2, target_modules="fc1"))
    assert torch.equal(every["body.fc1"].lora_down.weight, alone["body.fc1"].lora_down.weight)


def test_only_adapters_are_trained_also_after_a_second_call():
    net = trained(LoraConfig(r=2, target_modules="fc1"))
    replace_linear_with_lora(net, 2)
    moving = {name for name, weight in net.named_parameters() if weight.requires_grad}
    assert moving == {
        f"body.{layer}.lora_{side}.weight" for layer in ("fc1", "fc10") for side in ("down", "up")
    }


def test_merged_layers_are_unmerged_to_be_trained():
    net = trained()
    merge_all_lora(net)
    set_lora_trainable(net)
    net(IDS).square().sum().backward()
    assert all(layer.lora_down.weight.grad is not None for layer in lora_layers(net).values())


def test_the_rank_is_capped_and_the_layer_adopted():
    net = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 3)))
    base = net[0]
    replaced = replace_linear_with_lora(net, 5, scale=2, lora_bias=True)
    assert [layer.rank for layer in replaced.values()] == [5, 3]
    assert replaced["0"].base is base and not base.weight.requires_grad
    assert replaced["0"].scaling == 1 and replaced["0"].scale == 2
    assert not replaced["0"].lora_up.bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merging_is_what_live_layers_do_and_leaves_no_trace(dtype):
    net = trained(net=Net().to(dtype)).eval()
    before, live = weights_of(net), net(IDS)
    merge_all_lora(net)
    torch.testing.assert_close(net(IDS), live, rtol=0.02, atol=1e-5 if dtype.itemsize > 2 else 0.1)
    for scale in torch.randn(30):
        set_scale(net, float(scale))
    unmerge_all_lora(net)
    assert equal(weights_of(net), before)


def test_scale_0_and_detach_give_the_base():
    plain = Net()
    net = trained()
    set_scale(net, 0)
    assert torch.equal(net(IDS), plain(IDS))
    inject.detach(net)
    assert equal(weights_of(net), weights_of(plain))


def test_inference_mode_is_merged_trains_nothing_and_takes_an_adapter():
    config = LoraConfig(r=2, lora_alpha=3, target_modules=("*",), inference_mode=True)
    net = Net()
    apply_lora(net, config)
    load_lora_state_dict(net, lora_state_dict(trained()))
    assert not any(weight.requires_grad for weight in net.parameters())
    assert not torch.equal(net.body["fc1"].weight, Net().body["fc1"].weight)
    torch.testing.assert_close(net(IDS), trained()(IDS))


def test_merging_refuses_what_it_would_spoil_and_merges_nothing_then():
    net = nn.ModuleDict(
        {"words": nn.Embedding(9, 4), "head": nn.Linear(4, 9), "fc": nn.Linear(4, 4)}
    )
    net["head"].weight = net["words"].weight
    trained(LoraConfig(r=2, target_modules=("words", "fc")), net)
    before = weights_of(net)
    with pytest.raises(AdapterError, match="'words' shares its weight"):
        merge_all_lora(net)
    assert equal(weights_of(net), before)


def test_a_layer_used_twice_is_adapted_once_at_both_places():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    trained(LoraConfig(r=2, target_modules="0"), net)
    assert net[0] is net[1][0] and isinstance(net[0], LinearLoRA)
    live = net(x)
    merge_all_lora(net)
    torch.testing.assert_close(net(x), live)
    inject.detach(net)
    assert net[0] is shared and net[1][0] is shared


@torch.no_grad()
def test_torchs_own_transformer_uses_the_adapter_in_evaluation_too():
    net = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).eval()
    x = torch.randn(2, 3, 4)
    plain = net(x)
    trained(LoraConfig(r=2, target_modules=("linear1", "linear2")), net)
    assert not torch.allclose(net(x), plain)
    with pytest.raises(ConfigError, match="no layer matches 'out_proj'"):
        apply_lora(net, LoraConfig(r=2, target_modules="out_proj"))  # its weight is used uncalled


def test_a_state_is_a_copy_and_loads_to_the_bit():
    net = trained()
    state = lora_state_dict(net)
    kept = {key: tensor.clone() for key, tensor in state.items()}
    for layer in lora_layers(net).values():
        nn.init.zeros_(layer.lora_up.weight)
    assert equal(state, kept)
    assert load_lora_state_dict(net, state) == []
    assert equal(lora_state_dict(net), kept)


def test_strict_loading_tells_every_difference_and_loads_nothing():
    net, state = trained(), lora_state_dict(trained())
    before = lora_state_dict(net)
    del state["conv.lora_up.weight"]
    state["body.fc1.lora_down.weight"] = torch.zeros(3, 4)
    state["body.fc10.alpha"] = torch.tensor(8.0)
    state["words.lora_up.weight"] += 1
    state["head.alpha"] = torch.tensor(1.0)
    told = [
        "'conv.lora_up.weight' is missing.",
        "'body.fc1.lora_down.weight' has shape (3, 4), but the layer here has (2, 4).",
        "'body.fc10.alpha' is 8, but the layer here has 3.",
        "'head.alpha' is not expected here.",
    ]
    with pytest.raises(AdapterError) as error:
        load_lora_state_dict(net, state)
    assert error.value.problems == told
    assert equal(lora_state_dict(net), before)

    assert load_lora_state_dict(net, state, strict=False) == told
    after = lora_state_dict(net)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"words.lora_up.weight"}


def test_a_layer_with_an_up_bias_or_alone_keeps_its_state():
    nets = [nn.Sequential(LinearLoRA.alone(4, 3, 2), LinearLoRA(nn.Linear(3, 3), 2, up_bias=True))]
    nets.append(LinearLoRA(nn.Linear(4, 3), 2, dora="output"))
    for net in nets:
        state = {key: tensor + 1 for key, tensor in lora_state_dict(net).items()}
        state |= {key: tensor - 1 for key, tensor in state.items() if key.endswith("alpha")}
        assert load_lora_state_dict(net, state) == []
        assert equal(lora_state_dict(net), state)
    with pytest.raises(AdapterError, match="'0' has no base"):
        merge_all_lora(nets[0])
