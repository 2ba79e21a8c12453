"""The mathematics of one adapted layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_sd.adapter import delta_weight
from lora_sd.layers import ConvLoRA, LinearLoRA


def train_a_little(layer):
    """Give lora_up values, as training does."""
    nn.init.normal_(layer.lora_up.weight)
    return layer


convolutions = st.builds(
    dict,
    in_channels=st.integers(1, 6),
    out_channels=st.integers(1, 6),
    kernel_size=st.sampled_from([1, 3, (3, 1), 5]),
    stride=st.sampled_from([1, 2, (1, 2)]),
    padding=st.sampled_from([0, 1, (2, 1)]),
    dilation=st.sampled_from([1, 2]),
    bias=st.booleans(),
)


def test_a_fresh_linear_layer_is_the_base_to_the_last_bit():
    base, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    assert torch.equal(LinearLoRA(base, 4)(x), base(x))


@settings(deadline=None, max_examples=50)
@given(convolutions)
def test_a_fresh_convolution_is_the_base_to_the_last_bit(options):
    base, x = nn.Conv2d(**options), torch.randn(2, options["in_channels"], 12, 13)
    assert torch.equal(ConvLoRA(base, 1)(x), base(x))


@settings(deadline=None, max_examples=50)
@given(convolutions, st.floats(0.1, 8), st.floats(-2, 2))
def test_a_convolution_equals_its_merged_weight(options, alpha, scale):
    torch.manual_seed(0)
    base, x = nn.Conv2d(**options).double(), torch.randn(2, options["in_channels"], 12, 13).double()
    layer = train_a_little(ConvLoRA(base, 1, alpha).double())
    layer.scale = scale
    delta = delta_weight(layer.lora_down.weight, layer.lora_up.weight, alpha)
    merged = nn.functional.conv2d(
        x, base.weight + scale * delta, base.bias, base.stride, base.padding, base.dilation
    )
    torch.testing.assert_close(layer(x), merged, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.data(), st.floats(0.1, 8), st.floats(-2, 2))
def test_a_linear_layer_equals_its_merged_weight(inputs, outputs, data, alpha, scale):
    torch.manual_seed(0)
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    base, x = nn.Linear(inputs, outputs).double(), torch.randn(3, inputs).double()
    layer = train_a_little(LinearLoRA(base, rank, alpha).double())
    layer.scale = scale
    delta = delta_weight(layer.lora_down.weight, layer.lora_up.weight, alpha)
    merged = nn.functional.linear(x, base.weight + scale * delta, base.bias)
    torch.testing.assert_close(layer(x), merged, rtol=1e-5, atol=1e-5)


def test_scale_0_is_the_base_to_the_last_bit():
    base, x = nn.Linear(6, 5), torch.randn(2, 6)
    layer = train_a_little(LinearLoRA(base, 4))
    assert not torch.equal(layer(x), base(x))
    layer.scale = 0.0
    assert torch.equal(layer(x), base(x))


def test_only_the_factors_learn():
    layer = LinearLoRA(nn.Linear(6, 5), 2)
    learning = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert learning == ["lora_down.weight", "lora_up.weight"]


def test_alpha_is_the_rank_by_default_and_scaling_is_alpha_over_rank():
    assert LinearLoRA(nn.Linear(8, 8), 4).scaling == 1.0
    assert LinearLoRA(nn.Linear(8, 8), 4, alpha=1).scaling == 0.25


@pytest.mark.parametrize("rank", [-1, 6, 100])
def test_a_rank_outside_the_limit_is_an_error(rank):
    with pytest.raises(ValueError, match="outside 1..5"):
        LinearLoRA(nn.Linear(6, 5), rank)


def test_a_grouped_convolution_wants_a_rank_for_each_group():
    with pytest.raises(ValueError, match="no multiple of the convolution's 2 groups"):
        ConvLoRA(nn.Conv2d(4, 4, 3, groups=2), 3)


def test_half_precision_base_keeps_its_dtype():
    layer = train_a_little(LinearLoRA(nn.Linear(6, 5).bfloat16(), 2))
    assert layer(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
    assert layer.lora_down.weight.dtype == torch.float32


def test_gaussian_start_has_deviation_one_over_rank():
    weight = LinearLoRA(nn.Linear(400, 400), 50, init="gaussian").lora_down.weight
    assert weight.std().item() == pytest.approx(1 / 50, rel=0.05)


def test_weight_and_bias_are_the_base_s():
    base = nn.Conv2d(3, 4, 3)
    layer = ConvLoRA(base, 2)
    assert layer.weight is base.weight and layer.bias is base.bias
