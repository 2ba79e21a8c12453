"""The families of base models that the page has settings for: their names and their configs."""

from lora_sd.ui.launch import PROJECT

TITLES = {"tiny-sd": "tiny-sd", "sd15": "SD 1.5", "sd21": "SD 2.1", "sdxl": "SDXL"}
CONFIGS = {
    "tiny-sd": PROJECT / "configs" / "tiny.yaml",
    "sd15": PROJECT / "configs" / "sd15.yaml",
    "sd21": PROJECT / "configs" / "sd21.yaml",
    "sdxl": PROJECT / "configs" / "sdxl.yaml",
}
