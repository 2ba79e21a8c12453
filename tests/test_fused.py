"""The fast path of an adapted layer computes what the plain path does."""

from copy import deepcopy

import pytest
import torch
from agreement import assert_agree, train
from conftest import choose, make_unet, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_sd import inject
from lora_sd.layers import KINDS, LinearLoRA, LoRALayer, fused
from lora_sd.plan.live_memory import LiveMemory

WAYS = ["by rank", "by weight"]
LAYERS = {
    "rows": (nn.Linear(12, 10), (3, 12)),
    "sequences": (nn.Linear(12, 10), (2, 5, 12)),
    "sequences, no bias": (nn.Linear(12, 10, bias=False), (2, 5, 12)),
    "four axes": (nn.Linear(12, 10), (2, 3, 5, 12)),
    "1x1": (nn.Conv2d(6, 8, 1), (2, 6, 7, 8)),
    "3x3": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 8)),
    "3x3, no bias": (nn.Conv2d(6, 8, 3, padding=1, bias=False), (2, 6, 7, 8)),
    "3x3 of stride 2": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "3x3, reflecting": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 7, 8)),
}
SLOW_ONLY = nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 8)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    """Each of both ways, whatever the shapes."""
    monkeypatch.setattr(fused, "pays_by_weight", lambda *_: request.param == "by weight")
    return request.param


def made(kind: str, dtype: torch.dtype = torch.float64, **options) -> tuple[LoRALayer, Tensor]:
    """(a layer in training, its factors far from their start; an input for it)."""
    torch.manual_seed(0)
    plain, shape = SLOW_ONLY if kind == "groups" else LAYERS[kind]
    base = deepcopy(plain)
    layer = KINDS[type(base)](base, 4, 3.0, **options).to(dtype).train()
    for factor in (layer.lora_down, layer.lora_up):
        nn.init.normal_(factor.weight)
    return layer, torch.randn(shape, dtype=dtype)


def plain_path(model: nn.Module) -> nn.Module:
    """A model without fast paths."""
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            layer._fused = lambda _: None
    return model


def results(layer: LoRALayer, x: Tensor) -> dict[str, Tensor | None]:
    """The output and every gradient."""
    out = layer(x)
    if out.requires_grad:
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    down, up = layer.lora_down.weight, layer.lora_up.weight
    return {"out": out.detach(), "x": x.grad, "down": down.grad, "up": up.grad}


def both(layer: LoRALayer, x: Tensor) -> list[tuple[Tensor, Tensor, str]]:
    """(fast path's, plain path's, name) of output and gradients, where both have one."""
    assert layer._fused(x) is not None
    slow = plain_path(deepcopy(layer)), x.detach().clone().requires_grad_(x.requires_grad)
    fast, plain = results(layer, x), results(*slow)
    assert layer.base.weight.grad is None
    assert [key for key in fast if fast[key] is None] == [
        key for key in plain if plain[key] is None
    ]
    return [(fast[key], plain[key], key) for key in fast if fast[key] is not None]


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("scale", [1.0, 0.7, 4 / 3, -1.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_the_plain_path_s(way, kind, scale, dtype, within):
    layer, x = made(kind, dtype)
    layer.set_scale(scale)  # 4 / 3 at alpha / rank 3 / 4: a factor of 1
    for fast, plain, what in both(layer, x.requires_grad_()):
        assert fast.dtype == plain.dtype
        assert_agree(fast, plain, within, what)


@pytest.mark.parametrize("kind", ["sequences", "3x3"])
@pytest.mark.parametrize("frozen", ["x", "x down", "x up", "down", "up", "down up", "x down up"])
def test_only_what_learns_gets_a_gradient(way, kind, frozen):
    layer, x = made(kind)
    x.requires_grad_("x" not in frozen)
    layer.lora_down.requires_grad_("down" not in frozen)
    layer.lora_up.requires_grad_("up" not in frozen)
    found = both(layer, x)
    assert {what for *_, what in found} == {"out", "x", "down", "up"} - set(frozen.split())
    for fast, plain, what in found:
        assert_agree(fast, plain, 1e-14, what)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_fresh_layer_in_training_is_its_base_to_the_last_bit(way, kind):
    full = [torch.float32, torch.float64]
    for dtype in full if way == "by weight" else [*full, torch.float16, torch.bfloat16]:
        layer, x = made(kind, dtype)
        nn.init.zeros_(layer.lora_up.weight)
        assert layer._fused(x) is not None
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_mixed_precision_is_the_plain_path_s_within_its_rounding(kind, base_dtype):
    layer, x = made(kind, torch.float32)
    layer.base.to(base_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = both(layer, x.to(base_dtype).requires_grad_())
    for fast, plain, what in found:
        assert fast.dtype == plain.dtype
        assert_agree(fast.float(), plain.float(), 4 * torch.finfo(torch.bfloat16).eps, what)
    assert layer.lora_down.weight.grad.dtype == torch.float32


def test_several_precisions_take_the_plain_path():
    layer, x = made("sequences", torch.float32)
    layer.base.bfloat16()
    assert layer._fused(x.bfloat16()) is None
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.5}, {"rank_dropout": 0.5}, {"init": "pissa"}, {"up_bias": True}],
    ids=str,
)
def test_what_is_special_takes_the_plain_path(options):
    layer, x = made("sequences", **options)
    assert layer._fused(x) is None


def test_other_layers_than_plain_ones_take_the_plain_path():
    layer, x = made("groups")
    assert layer._fused(x) is None
    layer, x = made("sequences")
    layer.set_scale(torch.ones(2))
    assert layer._fused(x) is None
    assert LinearLoRA(made("sequences")[0], 2)._fused(x) is None


def test_a_base_with_a_hook_is_called():
    layer, x = made("sequences")
    layer.base.register_forward_hook(lambda *given: 2 * given[-1])
    without = layer._low_rank(x, layer.scaling)
    torch.testing.assert_close(layer(x) - without, 2 * nn.Linear.forward(layer.base, x))


def pays(
    weight: tuple[int, ...], rank: int, x: tuple[int, ...], learns: bool = True, **options
) -> bool:
    """The choice by shapes alone."""
    empty, x = torch.empty(weight, device="meta"), torch.empty(x, **options)
    down = torch.empty(rank, *weight[1:], device="meta", requires_grad=learns)
    up = torch.empty(weight[0], rank, device="meta", requires_grad=learns)
    return fused.pays_by_weight(x, empty, down, up, x.dtype)


@pytest.mark.parametrize("learns", [False, True])
def test_by_weight_is_for_few_channels_in_full_precision_on_the_cpu(learns):
    assert pays((48, 48), 8, (8, 256, 48), learns)
    assert pays((48, 48, 3, 3), 8, (8, 48, 16, 16), learns)
    assert not pays((48, 48), 8, (8, 256, 48), learns, dtype=torch.bfloat16)
    assert not pays((48, 48), 8, (8, 256, 48), learns, device="meta")
    assert not pays((48, 48), 8, (1, 2, 48), learns)  # few places
    assert not pays((1280, 1280), 16, (1, 64, 1280), learns)  # wide


def test_without_gradients_by_weight_is_for_all_with_many_places():
    assert not pays((320, 320), 16, (1, 1024, 320))
    assert not pays((144, 144, 3, 3), 8, (8, 144, 8, 8))
    assert pays((320, 320), 16, (1, 1024, 320), learns=False)
    assert pays((144, 144, 3, 3), 8, (8, 144, 8, 8), learns=False)
    with torch.no_grad():
        assert pays((320, 320), 16, (1, 1024, 320))


def test_fifty_steps_of_a_unet_and_a_scale_of_0_midway():
    trained = {}
    for path in ("fast", "plain"):
        unet = make_unet()
        layers = inject.attach(unet, choose(unet))
        if path == "plain":
            plain_path(unet)
        learning = [one for one in unet.parameters() if one.requires_grad]
        train(unet, learning, 50)
        trained[path] = torch.cat([one.detach().flatten() for one in learning])
        inject.set_scale(unet, 0)
        x = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 8)
        off = unet(*x).sample
        inject.set_scale(unet, 1)
        assert not torch.equal(unet(*x).sample, off)
        inject.detach(unet)
        assert torch.equal(unet(*x).sample, off)
        assert layers
    assert_agree(trained["fast"], trained["plain"], 1e-5, "what was learnt")


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_nothing(way, reentrant):
    layer, x = made("3x3")
    expected = results(layer, x.requires_grad_())
    again, y = made("3x3")
    y.requires_grad_()
    out = checkpoint(again, y, use_reentrant=reentrant)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    assert torch.equal(y.grad, expected["x"])
    assert torch.equal(again.lora_down.weight.grad, expected["down"])


def test_it_keeps_less_in_memory_than_the_plain_path():
    peaks = []
    for path in (nn.Module.train, plain_path):
        unet = make_unet()
        inject.attach(unet, choose(unet))
        randomise(unet)
        path(unet)
        x = torch.randn(4, 4, 8, 8), torch.tensor([3, 700, 4, 5]), torch.randn(4, 5, 8)
        with LiveMemory(list(unet.parameters())) as live:
            unet(*x).sample.square().mean().backward()
        peaks.append(live.peak)
    assert peaks[0] < peaks[1]
