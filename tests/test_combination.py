"""One adapter of several: what it adds is the sum of what they add."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_adapters import SHAPES, random_layer, relative_error

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.algebra.combination import Ingredient, combine
from lora_sd.algebra.low_rank import RankLimit
from lora_sd.errors import AdapterError
from lora_sd.merge import MergedWeights
from lora_sd.parts import Scales

LINEAR, CONV = "unet.mid_block.attentions.0.proj_in", "unet.down_blocks.0.resnets.0.conv1"
scales = st.floats(-3, 3).filter(lambda scale: abs(scale) > 1e-3)


def one_layer(layer: LoRAWeights, scale: float = 1.0, **metadata: str) -> Ingredient:
    return Ingredient(Adapter({LINEAR: layer}, dict(metadata)), Scales(scale), "one")


@given(
    st.sampled_from(SHAPES),
    st.lists(st.tuples(st.integers(1, 5), st.floats(0.1, 20), scales), min_size=1, max_size=3),
)
def test_exact_for_any_ranks_alphas_and_scales(
    shape: tuple[int, ...], parts: list[tuple[int, float, float]]
) -> None:
    layers = [(random_layer(shape, r, a, seed=n), s) for n, (r, a, s) in enumerate(parts)]
    adapter, error = combine([one_layer(layer, scale) for layer, scale in layers])
    size = sum(abs(scale) * float(layer.delta().norm()) for layer, scale in layers)
    difference = adapter.layers[LINEAR].delta() - sum(s * layer.delta() for layer, s in layers)
    assert difference.norm() < 1e-5 * size
    assert adapter.layers[LINEAR].rank <= min(shape[0], torch.Size(shape[1:]).numel())


def test_merged_result_equals_both_merged(unet, adapter) -> None:
    linear_only = {n: w for n, w in adapter.layers.items() if w.down.dim() == 2}
    other = Adapter({n: random_layer(w.weight_shape, 1, seed=7) for n, w in linear_only.items()})
    first = Scales(0.8, conv=-0.5, blocks={"mid": 0.0})
    both, _ = combine([Ingredient(adapter, first), Ingredient(other, Scales(-1.2))])
    merged = MergedWeights({"unet": unet})
    merged.set([(adapter, first), (other, -1.2)])
    expected = {name: weight.clone() for name, weight in unet.state_dict().items()}
    merged.set([(both, 1.0)])
    for name, weight in unet.state_dict().items():
        assert torch.allclose(weight, expected[name], atol=2e-6), name


def test_layers_of_only_some_adapters_and_one_alpha_for_all() -> None:
    first = Adapter({LINEAR: random_layer((6, 5), 2), CONV: random_layer((6, 4, 3, 3), 2)})
    second = Adapter({LINEAR: random_layer((6, 5), 3), LINEAR + "2": random_layer((5, 5), 1)})
    adapter, _ = combine([Ingredient(first), Ingredient(second)])
    assert list(adapter.layers) == [LINEAR, CONV, LINEAR + "2"]
    assert [adapter.layers[name].rank for name in adapter.layers] == [5, 2, 1]
    assert adapter.layers[LINEAR].alpha == adapter.layers[LINEAR + "2"].alpha


@given(st.integers(1, 4))
def test_error_stated_is_the_error_of_the_formed_sum(rank: int) -> None:
    parts = [one_layer(random_layer((9, 8), 3, seed=n), 0.5 + n) for n in range(2)]
    adapter, error = combine(parts, RankLimit(rank))
    whole = sum((0.5 + n) * random_layer((9, 8), 3, seed=n).delta() for n in range(2))
    assert adapter.layers[LINEAR].rank == rank
    assert relative_error(adapter.layers[LINEAR].delta(), whole) == pytest.approx(
        error.of(), rel=1e-4
    )


def test_biases_and_token_tables_are_summed() -> None:
    biased = replace(random_layer((6, 5), 2), up_bias=torch.randn(6))
    adapter, _ = combine([one_layer(biased, 2.0), one_layer(random_layer((6, 5), 1))])
    assert adapter.layers[LINEAR].bias_delta().allclose(2 * biased.bias_delta())
    table = replace(random_layer((4, 30), 2), embedding=True)
    adapter, _ = combine([one_layer(table, -0.5), one_layer(table, 2.0)])
    assert adapter.layers[LINEAR].delta().allclose(1.5 * table.delta(), atol=1e-6)


def dora() -> tuple[LoRAWeights, torch.Tensor]:
    torch.manual_seed(3)
    base = torch.randn(6, 5)
    return replace(random_layer((6, 5), 2), magnitude=base.norm(dim=1, keepdim=True) + 0.1), base


def test_dora_alone_at_scale_1_is_exact() -> None:
    layer, base = dora()
    adapter, _ = combine([one_layer(layer)])
    assert adapter.layers[LINEAR].delta(base).allclose(layer.delta(base), atol=1e-6)


def test_dora_otherwise_needs_its_base_and_a_limit() -> None:
    layer, base = dora()
    with pytest.raises(AdapterError, match="1 layers have a DoRA magnitude.*--base"):
        combine([one_layer(layer, 0.5)])
    plain = random_layer((6, 5), 2, seed=1)
    parts = [one_layer(layer, 0.5), one_layer(plain, 2.0)]
    adapter, error = combine(parts, RankLimit(5), read_base=lambda name: base)
    expected = 0.5 * layer.delta(base) + 2 * plain.delta()
    assert relative_error(adapter.layers[LINEAR].delta(), expected) < 1e-5 and error.of() < 1e-5


def test_refuses_other_shapes_and_nothing() -> None:
    with pytest.raises(AdapterError, match=r"\(6, 4\) and \(6, 5\)"):
        combine([one_layer(random_layer((6, 5), 2)), one_layer(random_layer((6, 4), 2))])
    with pytest.raises(AdapterError, match="Nothing is left"):
        combine([one_layer(random_layer((6, 5), 2), 0.0)])


def test_metadata_keeps_what_is_shared_and_tells_the_recipe() -> None:
    layer = random_layer((6, 5), 2)
    version = {"ss_base_model_version": "sd_v1", "ss_output_name": "x"}
    tags = [json.dumps({"f": {"cat": 2, "ink": n}}) for n in (1, 3)]
    first = {"ss_tag_frequency": tags[0], "modelspec.trigger_phrase": "a cat", "ss_v2": "False"}
    second = {"ss_tag_frequency": tags[1], "modelspec.trigger_phrase": "ink", "ss_v2": "True"}
    parts = [one_layer(layer, 0.5, **version, **first), one_layer(layer, -2, **version, **second)]
    metadata = combine(parts)[0].metadata
    assert metadata["ss_base_model_version"] == "sd_v1" and "ss_v2" not in metadata
    assert metadata["modelspec.trigger_phrase"] == "a cat, ink"
    assert json.loads(metadata["ss_tag_frequency"]) == {"f": {"cat": 4, "ink": 4}}
    assert [part["scale"] for part in json.loads(metadata["lora_sd.combined"])] == [0.5, -2]
