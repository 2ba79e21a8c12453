"""Measure how well a base draws what it is asked for.

python -m tools.tiny_sd.evaluate --base assets/tiny-sd --out outputs/tiny-sd-evaluation.png
"""

import argparse
import itertools
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tools.tiny_sd.measure import Request, background_colour, load_reference, nearest_subjects

PROMPTS = 64
BASE_STYLES = ("cartoon", "flat")


def fixed_requests() -> list[Request]:
    """64 requests over the base's styles and all colours, each for another subject."""
    reference = load_reference()
    subjects = reference.subjects[::2][:PROMPTS]
    styles_and_colours = itertools.cycle(itertools.product(BASE_STYLES, reference.colours))
    return [
        Request(subject, style, colour)
        for subject, (style, colour) in zip(subjects, styles_and_colours, strict=False)
    ]


def draw(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    steps: int = 20,
    guidance: float = 2.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Image.Image]:
    """One picture a prompt; the i-th prompt gets seed + i, whatever the batch size."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        images += pipeline(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
        ).images
    return images


def save_grid(images: list[Image.Image], path: Path, columns: int = 16, enlarge: int = 2) -> None:
    side = 64 * enlarge
    grid = Image.new("RGB", (columns * side, -(-len(images) // columns) * side))
    for i, image in enumerate(images):
        enlarged = image.resize((side, side), Image.Resampling.NEAREST)
        grid.paste(enlarged, (i % columns * side, i // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("assets/tiny-sd"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also save the pictures as a grid")
    args = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(args.base)
    requests = fixed_requests()
    prompts = [request.prompt for request in requests]
    images = draw(pipeline, prompts, args.steps, args.guidance, args.seed)
    if args.out:
        save_grid(images, args.out)

    subjects = nearest_subjects(pipeline.vae, images, requests)
    colours = [background_colour(image) for image in images]
    for request, subject, colour in zip(requests, subjects, colours, strict=True):
        if (subject, colour) != (request.subject, request.colour):
            print(f"asked for {request.prompt!r}, nearest: {subject!r} on {colour}")
    right_subjects = sum(s == r.subject for s, r in zip(subjects, requests, strict=True))
    right_colours = sum(c == r.colour for c, r in zip(colours, requests, strict=True))
    print(f"{len(images)} pictures, {args.steps} steps, guidance {args.guidance}")
    print(f"right subject    {right_subjects / len(images):.1%}")
    print(f"right background {right_colours / len(images):.1%}")


if __name__ == "__main__":
    main()
