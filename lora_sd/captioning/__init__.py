"""Captions for pictures that have none, by published models: BLIP, Florence-2, WD14 taggers.

An extra: nothing else of the project needs it. Models come as safetensors or ONNX, from a local
folder or the hub, and no code of theirs is run.
"""
