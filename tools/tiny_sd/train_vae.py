"""Train the base's AutoencoderKL on icons of all four styles, on random backgrounds.

    python -m tools.tiny_sd.train_vae --steps 4600

Run it again with the same arguments after a kill: it goes on from its checkpoint.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from tools.tiny_sd.checkpoints import load_checkpoint, save_checkpoint
from tools.tiny_sd.models import new_vae
from tools.tiny_sd.render import (
    colour_tensor,
    composite,
    fetch_icons,
    icon_svg,
    load_icons,
    render_sprites,
    sprite,
    sprites_to_tensor,
)
from tools.tiny_sd.subjects import STYLES, SUBJECTS

KL_WEIGHT = 1e-4  # per latent value, against a mean error per pixel value


def load_sprites(icons_dir: Path, cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Sprites of the subjects in all styles (n, 4, 64, 64), and of every other shared icon."""
    if not cache.exists():
        subjects = [s for style in STYLES for s in render_sprites(icons_dir, style)]
        sets = [load_icons(icons_dir, style) for style in STYLES]
        shared = set.intersection(*({*s["icons"], *s.get("aliases", {})} for s in sets))
        names = sorted(n for n in shared - {*SUBJECTS.values()} if "skin-tone" not in n)
        others = [sprite(icon_svg(icons, name)) for icons in sets for name in names]
        state = {"subjects": sprites_to_tensor(subjects), "others": sprites_to_tensor(others)}
        save_checkpoint(cache, state)
    state = torch.load(cache)
    return state["subjects"], state["others"]


def random_batch(
    subjects: torch.Tensor, others: torch.Tensor, size: int, generator: torch.Generator
) -> torch.Tensor:
    """Pictures in -1..1: 3/4 subjects, 3/4 on the base's backgrounds; shifted and flipped."""

    def pick(n: int, count: int) -> torch.Tensor:
        return torch.randint(n, (count,), generator=generator)

    from_others = size // 4
    sprites = torch.cat(
        [
            subjects[pick(len(subjects), size - from_others)],
            others[pick(len(others), from_others)],
        ]
    )
    named = colour_tensor()[pick(8, size)]
    free = torch.rand(size, 3, generator=generator)
    use_free = torch.rand(size, 1, generator=generator) < 0.25
    images = composite(sprites, torch.where(use_free, free, named))
    if pick(2, 1):
        images = images.flip(3)
    shift = (pick(7, 2) - 3).tolist()  # the margin is 3 pixels wide
    return images.roll(shift, (2, 3))


def save_reconstructions(vae: AutoencoderKL, images: torch.Tensor, path: Path) -> None:
    """A grid of pictures with their reconstructions below them."""
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
    rows = []
    for start in range(0, len(images), 16):
        rows += [images[start : start + 16], decoded[start : start + 16]]
    grid = torch.cat([torch.cat([*row], 2) for row in rows], 1)
    array = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).resize((array.shape[1] * 2, array.shape[0] * 2), 0).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny-sd-build"))
    parser.add_argument("--icons", type=Path, help="folder with the unpacked npm packages")
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every-s", type=float, default=120)
    args = parser.parse_args()

    # data
    icons_dir = args.icons or args.work / "icons"
    fetch_icons(icons_dir)
    args.work.mkdir(parents=True, exist_ok=True)
    subjects, others = load_sprites(icons_dir, args.work / "sprites.pt")
    generator = torch.Generator().manual_seed(args.seed)

    # model and optimizer
    torch.manual_seed(args.seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        vae.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0, fused=True
    )
    step = 0
    if state := load_checkpoint(args.work / "vae.pt"):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        step = state["step"]

    def save() -> None:
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state |= {"generator": generator.get_state(), "rng": torch.get_rng_state()}
        save_checkpoint(args.work / "vae.pt", state)
        with torch.random.fork_rng():
            preview = random_batch(subjects, others, 48, torch.Generator().manual_seed(1))
            save_reconstructions(vae, preview, args.work / "vae_preview.png")

    # loop
    started = saved = time.time()
    first_step = step
    while step < args.steps:
        warm = min(1, (step + 1) / 100)
        lr = args.lr * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / args.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = random_batch(subjects, others, args.batch_size, generator)
        images = images.contiguous(memory_format=torch.channels_last)
        # bfloat16 halves the time of a step on a CPU that has it; the last fifth is exact
        with torch.autocast("cpu", torch.bfloat16, enabled=step < 0.8 * args.steps):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        l1 = (decoded - images).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = l1 + 0.3 * (decoded - images).square().mean() + KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            speed = (step - first_step) * args.batch_size / (time.time() - started)
            std = posterior.mean.std().item()
            print(
                f"step {step}/{args.steps} l1 {l1.item():.4f} kl {kl.item():.3f} "
                f"std {std:.3f} {speed:.0f} images/s",
                flush=True,
            )
        if time.time() - saved > args.save_every_s:
            save()
            saved = time.time()
    save()


if __name__ == "__main__":
    main()
