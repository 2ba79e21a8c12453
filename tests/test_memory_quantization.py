"""Weights in few bits: what they compute, what gradients pass, what they take, what stays."""

import pytest
import torch
from conftest import choose, make_unet, randomise
from torch import nn
from torch.nn import functional as F

from lora_sd import inject, layer_names, memory
from lora_sd.layers import LayerOptions, LinearLoRA, LoRALayer, innermost
from lora_sd.memory.quantization import (
    BITS,
    QuantizedLinear,
    is_quantized,
    quantize,
    torchao_quantization,
    weight_bytes,
)
from lora_sd.merge import LiveWeights, MergedWeights, weights_with_adapters
from lora_sd.parts import Scales

WEIGHT_ERROR = {"int8": 0.01, "fp8": 0.05, "nf4": 0.15}  # of the norm, of normal numbers


def make_linear(inputs=64, outputs=96, **options):
    torch.manual_seed(4)
    return nn.Linear(inputs, outputs, **options).requires_grad_(False)


def wide_unet():
    """Linear layers that nf4 has a form for."""
    return make_unet(block_out_channels=(16, 32), cross_attention_dim=16)


def inputs():
    torch.manual_seed(2)
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 16)


def adapted(kind, options=None, **changes):
    unet = wide_unet()
    layers = inject.attach(unet, choose(unet, **changes), options)
    randomise(unet)
    if kind != "full":
        quantize(unet, kind)
    return unet, layers


# --- one layer ---


@pytest.mark.parametrize("kind", BITS)
def test_the_numbers_are_torchao_s(kind):
    linear = make_linear(256, 128)
    ao = torchao_quantization()
    theirs = {
        "int8": lambda w: ao.Int8Tensor.from_hp(w, ao.PerRow()).dequantize(),
        "fp8": lambda w: ao.Float8Tensor.from_hp(w).dequantize(),
        "nf4": lambda w: ao.to_nf4(w).get_original_weight(),
    }[kind](linear.weight)
    weight = QuantizedLinear(linear, kind).weight
    assert torch.equal(weight, theirs) and weight.dtype == linear.weight.dtype
    assert (weight - linear.weight).norm() < WEIGHT_ERROR[kind] * linear.weight.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BITS)
def test_outputs_and_gradients_are_those_of_the_weight_unpacked(kind, dtype, bias):
    layer = QuantizedLinear(make_linear(bias=bias).to(dtype), kind)
    assert layer.weight.dtype == dtype
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    out, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    assert torch.equal(out, expected) and out.dtype == dtype
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize("kind", BITS)
def test_autocast_computes_as_with_any_linear_layer(kind):
    layer = QuantizedLinear(make_linear(), kind)
    plain = make_linear()
    plain.weight = nn.Parameter(layer.weight, requires_grad=False)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x)) and layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", BITS)
def test_only_what_is_packed_waits_for_the_backward_pass(kind):
    """torchao's own layer keeps its weight unpacked."""
    layer = QuantizedLinear(make_linear(), kind)
    own = {weight.data_ptr() for weight in layer.parameters()}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 64, requires_grad=True))
    assert kept and all(tensor.data_ptr() in own for tensor in kept)


@pytest.mark.parametrize("kind", BITS)
def test_the_same_weight_is_packed_the_same_way_each_time(kind):
    one, other = (QuantizedLinear(make_linear(), kind) for _ in range(2))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert not list(one.buffers())  # which DDP would send around at each step


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4)])
def test_a_weight_takes_as_many_bits_as_it_says(kind, bits):
    linear = make_linear(1280, 1280, bias=False)
    layer = QuantizedLinear(linear, kind)
    assert bits <= 8 * weight_bytes(layer) / linear.weight.numel() < 1.05 * bits


@pytest.mark.parametrize("kind", BITS)
def test_an_adapter_before_it_learns_what_it_would_before_the_weight_unpacked(kind):
    """Gradients pass through to earlier adapters, and are those of the unpacked weights."""

    def gradients(second):
        torch.manual_seed(0)
        net = nn.Sequential(LinearLoRA(make_linear(64, 64), 4), nn.SiLU(), second)
        nn.init.normal_(net[0].lora_up.weight)
        net(torch.ones(2, 64)).square().sum().backward()
        return [net[0].lora_down.weight.grad, net[0].lora_up.weight.grad]

    layer = QuantizedLinear(make_linear(), kind)
    plain = make_linear()
    plain.weight = nn.Parameter(layer.weight, requires_grad=False)
    found, wanted = gradients(layer), gradients(plain)
    assert all(map(torch.equal, found, wanted)) and all(grad.norm() > 0 for grad in found)


# --- a UNet ---


@pytest.mark.parametrize("kind", BITS)
def test_linear_layers_are_quantized_and_nothing_else(kind):
    unet, layers = adapted(kind)
    assert is_quantized(unet)
    for name, module in unet.named_modules():
        in_wrapper = ".lora_" in name
        if isinstance(module, nn.Linear) and not in_wrapper:
            assert isinstance(module, QuantizedLinear), name
        elif in_wrapper:
            assert type(module) in (nn.Linear, nn.Conv2d) and module.weight.requires_grad
    convs = [one for one in unet.modules() if isinstance(one, nn.Conv2d)]
    assert convs and all(conv.weight.dtype == torch.float32 for conv in convs)
    learning = [name for name, weight in unet.named_parameters() if weight.requires_grad]
    assert learning and all(".lora_" in name for name in learning)


def test_what_nf4_has_no_form_for_stays_and_is_counted():
    net = nn.Sequential(nn.Linear(9, 7), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(8, 8))
    net[2].weight.data[3] = 0
    assert quantize(net.requires_grad_(False), "nf4") == (1, 3)
    assert [type(one) for one in net] == [nn.Linear, QuantizedLinear, nn.Linear, nn.Linear]
    assert torch.isfinite(net[1].weight).all()


@pytest.mark.parametrize("kind", BITS)
def test_names_shapes_and_dtypes_are_as_before(kind):
    unet, layers = adapted(kind)
    assert layer_names.layer_shapes(unet) == layer_names.layer_shapes(wide_unet())
    assert unet.dtype == torch.float32
    plain, _ = adapted("full")
    for name, layer in inject.lora_layers(unet).items():
        before = inject.lora_layers(plain)[name]
        assert layer.weight.dtype == torch.float32 and layer.weight.shape == before.weight.shape
    for name, weights in inject.collect(unet).layers.items():
        assert torch.equal(weights.down, inject.collect(plain).layers[name].down)
    inject.detach(unet)
    assert not any(isinstance(module, LoRALayer) for module in unet.modules())
    assert is_quantized(unet)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("kind", BITS)
def test_a_fresh_adapter_over_few_bits_is_the_identity(kind, init):
    """PiSSA too: its start is read off the full weights, and subtracted again."""
    bare = wide_unet()
    quantize(bare, kind)
    unet = wide_unet()
    inject.attach(unet, choose(unet), LayerOptions(init=init))
    quantize(unet, kind)
    with torch.no_grad():
        found, wanted = unet(*inputs()).sample, bare(*inputs()).sample
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("fp8", 0.06), ("nf4", 0.3)])
def test_a_unet_predicts_nearly_the_same(kind, most):
    with torch.no_grad():
        full, few = (adapted(one)[0](*inputs()).sample for one in ("full", kind))
    assert 0 < (few - full).norm() < most * full.norm()


@pytest.mark.parametrize("kind", BITS)
def test_checkpointed_gradients_are_the_same(kind):
    def gradients(checkpointed):
        unet, _ = adapted(kind)
        unet.train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        unet(*inputs()).sample.square().sum().backward()
        return [weight.grad for weight in unet.parameters() if weight.requires_grad]

    assert all(map(torch.equal, gradients(False), gradients(True)))


# --- drawing from an adapter's file ---


def test_an_adapter_acts_live_on_weights_in_few_bits_and_leaves_no_trace():
    unet, _ = adapted("int8", preset="full")
    adapter = inject.collect(unet)
    with torch.no_grad():
        trained = unet(*inputs()).sample
        inject.detach(unet)
        bare = unet(*inputs()).sample
        with pytest.raises(ValueError, match="few bits"):
            MergedWeights({"unet": unet})
        weights = weights_with_adapters({"unet": unet})
        assert isinstance(weights, LiveWeights)
        for scale, expected in ((1.0, trained), (0.0, bare), (1.0, trained)):
            weights.set([(adapter, scale)])
            torch.testing.assert_close(unet(*inputs()).sample, expected)
        weights.set([(adapter, 0.5), (adapter, 0.5)])
        torch.testing.assert_close(unet(*inputs()).sample, trained, atol=1e-4, rtol=1e-4)
        weights.set([(adapter, Scales(linear=0.0))])
        half = unet(*inputs()).sample
        assert not torch.equal(half, bare) and not torch.equal(half, trained)
        weights.set([])
        assert torch.equal(unet(*inputs()).sample, bare)
    assert not inject.lora_layers(unet, "live 0")


def test_full_weights_are_merged():
    assert isinstance(weights_with_adapters({"unet": make_unet()}), MergedWeights)


def test_a_layer_does_not_merge_into_few_bits():
    layer = LinearLoRA(QuantizedLinear(make_linear(), "int8"), 2)
    with pytest.raises(ValueError, match="few bits"):
        layer.merge()
    assert not layer.is_merged and innermost(layer).kind == "int8"


def test_torchao_is_silent(caplog):
    torchao_quantization()
    assert not caplog.records
    assert memory.check(torch.device("cpu"), "no", base_weights="nf4") is None


@pytest.mark.parametrize("kind", BITS)
def test_processes_can_share_the_gradients(kind, tmp_path):
    """DDP sends all parameters around once, whatever they are made of."""
    from torch import distributed

    options = {"init_method": f"file://{tmp_path / 'meet'}", "rank": 0, "world_size": 1}
    distributed.init_process_group("gloo", **options)
    try:
        alone, _ = adapted(kind)
        unet, _ = adapted(kind)
        shared = nn.parallel.DistributedDataParallel(unet)
        alone(*inputs()).sample.square().sum().backward()
        shared(*inputs()).sample.square().sum().backward()
    finally:
        distributed.destroy_process_group()
    for mine, other in zip(unet.parameters(), alone.parameters(), strict=True):
        assert mine.requires_grad == other.requires_grad
        if mine.requires_grad:
            assert torch.equal(mine.grad, other.grad)
