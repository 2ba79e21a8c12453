"""`bake`: the baked model against the merged one, and against what diffusers reads of it."""

import json
import os
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from make_adapters import random_adapter, random_layer, token_layer
from make_bases import KINDS, assert_same_tensors, make_base, tensors_of
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lora_sd.__main__ import main
from lora_sd.adapter import Adapter
from lora_sd.base_files import baking, open_base
from lora_sd.base_files.baking import (
    Recipe,
    gather_updates,
    write_folder,
    write_single_file,
)
from lora_sd.base_files.tensor_stream import read_header
from lora_sd.base_loading import load_base_model
from lora_sd.durable import staged
from lora_sd.errors import AdapterError, UserError
from lora_sd.formats import save_adapter
from lora_sd.generate import PictureSettings, generate
from lora_sd.merge import MergedWeights
from lora_sd.parts import Scales
from lora_sd.verbs.bake import bake, told

PIPELINES = {"sdxl": StableDiffusionXLPipeline}
TOKENS = "text_encoder.text_model.embeddings.token_embedding"


@pytest.fixture(scope="session", params=KINDS)
def kind_and_folder(request, tmp_path_factory):
    """A miniature of each kind."""
    return request.param, make_base(request.param, tmp_path_factory.mktemp(request.param) / "base")


def adapters_for(base):
    """One of every kind of layer, DoRA among them."""
    plain, dora = random_adapter(base.shapes), random_adapter(base.shapes, (1,), dora=True)
    plain.layers[TOKENS] = token_layer(base.shapes[TOKENS])
    return [(plain, Scales(0.7, conv=0.5)), (dora, Scales(0.4, blocks={"mid": 0}))]


def bake_both(folder, out, adapters, dtype=None):
    """(the folder, the single file) baked."""
    base = open_base(str(folder))
    recipe = Recipe(base, gather_updates(base, adapters), dtype)
    with staged(out / "folder") as path:
        write_folder(recipe, path)
    with staged(out / "one.safetensors") as path:
        write_single_file(recipe, path, {})
    return open_base(str(out / "folder")), open_base(str(out / "one.safetensors"))


def test_a_baked_layer_is_base_plus_scaled_deltas(kind_and_folder, tmp_path):
    base = open_base(str(kind_and_folder[1]))
    adapters = adapters_for(base)
    baked, _ = bake_both(kind_and_folder[1], tmp_path, adapters)
    for name, shape in base.shapes.items():
        expected = weight = base.read(name)
        for adapter, scales in adapters:
            if name in adapter.layers:
                delta = adapter.layers[name].delta(weight)
                expected = expected + scales.of(name, shape) * delta
        torch.testing.assert_close(baked.read(name), expected)
    changed = {f"{name}.weight" for name in base.shapes}
    for name in base.tensor_shapes.keys() - changed:
        assert torch.equal(baked.tensor(name), base.tensor(name)), name


def test_diffusers_reads_the_same_from_folder_and_single_file(kind_and_folder, tmp_path):
    kind, folder = kind_and_folder
    pipeline = PIPELINES.get(kind, StableDiffusionPipeline)
    bake_both(folder, tmp_path, adapters_for(open_base(str(folder))))
    of_folder = pipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    of_file = pipeline.from_single_file(
        tmp_path / "one.safetensors", config=str(folder), local_files_only=True
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if not hasattr(of_folder, part):
            continue
        mine = getattr(of_folder, part).state_dict()
        theirs = getattr(of_file, part).state_dict()
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert torch.equal(theirs[name], tensor), f"{part}.{name}"


def test_a_baked_single_file_bakes_on(kind_and_folder, tmp_path):
    """Folder -> file -> file with an adapter equals folder -> folder with it."""
    folder = kind_and_folder[1]
    _, plain = bake_both(folder, tmp_path, [])
    adapters = adapters_for(open_base(str(folder)))
    (tmp_path / "with").mkdir()
    expected, _ = bake_both(folder, tmp_path / "with", adapters)
    write_single_file(
        Recipe(plain, gather_updates(plain, adapters), None), tmp_path / "2.safetensors", {}
    )
    assert_same_tensors(open_base(str(tmp_path / "2.safetensors")), expected)


def test_nothing_to_add_gives_the_base_back(kind_and_folder, tmp_path):
    base = open_base(str(kind_and_folder[1]))
    adapter = random_adapter(base.shapes)
    folder, single = bake_both(kind_and_folder[1], tmp_path, [(adapter, Scales(0))])
    assert_same_tensors(folder, base)
    assert_same_tensors(single, base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_changed_once_at_the_end(dtype, model_folder, tmp_path):
    base = open_base(str(model_folder))
    adapters = [(random_adapter(base.shapes), Scales(0.3))]
    whole, _ = bake_both(model_folder, tmp_path, adapters)
    (tmp_path / "half").mkdir()
    for half in bake_both(model_folder, tmp_path / "half", adapters, dtype):
        for name, tensor in tensors_of(whole).items():
            assert torch.equal(half.tensor(name), tensor.to(dtype)), name


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_config_that_names_a_dtype_names_the_new_one(field, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "base")
    config = folder / "text_encoder" / "config.json"
    fields = {k: v for k, v in json.loads(config.read_text()).items() if "dtype" not in k}
    config.write_text(json.dumps({**fields, field: "float16"}))
    bake(str(folder), [], tmp_path / "as it was")
    baked = tmp_path / "as it was" / "text_encoder"
    assert (baked / "config.json").read_bytes() == config.read_bytes()
    bake(str(folder), [], tmp_path / "x", dtype="float32")
    baked = tmp_path / "x" / "text_encoder"
    assert json.loads((baked / "config.json").read_text()) == {**fields, field: "float32"}
    assert CLIPTextModel.from_pretrained(baked).dtype == torch.float32
    assert "dtype" not in (tmp_path / "x" / "unet" / "config.json").read_text()


def test_a_partly_readable_adapter_is_baked_on_request(tmp_path, capsys):
    adapter = random_adapter({n: s for n, s in open_base("tiny-sd").shapes.items() if "attn1" in n})
    adapter.layers["unet.nowhere"] = next(iter(adapter.layers.values()))
    save_adapter(adapter, tmp_path / "cat.safetensors")
    command = ["bake", "tiny-sd", str(tmp_path / "cat.safetensors"), "-o", str(tmp_path / "x")]
    with pytest.raises(UserError, match="3 of its .* tensors belong to no layer"):
        main(command)
    assert main([*command, "--allow-partial"]) == 0
    said = capsys.readouterr().out
    assert f"in {len(adapter.layers) - 1} layers" in said
    assert "cat.safetensors': left out: 3 of its" in said


def test_an_up_bias_is_added_to_the_bias(model_folder, tmp_path):
    base = open_base(str(model_folder))
    name = "unet.mid_block.attentions.0.proj_in"
    adapter = Adapter({name: random_layer(base.shapes[name], 2, 1.0, bias=True)})
    baked, _ = bake_both(model_folder, tmp_path, [(adapter, Scales(0.5))])
    expected = base.tensor(f"{name}.bias") + 0.5 * adapter.layers[name].bias_delta()
    torch.testing.assert_close(baked.tensor(f"{name}.bias"), expected)


def test_an_up_bias_without_a_bias_is_refused(model_folder):
    base = open_base(str(model_folder))
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = Adapter({name: random_layer(base.shapes[name], 2, 1.0, bias=True)})
    with pytest.raises(AdapterError, match="adds a bias to 1 layers .*attn1.to_q"):
        gather_updates(base, [(adapter, Scales())])


def test_values_too_large_for_the_dtype_are_refused_and_nothing_is_left(model_folder, tmp_path):
    base = open_base(str(model_folder))
    adapters = [(random_adapter(base.shapes), Scales(1e7))]
    with pytest.raises(AdapterError, match="float16 cannot"):
        bake_both(model_folder, tmp_path, adapters, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_baked_pictures_are_the_merged_ones(tmp_path):
    tiny = open_base("tiny-sd")
    adapter = random_adapter({n: s for n, s in tiny.shapes.items() if n.startswith("unet.")})
    save_adapter(adapter, tmp_path / "a.safetensors", torch.float32, exact=True)
    bake(
        "tiny-sd", [(tmp_path / "a.safetensors", Scales(0.2))], tmp_path / "baked", dtype="float32"
    )
    cpu, settings = torch.device("cpu"), [PictureSettings("a fox", steps=2)]
    base = load_base_model("tiny-sd", cpu, torch.float32)
    MergedWeights({"unet": base.unet}).set([(adapter, 0.2)])
    (merged,) = generate(base, settings)
    (baked,) = generate(load_base_model(str(tmp_path / "baked"), cpu, torch.float32), settings)
    assert baked.tobytes() == merged.tobytes()


def test_a_folder_brings_its_files_and_no_stale_weights(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "base")
    stale = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]
    kept = ["safety_checker/model.safetensors", "LICENSE"]
    (folder / "safety_checker").mkdir()
    for name in [*stale, *kept, "v1-5-pruned.ckpt", ".git"]:
        (folder / name).write_text("x")
    bake_both(folder, tmp_path, [])
    found = {
        str(path.relative_to(tmp_path / "folder")) for path in (tmp_path / "folder").rglob("*")
    }
    expected = {str(path.relative_to(model_folder)) for path in model_folder.rglob("*")}
    assert found == expected | {*kept, "safety_checker"}
    (said,) = told(bake(str(folder), [], tmp_path / "again"))
    assert "Left out of the folder" in said and ".git" not in said
    assert all(f"'{name}'" in said for name in [*stale, "v1-5-pruned.ckpt"])
    config = "unet/config.json"
    assert (tmp_path / "folder" / config).read_bytes() == (folder / config).read_bytes()


def test_shards_and_their_index_stay(tmp_path):
    sharded = make_base("sd1", tmp_path / "base", max_shard_size="60KB")
    baked, _ = bake_both(sharded, tmp_path, [])
    assert_same_tensors(baked, open_base(str(sharded)))
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert (tmp_path / "folder" / index).is_file()


def test_what_is_no_part_of_the_model_is_copied_but_the_ema(model_folder, tmp_path):
    _, single = bake_both(model_folder, tmp_path, [])
    more = {"alphas_cumprod": torch.arange(3.0), "model_ema.decay": torch.tensor(0.9)}
    with_more = tmp_path / "more.safetensors"
    save_file(load_file(single.path) | more, with_more)
    done = bake(str(with_more), [], tmp_path / "out.safetensors", dtype="float16")
    stored = {one.key: one for one in read_header(tmp_path / "out.safetensors")[0]}
    assert torch.equal(stored["alphas_cumprod"].read(), more["alphas_cumprod"])
    assert "model_ema.decay" not in stored and done.left_out == 1


def test_the_single_file_says_what_it_is(model_folder, tmp_path):
    adapter = random_adapter(open_base(str(model_folder)).shapes)
    save_adapter(adapter, tmp_path / "cat.safetensors", torch.float32)
    bake(str(model_folder), [(tmp_path / "cat.safetensors", Scales())], tmp_path / "x.safetensors")
    metadata = read_header(tmp_path / "x.safetensors")[1]
    assert metadata["modelspec.title"] == "x"
    assert metadata["modelspec.merged_from"] == f"{model_folder.name}, cat"


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_an_adapter_whose_name_is_no_unicode_is_baked(model_folder, tmp_path):
    adapter = random_adapter(open_base(str(model_folder)).shapes)
    save_adapter(adapter, tmp_path / "c\udcff.safetensors", torch.float32)
    source = tmp_path / "c\udcff.safetensors", Scales()
    bake(str(model_folder), [source], tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors")[1]["modelspec.merged_from"].endswith(", c?")


def test_outputs_that_would_do_harm_are_refused(model_folder, tmp_path):
    base = shutil.copytree(model_folder, tmp_path / "base")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    (tmp_path / "taken.safetensors").write_text("x")
    for output, overwrite, said in [
        (base, True, "is the base model"),
        (base / "unet" / "x.safetensors", True, "lies in the base"),
        (tmp_path, True, "holds the base model"),
        (tmp_path / "taken.safetensors", False, "exists already"),
        (other, True, "no diffusers model"),
        (tmp_path / "none" / "x", False, "no folder"),
    ]:
        with pytest.raises(UserError, match=said):
            bake(str(base), [], output, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base",
        "other",
        "taken.safetensors",
    ]


def test_an_adapter_is_not_overwritten_by_its_bake(tmp_path):
    adapter = random_adapter(open_base("tiny-sd").shapes)
    save_adapter(adapter, tmp_path / "cat.safetensors")
    bake("tiny-sd", [], tmp_path / "x")
    shutil.copy(tmp_path / "cat.safetensors", tmp_path / "x")
    (tmp_path / "link.safetensors").symlink_to("cat.safetensors")
    for source, output, said in [
        ("cat.safetensors", "cat.safetensors", "is the adapter"),
        ("cat.safetensors", "link.safetensors", "is the adapter"),
        ("x/cat.safetensors", "x", "holds the adapter"),
    ]:
        with pytest.raises(UserError, match=said):
            bake("tiny-sd", [(tmp_path / source, Scales())], tmp_path / output, overwrite=True)
        assert read_header(tmp_path / source)[0]


def test_a_folder_with_files_of_its_owner_is_not_overwritten(model_folder, tmp_path):
    bake(str(model_folder), [], tmp_path / "x")
    mine = ["notes.txt", "unet/mine.safetensors", ".git/config"]
    (tmp_path / "x" / ".git").mkdir()
    for name in [*mine, ".DS_Store"]:
        (tmp_path / "x" / name).write_text("x")
    with pytest.raises(UserError, match="would remove it") as caught:
        bake(str(model_folder), [], tmp_path / "x", overwrite=True)
    assert all(f"'{name}'" in str(caught.value) for name in mine)
    assert "DS_Store" not in str(caught.value)
    for name in mine:
        (tmp_path / "x" / name).unlink()
    bake("tiny-sd", [], tmp_path / "x", overwrite=True)


def test_a_bake_that_came_meanwhile_stays(model_folder, tmp_path, monkeypatch):
    write = baking.write_folder

    def slow(*arguments):
        done = write(*arguments)
        shutil.copytree(model_folder, tmp_path / "x")
        return done

    monkeypatch.setattr(baking, "write_folder", slow)
    with pytest.raises(UserError, match="meanwhile"):
        bake("tiny-sd", [], tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert_same_tensors(open_base(str(tmp_path / "x")), open_base(str(model_folder)))


def test_a_scale_beyond_float32_is_refused(model_folder):
    base = open_base(str(model_folder))
    with pytest.raises(AdapterError, match="1e\\+300 .* too large"):
        gather_updates(base, [(random_adapter(base.shapes), Scales(1e300))])


def test_a_single_file_cannot_become_a_folder(model_folder, tmp_path):
    bake_both(model_folder, tmp_path, [])
    with pytest.raises(UserError, match="from_single_file"):
        bake(str(tmp_path / "one.safetensors"), [], tmp_path / "x")


def test_overwriting_replaces_whole_and_leaves_nothing(model_folder, tmp_path):
    old = tmp_path / "x" / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    for _ in range(2):
        bake(str(model_folder), [], tmp_path / "x", overwrite=True)
        bake(str(model_folder), [], tmp_path / "x.safetensors", overwrite=True)
        old.touch()
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.safetensors"}
    bake(str(model_folder), [], tmp_path / "x", overwrite=True)
    assert not old.exists()


def test_a_failure_keeps_the_old_output(model_folder, tmp_path, monkeypatch):
    bake(str(model_folder), [], tmp_path / "x")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(baking, "write_tensor_file", full)
    with pytest.raises(UserError, match="No space left"):
        bake(str(model_folder), [], tmp_path / "x", overwrite=True)
    monkeypatch.undo()
    assert_same_tensors(open_base(str(tmp_path / "x")), open_base(str(model_folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_told_before(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(baking.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match="needs .* MB, .* has 0 bytes left. Make room"):
        bake(str(model_folder), [], tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path, capsys):
    adapter = random_adapter(open_base("tiny-sd").shapes)
    save_adapter(adapter, tmp_path / "cat.safetensors")
    output = tmp_path / "x.safetensors"
    assert main(["bake", "tiny-sd", f"{tmp_path}/cat.safetensors=0.5", "-o", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"1 adapter in {len(adapter.layers)} layers" in said and "MB" in said


def test_a_base_too_large_for_the_dtype_is_refused(model_folder, tmp_path):
    large = shutil.copytree(model_folder, tmp_path / "large")
    weights = large / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor * 1e8 for key, tensor in load_file(weights).items()}, weights)
    with pytest.raises(AdapterError, match="'vae.* float16 cannot"):
        bake(str(large), [], tmp_path / "x", dtype="float16")


@pytest.mark.parametrize("dora", [False, True])
def test_a_base_of_eight_bit_numbers_stays_so(dora, model_folder, tmp_path):
    small = shutil.copytree(model_folder, tmp_path / "small")
    weights = small / "unet" / "diffusion_pytorch_model.safetensors"
    eight = torch.float8_e4m3fn
    save_file({key: tensor.to(eight) for key, tensor in load_file(weights).items()}, weights)
    base = open_base(str(small))
    adapter = random_adapter(base.shapes, dora=dora)
    for baked in bake_both(small, tmp_path, [(adapter, Scales())]):
        for name in ("unet.conv_in", "unet.mid_block.attentions.0.proj_in"):
            weight = base.read(name).float()
            expected = (weight + adapter.layers[name].delta(weight)).to(eight)
            assert torch.equal(baked.read(name).view(torch.uint8), expected.view(torch.uint8))
