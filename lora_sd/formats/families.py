"""Families of models that are known by name."""

from lora_sd.formats.layer_tables import FAMILIES, layer_shapes

__all__ = ["FAMILIES", "layer_shapes"]
