"""Settings of what is trained."""

from typing import Any, Literal

from pydantic import Field, model_validator

from lora_sd.config.group import Group

LAYER_OPTIONS = ("init", "rs", "dora", "dropout", "rank_dropout", "module_dropout", "up_bias")
Preset = Literal["attention", "attention-ff", "attention-conv", "full"]


class AdapterGroup(Group):
    preset: Preset = "attention-conv"
    """Which layers are adapted: attention; attention and feed-forward; those and the 3x3
    convolutions; or every linear and convolution layer."""
    text_encoder: bool = False
    """Adapt the text encoders too (their attention, and with every preset but 'attention' their
    feed-forward layers); helps with new words, and overfits sooner."""
    include: list[str] = []
    """Patterns of further layers to adapt: a name's ending ('attn2.to_k'), a glob ('up_blocks.*'),
    a regular expression ('re:...') or a block ('block:mid', 'block:up.1/conv'). With text_encoder,
    'token_embedding' adapts its tokens."""
    exclude: list[str] = []
    """Patterns of layers to leave alone; they win over preset and include."""
    rank: int = Field(16, ge=0, le=1024)
    """Inner size of the adapter in linear layers and 1x1 convolutions; 0 leaves them alone."""
    alpha: float | None = Field(None, gt=0, le=4096, allow_inf_nan=False)
    """The update of linear layers is scaled by alpha / rank. Empty: the same as rank."""
    conv_rank: int = Field(8, ge=0, le=1024)
    """Inner size of the adapter in 3x3 convolutions; half the linear rank is usual, 0 leaves them
    alone."""
    conv_alpha: float | None = Field(None, gt=0, le=4096, allow_inf_nan=False)
    """The same for 3x3 convolutions: conv_alpha / conv_rank. Empty: the same as conv_rank."""
    ranks: list[str] = []
    """Ranks of their own for some layers: PATTERN=RANK or PATTERN=RANK:ALPHA, such as
    'attn2.to_k=32' or 'block:mid/conv=4:2'. Without alpha the scaling stays; the last that fits
    counts; 0 leaves a layer alone."""
    clamp_ranks: bool = False
    """Give a layer that is too small for the rank the largest it allows (conv_out of Stable
    Diffusion allows 4), and say so, instead of refusing to start."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa"] = "kaiming"
    """How lora_down starts: Kaiming uniform, Gaussian with deviation 1 / rank, or orthonormal rows;
    lora_up starts at zero. 'pissa' starts both at the base's principal components, learns faster,
    and makes a file of twice the rank."""
    rs: bool = False
    """Scale the update by alpha / sqrt(rank) instead of alpha / rank (rsLoRA), for high ranks."""
    dora: Literal["off", "input", "output"] = "off"
    """Train the norms of the weights apart (DoRA): closer to full fine-tuning, and slower. 'input':
    one norm for each input, as A1111, ComfyUI, Forge, InvokeAI and LyCORIS read it. 'output': one
    for each output, as PEFT has it; saved in diffusers' format."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the update's input that is zeroed in training, against overfitting."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the ranks that is zeroed in training, anew for each picture."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the passes that leave a layer's update out altogether."""
    up_bias: bool = False
    """Give lora_up a bias. Only diffusers' format holds it: A1111, Forge, ComfyUI and InvokeAI do
    not read it."""

    def layer_choice(self) -> dict[str, Any]:
        """Which layers, as `layer_choice.choose_layers` takes it."""
        return self.model_dump(exclude={"text_encoder", *LAYER_OPTIONS}) | {"rs": self.rs}

    def layer_options(self) -> dict[str, Any]:
        """How each layer is made, as `layers.LayerOptions` takes it."""
        return self.model_dump(include=set(LAYER_OPTIONS))

    @model_validator(mode="after")
    def _options_go_together(self) -> "AdapterGroup":
        if self.dora != "off" and self.up_bias:
            raise ValueError("dora has no bias of its own: turn dora or up_bias off")
        return self
