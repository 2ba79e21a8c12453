"""What `inspect` says, against the formed updates."""

import math

import pytest
import torch
from random_adapters import SHAPES, random_adapter, random_layer

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.algebra.spectrum import LayerFacts, by_block, by_kind, layer_facts, span
from lora_sd.algebra.spectrum_plot import draw_plot, log_ticks, round_ticks


def facts_of(*values: float) -> LayerFacts:
    return LayerFacts("unet.conv_in", (9, 9), "rest", "linear", 4, 4.0, 1.0, values)


def test_numbers_are_those_of_the_formed_update() -> None:
    shapes = [*SHAPES, (40, 30), (24, 16, 3, 3)]
    small = {f"unet.mid_block.{n}": random_layer(s, 4, seed=n) for n, s in enumerate(shapes)}
    for facts, layer in zip(layer_facts(Adapter(small)), small.values(), strict=True):
        delta = layer.delta()
        values = torch.linalg.svdvals(delta.flatten(1).double())[: layer.rank]
        assert torch.tensor(facts.values).allclose(values.float(), rtol=1e-4, atol=1e-7)
        assert facts.norm == pytest.approx(float(delta.double().norm()), rel=1e-5)
        assert facts.stable_rank == pytest.approx(float((values / values[0]).square().sum()))


def test_effective_rank_of_known_spectra() -> None:
    assert facts_of(2.0, 2.0, 2.0, 2.0).effective_rank == pytest.approx(4)
    assert facts_of(2.0, 0.0).effective_rank == pytest.approx(1)
    third = math.exp(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    assert facts_of(3.0, 1.0).effective_rank == pytest.approx(third)
    assert facts_of(3.0, 1.0).rank_for_most == 2 and facts_of(5.0, 1.0).rank_for_most == 1


def test_an_update_of_zero() -> None:
    zero = LoRAWeights(torch.randn(2, 5), torch.zeros(6, 2), 1.0)
    facts = list(layer_facts(Adapter({"unet.mid_block.x": zero})))
    assert facts[0].norm == facts[0].effective_rank == facts[0].stable_rank == 0
    draw_plot(facts, "nothing")


def test_groups_sum_energies_and_know_the_base() -> None:
    shapes = {"unet.mid_block.a": (6, 5), "unet.mid_block.b": (6, 4, 3, 3), "unet.conv_in": (6, 5)}
    layers = {name: random_layer(shape, 2, seed=len(name)) for name, shape in shapes.items()}
    facts = list(layer_facts(Adapter(layers), lambda name: torch.ones(shapes[name])))
    assert [group.name for group in by_block(facts)] == ["mid linear", "mid conv", "rest linear"]
    linear, conv = by_kind(facts)
    deltas = [layers[name].delta().norm() for name in ("unet.mid_block.a", "unet.conv_in")]
    assert linear.norm == pytest.approx(float(torch.stack(deltas).norm()), rel=1e-5)
    assert linear.relative_norm == pytest.approx(linear.norm / math.sqrt(60), rel=1e-5)
    assert sum(value**2 for value in conv.spectrum()) == pytest.approx(conv.energy)


def test_plot_has_a_column_for_each_kind() -> None:
    wide = draw_plot(list(layer_facts(random_adapter(every=30))), "a title " * 40)
    assert wide.size == (3 * 520, 1000) and len(wide.getcolors(2**24) or []) > 20


def test_ticks_and_spans() -> None:
    assert round_ticks(0.9) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and round_ticks(0) == [0, 1]
    assert log_ticks(-1, 1) == pytest.approx([0.1, 0.2, 0.5, 1]) and len(log_ticks(-3, 3)) == 4
    assert span([4, 16, 8]) == "4-16" and span([0.5]) == "0.5"
