"""The gauge: relative sizes of updates by block and kind, and sentences at both ends."""

import math

import pytest
import torch
from conftest import choose, make_parts
from heard import heard
from torch import nn

from lora_sd import gauge, inject
from lora_sd.gauge import Gauge, update_square
from lora_sd.layers import ConvLoRA, EmbeddingLoRA, LayerOptions, LinearLoRA
from lora_sd.parts import block_of


def layers_of(model, **options):
    layers = inject.attach(model, choose(model, "full"), LayerOptions(**options))
    for layer in layers.values():
        nn.init.normal_(layer.lora_up.weight, std=0.3)
    return layers


LAYERS = {
    "linear": lambda **o: LinearLoRA(nn.Linear(7, 5), 3, 2, **o),
    "conv": lambda **o: ConvLoRA(nn.Conv2d(6, 4, 3), 3, 2, **o),
    "grouped conv": lambda **o: ConvLoRA(nn.Conv2d(6, 4, 3, groups=2), 4, 2, **o),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options", [{}, {"rs": True}, {"dora": "input"}, {"dora": "output"}, {"init": "pissa"}]
)
def test_the_norm_is_that_of_the_whole_update(kind, options):
    if options.get("init") == "pissa" and kind == "grouped conv":
        pytest.skip("there is none")
    torch.manual_seed(1)
    layer = LAYERS[kind](**options)
    nn.init.normal_(layer.lora_up.weight)
    before = layer.weight.detach().clone()
    found = update_square(layer)
    layer.merge()
    expected = (layer.weight - before).square().sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_a_token_tables_update_counts_too():
    layer = EmbeddingLoRA(nn.Embedding(9, 4), 3, 2)
    nn.init.normal_(layer.lora_up.weight)
    assert float(update_square(layer)) == pytest.approx(
        float(layer.weights().low_rank().square().sum()), rel=1e-5
    )


@pytest.mark.parametrize("options", [{}, {"dora": "input"}, {"init": "pissa"}])
def test_a_fresh_adapter_has_changed_nothing(options):
    layer = LinearLoRA(nn.Linear(7, 5), 3, 2, **options)
    assert float(update_square(layer)) < 1e-10


def test_it_sums_up_by_kind_and_by_block():
    parts = make_parts()
    layers = layers_of(parts)
    found = Gauge(layers, 10, 0).measure(1)
    squares = {
        name: float(layer.weights().low_rank().square().sum()) for name, layer in layers.items()
    }
    of_base = {name: float(layer.weight.square().sum()) for name, layer in layers.items()}
    assert set(found) == {"update_linear", "update_conv", "update_text_encoder", "update_blocks"}
    assert set(found["update_blocks"]) == {block_of(name) for name in layers} >= {
        "down.0", "mid", "up.1", "text_encoder", "text_encoder_2",
    }  # fmt: skip
    mid = [name for name in layers if block_of(name) == "mid"]
    expected = math.sqrt(sum(squares[n] for n in mid) / sum(of_base[n] for n in mid))
    assert found["update_blocks"]["mid"] == pytest.approx(expected, rel=1e-4)
    convs = [n for n in layers if n.startswith("unet") and layers[n].weight.shape[2:] == (3, 3)]
    expected = math.sqrt(sum(squares[n] for n in convs) / sum(of_base[n] for n in convs))
    assert found["update_conv"] == pytest.approx(expected, rel=1e-4)


def test_only_kinds_that_are_there_are_named(unet):
    layers = inject.attach(unet, choose(unet, "attention"))
    found = Gauge(layers, 10, 0).measure(1)
    assert set(found) == {"update_linear", "update_blocks"} and found["update_linear"] == 0


def test_the_base_is_measured_once_and_follows_the_adapter(unet, monkeypatch):
    layers = layers_of(unet)
    one = Gauge(layers, 10, 0)
    before = one.measure(1)["update_linear"]
    monkeypatch.setattr(gauge, "_base_square", None)
    for layer in layers.values():
        layer.lora_up.weight.data *= 2
    assert one.measure(2)["update_linear"] == pytest.approx(2 * before, rel=1e-4)


def test_nothing_is_changed_by_measuring(unet):
    layers = layers_of(unet, dora="input")
    before = inject.collect(unet, exact=True)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    Gauge(layers, 10, 0).measure(1)
    after = inject.collect(unet, exact=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(after.layers[n].up, before.layers[n].up) for n in before.layers)


def scaled_to(layers, share):
    """Make the update that share of the weights, in the kind where it is largest."""
    with heard():
        found = Gauge(layers, 10, 0).measure(0)
    largest = max(found["update_linear"], found["update_conv"])
    for layer in layers.values():
        layer.lora_up.weight.data *= share / largest


def test_a_nil_effect_is_said_once_after_the_warmup(unet):
    layers = layers_of(unet)
    scaled_to(layers, 1e-5)
    one = Gauge(layers, 1000, 50)
    with heard() as lines:
        one.measure(40)
        one.measure(99)
        assert lines == []
        one.measure(100)
        one.measure(200)
    assert len(lines) == 1 and "hardly changed anything by step 100" in lines[0]
    assert "Raise optimizer.learning_rate" in lines[0]


def test_a_longer_warmup_is_waited_for(unet):
    layers = layers_of(unet)
    scaled_to(layers, 1e-5)
    with heard() as lines:
        Gauge(layers, 1000, 500).measure(499)
    assert lines == []


@pytest.mark.parametrize("share", [3.0, math.inf, math.nan])
def test_an_exploding_effect_is_said_once_with_its_block(unet, share):
    layers = layers_of(unet)
    if math.isfinite(share):
        scaled_to(layers, share)
    else:
        next(iter(layers.values())).lora_up.weight.data.fill_(share)
    one = Gauge(layers, 1000, 50)
    with heard() as lines:
        found = one.measure(3)
        one.measure(4)
    assert len(lines) == 1 and "overwhelms the base at step 3" in lines[0]
    assert "Lower optimizer.learning_rate" in lines[0]
    assert all(math.isfinite(v) for v in found["update_blocks"].values())


def test_growth_by_leaps_is_said_once(unet):
    layers = layers_of(unet)
    one = Gauge(layers, 1000, 0)
    with heard() as lines:
        for step, share in ((100, 0.002), (200, 0.04), (300, 0.25), (400, 0.95), (500, 0.96)):
            scaled_to(layers, share)
            one.measure(step)
    assert len(lines) == 1 and "was 0.25 of the weights it adapts at step 300" in lines[0]


def test_what_learns_well_is_not_commented_on(unet):
    layers = layers_of(unet)
    for share in (0.002, 0.05, 0.3):
        scaled_to(layers, share)
        with heard() as lines:
            Gauge(layers, 100, 0).measure(100)
        assert lines == []


def test_weights_in_few_bits_are_measured_as_what_they_stand_for(unet):
    quantization = pytest.importorskip("lora_sd.memory.quantization")
    pytest.importorskip("torchao")
    layers = layers_of(unet)
    plain = Gauge(layers, 10, 0).measure(1)
    quantization.quantize(unet, "int8")
    packed = Gauge(layers, 10, 0).measure(1)
    assert packed["update_linear"] == pytest.approx(plain["update_linear"], rel=0.02)
