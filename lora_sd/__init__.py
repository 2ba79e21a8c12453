"""Train Stable Diffusion LoRA adapters on a folder of images, and use them at once."""

__version__ = "0.1.0"
