"""The files of a base model, read tensor by tensor: a diffusers folder, or a single file in the
original layout. Nothing is loaded when they are opened.

For tools that go through a model's weights; to draw or train with one, see `base_model`.
"""

from lora_sd.base_files.files import WEIGHTS, BaseFiles, Entry
from lora_sd.base_files.folder import weight_files
from lora_sd.base_files.opening import NotHere, open_base, open_folder

__all__ = ["WEIGHTS", "BaseFiles", "Entry", "NotHere", "open_base", "open_folder", "weight_files"]
