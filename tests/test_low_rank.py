"""The spectrum of a layer and its best approximation, against formed updates."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_adapters import SHAPES, random_layer, relative_error

from lora_sd.adapter import LoRAWeights
from lora_sd.algebra.low_rank import (
    RankLimit,
    TruncationError,
    from_delta,
    rank_for_energy,
    singular_values,
    truncated,
)

layers = st.builds(
    random_layer,
    st.sampled_from(SHAPES),
    st.integers(1, 9),
    st.floats(0.1, 50),
    st.integers(0, 100),
)


def dense(layer: LoRAWeights) -> torch.Tensor:
    return layer.delta().flatten(1)


@given(layers)
def test_singular_values_are_those_of_the_formed_update(layer: LoRAWeights) -> None:
    expected = torch.linalg.svdvals(dense(layer).double())
    found = singular_values(layer)[: len(expected)]
    assert torch.allclose(found, expected[: len(found)], atol=1e-6 * float(expected[0]))


def test_singular_values_of_a_grouped_convolution() -> None:
    layer = LoRAWeights(torch.randn(4, 3, 3, 3), torch.randn(6, 2, 1, 1), 1.0)
    assert torch.allclose(singular_values(layer), torch.linalg.svdvals(dense(layer).double())[:4])
    assert truncated(layer, 2) is layer


@given(layers, st.integers(1, 9))
def test_truncation_is_the_best_approximation(layer: LoRAWeights, rank: int) -> None:
    left, values, right = torch.linalg.svd(dense(layer).double(), full_matrices=False)
    best = (left * values)[:, :rank] @ right[:rank]
    cut = truncated(layer, rank)
    assert cut.rank <= rank or cut is layer
    assert cut.alpha == layer.alpha
    assert cut.weight_shape == layer.weight_shape
    assert relative_error(dense(cut), best) < 1e-5


def test_truncation_to_the_same_rank_keeps_every_bit() -> None:
    layer = random_layer((6, 5), 3)
    assert truncated(layer, 3) is layer and truncated(layer, 8) is layer


def test_truncation_keeps_what_the_bias_adds_and_the_magnitude() -> None:
    layer = replace(random_layer((6, 5), 4), up_bias=torch.randn(6), magnitude=torch.rand(6, 1))
    cut = truncated(layer, 2)
    assert cut.bias_delta().allclose(layer.bias_delta()) and cut.magnitude is layer.magnitude


def test_truncation_of_a_token_table() -> None:
    table = replace(random_layer((6, 30), 4), embedding=True)
    cut = truncated(table, 4 - 1)
    lost = singular_values(table)[3:].norm() / singular_values(table).norm()
    assert cut.delta().shape == (30, 6)
    assert relative_error(cut.delta(), table.delta()) == pytest.approx(float(lost), rel=1e-4)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 1))
def test_rank_for_energy_is_the_lowest_that_holds_the_share(
    numbers: list[float], share: float
) -> None:
    values = torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)
    rank, energy = rank_for_energy(values, share), values.square()
    assert energy[:rank].sum() >= share * energy.sum() * (1 - 1e-12)
    assert rank == 1 or energy[: rank - 1].sum() < share * energy.sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_of_a_dense_update(shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape)
    whole, values = from_delta(delta, 2.0, len)
    assert whole.alpha == 2 and relative_error(whole.delta(), delta) < 1e-5
    assert values.allclose(torch.linalg.svdvals(delta.double().flatten(1)), atol=1e-6)
    cut, _ = from_delta(delta, 2.0, lambda _: 2)
    expected = values[2:].norm() / values.norm()
    assert relative_error(cut.delta(), delta) == pytest.approx(float(expected), rel=1e-4)


def test_rank_limits_by_kind_and_energy() -> None:
    values = torch.tensor([3.0, 2, 1, 0.1])
    assert RankLimit().is_none and RankLimit().of("conv", values) == 4
    assert RankLimit(rank=2).of("conv", values) == 2
    assert RankLimit(rank=3, conv_rank=1).of("conv", values) == 1
    assert RankLimit(conv_rank=1).of("linear", values) == 4
    assert RankLimit(rank=3, energy=0.6).of("linear", values) == 1


def test_error_sums_energies_by_kind() -> None:
    error = TruncationError.none()
    error.add("linear", torch.tensor([2.0, 1.0]), 1)
    error.add("conv", torch.tensor([2.0]), 1)
    assert error.of(["linear"]) == pytest.approx((1 / 5) ** 0.5)
    assert error.of() == pytest.approx((1 / 9) ** 0.5)
    assert error.sentence() == "error 33 % (linear 45 %, conv 0 %)"
