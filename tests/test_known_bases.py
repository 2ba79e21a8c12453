"""What is known of base models without a look at their files."""

import subprocess
import sys

import pytest

from lora_sd.errors import BaseModelError
from lora_sd.known_bases import EMBEDDED, HUB_ID, PUBLISHED, published_configs, size_step_px


@pytest.mark.parametrize("family, step_px", [("sd15", 64), ("sd21", 64), ("sdxl", 32)])
def test_steps_of_the_published_families(family, step_px):
    configs = published_configs(family)
    assert size_step_px(configs["unet"], configs["vae"]) == step_px


@pytest.mark.parametrize("damaged", [{}, {"block_out_channels": 4}, {"block_out_channels": None}])
def test_a_config_without_sizes_is_a_sentence(damaged):
    for configs in ((damaged, {"block_out_channels": [4]}), ({"block_out_channels": [4]}, damaged)):
        with pytest.raises(BaseModelError, match="damaged.*'block_out_channels'"):
            size_step_px(*configs)


@pytest.mark.parametrize(
    "name, is_one",
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("some.one/sd_xl-1.0", True),
        ("models/cat.safetensors", False),
        ("models/cat.ckpt", False),
        ("../cat", False),
        ("a/b/c", False),
        ("tiny-sd", False),
        ("kätzchen/modell", False),
    ],
)
def test_names_of_the_hub(name, is_one):
    assert bool(HUB_ID.fullmatch(name)) == is_one


def test_the_facts_of_a_known_base_come_without_torch():
    names = [*EMBEDDED, *PUBLISHED]
    program = f"""
import sys
from lora_sd.data.report.base_facts import base_facts
assert [base_facts(name).step_px for name in {names}] == [16, 64, 64, 32]
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
