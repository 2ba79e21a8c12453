"""How attention is computed, and pictures piece by piece."""

from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor

SDPA, SLICED = "scaled-dot-product", "sliced"
_PROCESSORS: dict[type, str] = {AttnProcessor2_0: SDPA, SlicedAttnProcessor: SLICED}


def use_attention(unet: Any, sliced: bool = False) -> None:
    """Let a UNet use torch's scaled-dot-product attention, which picks the best kernel there is
    and keeps no matrix of all pixels against all; or compute it head by head."""
    unet.set_attn_processor(AttnProcessor2_0())
    if sliced:
        unet.set_attention_slice("max")


def attention_in_use(unet: Any) -> str:
    """'scaled-dot-product', 'sliced', or the names of other ways."""
    found = {type(one) for one in unet.attn_processors.values()}
    return " and ".join(sorted(_PROCESSORS.get(one, one.__name__) for one in found))


def slice_vae(vae: Any) -> None:
    """Let a VAE work picture by picture, and on those larger than it was made for tile by tile.
    Tiles overlap and are blended, which changes latents and pictures slightly; single pictures do
    not change."""
    vae.enable_slicing()
    vae.enable_tiling()
