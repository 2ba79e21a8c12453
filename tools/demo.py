"""Say in three figures what a run on the embedded base has learned (`make demo` ends with it).

`python -m tools.demo [RUN]`; by default the newest run under outputs/.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lora_sd.adapter import Adapter
from lora_sd.base_loading import load_base_model, pick_device
from lora_sd.base_model import BaseModel
from lora_sd.errors import RunError, run_program
from lora_sd.formats import load_adapter
from lora_sd.generate import PictureSettings, generate, generate_at_scales
from lora_sd.layer_names import layer_shapes
from lora_sd.merge import MergedWeights
from lora_sd.run_folder import RunFolder, list_runs
from tools.tiny_sd.measure import (
    Request,
    figure_mask,
    load_reference,
    mean_chroma,
    nearest_subjects,
    render,
    silhouette,
)

SEEDS = (11, 12)
STEPS, GUIDANCE = 16, 2.0
COMPARED = 8  # pictures drawn a second time, to compare scale 0 with the base bit for bit


@dataclass(frozen=True)
class Figures:
    """What the adapter does to subjects that its training pictures do not hold.

    `shift`: how far the colour inside the figures moved from the base's towards that of the real
    style, 0 to 1. `exact`: whether scale 0 is the base's picture bit for bit. `found_base`,
    `found_adapted`: share of pictures nearest to the right subject among all, at scales 0 and 1.
    """

    shift: float
    exact: bool
    found_base: float
    found_adapted: float


def measure(base: BaseModel, adapter: Adapter) -> Figures:
    """Draw the held-out subjects as ink drawings at scales 0 and 1, and compare."""
    subjects = load_reference().held_out_subjects
    requests = [Request(subject, "ink") for subject in subjects for _ in SEEDS]
    settings = [
        PictureSettings(request.prompt, seed=seed, steps=STEPS, guidance=GUIDANCE)
        for request, seed in zip(requests, SEEDS * len(subjects), strict=True)
    ]
    plain = generate(base, settings[:COMPARED])  # before the adapter comes near the weights
    rows = generate_at_scales(base, MergedWeights(base.components), adapter, [1, 0], settings)
    one, zero = [row[0] for row in rows], [row[1] for row in rows]

    masks = [figure_mask(picture) for picture in zero]
    before = float(np.nanmean([mean_chroma(p, m) for p, m in zip(zero, masks, strict=True)]))
    after = float(np.nanmean([mean_chroma(p, m) for p, m in zip(one, masks, strict=True)]))
    real = float(np.mean([mean_chroma(render(s, "ink"), silhouette(s)) for s in subjects]))
    exact = all(a.tobytes() == b.tobytes() for a, b in zip(plain, zero, strict=False))
    return Figures(
        shift=(before - after) / (before - real),
        exact=exact,
        found_base=_found(base, zero, requests, ("flat", "cartoon")),
        found_adapted=_found(base, one, requests, ("ink",)),
    )


def _found(
    base: BaseModel, pictures: list[Image.Image], requests: list[Request], styles: Sequence[str]
) -> float:
    """Share of pictures whose nearest real picture in one of the styles is of their subject."""
    by_style = [
        nearest_subjects(base.vae, pictures, [Request(r.subject, style) for r in requests])
        for style in styles
    ]
    wanted = [request.subject for request in requests]
    hits = [any(names[i] == wanted[i] for names in by_style) for i in range(len(wanted))]
    return sum(hits) / len(hits)


def main(argv: Sequence[str]) -> int:
    """Print the figures of a run, and what to do next."""
    runs = [RunFolder(argv[0])] if argv else list_runs(Path("outputs"))
    if not runs or not runs[0].adapter_file.is_file():
        raise RunError("There is no finished run under 'outputs'. Type 'make demo' first.")
    run = runs[0]
    base = load_base_model("tiny-sd", pick_device(), torch.float32)
    figures = measure(base, load_adapter(run.adapter_file, layer_shapes(base.components)))
    python = os.path.relpath(sys.executable)
    print(f"""
On {len(load_reference().held_out_subjects)} subjects that the training pictures do not hold:
  new style:  {figures.shift:.0%} of the way from the base's colours to real ink drawings
  scale 0:    {"the base's pictures, bit for bit" if figures.exact else "NOT the base's pictures"}
  subjects:   {figures.found_adapted:.0%} recognised at scale 1, {figures.found_base:.0%} at scale 0

The adapter:    {run.adapter_file}
What it does:   {run.grid_file}   (each row a prompt, from scale 0 to 1)
Try it:         {python} app.py     (the Generate tab; move the scale)
Your pictures:  put them with captions into a folder, then add --data.folder FOLDER to
                {python} train_sd_lora.py --config configs/tiny.yaml""")
    return 0


if __name__ == "__main__":
    run_program(main)
