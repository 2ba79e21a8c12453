"""Merged adapters equal live ones, and leave no trace."""

import pytest
import torch
from conftest import make_unet

from lora_sd import inject
from lora_sd.errors import AdapterError
from lora_sd.merge import MergedWeights


@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0, 2.0])
def test_merged_equals_live(unet, unet_inputs, adapter, scale):
    MergedWeights({"unet": unet}).set([(adapter, scale)])
    live = make_unet()
    inject.attach_adapter(live, adapter, scale)
    torch.testing.assert_close(
        unet(*unet_inputs).sample, live(*unet_inputs).sample, rtol=1e-4, atol=1e-4
    )


def test_two_adapters_add_up(unet, adapter):
    before = unet.conv_in.weight.clone()
    MergedWeights({"unet": unet}).set([(adapter, 0.25), (adapter, 0.5)])
    expected = before + 0.75 * adapter.layers["unet.conv_in"].delta()
    torch.testing.assert_close(unet.conv_in.weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_thousand_changes_leave_the_base_bit_for_bit(unet, adapter, dtype):
    unet.to(dtype)
    before = {name: p.clone() for name, p in unet.named_parameters()}
    merged = MergedWeights({"unet": unet})
    small = type(adapter)({n: adapter.layers[n] for n in ("unet.conv_in", "unet.conv_out")})
    for number in range(1000):
        merged.set([(small, (number % 37) / 9 - 2)])
    merged.set([(adapter, 1.0)])
    assert not torch.equal(unet.conv_in.weight, before["conv_in.weight"])
    fresh = make_unet().to(dtype)
    MergedWeights({"unet": fresh}).set([(adapter, 1.0)])
    assert torch.equal(unet.conv_in.weight, fresh.conv_in.weight)
    merged.set([])
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
    merged.set([(adapter, 1.0)])
    merged.set([(adapter, 0.0)])
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())


def test_an_adapter_for_another_model_changes_nothing(unet, adapter):
    before = unet.conv_in.weight.clone()
    adapter.layers["unet.nowhere"] = adapter.layers["unet.conv_in"]
    with pytest.raises(AdapterError, match=r"no layer 'unet.nowhere'"):
        MergedWeights({"unet": unet}).set([(adapter, 1.0)])
    assert torch.equal(unet.conv_in.weight, before)
