"""How alike two adapters are."""

from dataclasses import replace

import pytest
import torch
from make_adapters import random_adapter

from lora_sd.adapter import Adapter
from lora_sd.algebra.similarity import similarity
from lora_sd.errors import AdapterError
from lora_sd.formats.layer_tables import layer_shapes

SHAPES = {name: shape for name, shape in list(layer_shapes("tiny-sd").items())[:30]}


def test_the_cosine_is_that_of_the_updates() -> None:
    first, second = random_adapter(SHAPES), random_adapter(SHAPES, ranks=(3,), alphas=(2.0,))
    found = similarity(first, second).whole
    one, other = (
        torch.cat([layer.low_rank().flatten() for layer in adapter.layers.values()])
        for adapter in (first, second)
    )
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(one, other, 0)), abs=1e-5)
    assert found.norms == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-5)
    assert found.shared == len(first.layers)


def test_the_same_the_opposite_and_what_only_one_has() -> None:
    first = random_adapter(SHAPES)
    opposite = Adapter({n: replace(one, up=-2 * one.up) for n, one in first.layers.items()})
    assert similarity(first, first).whole.cosine == pytest.approx(1)
    assert all(pair.cosine == pytest.approx(-1) for pair in similarity(first, opposite).blocks)
    name, layer = next(iter(first.layers.items()))
    found = similarity(first, Adapter({name: layer}))
    assert name not in found.only[0] and len(found.only[0]) == len(first.layers) - 1
    assert found.only[1] == [] and found.whole.shared == 1
    assert sum(pair.cosine is None for pair in found.blocks) == len(found.blocks) - 1


def test_another_models_adapter_is_refused() -> None:
    first = random_adapter(SHAPES)
    wider = {n: torch.Size((2 * s[0], *s[1:])) for n, s in SHAPES.items()}
    with pytest.raises(AdapterError, match="different models"):
        similarity(first, random_adapter(wider))
