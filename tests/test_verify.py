"""Files read back: faithful or not, and what the clients make of them."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_sd import inject, layer_choice, layer_names
from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.base_loading import load_base_model
from lora_sd.base_model import BaseModel
from lora_sd.errors import AdapterError
from lora_sd.formats import save_adapter
from lora_sd.formats.layer_tables import layer_shapes
from lora_sd.verify import Report, check_file

OUT = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
TO_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def adapter_of(family: str, rank: int = 1, preset: str = "attention-conv") -> Adapter:
    """An adapter with random factors."""
    torch.manual_seed(0)
    shapes = layer_shapes(family)
    layers = {
        plan.name: LoRAWeights(
            torch.randn(rank, *plan.weight_shape[1:]),
            torch.randn(plan.weight_shape[0], rank, *(1 for _ in plan.weight_shape[2:])),
            rank / 2,
        )
        for plan in layer_choice.choose_layers(shapes, preset, rank, None, rank, None)
    }
    return Adapter(layers)


@pytest.fixture(scope="module")
def sd15() -> Adapter:
    return adapter_of("sd15")


@pytest.fixture
def file(sd15: Adapter, tmp_path: Path) -> Path:
    """`sd15`, saved."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(sd15, path)
    return path


def spoil(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_saved_file_is_what_was_meant(family: str, tmp_path: Path) -> None:
    adapter, path = adapter_of(family), tmp_path / "adapter.safetensors"
    save_adapter(adapter, path)
    report = check_file(path, family, adapter)
    count = len(adapter.layers)
    assert report.ok and report.everywhere
    summary = rf"{count} of {count} modules match in 7 clients, largest error [345]e-4"
    assert re.fullmatch(summary, report.summary())
    save_adapter(adapter, path, torch.float32)
    assert check_file(path, family, adapter).summary().endswith("largest error 0")


def test_a_file_alone(file: Path, sd15: Adapter) -> None:
    report = check_file(file, "sd15")
    assert report.ok
    assert report.summary() == f"{len(sd15.layers)} modules are whole in 7 clients"


def test_a_faithful_file_that_a_client_ignores_parts_of(tmp_path: Path) -> None:
    adapter, path = adapter_of("sd15", preset="full"), tmp_path / "adapter.safetensors"
    save_adapter(adapter, path)
    report = check_file(path, "sd15", adapter)
    assert report.ok and not report.everywhere
    assert "in 6 of 7 clients" in report.summary()
    assert report.summary().endswith("; not whole in kohya's tools")
    assert "In kohya's tools 4 of 354 layers are ignored: 'unet.conv_in'" in " ".join(
        report.lines()
    )


def test_rounding_that_costs_much_of_an_update_is_told(file: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    large, small, down = torch.full((1280, 1), 100.0), torch.randn(1280, 1), torch.randn(1, 1280)
    up = torch.cat([large + small / 1000, -large], 1)  # the update drowns in the rounding
    adapter = Adapter({name: LoRAWeights(torch.cat([down, down]), up, 2.0)})
    save_adapter(adapter, file, torch.bfloat16)
    lines = " ".join(check_file(file, "sd15", adapter).lines())
    assert "changes the update of 1 layers by more than 5%: save it in float32" in lines


def flip(tensors: dict[str, Tensor]) -> None:
    tensors[f"{TO_Q}.lora_up.weight"][3] *= -1


def drop_layer(tensors: dict[str, Tensor]) -> None:
    for part in ("lora_down.weight", "lora_up.weight", "alpha"):
        del tensors[f"lora_{OUT.replace('text_encoder', 'te').replace('.', '_')}.{part}"]


FAULTS = {
    "a flipped value": (flip, "attn1.to_q': its update differs by"),
    "a dropped alpha": (lambda t: t.pop(f"{TO_Q}.alpha"), "attn1.to_q': its update differs by 1.0"),
    "a dropped layer": (drop_layer, f"missing from the file: '{OUT}'"),
    "half a layer": (lambda t: t.pop(f"{TO_Q}.lora_up.weight"), "lack lora_down or lora_up"),
    "a foreign key": (lambda t: t.update({"lora_te9_x.alpha": torch.ones(1)}), "no layer of this"),
}


def report_after(fault: str, file: Path, live: Adapter) -> Report:
    spoil(file, FAULTS[fault][0])
    return check_file(file, "sd15", live)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, file: Path, sd15: Adapter) -> None:
    report = report_after(fault, file, sd15)
    assert not report.ok
    assert report.summary().startswith("THE FILE IS NOT RIGHT")
    assert any(FAULTS[fault][1] in line for line in report.lines()), report.lines()


def test_clients_are_named_with_the_first_layer(file: Path, sd15: Adapter) -> None:
    lines = report_after("a dropped alpha", file, sd15).client_notes()
    assert f"In LyCORIS the whole file is refused: {TO_Q}: no alpha" in lines[-1]


def test_an_added_layer_that_acts_is_a_fault(file: Path, sd15: Adapter) -> None:
    layers = dict(sd15.layers)
    layers.pop(OUT)
    assert "should not be there" in " ".join(check_file(file, "sd15", Adapter(layers)).lines())


def test_layers_added_to_make_attention_whole_are_no_fault(tmp_path: Path) -> None:
    layers = adapter_of("sd15").layers
    layers = {name: layer for name, layer in layers.items() if not name.endswith("out_proj")}
    adapter, path = Adapter(layers), tmp_path / "adapter.safetensors"
    assert save_adapter(adapter, path)
    report = check_file(path, "sd15", adapter)
    assert report.ok and report.everywhere


def test_a_damaged_file_is_an_error(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterError):
        check_file(file, "sd15")
    with pytest.raises(AdapterError, match="cannot be checked without its base"):
        check_file(file, "my-model")


@pytest.fixture(scope="module")
def tiny() -> BaseModel:
    return load_base_model("tiny-sd", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_itself_loads_what_no_client_knows(
    format: str, tiny: BaseModel, tmp_path: Path
) -> None:
    adapter, path = adapter_of("tiny-sd", preset="full"), tmp_path / "adapter.safetensors"
    save_adapter(adapter, path, format=format)
    before = {name: one.clone() for name, one in tiny.unet.state_dict().items()}
    report = check_file(path, "tiny-sd", adapter, tiny)
    assert report.ok and report.in_diffusers == []
    assert "in diffusers itself" in report.summary()
    assert not inject.lora_layers(tiny.components)
    after = tiny.unet.state_dict()
    assert after.keys() == before.keys() and all(after[n].equal(one) for n, one in before.items())


def test_what_diffusers_itself_refuses_or_reads_otherwise(tiny: BaseModel, tmp_path: Path) -> None:
    adapter, path = adapter_of("tiny-sd"), tmp_path / "adapter.safetensors"
    save_adapter(adapter, path)
    key = next(key for key in load_file(path) if key.endswith("attn1_to_q.alpha"))
    spoil(path, lambda tensors: tensors.update({key: torch.tensor(0.25)}))
    (said,) = check_file(path, "tiny-sd", base=tiny).in_diffusers or []
    assert "applies otherwise than meant 1 of" in said and "attn1.to_q" in said
    spoil(path, lambda tensors: tensors.update({"lora_unet_conv_in.diff_b": torch.ones(4)}))
    (said,) = check_file(path, "tiny-sd", base=tiny).in_diffusers or []
    assert said.startswith("diffusers refuses the file")


def test_a_model_that_is_known_by_its_base_alone(base: BaseModel, tmp_path: Path) -> None:
    shapes = layer_names.layer_shapes(base.components)
    layers = {
        name: LoRAWeights(torch.randn(1, *s[1:]), torch.randn(s[0], 1, *(1 for _ in s[2:])), 1.0)
        for name, s in shapes.items()
        if name.endswith(("to_q", "conv1", "fc1"))
    }
    path = tmp_path / "adapter.safetensors"
    save_adapter(Adapter(layers), path)
    report = check_file(path, "", Adapter(layers), base)
    assert report.ok and report.everywhere and report.in_diffusers == []


@pytest.mark.slow
def test_a_rank_16_adapter_is_checked_in_three_seconds(tmp_path: Path) -> None:
    adapter, path = adapter_of("sd15", rank=16), tmp_path / "adapter.safetensors"
    save_adapter(adapter, path)
    start = time.perf_counter()
    assert check_file(path, "sd15", adapter).ok
    assert time.perf_counter() - start < 3
