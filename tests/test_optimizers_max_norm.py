"""Updates that are kept below a norm."""

import pytest
import torch
from conftest import choose, make_parts, randomise
from torch import nn

from lora_sd import inject
from lora_sd.layers import ConvLoRA, LayerOptions
from lora_sd.optimizers import scale_weight_norms
from lora_sd.optimizers.max_norm import update_norm


def full_update(layer) -> torch.Tensor:
    """scaling * up @ down, the whole of it."""
    return layer.weights().delta(layer.weight)


def layers_of_every_kind(**options):
    parts = make_parts()
    layers = inject.attach(
        parts, choose(parts, "full", include=["token_embedding"]), LayerOptions(**options)
    )
    for part in parts.values():
        randomise(part)
    grouped = ConvLoRA(nn.Conv2d(8, 12, 3, groups=2), 4, 3.0)
    nn.init.normal_(grouped.lora_up.weight)
    return [*layers.values(), grouped]


@pytest.mark.parametrize("rs", [False, True])
def test_the_norm_is_that_of_the_full_product(rs):
    for layer in layers_of_every_kind(rs=rs):
        torch.testing.assert_close(update_norm(layer), full_update(layer).norm())


def test_what_is_above_the_norm_is_scaled_down_to_it_and_nothing_else_is_touched():
    layers = layers_of_every_kind()
    before = [full_update(layer) for layer in layers]
    factors = [layer.lora_down.weight.detach().clone() for layer in layers]
    limit = float(torch.stack([update.norm() for update in before]).median())
    count = scale_weight_norms(layers, limit)
    assert count == sum(update.norm() > limit for update in before)
    assert 0 < count < len(layers)
    for layer, update, down in zip(layers, before, factors, strict=True):
        now = full_update(layer)
        if update.norm() > limit:
            torch.testing.assert_close(now, update * limit / update.norm())
            torch.testing.assert_close(now.norm().item(), limit)
        else:
            assert torch.equal(now, update) and torch.equal(layer.lora_down.weight, down)


def test_both_factors_are_scaled_alike():
    (layer,) = layers_of_every_kind()[:1]
    down, up = layer.lora_down.weight.norm().item(), layer.lora_up.weight.norm().item()
    scale_weight_norms([layer], 0.01)
    now = layer.lora_down.weight.norm().item(), layer.lora_up.weight.norm().item()
    assert now[0] / down == pytest.approx(now[1] / up) and now[0] < down


def test_a_fresh_adapter_is_left_alone(unet):
    layers = inject.attach(unet, choose(unet, "full"))
    assert scale_weight_norms(layers.values(), 1e-3) == 0
    assert all(torch.isfinite(layer.lora_down.weight).all() for layer in layers.values())


def test_dora_s_magnitude_is_left_as_it_is():
    layers = [layer for layer in layers_of_every_kind(dora="input") if layer.magnitude is not None]
    magnitudes = [layer.magnitude.detach().clone() for layer in layers]
    assert scale_weight_norms(layers, 0.01) == len(layers)
    assert all(torch.equal(la.magnitude, m) for la, m in zip(layers, magnitudes, strict=True))


def test_a_step_of_training_can_go_on_after_it(unet, unet_inputs):
    layers = inject.attach(unet, choose(unet, "full"))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        unet(*unet_inputs).sample.square().mean().backward()
        optimizer.step()
        scale_weight_norms(layers.values(), 0.05)
        optimizer.zero_grad()
        assert all(update_norm(layer) < 0.05001 for layer in layers.values())


def test_pissa_is_refused(unet):
    layers = inject.attach(unet, choose(unet, "attention"), LayerOptions(init="pissa"))
    with pytest.raises(ValueError, match="PiSSA"):
        scale_weight_norms(layers.values(), 1.0)
