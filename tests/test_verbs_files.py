"""inspect, convert, resize, combine and verify on files of SD 1.5's and SDXL's shapes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make_bases import make_base
from random_adapters import random_adapter, random_layer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_sd import formats
from lora_sd.__main__ import main
from lora_sd.adapter import Adapter
from lora_sd.base_files import open_base
from lora_sd.errors import AdapterError, ConfigError, UserError
from lora_sd.formats import save_adapter
from lora_sd.formats.families import load_any
from lora_sd.parts import Scales
from lora_sd.verbs.bake import bake
from lora_sd.verbs.combine import combine, parsed_source
from lora_sd.verbs.convert import convert
from lora_sd.verbs.inspect import inspect, metadata_lines
from lora_sd.verbs.resize import resize
from lora_sd.verbs.verify import verify

EVERY = {"sd15": 19, "sdxl": 53}
FAMILIES = list(EVERY)


@pytest.fixture(params=FAMILIES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A float32 file of a part of a family's layers."""
    adapter = random_adapter(request.param, every=EVERY[request.param])
    adapter.metadata["ss_output_name"] = "cat"
    save_adapter(adapter, tmp_path / "cat.safetensors", torch.float32)
    return tmp_path / "cat.safetensors"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def measured_error(found: Path, expected: dict[str, torch.Tensor]) -> float:
    """Relative error of all formed updates together."""
    layers = load_any(found)[0].layers
    lost = sum(energy(layers[name].delta() - delta) for name, delta in expected.items())
    return (lost / sum(map(energy, expected.values()))) ** 0.5


def energy(delta: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {name: layer.delta() for name, layer in load_any(path)[0].layers.items()}


def test_convert_there_and_back_gives_the_same_bytes(file: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    done = convert(file, there, format="diffusers")
    assert done.dtype == "float32" and "A1111" in done.notices[-1]
    assert not any("lora_down" in name for name in load_file(there))
    convert(there, back, format="kohya")
    before, after = load_file(file), load_file(back)
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name
    assert metadata_of(back)["ss_output_name"] == "cat"


def test_convert_says_what_is_lost(tmp_path: Path) -> None:
    adapter = random_adapter(every=40)
    name, layer = next(iter(adapter.layers.items()))
    adapter.layers[name] = replace(layer, up_bias=torch.ones(layer.up.shape[0]))
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_adapter(adapter, source, torch.float32, "diffusers")
    with pytest.raises(AdapterError, match="no place for up-biases"):
        convert(source, output, format="kohya")
    assert not output.exists()
    done = convert(source, output, format="kohya", dtype="float16", allow_partial=True)
    assert any("up-biases" in notice for notice in done.notices)
    assert "numbers were rounded to float16" in done.notices
    with pytest.raises(ConfigError, match="--format, --dtype"):
        convert(source, tmp_path / "c.safetensors")


def test_a_family_can_be_named_where_the_layers_do_not_tell(tmp_path: Path) -> None:
    name = "unet.conv_in"  # the same in SD 1.5 and 2.1
    adapter = Adapter({name: random_layer((320, 4, 3, 3), 2)})
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_adapter(adapter, source, torch.float32)
    with pytest.raises(AdapterError, match="fits sd15 and sd21"):
        convert(source, output, dtype="float16")
    convert(source, output, dtype="float16", base="sd21")
    assert metadata_of(output)["ss_v2"] == "True"


def test_convert_says_for_which_family_the_file_is(file: Path, tmp_path: Path) -> None:
    convert(file, tmp_path / "b.safetensors", dtype="bfloat16")
    version = metadata_of(tmp_path / "b.safetensors")["ss_base_model_version"]
    assert version.startswith("sdxl") == load_any(file)[0].is_sdxl


def test_resize_to_the_full_rank_is_exact(file: Path, tmp_path: Path) -> None:
    done = resize(file, tmp_path / "b.safetensors", rank=99)
    assert done.error.of() == 0
    before, after = load_file(file), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_resize_states_the_error_that_is_measured(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"
    done = resize(file, output, rank=2, conv_rank=1)
    ranks = {layer.rank for layer in load_any(output)[0].layers.values()}
    assert ranks == {1, 2}
    assert measured_error(output, deltas(file)) == pytest.approx(done.error.of(), rel=1e-4)


def test_resize_to_a_share_of_energy_keeps_it_in_every_layer(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"
    resize(file, output, energy=0.8)
    expected = deltas(file)
    for name, layer in load_any(output)[0].layers.items():
        assert energy(layer.delta() - expected[name]) <= 0.2001 * energy(expected[name]), name


@pytest.mark.parametrize("share", [0.4, 0.75])
def test_resize_obeys_a_size_and_uses_it(file: Path, tmp_path: Path, share: float) -> None:
    output = tmp_path / "b.safetensors"
    size = int(share * file.stat().st_size)
    done = resize(file, output, size_bytes=size)
    assert 0.85 * size < output.stat().st_size <= size
    assert measured_error(output, deltas(file)) == pytest.approx(done.error.of(), rel=1e-4)
    assert metadata_of(output)["ss_output_name"] == "b"
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}  # nothing staged


def test_resize_to_an_impossible_size_leaves_nothing(file: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="at rank 1 in every layer"):
        resize(file, tmp_path / "b.safetensors", size_bytes=5000)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with pytest.raises(ConfigError, match="how far"):
        resize(file, tmp_path / "b.safetensors")


def test_combine_adds_what_each_adds(file: Path, tmp_path: Path) -> None:
    family = load_any(file)[1]
    other = random_adapter(family, 2, 1, seed=5, every=2 * EVERY[family])
    save_adapter(other, tmp_path / "ink.safetensors", torch.float32)
    output = tmp_path / "both.safetensors"
    scales = Scales(0.8, conv=0.5, text_encoder=0.25), Scales(-1.5)
    done = combine(
        [(file, scales[0]), (tmp_path / "ink.safetensors", scales[1])],
        output,
        dtype="float32",
    )
    expected = {
        name: scales[0].of(name, delta.shape) * delta for name, delta in deltas(file).items()
    }
    for name, layer in other.layers.items():
        expected[name] = expected[name] - 1.5 * layer.delta()
    assert done.exact and measured_error(output, expected) < 1e-6
    recipe = json.loads(metadata_of(output)["lora_sd.combined"])
    assert [part["name"] for part in recipe] == ["cat", "ink"] and str(tmp_path) not in str(recipe)
    cut = combine([(output, Scales())], tmp_path / "cut.safetensors", rank=2)
    stated = cut.error.of()
    assert measured_error(tmp_path / "cut.safetensors", expected) == pytest.approx(stated, rel=1e-3)


def test_combine_refuses_other_families_and_names_them(tmp_path: Path) -> None:
    for family in FAMILIES:
        adapter = random_adapter(family, every=50)
        save_adapter(adapter, tmp_path / f"{family}.safetensors", torch.float16)
    paths = [(tmp_path / f"{family}.safetensors", Scales()) for family in FAMILIES]
    with pytest.raises(AdapterError, match="sd15.safetensors' for sd15, .* for sdxl"):
        combine(paths, tmp_path / "both.safetensors")


def test_scales_on_the_command_line() -> None:
    path, scales = parsed_source("a=b/cat.safetensors=-0.5,conv=0,up.1=2")
    assert path == Path("a=b/cat.safetensors")
    assert scales == Scales(-0.5, conv=0, blocks={"up.1": 2})
    assert parsed_source("cat.safetensors") == (Path("cat.safetensors"), Scales())
    assert parsed_source("cat.safetensors=text_encoder=0.5")[1] == Scales(text_encoder=0.5)
    with pytest.raises(ConfigError) as found:
        parsed_source("cat.safetensors=nan,cnv=1,mid=x")
    assert "'nan' is not a scale" in str(found.value) and "'conv'?" in str(found.value)
    assert len(found.value.problems) == 3


def test_inspect_as_json_and_as_a_table(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = deltas(file)
    assert said["dtype"] == "float32" and said["format"] == "kohya"
    assert len(said["layers"]) == len(expected)
    for layer in said["layers"]:
        norm = float(expected[layer["name"]].double().norm())
        assert layer["norm"] == pytest.approx(norm, rel=1e-5)
    assert main(["inspect", str(file), "--plot", str(tmp_path / "a.png"), "--layers"]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "all conv" in table and all(name in table for name in expected)
    with pytest.raises(UserError, match="exists already"):
        main(["inspect", str(file), "--plot", str(tmp_path / "a.png")])


def test_inspect_with_a_base_and_with_dora(model_folder: Path, adapter, tmp_path: Path) -> None:
    layers = {
        name: replace(layer, magnitude=torch.ones(len(layer.up), *[1] * (layer.down.dim() - 1)))
        for name, layer in adapter.layers.items()
    }
    save_adapter(Adapter(layers), tmp_path / "a.safetensors", torch.float32)
    found = inspect(tmp_path / "a.safetensors", base=str(model_folder))
    assert found.family == "custom" and all(facts.dora for facts in found.facts)
    assert all(facts.relative_norm for facts in found.facts)


def test_a_family_s_name_is_a_base_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, dora = random_adapter(every=60), random_adapter(every=60)
    for name, layer in dora.layers.items():
        ones = torch.ones(len(layer.up), *[1] * (layer.down.dim() - 1))
        dora.layers[name] = replace(layer, magnitude=ones)
    for name, adapter in (("plain", plain), ("dora", dora)):
        save_adapter(adapter, tmp_path / f"{name}.safetensors", torch.float32)
    paths = [str(tmp_path / "plain.safetensors"), str(tmp_path / "dora.safetensors")]
    command = ["--base", "sd15", "--rank", "4", "-o", str(tmp_path / "c.safetensors")]
    assert main(["combine", paths[0], paths[0], *command]) == 0
    with pytest.raises(AdapterError, match=r"Give the base model's weights .* not its family"):
        main(["combine", *paths, *command, "--overwrite"])
    capsys.readouterr()
    assert main(["inspect", paths[0], "--base", "sd15"]) == 0
    said = capsys.readouterr().out
    assert "'sd15' is only a family's name" in said and "of base" not in said


def test_what_is_written_is_read_back(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(load_any(file)[0].layers)
    right = rf"Read back: {count} of {count} modules match in [67] (of 7 )?clients, largest error"
    commands = [
        ["convert", str(file), "--dtype", "float16"],
        ["resize", str(file), "--rank", "2"],
        ["combine", f"{file}=0.5", str(file)],
    ]
    for command in commands:
        output = ["-o", str(tmp_path / f"{command[0]}.safetensors")]
        assert main([*command, *output]) == 0
        assert re.search(right, capsys.readouterr().out)

    def spoiled(adapter: Adapter, path: Path, *options: object) -> list[str]:
        name = next(iter(adapter.layers))
        wrong = replace(adapter.layers[name], alpha=99.0)
        return save_adapter(Adapter({**adapter.layers, name: wrong}), path, *options)

    monkeypatch.setattr(formats, "save_adapter", spoiled)
    for command in commands:
        with pytest.raises(AdapterError, match="THE FILE IS NOT RIGHT") as found:
            main([*command, "-o", str(tmp_path / "wrong.safetensors"), "--overwrite"])
        assert "its update differs by" in str(found.value)


def test_every_verb_reads_a_part_on_request(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(file)
    tensors["lora_unet_nowhere.alpha"] = torch.ones(())
    save_file(tensors, file)
    for command in (
        ["inspect", str(file)],
        ["convert", str(file), "--dtype", "float16"],
        ["resize", str(file), "--rank", "2"],
        ["combine", str(file), str(file)],
    ):
        if command[0] != "inspect":
            command += ["-o", str(tmp_path / f"{command[0]}.safetensors")]
        with pytest.raises(UserError, match="1 of its .* tensors belong to no layer"):
            main(command)
        assert main([*command, "--allow-partial"]) == 0
        assert f"'{file}': left out: 1 of its" in capsys.readouterr().out


def test_metadata_is_readable_and_drives_no_terminal() -> None:
    tags = json.dumps({"f": {"ink": 2, "cat": 10}})
    lines = list(metadata_lines({"a": "x\x1b[2J" + "y" * 500, "ss_tag_frequency": tags}))
    assert "\x1b" not in lines[0] and len(lines[0]) < 160 and "505 characters" in lines[0]
    assert lines[1].endswith("10 x cat, 2 x ink")


@pytest.mark.parametrize("kind", ["a folder", "a single file"])
@pytest.mark.parametrize("base", ["tiny-sd", "sd1", "sdxl"])
def test_verify_takes_any_base(base: str, kind: str, tmp_path: Path) -> None:
    folder = base if base == "tiny-sd" else str(make_base(base, tmp_path / "base"))
    shapes = open_base(folder).shapes
    names = [name for name in shapes if "attn" in name]
    layers = {name: random_layer(shapes[name], 2, seed=n) for n, name in enumerate(names)}
    path = tmp_path / "a.safetensors"
    save_adapter(Adapter(layers), path, torch.float32)
    if kind == "a single file":
        bake(folder, [], tmp_path / "base.safetensors")
        folder = str(tmp_path / "base.safetensors")
    report = verify(path, folder)[1]
    assert report.ok and report.modules == len(layers) and report.by_rules
    is_loaded = kind == "a folder" and base != "sdxl"
    assert report.in_diffusers == ([] if is_loaded else None)


def test_verify_tells_by_its_status(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(file)]) == (0 if verify(file)[1].everywhere else 1)
    assert "ComfyUI" in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="cut short"):
        main(["verify", str(file)])
