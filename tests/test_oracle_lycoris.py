"""Adapted layers compute what LyCORIS's LoCon does: outputs, gradients, weights after training.

Agreement is measured as in test_oracle_peft.py, a whole UNet's gradient within 3e-6, since LyCORIS
rounds an update by adding it to the base and subtracting that again.

Two things of DoRA differ on purpose. LyCORIS lets gradients pass through the norm; PEFT and we take
it for a constant (Liu et al. 2024, "DoRA", section 4.3), so gradients and training are compared
with that one path cut in LyCORIS. And at a scale of 0 LyCORIS leaves the low-rank update in the
weight; ours is the base then, so DoRA is compared at scale 1 only.
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
from lycoris.functional.general import weight_decompose
from lycoris.modules.locon import LoConModule
from torch import nn

from lora_sd import inject
from lora_sd.layers import KINDS, LayerOptions

LAYERS = {
    "linear": (nn.Linear(12, 10), (2, 5, 12)),
    "linear without bias": (nn.Linear(12, 10, bias=False), (3, 12)),
    "3x3": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 8)),
    "3x3 of stride 2": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "3x3 without bias": (nn.Conv2d(6, 8, 3, padding=1, bias=False), (2, 6, 7, 8)),
    "dilated 3x3": (nn.Conv2d(6, 8, 3, padding=2, dilation=2), (2, 6, 7, 8)),
    "1x1": (nn.Conv2d(6, 8, 1), (2, 6, 7, 8)),
}
DORA = ["out", "in"]
AXES = {"": "off", "out": "output", "in": "input"}


def locon(base: nn.Module, rank: int, alpha: float, rs: bool = False, dora: str = "", **options):
    """LyCORIS's layer; `dora`: '', or the axis whose norms are trained, 'out' or 'in'."""
    names = {"rs_lora": rs, "weight_decompose": bool(dora), "wd_on_out": dora == "out"}
    return LoConModule("", base, 1.0, rank, alpha, **names, **options)


def cut_the_norm_s_gradient(layer: LoConModule) -> None:
    """Make LyCORIS take DoRA's norm for a constant."""

    def decomposed(weight: torch.Tensor, multiplier: float = 1) -> torch.Tensor:
        constant = weight.detach()
        ratio = weight_decompose(constant, layer.dora_scale, multiplier, layer.wd_on_out) / constant
        return weight * ratio

    layer.apply_weight_decompose = decomposed


def locon_weights(layer: LoConModule) -> Weights:
    """What LyCORIS's layer trains, by the names of `LoRAWeights`."""
    found = {"down": layer.lora_down.weight, "up": layer.lora_up.weight}
    return found | ({"magnitude": layer.dora_scale} if layer.wd else {})


@torch.no_grad()
def take_over(ours: nn.Module, theirs: LoConModule) -> None:
    weights = locon_weights(theirs)
    if theirs.wd:
        ours.add_magnitude(weights["magnitude"].clone())
    for name, weight in our_weights(ours).items():
        weight.copy_(weights[name])


def pair_of(base: nn.Module, rs: bool = False, dora: str = "", **options: object):
    """(our layer, LyCORIS's) around copies of a base, with the same weights."""
    ours = KINDS[type(base)](deepcopy(base), 3, 2, rs=rs, dora=AXES[dora])
    theirs = locon(deepcopy(base), 3, 2, rs, dora, **options)
    if dora:
        assert_agree(ours.magnitude, theirs.dora_scale, 1e-6, "DoRA's start")
    randomise(locon_weights(theirs))
    take_over(ours, theirs)
    return ours, theirs


def compare(ours: nn.Module, theirs: LoConModule, shape: tuple[int, ...]) -> None:
    """Outputs and every gradient agree."""
    x = torch.randn(shape).requires_grad_()
    other_x = x.detach().clone().requires_grad_()
    outputs = ours(x), theirs(other_x)
    assert_agree(*outputs, 1e-6, "output")
    pull_both(outputs)
    assert_gradients_agree(our_weights(ours), locon_weights(theirs))
    assert_agree(x.grad, other_x.grad, 1e-6, "gradient of the input")


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_s_output_and_gradients_are_lycoris_s(kind, rs):
    torch.manual_seed(0)
    base, shape = LAYERS[kind]
    compare(*pair_of(base, rs=rs), shape)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "dilated 3x3"])
def test_lycoris_s_way_without_a_rebuilt_weight_agrees_too(kind):
    torch.manual_seed(0)
    base, shape = LAYERS[kind]
    compare(*pair_of(base, bypass_mode=True), shape)


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("axis", DORA)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_dora_layer_s_output_and_gradients_are_lycoris_s(kind, axis, rs):
    torch.manual_seed(0)
    base, shape = LAYERS[kind]
    ours, theirs = pair_of(base, rs, axis)
    x = torch.randn(shape)
    assert_agree(ours(x), theirs(x), 1e-6, "output of LyCORIS as it is")
    cut_the_norm_s_gradient(theirs)
    compare(ours, theirs, shape)


@pytest.mark.parametrize(
    ("dora", "scale"), [("", -1), ("", 0.5), ("", 2), *((axis, 1) for axis in DORA)]
)
@pytest.mark.parametrize("kind", ["linear", "3x3", "1x1"])
def test_merged_it_is_lycoris_s(kind, dora, scale):
    torch.manual_seed(0)
    ours, theirs = pair_of(LAYERS[kind][0], dora=dora)
    ours.set_scale(scale)
    ours.merge()
    assert_agree(ours.weight, theirs.get_merged_weight(scale)[0], 1e-6, "merged weight")


@pytest.mark.parametrize("dora", ["", *DORA])
def test_its_file_says_what_lycoris_s_says(dora):
    torch.manual_seed(0)
    ours, theirs = pair_of(LAYERS["3x3"][0], rs=True, dora=dora)
    weights, saved = ours.weights(), theirs.custom_state_dict()
    assert weights.alpha == pytest.approx(float(saved["alpha"]), rel=1e-6)
    assert weights.up.shape == saved["lora_up.weight"].shape
    assert weights.down.shape == saved["lora_down.weight"].shape
    assert not dora or weights.magnitude.shape == saved["dora_scale"].shape


def unet_pair(preset: str, rs: bool, dora: str, randomised: bool):
    """(our UNet, LyCORIS's, [(name, our layer, LyCORIS's)]), with the same weights."""
    ours, theirs = make_unet(), make_unet().requires_grad_(False)
    plans = choose(ours, preset)
    layers = inject.attach(ours, plans, LayerOptions(rs=rs, dora=AXES[dora]))
    torch.manual_seed(1)
    pairs = []
    for plan in plans:
        base = theirs.get_submodule(plan.name.removeprefix("unet."))
        other = locon(base, plan.rank, plan.alpha, rs, dora)
        other.apply_to()
        if dora:
            cut_the_norm_s_gradient(other)
        if randomised:
            randomise(locon_weights(other))
        take_over(layers[plan.name], other)
        pairs.append((plan.name, layers[plan.name], other))
    return ours, theirs, pairs


@pytest.mark.parametrize(("rs", "dora"), [(False, ""), (True, ""), (False, "out"), (False, "in")])
@pytest.mark.parametrize("preset", ["attention-conv", "full"])
def test_a_unet_s_output_and_gradients_are_lycoris_s(preset, rs, dora, unet_inputs):
    ours, theirs, pairs = unet_pair(preset, rs, dora, randomised=True)
    outputs = ours(*unet_inputs).sample, theirs(*unet_inputs).sample
    assert_agree(*outputs, 1e-6, "output")
    pull_both(outputs)
    whole = (
        whole_gradient([our_weights(mine) for _, mine, _ in pairs]),
        whole_gradient([locon_weights(other) for _, _, other in pairs]),
    )
    assert_agree(*whole, 3e-6, "whole gradient")


@pytest.mark.parametrize(("preset", "dora"), [("full", ""), ("attention-conv", "in")])
def test_fifty_steps_give_lycoris_s_weights(preset, dora):
    ours, theirs, pairs = unet_pair(preset, False, dora, randomised=False)
    train(ours, [w for _, mine, _ in pairs for w in our_weights(mine).values()])
    train(theirs, [w for _, _, other in pairs for w in locon_weights(other).values()])
    for name, mine, other in pairs:
        for what, weight in locon_weights(other).items():
            assert_agree(our_weights(mine)[what], weight, 1e-5, f"{name} {what}")
