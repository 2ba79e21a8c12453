"""Adapted layers compute what PEFT's do: outputs, every gradient, and weights after training.

Two tensors agree when the norm of their difference is within 1e-6 (after 50 steps: 1e-5) of the
norm of PEFT's, in float32. The gradients of a whole UNet are less certain than that: PEFT's own in
float32 lie 1.3e-6 from its own in float64, taken as one vector, and up to 1e-5 for the queries and
keys of an attention, which nearly cancel out. So they are compared as one vector within 2e-6, and
each by itself in float64; there DoRA is allowed 1e-5, since its norms are float32 always.
"""

from copy import deepcopy

import pytest
import torch
from agreement import (
    Weights,
    assert_agree,
    assert_gradients_agree,
    our_weights,
    pull_both,
    randomise,
    train,
    whole_gradient,
)
from conftest import choose, make_unet
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from torch import nn

from lora_sd import inject, layer_choice
from lora_sd.adapter import LoRAWeights
from lora_sd.layers import KINDS, LayerOptions

PEFT_NAMES = {"rs": "use_rslora", "dora": "use_dora", "up_bias": "lora_bias"}

LAYERS = {
    "linear": (nn.Linear(12, 10), (3, 12)),
    "linear of sequences": (nn.Linear(12, 10), (2, 5, 12)),
    "linear without bias": (nn.Linear(12, 10, bias=False), (2, 5, 12)),
    "3x3": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 8)),
    "3x3 of stride 2": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "3x3 of stride 2, unpadded": (nn.Conv2d(6, 8, 3, stride=2), (2, 6, 8, 8)),
    "3x3 without bias": (nn.Conv2d(6, 8, 3, padding=1, bias=False), (2, 6, 7, 8)),
    "1x1": (nn.Conv2d(6, 8, 1), (2, 6, 7, 8)),
    "1x1 without bias": (nn.Conv2d(6, 8, 1, bias=False), (2, 6, 7, 8)),
}
OPTIONS = [{}, {"rs": True}, {"dora": "output"}, {"dora": "output", "rs": True}, {"up_bias": True}]


def peft_weights(layer: PeftLayer) -> Weights:
    """What a PEFT layer trains, by the names of `LoRAWeights`."""
    if layer.lora_embedding_A:
        return {"down": layer.lora_embedding_A["default"], "up": layer.lora_embedding_B["default"]}
    found = {"down": layer.lora_A["default"].weight, "up": layer.lora_B["default"].weight}
    if layer.lora_B["default"].bias is not None:
        found["up_bias"] = layer.lora_B["default"].bias
    if layer.lora_magnitude_vector:
        found["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return found


@torch.no_grad()
def take_over(ours, theirs: PeftLayer) -> None:
    """Copy PEFT's weights into our layer; PEFT shapes a convolution's magnitude (1, out, 1, 1)."""
    for name, weight in peft_weights(theirs).items():
        mine = our_weights(ours)[name]
        mine.copy_(weight.reshape(mine.shape))


def pair_of(base: nn.Module, rank: int = 3, alpha: float = 2, **options: object):
    """(our layer, PEFT's) around copies of a base, with the same weights."""
    theirs = nn.ModuleDict({"layer": deepcopy(base)})
    names = {PEFT_NAMES.get(name, name): value for name, value in options.items()}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], **names)
    theirs = inject_adapter_in_model(config, theirs)["layer"]
    ours = KINDS[type(base)](deepcopy(base), rank, alpha, **options)
    randomise(peft_weights(theirs))
    take_over(ours, theirs)
    return ours, theirs


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_s_output_and_gradients_are_peft_s(kind, options):
    torch.manual_seed(0)
    base, shape = LAYERS[kind]
    ours, theirs = pair_of(base, **options)
    x = torch.randn(shape).requires_grad_()
    other_x = x.detach().clone().requires_grad_()
    outputs = ours(x), theirs(other_x)
    assert_agree(*outputs, 1e-6, "output")
    pull_both(outputs)
    assert_gradients_agree(our_weights(ours), peft_weights(theirs))
    assert_agree(x.grad, other_x.grad, 1e-6, "gradient of the input")


@pytest.mark.parametrize("options", [{}, {"rs": True}], ids=str)
def test_an_embedding_s_output_and_gradients_are_peft_s(options):
    torch.manual_seed(0)
    ours, theirs = pair_of(nn.Embedding(20, 8, padding_idx=3), **options)
    ids = torch.randint(20, (2, 7))
    ids[0, 0] = 3  # the padding, which learns nothing
    outputs = ours(ids), theirs(ids)
    assert_agree(*outputs, 1e-6, "output")
    pull_both(outputs)
    assert_gradients_agree(our_weights(ours), peft_weights(theirs))


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
def test_the_delta_is_peft_s(kind, rs):
    torch.manual_seed(0)
    base = nn.Embedding(20, 8) if kind == "embedding" else LAYERS[kind][0]
    ours, theirs = pair_of(base, rs=rs)
    assert_agree(ours.weights().delta(), theirs.get_delta_weight("default"), 1e-6, "delta")


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "3x3", "1x1"])
def test_a_merged_dora_layer_is_peft_s(kind):
    torch.manual_seed(0)
    ours, theirs = pair_of(LAYERS[kind][0], dora="output")
    ours.merge()
    theirs.merge()
    assert_agree(ours.weight, theirs.base_layer.weight, 1e-6, "merged weight")


def peft_unet(plans: list[layer_choice.LayerPlan], options: LayerOptions) -> nn.Module:
    """The miniature UNet with PEFT's layers at the planned places."""
    unet, paths = make_unet(), {plan.name.removeprefix("unet."): plan for plan in plans}
    unet.add_adapter(
        LoraConfig(
            target_modules=list(paths),
            rank_pattern={path: plan.rank for path, plan in paths.items()},
            alpha_pattern={path: plan.alpha for path, plan in paths.items()},
            use_dora=options.dora != "off",
            use_rslora=options.rs,
            lora_bias=options.up_bias,
        )
    )
    return unet


def unet_pair(preset: str, options: LayerOptions, randomised: bool = True):
    """(our UNet, PEFT's, [(name, our layer, PEFT's)]), with the same weights."""
    ours = make_unet()
    plans = choose(ours, preset)
    theirs = peft_unet(plans, options)
    layers = inject.attach(ours, plans, options)
    wrapped = [name for name, part in theirs.named_modules() if isinstance(part, PeftLayer)]
    assert sorted(f"unet.{name}" for name in wrapped) == sorted(layers)
    pairs = [
        (name, layer, theirs.get_submodule(name.removeprefix("unet.")))
        for name, layer in layers.items()
    ]
    torch.manual_seed(1)
    for _, mine, other in pairs:
        if randomised:
            randomise(peft_weights(other))
        take_over(mine, other)
    return ours, theirs, pairs


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("preset", ["attention", "attention-conv", "full"])
def test_a_unet_s_output_and_gradients_are_peft_s(preset, options, unet_inputs):
    ours, theirs, pairs = unet_pair(preset, LayerOptions(**options))
    outputs = ours(*unet_inputs).sample, theirs(*unet_inputs).sample
    assert_agree(*outputs, 1e-6, "output")
    pull_both(outputs)
    whole = (
        whole_gradient([our_weights(mine) for _, mine, _ in pairs]),
        whole_gradient([peft_weights(other) for _, _, other in pairs]),
    )
    assert_agree(*whole, 2e-6, "whole gradient")


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_gradient_of_a_unet_is_peft_s_in_float64(options, unet_inputs):
    ours, theirs, pairs = unet_pair("full", LayerOptions(**options))
    latents, timesteps, captions = unet_inputs
    inputs = latents.double(), timesteps, captions.double()
    pull_both((ours.double()(*inputs).sample, theirs.double()(*inputs).sample))
    for name, mine, other in pairs:
        ours, theirs = our_weights(mine), peft_weights(other)
        if name.endswith("to_k"):  # a bias for all keys alike leaves the softmax as it is
            ours.pop("up_bias", None), theirs.pop("up_bias", None)
        assert_gradients_agree(ours, theirs, 1e-5 if "magnitude" in ours else 1e-6, name)


@pytest.mark.parametrize(
    ("preset", "options"), [("full", {}), ("attention-conv", {"dora": "output"})], ids=str
)
def test_fifty_steps_give_peft_s_weights(preset, options):
    ours, theirs, pairs = unet_pair(preset, LayerOptions(**options), randomised=False)
    for unet in (ours, theirs):
        train(unet, [weight for weight in unet.parameters() if weight.requires_grad])
    for name, mine, other in pairs:
        for what, weight in peft_weights(other).items():
            trained = our_weights(mine)[what]
            assert_agree(trained, weight.reshape(trained.shape), 1e-5, f"{name} {what}")
            assert what != "up" or weight.any()


def pissa_pair():
    """(a base, our PiSSA layer around a copy of it, PEFT's)."""
    torch.manual_seed(0)
    base = nn.Linear(12, 10)
    peft = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights="pissa")
    theirs = inject_adapter_in_model(peft, nn.ModuleDict({"layer": deepcopy(base)}))["layer"]
    return base, KINDS[nn.Linear](deepcopy(base), 4, 6, init="pissa"), theirs


def test_pissa_starts_where_peft_s_does():
    base, ours, theirs = pissa_pair()
    start = LoRAWeights(ours.lora_down.weight, ours.lora_up.weight, 6).delta()
    residual = theirs.base_layer.weight
    assert_agree(base.weight - start, residual, 1e-6, "residual")
    assert_agree(residual + start, base.weight, 1e-6, "PEFT's residual plus our adapter")
    assert_agree(residual + theirs.get_delta_weight("default"), base.weight, 1e-6, "PEFT's sum")
    for mine, other in zip(our_weights(ours).values(), peft_weights(theirs).values(), strict=True):
        assert_agree(mine.abs(), other.abs(), 1e-6, "start, up to the signs of its components")


def test_trained_pissa_and_its_saved_form_of_twice_the_rank_are_peft_s():
    base, ours, theirs = pissa_pair()
    take_over(ours, theirs)
    for weight in peft_weights(theirs).values():
        weight.data += 0.1 * torch.randn_like(weight)
    x = torch.randn(5, 12)
    ours.down_start.copy_(ours.lora_down.weight.detach())
    ours.up_start.copy_(ours.lora_up.weight.detach())
    take_over(ours, theirs)
    assert_agree(ours(x), theirs(x), 1e-6, "output")
    saved = ours.weights()
    trained = theirs.base_layer.weight + theirs.get_delta_weight("default")
    assert saved.rank == 8
    assert_agree(base.weight + saved.delta(), trained, 1e-6, "base plus saved adapter")
