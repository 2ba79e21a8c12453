"""A layer read from a file against the layer that it should be."""

from dataclasses import replace

import pytest
import torch

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.algebra.comparison import (
    compare,
    largest_absolute_error,
    layer_difference,
    relative_error,
)


def layer(rank: int = 4, alpha: float = 2.0) -> LoRAWeights:
    """A convolution's factors, as if trained."""
    torch.manual_seed(0)
    return LoRAWeights(torch.randn(rank, 6, 3, 3), torch.randn(8, rank, 1, 1), alpha)


def stored(weights: LoRAWeights, dtype: torch.dtype) -> LoRAWeights:
    return replace(weights, down=weights.down.to(dtype), up=weights.up.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_to_the_files_precision_is_right(dtype: torch.dtype) -> None:
    difference = layer_difference(stored(layer(), dtype), layer())
    assert not difference.why
    assert difference.error < torch.finfo(dtype).eps
    assert (difference.error == 0) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_alpha_folded_into_up_is_right(dtype: torch.dtype) -> None:
    folded = replace(layer(), up=layer().up * (2.0 / 3.0), alpha=3.0)
    assert not layer_difference(stored(folded, dtype), layer()).why


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_flipped_value_is_wrong(dtype: torch.dtype) -> None:
    found = stored(layer(), dtype)
    found.down[2, 3, 1, 1] *= -1
    assert "its update differs" in layer_difference(found, layer()).why


def test_values_too_small_for_the_precision_are_no_fault() -> None:
    tiny = replace(layer(), up=layer().up * 1e-8)
    difference = layer_difference(stored(tiny, torch.float16), tiny)
    assert not difference.why
    assert difference.error > 0.01


def test_another_alpha_is_wrong() -> None:
    assert layer_difference(replace(layer(), alpha=4.0), layer()).error == pytest.approx(1)
    assert layer_difference(replace(layer(), alpha=4.0), layer()).why


def test_other_factors_of_the_same_update_are_right() -> None:
    padded = replace(
        layer(),
        down=torch.cat([layer().down, torch.randn(4, 6, 3, 3)]),
        up=torch.cat([layer().up, torch.zeros(8, 4, 1, 1)], 1),
        alpha=4.0,
    )
    assert not layer_difference(padded, layer()).why


def test_the_errors_are_those_of_the_formed_updates() -> None:
    found, meant = stored(layer(), torch.bfloat16), layer()
    difference = found.delta() - meant.delta()
    expected = float(difference.norm() / meant.delta().norm())
    assert relative_error(found, meant) == pytest.approx(expected, rel=1e-3)
    assert largest_absolute_error(found, meant) == float(difference.abs().max())


def test_what_is_beside_the_factors_counts_too() -> None:
    whole = replace(layer(), up_bias=torch.ones(8), magnitude=torch.ones(8, 1, 1, 1))
    assert not layer_difference(whole, whole).why
    assert "up-bias is missing" in layer_difference(replace(whole, up_bias=None), whole).why
    other = replace(whole, magnitude=whole.magnitude * 1.01)
    assert layer_difference(other, whole).why == "its magnitude differs"
    assert "not meant to be there" in layer_difference(whole, replace(whole, magnitude=None)).why
    padded = replace(layer(), up_bias=torch.zeros(8))
    assert not layer_difference(padded, layer()).why  # PEFT has biases for all layers or none


def test_missing_and_extra_layers() -> None:
    nothing = replace(layer(), up=torch.zeros(8, 4, 1, 1))
    comparison = compare(
        Adapter({"a": layer(), "extra": layer(), "idle": nothing}),
        Adapter({"a": layer(), "missing": layer()}),
    )
    assert (comparison.missing, comparison.extra) == (["missing"], ["extra"])
    assert not comparison.ok
    assert compare(Adapter({"a": layer()}), Adapter({"a": layer()})).ok
