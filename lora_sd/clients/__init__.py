"""What A1111, Forge, ComfyUI, InvokeAI, kohya's tools, LyCORIS and diffusers do with a file.

`tables` holds the names of layers that each knows, and a module for each client or two what it
does with them; `judge` asks all of them about a file, `foresee` about one that is not written yet.
"""

from lora_sd.clients.foresee import ignored, ignored_layers
from lora_sd.clients.judge import check

__all__ = ["check", "ignored", "ignored_layers"]
