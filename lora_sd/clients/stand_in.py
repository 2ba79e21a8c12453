"""Stand-in tables for a model whose shapes no client knows, such as the embedded base.

The clients name layers by rules: what holds for 'unet.down_blocks.1.attentions.0.proj_in' of SD 1.5
(SDXL, when there is a second text encoder) holds for that layer of any block. So a layer of the
model is known to a client when its twin there is, under the same spelling, with the model's own
shape.
"""

import re
from collections.abc import Mapping

from torch import Size

from lora_sd.clients.outline import Shape
from lora_sd.clients.tables import A1111Layer, Module, Tables, Target, load_tables
from lora_sd.formats.kohya import keys_of
from lora_sd.formats.layer_tables import layer_shapes
from lora_sd.parts import TOKENS

NUMBERED = re.compile(r"(blocks|attentions|resnets|layers)\.\d+")


def stand_in_tables(family: str, shapes: Mapping[str, Size]) -> Tables:
    """Tables for a model by the shapes of its layers, full layer name -> weight shape."""
    is_sdxl = any(name.startswith("text_encoder_2.") for name in shapes)
    known_family = "sdxl" if is_sdxl else "sd15"
    known, known_shapes = load_tables(known_family), layer_shapes(known_family)
    twins = {NUMBERED.sub(r"\1.N", name): name for name in reversed(known_shapes)}
    keys, known_keys = _spellings(shapes, is_sdxl), _spellings(known_shapes, is_sdxl)
    tables = Tables(family, is_sdxl, {}, {}, {}, {}, {}, {})
    for name, size in shapes.items():
        twin = twins.get(NUMBERED.sub(r"\1.N", name))
        if twin is None:
            continue
        shape, (component, _, path) = tuple(size), name.partition(".")
        kind = "Embedding" if path.endswith(TOKENS) else _kind(shape)
        tables.modules.setdefault(component, {})[path] = Module(kind, shape)
        for key, known_key in zip(keys[name], known_keys[twin], strict=True):
            if known_key in known.comfy:
                tables.comfy[key] = Target(f"{name}.weight", shape)
            if known_key in known.forge:
                tables.forge[key] = Target(f"{name}.weight", shape)
            if known_key in known.a1111:
                takes_lora, projection = known.a1111[known_key][3:]
                layer = name.replace(".", "_")
                tables.a1111[key] = A1111Layer(layer, kind, shape, takes_lora, projection)
            if known_key in known.invoke:
                tables.invoke[key] = shape
            if known_key in known.kohya:
                tables.kohya[key] = shape
    return tables


def _spellings(shapes: Mapping[str, Size], is_sdxl: bool) -> dict[str, tuple[str, str, str]]:
    """{full name: keys} as kohya's tools, diffusers in kohya's format, and PEFT write it."""
    keys = keys_of(shapes, is_sdxl)
    return {name: (keys[name], "lora_" + name.replace(".", "_"), name) for name in shapes}


def _kind(shape: Shape) -> str:
    return "Conv2d" if len(shape) == 4 else "Linear"
