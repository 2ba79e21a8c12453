"""Two processes on the CPU see and learn what one does."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import PROJECT
from PIL import Image

from lora_sd.run_folder import RunFolder


def run(settings, tmp_path, processes):
    """Train in processes of their own; the run's folder."""
    settings["output"]["name"] = f"by-{processes}"
    file = tmp_path / f"{processes}.yaml"
    file.write_text(yaml.safe_dump(settings))
    launch(processes, "--config", str(file))
    return RunFolder(tmp_path / "outputs" / settings["output"]["name"])


def launch(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--standalone", "train_sd_lora.py", *arguments]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_with_half_the_batch_are_one_with_the_whole(
    run_settings, image_folder, tmp_path
):
    for number in range(3):  # a second size, which leaves a process without a picture now and then
        Image.new("RGB", (32, 8), (number * 80, 0, 0)).save(image_folder / f"wide{number}.png")
        (image_folder / f"wide{number}.txt").write_text("a wide wall")
    run_settings["data"] |= {"max_aspect_ratio": 4, "flip": True}
    run_settings["adapter"]["text_encoder"] = True
    run_settings["train"] |= {"batch_size": 4}
    one = run(run_settings, tmp_path, 1)
    run_settings["train"] |= {"batch_size": 2}
    two = run(run_settings, tmp_path, 2)
    for key in ("loss", "grad_norm"):
        expected = [record[key] for record in one.read_metrics()]
        assert [record[key] for record in two.read_metrics()] == pytest.approx(expected, rel=1e-5)
    assert two.read_status().state == "finished" and two.adapter_file.is_file()

    # and they go on from a checkpoint as the same run
    expected = [record["loss"] for record in two.read_metrics()]
    shutil.rmtree(two.checkpoint(6))
    two.adapter_file.unlink()
    launch(2, "--resume", str(two.path))
    assert [record["loss"] for record in two.read_metrics()] == expected
    assert two.read_status().state == "finished" and two.adapter_file.is_file()
