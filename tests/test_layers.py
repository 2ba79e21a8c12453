"""The mathematics of one adapted layer, as properties over kinds, shapes, options and dtypes."""

from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_sd.adapter import delta_weight, norms
from lora_sd.layers import (
    INITS,
    KINDS,
    PISSA,
    ConvLoRA,
    EmbeddingLoRA,
    LayerOptions,
    LinearLoRA,
    LoRALayer,
    rank_limit,
    wrapper_of,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
quick = settings(deadline=None, max_examples=60)


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = draw(st.sampled_from([(2, inputs), (2, 3, inputs), (4, 2, 3, inputs)]))
    return nn.Linear(inputs, outputs, bias=draw(st.booleans())), torch.randn(shape)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    groups, stride = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 2, (1, 2)]))
    paddings = [0, 1, (2, 1), *(["same"] if stride == 1 else [])]
    base = nn.Conv2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel_size=draw(st.sampled_from([1, 3, (3, 1), 5])),
        stride=stride,
        padding=draw(st.sampled_from(paddings)),
        dilation=draw(st.sampled_from([1, 2])),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    )
    return base, torch.randn(2, base.in_channels, 12, 13)


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    tokens = draw(st.integers(1, 9))
    padding = draw(st.sampled_from([None, 0]))
    base = nn.Embedding(tokens, draw(st.integers(1, 9)), padding_idx=padding)
    return base, torch.randint(tokens, draw(st.sampled_from([(4,), (2, 3)])))


@st.composite
def layer_options(draw: st.DrawFn, base: nn.Module) -> LayerOptions:
    """Any options that go together for a base."""
    is_table = isinstance(base, nn.Embedding)
    extra = (
        draw(st.sampled_from(["", "up_bias", "dora-input", "dora-output"])) if not is_table else ""
    )
    inits = [*INITS, *([PISSA] if getattr(base, "groups", 1) == 1 else [])]
    shares = st.sampled_from([0.0, 0.5])
    return LayerOptions(
        draw(st.sampled_from(inits)),
        draw(st.booleans()),
        draw(shares),
        draw(shares),
        draw(shares),
        extra == "up_bias",
        extra.removeprefix("dora-") if extra.startswith("dora") else "off",
    )


@st.composite
def adapted(
    draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES, options: LayerOptions | None = None
) -> tuple[LoRALayer, Tensor]:
    """(a fresh layer around any base, an input for it), both drawn anew."""
    torch.manual_seed(draw(st.integers(0, 3)))
    base, x = draw(st.one_of(linears(), convolutions(), embeddings()))
    base.to(dtype := draw(st.sampled_from(dtypes)))
    x = x if isinstance(base, nn.Embedding) else x.to(dtype)
    return wrapped(draw, base, options or draw(layer_options(base))), x


def wrapped(draw: st.DrawFn, base: nn.Module, options: LayerOptions) -> LoRALayer:
    """A fresh layer of any rank and alpha around a base."""
    groups = getattr(base, "groups", 1)
    assume(groups == 1 or options.init != PISSA)
    assume(not isinstance(base, nn.Embedding) or not (options.dora != "off" or options.up_bias))
    limit = rank_limit(base.weight.shape) // groups
    assume(limit)
    rank, alpha = draw(st.integers(1, limit)), draw(st.floats(0.1, 8))
    return KINDS[type(base)](base, groups * rank, alpha, **asdict(options)).eval()


@torch.no_grad()
def train_a_little(layer: LoRALayer, seed: int = 0) -> LoRALayer:
    """Move everything that learns from its start, as training does."""
    draw = torch.Generator().manual_seed(seed)
    for weight in layer.parameters():
        if weight.requires_grad:
            weight += 0.3 * torch.randn(weight.shape, generator=draw)
    return layer


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(torch.uint8)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def assert_within_rounding(found: Tensor, expected: Tensor, layer: LoRALayer, x: Tensor) -> None:
    """Two outputs differ by no more than roundings of all their summands in the base's dtype."""
    weights, base = layer.weights(), deepcopy(layer.base)
    with torch.no_grad():
        parts = replace(weights, down=weights.down.abs(), up=weights.up.abs(), magnitude=None)
        update, size = parts.low_rank(), base.weight.abs().float()
        if weights.magnitude is not None:  # may be large where base and update nearly cancel out
            adapted = base.weight.float() + weights.low_rank()
            ratio = weights.magnitude / norms(adapted, weights.magnitude.shape)
            update = ratio.abs() * (size + update)
        size += 3 * update
        base = base.float()
        base.weight.copy_(size)
        bound = base(x if isinstance(base, nn.Embedding) else x.abs().float()).abs()
        if weights.up_bias is not None:
            bound += layer._by_channel(weights.bias_delta().abs() + 1)
        error = (found.float() - expected.float()).norm()
        assert error <= 4 * torch.finfo(layer.weight.dtype).eps * bound.norm()


@pytest.mark.parametrize(
    "extra", [{}, {"rs": True}, {"up_bias": True}, {"dora": "output"}], ids=str
)
@pytest.mark.parametrize("init", [*INITS, PISSA])
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_a_fresh_layer_is_the_base_to_the_last_bit(init, extra, data):
    dropouts = dict.fromkeys(("dropout", "rank_dropout", "module_dropout"), 0.5)
    layer, x = data.draw(adapted(DTYPES, LayerOptions(init, **extra, **dropouts)))
    plain, before = layer.base(x), bits(layer.weight)
    assert torch.equal(layer(x), plain)
    layer.merge()
    assert init == PISSA or torch.equal(bits(layer.weight), before)


@quick
@given(st.data())
def test_scale_0_is_the_base_to_the_last_bit(data):
    layer, x = data.draw(adapted())
    train_a_little(layer).set_scale(0)
    assert torch.equal(layer(x), layer.base(x))


@quick
@given(st.data(), st.floats(-2, 2))
def test_merged_is_live_within_the_dtype_s_rounding_and_unmerged_is_the_base(data, scale):
    layer, x = data.draw(adapted())
    train_a_little(layer).set_scale(scale)
    weight, bias = bits(layer.weight), None if layer.bias is None else bits(layer.bias)
    live = layer(x)
    bounds = deepcopy(layer)
    layer.merge()
    assert_within_rounding(layer(x), live, bounds, x)
    layer.set_scale(1)
    layer.set_scale(scale)
    assert_within_rounding(layer(x), live, bounds, x)
    layer.unmerge()
    assert torch.equal(bits(layer.weight), weight)
    assert layer.bias is None if bias is None else torch.equal(bits(layer.bias), bias)
    assert torch.equal(layer(x), live)


@quick
@given(st.data(), st.floats(-2, 2))
def test_a_layer_is_its_formula(data, scale):
    layer, x = data.draw(adapted([torch.float32], LayerOptions()))
    train_a_little(layer).set_scale(scale)
    delta = delta_weight(layer.lora_down.weight, layer.lora_up.weight, layer.alpha)
    plain = deepcopy(layer.base)
    with torch.no_grad():
        plain.weight += scale * (delta.T if isinstance(plain, nn.Embedding) else delta)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)


@quick
@given(st.data())
def test_what_a_layer_returns_another_one_loads_to_the_bit(data):
    layer, x = data.draw(adapted())
    fresh = deepcopy(layer)
    weights = train_a_little(layer).weights(exact=True)
    fresh.load(weights)
    assert torch.equal(fresh(x), layer(x))
    again = fresh.weights(exact=True)
    for part in ("down", "up", "up_bias", "magnitude"):
        one, other = getattr(weights, part), getattr(again, part)
        assert one is other is None or same_bits(one, other)
    assert again.alpha == weights.alpha


@quick
@given(st.data())
def test_what_a_layer_returns_is_what_it_adds(data):
    layer, x = data.draw(adapted([torch.float32]))
    weights, plain = train_a_little(layer).weights(), deepcopy(layer.base)
    with torch.no_grad():
        plain.weight += weights.delta(plain.weight)
    out = plain(x)
    if weights.up_bias is not None:
        out = out + layer._by_channel(weights.bias_delta())
    assert_within_rounding(layer(x), out, layer, x)


@quick
@given(st.data(), st.floats(-2, 2), st.floats(-2, 2))
def test_nested_adapters_add_up_in_any_order(data, first, second):
    inner, x = data.draw(adapted([torch.float32]))
    base = inner.base
    other = wrapped(data.draw, base, data.draw(layer_options(base)))
    pair = [train_a_little(inner, 1), train_a_little(other, 2)]
    pair[0].set_scale(first)
    pair[1].set_scale(second)
    apart = sum(layer(x) - base(x) for layer in pair) + base(x)
    for outer, inner in (pair, pair[::-1]):
        outer.base, inner.base = inner, base
        torch.testing.assert_close(outer(x), apart, rtol=1e-4, atol=2e-4)
        outer.base = base


@quick
@given(st.data())
def test_a_scale_for_each_sample_is_a_pass_for_each_scale(data):
    layer, x = data.draw(adapted([torch.float32]))
    train_a_little(layer)
    scales = torch.linspace(0, 1.5, len(x) // 2)  # guidance's batch is twice the scales
    layer.set_scale(scales)
    together = layer(x)
    assert torch.equal(together[0], layer.base(x)[0])
    for place, scale in enumerate(scales.repeat(2).tolist()):
        layer.set_scale(scale)
        one = layer(x)[place]
        torch.testing.assert_close(together[place], one, rtol=1e-4, atol=1e-4)


def test_scales_that_do_not_fit_the_batch_are_an_error():
    layer = train_a_little(LinearLoRA(nn.Linear(6, 5), 2))
    layer.set_scale(torch.ones(3))
    with pytest.raises(ValueError, match="3 scales for a batch of 4"):
        layer(torch.randn(4, 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"rs": True}, {"dora": "output"}, {"init": PISSA}], ids=str
)
def test_rank_0_leaves_the_layer_alone(dtype, options):
    for base, x in (
        (nn.Linear(6, 5), torch.randn(2, 6).to(dtype)),
        (nn.Conv2d(4, 3, 3), torch.randn(2, 4, 5, 5).to(dtype)),
        (nn.Embedding(7, 3), torch.arange(4)),
    ):
        base.to(dtype)
        if isinstance(base, nn.Embedding) and "dora" in options:
            continue
        before, out = bits(base.weight), base(x)
        layer = KINDS[type(base)](base, 0, **options)
        assert torch.equal(layer(x), out)
        assert not any(weight.requires_grad for weight in layer.parameters())
        layer.merge()
        layer.set_scale(2)
        layer.unmerge()
        assert torch.equal(bits(base.weight), before) and layer.scaling == 0


@quick
@given(st.data())
def test_autocast_and_a_half_precision_base_train_float32_factors(data):
    layer, x = data.draw(adapted([torch.bfloat16]))
    train_a_little(layer).train()
    layer.module_dropout = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for weight in layer.parameters():
        assert not weight.requires_grad or (weight.dtype == weight.grad.dtype == torch.float32)


@quick
@given(st.data())
def test_the_same_seed_drops_the_same(data):
    layer, x = data.draw(adapted([torch.float32]))
    train_a_little(layer).train()
    torch.manual_seed(9)
    first = layer(x)
    torch.manual_seed(9)
    assert torch.equal(layer(x), first)


def transparent(**options: float) -> LinearLoRA:
    """A layer in training that adds its input to a base of zeros."""
    layer = LinearLoRA(nn.Linear(8, 8, bias=False), 8, **options).train()
    for weight, start in ((layer.base.weight, torch.zeros(8, 8)), (layer.lora_up.weight, None)):
        nn.init.zeros_(weight) if start is not None else nn.init.eye_(weight)
    nn.init.eye_(layer.lora_down.weight)
    return layer


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
def test_dropouts_keep_the_mean(kind):
    torch.manual_seed(0)
    out = transparent(**{kind: 0.25})(torch.ones(20000, 8))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.01)
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_rank_dropout_leaves_out_a_rank_for_a_whole_sample_and_others_for_the_next():
    torch.manual_seed(0)
    out = transparent(rank_dropout=0.5)(torch.ones(64, 5, 8))
    assert torch.equal(out, out[:, :1].expand(-1, 5, -1))
    assert len(out[:, 0].unique(dim=0)) > 30
    layer = train_a_little(ConvLoRA(nn.Conv2d(4, 4, 3), 4, rank_dropout=0.5)).train()
    mask = layer._rank_mask(torch.ones(64, 4, 5, 5))
    assert mask.shape == (64, 4, 1, 1) and len(mask.unique(dim=0)) > 8


def test_module_dropout_leaves_out_whole_passes():
    torch.manual_seed(0)
    layer, x = transparent(module_dropout=0.3), torch.ones(4, 8)
    means = [layer(x).mean().item() for _ in range(2000)]
    assert set(means) == {0.0, 1.0}
    assert sum(means) / 2000 == pytest.approx(0.7, abs=0.04)


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
def test_nothing_is_dropped_but_in_training(kind):
    layer = transparent(**{kind: 0.9}).eval()
    assert torch.equal(layer(torch.ones(50, 8)), torch.ones(50, 8))


def test_pissa_s_start_is_subtracted_without_dropout():
    layer, x = LinearLoRA(nn.Linear(8, 8), 8, init=PISSA, dropout=0.5).train(), torch.randn(4, 8)
    torch.manual_seed(0)
    out = layer(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5) - x
    start = delta_weight(layer.down_start, layer.up_start, layer.alpha)
    torch.testing.assert_close(out, layer.base(x) + dropped @ start.T, rtol=1e-4, atol=1e-5)


def test_only_the_factors_learn():
    layer = LinearLoRA(nn.Linear(6, 5), 2)
    learning = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert learning == ["lora_down.weight", "lora_up.weight"]
    layer = LinearLoRA(nn.Linear(6, 5), 2, dora="output", init=PISSA)
    learning = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert learning == {"magnitude", "lora_down.weight", "lora_up.weight"}


def test_alpha_is_the_rank_by_default_and_scaling_is_alpha_over_rank():
    assert LinearLoRA(nn.Linear(8, 8), 4).scaling == 1.0
    assert LinearLoRA(nn.Linear(8, 8), 4, alpha=1).scaling == 0.25
    assert LinearLoRA(nn.Linear(8, 8), 4, alpha=1, rs=True).scaling == 0.5


@pytest.mark.parametrize("rank", [-1, 6, 100])
def test_a_rank_outside_the_limit_is_an_error(rank):
    with pytest.raises(ValueError, match="outside 1..5"):
        LinearLoRA(nn.Linear(6, 5), rank)


def test_a_grouped_convolution_wants_a_rank_for_each_group():
    with pytest.raises(ValueError, match="no multiple of the convolution's 2 groups"):
        ConvLoRA(nn.Conv2d(4, 4, 3, groups=2), 3)


@pytest.mark.parametrize("options", [{"dora": "output"}, {"up_bias": True}], ids=str)
def test_a_token_table_has_no_dora_and_no_bias(options):
    table = nn.Embedding(6, 5)
    for base in (table, EmbeddingLoRA(table, 2)):
        with pytest.raises(ValueError, match="token table"):
            EmbeddingLoRA(base, 2, **options)


def test_options_that_do_not_go_together_are_an_error():
    with pytest.raises(ValueError, match="DoRA has no bias"):
        LinearLoRA(nn.Linear(6, 5), 2, dora="output", up_bias=True)
    with pytest.raises(ValueError, match="grouped"):
        ConvLoRA(nn.Conv2d(4, 4, 3, groups=2), 2, init=PISSA)
    with pytest.raises(ValueError, match="base"):
        LinearLoRA.alone(6, 5, 2, dora="output")


def test_half_precision_base_keeps_its_dtype():
    layer = train_a_little(LinearLoRA(nn.Linear(6, 5).bfloat16(), 2))
    assert layer(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
    assert layer.lora_down.weight.dtype == torch.float32


BASES = [nn.Linear(400, 90), nn.Conv2d(40, 90, 3), nn.Embedding(400, 90)]


@pytest.mark.parametrize("base", BASES, ids=str)
def test_gaussian_start_has_deviation_one_over_rank(base):
    weight = KINDS[type(base)](base, 50, init="gaussian").lora_down.weight
    assert weight.std().item() == pytest.approx(1 / 50, rel=0.05)


@pytest.mark.parametrize("base", BASES, ids=str)
def test_kaiming_start_is_uniform_within_one_over_the_root_of_the_fan_in(base):
    weight = KINDS[type(base)](base, 50).lora_down.weight
    fan_in = 50 if isinstance(base, nn.Embedding) else weight[0].numel()
    assert weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    assert weight.abs().max().item() <= fan_in**-0.5
    assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)


@pytest.mark.parametrize("base", BASES, ids=str)
def test_orthogonal_start_has_orthonormal_rows(base):
    rows = KINDS[type(base)](base, 50, init="orthogonal").lora_down.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(50))


@pytest.mark.parametrize("base", BASES, ids=str)
def test_pissa_s_start_is_the_base_s_best_approximation(base):
    layer = KINDS[type(base)](base, 50, alpha=7, init=PISSA)
    matrix = base.weight.flatten(1).T if isinstance(base, nn.Embedding) else base.weight.flatten(1)
    start = delta_weight(layer.down_start, layer.up_start, 7).flatten(1)
    values = torch.linalg.svdvals(matrix)
    lost = torch.linalg.svdvals(matrix - start)
    torch.testing.assert_close(lost[: len(values) - 50], values[50:], rtol=1e-4, atol=1e-4)
    norms = layer.down_start.flatten(1).norm(dim=1), layer.up_start.flatten(1).norm(dim=0)
    torch.testing.assert_close(*norms)


@pytest.mark.parametrize("init", [*INITS, PISSA])
def test_a_start_depends_on_its_generator_alone(init):
    starts = []
    for noise in range(2):
        torch.manual_seed(noise)
        base = nn.Conv2d(6, 8, 3)
        with torch.no_grad():
            base.weight.fill_(0.5)
        draw = torch.Generator().manual_seed(4)
        starts.append(ConvLoRA(base, 4, init=init, generator=draw).lora_down.weight)
    assert torch.equal(*starts)


def test_weight_and_bias_are_the_base_s():
    base = nn.Conv2d(3, 4, 3)
    layer = ConvLoRA(base, 2)
    assert layer.weight is base.weight and layer.bias is base.bias


@pytest.mark.parametrize("options", [{}, {"up_bias": True}, {"rs": True}], ids=str)
@pytest.mark.parametrize("scale", [1, 0.3, torch.tensor([0.2, 0.7])], ids=str)
def test_a_layer_alone_beside_a_base_s_output_is_the_wrapped_layer(options, scale):
    x, image = torch.randn(2, 6), torch.randn(2, 6, 9, 9)
    conv = nn.Conv2d(6, 5, 3, stride=2, padding=1)
    for base, alone, given_x in (
        (nn.Linear(6, 5), LinearLoRA.alone(6, 5, 3, 2, **options), x),
        (conv, ConvLoRA.alone(6, 5, 3, 2, 3, 2, 1, **options), image),
    ):
        layer = train_a_little(KINDS[type(base)](base, 3, 2, **options))
        alone.load(layer.weights())
        layer.set_scale(scale)
        alone.set_scale(scale)
        torch.testing.assert_close(base(given_x) + alone(given_x), layer(given_x))


def test_merged_at_construction_is_merged():
    base, x = nn.Linear(6, 5), torch.randn(2, 6)
    layer = LinearLoRA(base, 3, init=PISSA, merged=True)
    torch.testing.assert_close(layer(x), base(x))
    assert layer._kept is not None


@quick
@given(st.data())
def test_shapes_can_be_planned_without_weights(data):
    layer, _ = data.draw(adapted([torch.float32]))
    with torch.device("meta"):
        base = deepcopy(layer.base).to("meta")
    dora = "off" if layer.magnitude is None else "output"
    options = {"up_bias": layer.lora_up.bias is not None, "dora": dora}
    planned = type(layer)(base, layer.rank, layer.alpha, **options)
    assert all(weight.is_meta for weight in planned.parameters())
    assert planned.weights().weight_shape == layer.weights().weight_shape


def test_a_depthwise_convolution_may_have_a_rank_for_each_group():
    base, x = nn.Conv2d(32, 32, 3, groups=32), torch.randn(1, 32, 5, 5)
    assert torch.equal(ConvLoRA(base, 32)(x), base(x))


def test_loading_into_a_merged_layer_merges_anew():
    layer, other = (train_a_little(LinearLoRA(nn.Linear(6, 5), 2)) for _ in range(2))
    before = layer.weight.clone()
    layer.merge()
    layer.load(other.weights())
    expected = before + other.weights().delta()
    torch.testing.assert_close(layer.weight, expected)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_a_merged_layer_takes_no_scales_by_sample_and_stays_as_it_is():
    layer = train_a_little(LinearLoRA(nn.Linear(6, 5), 2, merged=True))
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="unmerge it first"):
        layer.set_scale(torch.tensor([0.0, 1.0]))
    assert layer.scale == 1 and torch.equal(layer.weight, before)


def test_making_a_layer_draws_nothing_from_the_global_generator():
    bases = nn.Linear(6, 5), nn.Conv2d(4, 4, 3), nn.Embedding(9, 4)
    before = torch.get_rng_state()
    for base in bases:
        wrapper_of(base)(base, 2, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_what_pissa_has_learnt_survives_half_precision(dtype, most):
    torch.manual_seed(0)
    layer = LinearLoRA(nn.Linear(64, 64), 8, init=PISSA)
    for factor in (layer.lora_down, layer.lora_up):  # a little learnt, beside large factors
        factor.weight.data += 1e-4 * torch.randn_like(factor.weight)
    weights, delta = layer.weights(), layer.weights(exact=True).delta()
    stored = replace(weights, down=weights.down.to(dtype), up=weights.up.to(dtype))
    assert (stored.delta() - delta).norm() < most * delta.norm()
