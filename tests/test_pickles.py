"""Pickled checkpoints: refused, with a command that converts them."""

import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from make_bases import make_base, save_single_file
from safetensors.torch import load_file, save_file

from lora_sd.base_files import open_base
from lora_sd.base_files.pickles import is_pickle
from lora_sd.base_loading import load_base_model
from lora_sd.errors import BaseModelError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_base("sd1", tmp_path_factory.mktemp("base") / "base")


def refusal(path):
    with pytest.raises(BaseModelError) as caught:
        load_base_model(str(path), CPU, torch.float32)
    (problem,) = caught.value.problems
    assert "pickle can run any program" in problem and "\n" not in problem
    return problem


def run(command):
    """Run a printed command as a shell does, with the python of the tests."""
    python = shlex.quote(sys.executable)
    done = subprocess.run(
        f"{python} {command.removeprefix('python ')}", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def command_in(problem):
    return problem[problem.index("python -c") :]


def test_the_printed_command_converts_a_checkpoint(folder, tmp_path):
    single = save_single_file(folder, tmp_path / "whole.safetensors")
    tensors = load_file(single)
    twin = next(key for key in tensors if key.endswith(".to_k.weight"))
    tensors["model_ema.decay"] = tensors[twin][0]  # shares memory, as EMA copies may
    old = tmp_path / "it's my $model!.ckpt"
    torch.save({"state_dict": tensors, "global_step": 5}, old)
    run(command_in(refusal(old)))
    converted = load_file(old.with_suffix(".safetensors"))
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in tensors.items())


def test_the_converted_checkpoint_of_a_folder_loads(folder, tmp_path):
    pickled = shutil.copytree(folder, tmp_path / "model")
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
             "text_encoder": "pytorch_model"}  # fmt: skip
    for part, name in names.items():
        file = next((pickled / part).glob("*.safetensors"))
        torch.save(load_file(file), pickled / part / f"{name}.bin")
        file.unlink()
    run(command_in(refusal(pickled)))
    assert (pickled / "text_encoder" / "model.safetensors").is_file()
    base, expected = (load_base_model(str(path), CPU, torch.float32) for path in (pickled, folder))
    assert base.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_another_name_is_told_by_how_it_begins(folder, tmp_path, zipped):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.ones(2)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    run(command_in(refusal(path)))
    assert load_file(tmp_path / "model_converted.safetensors").keys() == tensors.keys()


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path):
    """The first byte of a safetensors file is of its header's length."""
    for length in range(200):
        save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"k": "x" * length})
        assert not is_pickle(tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_what_is_called_a_pickle_is_not_read(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    with pytest.raises(BaseModelError, match="weights_only=True"):
        open_base(str(tmp_path / f"a{suffix}"))
