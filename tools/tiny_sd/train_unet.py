"""Train the base's UNet and text encoder on cached latents of (subject, style, background).

    torchrun --nproc-per-node 2 -m tools.tiny_sd.train_unet --steps 6200

Needs train_vae.py's result. One process a core (OMP_NUM_THREADS=1) is half as fast again as one
process with two threads. Run it again with the same arguments after a kill: it goes on from its
checkpoint. Grids of preview pictures appear under --work while it runs.
"""

import argparse
import math
import os
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import distributed
from torch.nn.functional import mse_loss
from transformers import CLIPTokenizer

from tools.tiny_sd.checkpoints import load_checkpoint, save_checkpoint
from tools.tiny_sd.models import new_pipeline, new_scheduler, new_text_encoder, new_unet, new_vae
from tools.tiny_sd.render import colour_tensor, composite
from tools.tiny_sd.subjects import BASE_STYLES, COLOURS, STYLES, SUBJECTS, random_caption
from tools.tiny_sd.tokenizer import build_tokenizer

EMPTY_CAPTIONS = 0.1  # for classifier-free guidance
EMA_DECAY = 0.999
PREVIEW_PROMPTS = [
    f"{subject}, {style_and_background}"
    for subject in ("fox", "red apple", "sailboat", "owl", "hamburger", "rocket", "tulip", "castle")
    for style_and_background in (
        "cartoon icon",
        "flat icon, blue background",
        "cartoon icon, yellow background",
    )
]


@torch.no_grad()
def encode_all(vae: AutoencoderKL, sprites: torch.Tensor) -> torch.Tensor:
    """Latents of every subject in the base's styles on every background.

    Takes the sprites as train_vae.py caches them, style by style. Returns unscaled means
    (subjects, styles, colours, 4, 16, 16).
    """
    by_style = sprites.unflatten(0, (len(STYLES), len(SUBJECTS)))
    wanted = by_style[[list(STYLES).index(style) for style in BASE_STYLES]].transpose(0, 1)
    colours = colour_tensor()
    latents = []
    for sprite in wanted.flatten(0, 1):
        images = composite(sprite.expand(len(colours), -1, -1, -1), colours)
        latents.append(vae.encode(images).latent_dist.mean)
    return torch.stack(latents).unflatten(0, wanted.shape[:2])


def load_vae(work: Path) -> AutoencoderKL:
    vae = new_vae().requires_grad_(False).eval()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=False)["vae"])
    return vae


def save_preview(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Pictures of the fixed prompts, twelve a row, twice enlarged."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PREVIEW_PROMPTS,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(i) for i in range(len(PREVIEW_PROMPTS))],
    ).images
    grid = Image.new("RGB", (12 * 128, 2 * 128))
    for i, image in enumerate(images):
        grid.paste(image.resize((128, 128), 0), (i % 12 * 128, i // 12 * 128))
    grid.save(path)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Over all processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny-sd-build"))
    parser.add_argument("--steps", type=int, default=6200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every-s", type=float, default=150)
    parser.add_argument("--preview-every-s", type=float, default=300)
    args = parser.parse_args()
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if processes > 1:
        distributed.init_process_group("gloo")

    # latents, encoded once, and the vocabulary
    vae = load_vae(args.work)
    cache = args.work / "latents.pt"
    if rank == 0:
        build_tokenizer(args.work / "tokenizer")
        if not cache.exists():
            sprites = torch.load(args.work / "sprites.pt")["subjects"]
            save_checkpoint(cache, encode_all(vae, sprites))
    if processes > 1:
        distributed.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    latents = torch.load(cache)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents = latents * vae.config.scaling_factor
    subjects, colours = list(SUBJECTS), list(COLOURS)

    # models, optimizer, noise schedule
    torch.manual_seed(args.seed)
    text_encoder = new_text_encoder(tokenizer)
    unet = new_unet().to(memory_format=torch.channels_last)
    trained = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    averaged = {k: v.clone() for k, v in trained.state_dict().items()}
    optimizer = torch.optim.AdamW(
        trained.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    alphas_cumprod = new_scheduler().alphas_cumprod
    step = 0
    if state := load_checkpoint(args.work / "unet.pt"):
        trained.load_state_dict(state["trained"])
        averaged = state["averaged"]
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    def save() -> None:
        state = {"trained": trained.state_dict(), "averaged": averaged, "step": step}
        state |= {"optimizer": optimizer.state_dict(), "scaling": vae.config.scaling_factor}
        save_checkpoint(args.work / "unet.pt", state)

    def preview() -> None:
        current = {k: v.clone() for k, v in trained.state_dict().items()}
        trained.load_state_dict(averaged)
        pipeline = new_pipeline(vae, text_encoder, tokenizer, unet)
        save_preview(pipeline, args.work / f"preview_{step:06d}.png")
        trained.load_state_dict(current)
        trained.train()

    # loop
    local_batch = args.batch_size // processes
    parameters = list(trained.parameters())
    started = saved = previewed = time.time()
    first_step, running_loss = step, None
    while step < args.steps:
        lr = args.lr * min(1, (step + 1) / 200)
        lr *= 0.005 + 0.995 * (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr

        # a batch: latents, captions, noise; a function of seed, step and rank
        rng = random.Random(f"{args.seed} {step} {rank}")
        torch.manual_seed(rng.randrange(2**32))
        picks = [
            (rng.randrange(len(subjects)), rng.randrange(2), rng.randrange(len(colours)))
            for _ in range(local_batch)
        ]
        captions = [
            ""
            if rng.random() < EMPTY_CAPTIONS
            else random_caption(rng, subjects[i], BASE_STYLES[j], colours[k])
            for i, j, k in picks
        ]
        clean = torch.stack([latents[pick] for pick in picks])
        noise = torch.randn_like(clean)
        # stratified over the batch: the same distribution with less spread in the loss
        strata = (torch.arange(local_batch) + torch.rand(local_batch)) / local_batch
        timesteps = (strata * len(alphas_cumprod)).long()
        signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids

        text = text_encoder(tokens).last_hidden_state
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, timesteps, text).sample
        loss = mse_loss(predicted, velocity)
        loss.backward()
        if processes > 1:
            average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for name, value in trained.state_dict().items():
            averaged[name].lerp_(value, 1 - decay)

        # records
        running_loss = loss.item() if running_loss is None else running_loss
        running_loss += 0.02 * (loss.item() - running_loss)
        now = time.time()
        if rank > 0:
            continue
        if step % 50 == 0:
            speed = (step - first_step) * args.batch_size / (now - started)
            print(
                f"step {step}/{args.steps} loss {running_loss:.4f} "
                f"norm {norm:.2f} lr {lr:.2e} {speed:.0f} images/s",
                flush=True,
            )
        if now - saved > args.save_every_s:
            save()
            saved = now
        if now - previewed > args.preview_every_s:
            preview()
            previewed = now
    if rank == 0:
        save()
        preview()


if __name__ == "__main__":
    main()
