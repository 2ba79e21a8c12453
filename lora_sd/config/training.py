"""Settings of how it is trained: the run, what is learned, the optimizer, the memory."""

from typing import Any, Literal

from pydantic import Field, model_validator

from lora_sd.config.group import Group

FINDS_ITS_RATE = ("prodigy",)
NEEDS_NO_SCHEDULE = ("adamw_schedulefree",)


class TrainGroup(Group):
    steps: int = Field(1500, ge=1, le=10_000_000)
    """Optimizer steps."""
    batch_size: int = Field(1, ge=1, le=4096)
    """Pictures in one forward and backward pass, on each device."""
    gradient_accumulation: int = Field(1, ge=1, le=4096)
    """Passes that make one optimizer step: the effective batch is batch_size times this, times
    the number of devices."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the arithmetic. 'auto': what `accelerate launch` was told, otherwise bf16 on a
    GPU that has it, fp16 on other GPUs, none on the CPU."""
    validate_every_steps: int = Field(100, ge=1)
    """Measure the loss on the validation pictures, where a folder holds some, every so many
    steps."""
    keep_best: bool = False
    """Keep the adapter with the lowest validation loss as best.safetensors beside the last one."""
    patience: int = Field(0, ge=0, le=1000)
    """End early when so many validations in a row brought no lower loss; 0: never."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Keep a moving average of the adapter and make it the result: 0.999 averages over about the
    last thousand steps, fewer at the start. 0: off."""
    on_bad_numbers: Literal["stop", "halve_learning_rate"] = "stop"
    """When loss or gradient are no finite numbers: stop with the last good weights saved, or go on
    from them at half the learning rate."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """The same seed, data and settings give the same adapter on the same machine."""


class ObjectiveGroup(Group):
    weighting: Literal["none", "min_snr", "soft_min_snr", "debiased"] = "none"
    """How much each timestep's error counts: all alike; at most snr_gamma / SNR, which learns
    faster (min-SNR); the same without its kink; or 1 / sqrt(SNR), which raises the noisy ones, for
    colours and composition (debiased)."""
    snr_gamma: float = Field(5.0, gt=0, le=100, allow_inf_nan=False)
    """The gamma of min_snr and soft_min_snr."""
    error: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """How the prediction's distance from its target is measured. huber and smooth_l1 are less
    moved by outliers than l2: by a few odd pictures among many."""
    huber_c: float = Field(0.1, gt=0, le=10, allow_inf_nan=False)
    """Where huber and smooth_l1 turn from squares to a straight line."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How huber_c falls with noise: not; from 1 to huber_c along an exponential; or by the SNR."""
    noise_offset: float = Field(0.0, ge=0, le=1)
    """Add so much noise that is one value for a whole channel, to learn very dark and very bright
    pictures; 0.05 is usual. Not with zero terminal SNR, which does the same better."""
    multires_noise_iterations: int = Field(0, ge=0, le=10)
    """Add noise of so many coarser resolutions; 6 is usual, 0: none. Not with zero terminal SNR."""
    multires_noise_discount: float = Field(0.3, ge=0, le=1)
    """How much each coarser resolution counts of the finer one."""
    input_perturbation: float = Field(0.0, ge=0, le=1)
    """Add so much more noise to the input without telling the target; 0.1 is usual."""
    timesteps: Literal["uniform", "logit_normal", "biased"] = "uniform"
    """How timesteps are drawn: all alike; most often in the middle; or by timestep_bias."""
    timestep_bias: float = Field(0.0, ge=-4, le=4)
    """With 'biased': above 0 more of the noisy timesteps, which decide what is where; below 0 more
    of the late ones, which decide detail."""
    logit_mean: float = Field(0.0, ge=-5, le=5)
    """With 'logit_normal': above 0 more noisy timesteps, below 0 fewer."""
    logit_deviation: float = Field(1.0, gt=0, le=5)
    """With 'logit_normal': how wide they spread."""
    min_timestep: int = Field(0, ge=0, le=100_000)
    """The least noisy timestep that is drawn."""
    max_timestep: int | None = Field(None, ge=0, le=100_000)
    """The noisiest timestep that is drawn. Empty: the last, 999 of Stable Diffusion."""

    @model_validator(mode="after")
    def _options_go_together(self) -> "ObjectiveGroup":
        if self.max_timestep is not None and self.max_timestep < self.min_timestep:
            raise ValueError("max_timestep is below min_timestep")
        if self.noise_offset and self.multires_noise_iterations:
            raise ValueError(
                "noise_offset and multires_noise_iterations do the same: turn one of them off"
            )
        if (self.timesteps == "biased") != bool(self.timestep_bias):
            raise ValueError(
                f"timesteps is {self.timesteps} and timestep_bias {self.timestep_bias:g}: a bias "
                f"goes with timesteps biased, which wants one"
            )
        if self.timesteps != "logit_normal" and (self.logit_mean or self.logit_deviation != 1):
            raise ValueError("logit_mean and logit_deviation go with timesteps logit_normal")
        return self


class OptimizerGroup(Group):
    name: Literal[
        "adamw", "adamw_8bit", "lion", "adafactor", "prodigy", "came", "adamw_schedulefree"
    ] = "adamw"
    """AdamW; AdamW with states of 8 bits, for GPUs; Lion (wants a third to a tenth of AdamW's
    learning rate); Adafactor; Prodigy (finds the learning rate itself: set it to 1); CAME (wants a
    tenth of AdamW's); AdamW without a schedule."""
    options: list[str] = []
    """Further arguments of the optimizer, as NAME=VALUE: 'betas=0.9,0.99', 'd_coef=0.5'."""
    learning_rate: float = Field(1e-4, gt=0, le=10, allow_inf_nan=False)
    """Highest learning rate, reached after the warm-up."""
    conv_learning_rate: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    """The same for the 3x3 convolutions. Empty: learning_rate."""
    text_encoder_learning_rate: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    """The same for the text encoders' layers. Empty: half of learning_rate."""
    text_encoder_2_learning_rate: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    """The same for SDXL's second text encoder. Empty: as the first."""
    block_learning_rates: list[str] = []
    """Factors on the learning rate of some layers: PATTERN=FACTOR, such as 'block:mid=0.5' or
    '*attn1*=0'; the last that fits counts, and 0 leaves a layer as it starts."""
    lora_plus_ratio: float = Field(1.0, ge=1, le=100, allow_inf_nan=False)
    """lora_up learns so many times faster than lora_down (LoRA+); 16 is usual, 1: off."""
    weight_decay: float = Field(0.01, ge=0, le=10, allow_inf_nan=False)
    """Pull of the factors towards zero, in proportion to the learning rate."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Gradients are scaled down to this total norm."""
    max_weight_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Scale each layer's update down to this norm after a step; 1 is usual. Empty: off."""
    schedule: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial",
        "warmup_stable_decay", "rex",
    ] = "cosine"  # fmt: skip
    """What the learning rate does after the warm-up: stay; fall along a line; along a cosine; along
    several cosines; along a power; stay and fall at the end; or fall slowly first (REX)."""
    warmup_steps: int = Field(50, ge=0, le=1_000_000)
    """Steps over which the learning rate rises from zero."""
    schedule_floor: float = Field(0.0, ge=0, le=1)
    """Share of the learning rate that it falls to at the end."""
    schedule_cycles: int = Field(1, ge=1, le=1000)
    """With 'cosine_with_restarts': how many cosines."""
    schedule_power: float = Field(1.0, gt=0, le=10)
    """With 'polynomial': the power."""
    decay_share: float = Field(0.2, ge=0, le=1)
    """With 'warmup_stable_decay': the share of all steps over which it falls at the end."""

    @model_validator(mode="after")
    def _options_go_together(self) -> "OptimizerGroup":
        if self.name in FINDS_ITS_RATE and self.learning_rate < 0.1:
            raise ValueError(
                f"{self.name} finds the learning rate itself and multiplies it by learning_rate, "
                f"which is {self.learning_rate:g}: set it to 1"
            )
        if self.name in NEEDS_NO_SCHEDULE and self.schedule != "constant":
            raise ValueError(f"{self.name} is made to go without a schedule: set it to constant")
        if self.name in NEEDS_NO_SCHEDULE and self.max_weight_norm:
            raise ValueError(
                f"{self.name} keeps a second set of weights, which max_weight_norm "
                "would not scale: turn it off"
            )
        return self

    def text_encoder_rates(self) -> dict[str, float]:
        """The learning rate of each text encoder, by its name."""
        first = self.text_encoder_learning_rate or self.learning_rate / 2
        return {
            "text_encoder": first,
            "text_encoder_2": self.text_encoder_2_learning_rate or first,
        }

    def schedule_options(self) -> dict[str, Any]:
        """How the learning rate moves, as `optimizers.schedules.make_schedule` takes it."""
        return {
            "name": self.schedule,
            "warmup_steps": self.warmup_steps,
            "floor": self.schedule_floor,
            "cycles": self.schedule_cycles,
            "power": self.schedule_power,
            "decay_share": self.decay_share,
        }


class MemoryGroup(Group):
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory, about a third more time."""
    base_weights: Literal["full", "int8", "fp8", "nf4"] = "full"
    """Keep the frozen linear layers of the UNet in so many bits: int8 takes half of bfloat16, nf4 a
    quarter, and is less exact. They are 87 % of SDXL's UNet and a third of SD 1.5's. The adapter
    stays in full precision."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the adapter and its gradients while it learns. bfloat16 halves them and the
    optimizer's states, and rounds small steps away."""
    channels_last: bool = False
    """Lay convolutions out as GPUs like them best."""
    compile: bool = False
    """Compile the UNet for training (torch.compile): a minute or more at the start of each picture
    size, then faster steps."""
    attention_slicing: bool = False
    """Compute attention head by head, for where scaled-dot-product attention fails: it takes more
    memory in training than that, and more time."""
    vae_slicing: bool = False
    """Encode and decode pictures one by one and in tiles: less memory at large sizes."""
    idle_parts: Literal["release", "cpu", "keep"] = "release"
    """What becomes of VAE and text encoders when all is encoded: they are let go and read again
    when they are wanted, wait in the CPU's memory, or stay."""
    on_out_of_memory: Literal["stop", "step_down"] = "stop"
    """When memory runs out: stop, resumable, with advice; or go on with gradient checkpointing,
    then with ever smaller batches and as much more accumulation, saying so."""

    def applied(self) -> dict[str, Any]:
        """What is set up before the start, as `memory.apply` takes it."""
        return self.model_dump(exclude={"gradient_checkpointing", "on_out_of_memory"})
