"""Turn the trained parts into `assets/tiny-sd/`: an fp16 StableDiffusionPipeline folder.

    python -m tools.tiny_sd.export

Can be run while train_unet.py is still going: it takes the averaged weights of the last
checkpoint.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from tools.tiny_sd.checkpoints import load_checkpoint
from tools.tiny_sd.models import new_pipeline, new_text_encoder, new_unet
from tools.tiny_sd.tokenizer import build_tokenizer
from tools.tiny_sd.train_unet import load_vae

LIMIT_MB = 25


def assemble(work: Path) -> tuple[StableDiffusionPipeline, int]:
    """The pipeline with averaged weights, float32, and the step they come from."""
    state = load_checkpoint(work / "unet.pt")
    if state is None:
        raise SystemExit(f"'{work / 'unet.pt'}' does not exist. Run train_unet.py first.")
    vae = load_vae(work)
    vae.register_to_config(scaling_factor=state["scaling"])
    tokenizer = build_tokenizer(work / "tokenizer")
    trained = torch.nn.ModuleDict(
        {"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)}
    ).eval()
    trained.load_state_dict(state["averaged"])
    pipeline = new_pipeline(vae, trained["text_encoder"], tokenizer, trained["unet"])
    return pipeline, state["step"]


def export(pipeline: StableDiffusionPipeline, tokenizer_files: Path, target: Path) -> None:
    """Write the folder aside and put it in the place of the old one."""
    aside = target.with_name(target.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(aside, safe_serialization=True)
    # transformers 5 saves tokenizer.json only; other readers want CLIP's own two files
    for file in tokenizer_files.iterdir():
        shutil.copy(file, aside / "tokenizer")
    # transformers loads in the dtype named here, diffusers in float32: keep them the same
    config_file = aside / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text("utf-8")) | {"dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    size_mb = sum(f.stat().st_size for f in aside.rglob("*") if f.is_file()) / 1e6
    if size_mb > LIMIT_MB:
        raise SystemExit(f"The base has {size_mb:.1f} MB, more than {LIMIT_MB} MB.")
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(aside, target)
    shutil.rmtree(old, ignore_errors=True)
    print(f"'{target}': {size_mb:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny-sd-build"))
    parser.add_argument("--out", type=Path, default=Path("assets/tiny-sd"))
    args = parser.parse_args()
    pipeline, step = assemble(args.work)
    print(f"step {step}")
    export(pipeline, args.work / "tokenizer", args.out)


if __name__ == "__main__":
    main()
