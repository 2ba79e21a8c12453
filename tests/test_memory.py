"""Memory settings: each leaves what is computed as it was, or says by how much it changes it."""

import copy
import itertools

import pytest
import torch
from conftest import choose, make_parts, make_unet, randomise
from diffusers.models.attention_processor import AttnProcessor

from lora_sd import inject, memory
from lora_sd.errors import ConfigError
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.layers import LayerOptions, LinearLoRA
from lora_sd.memory import attention, compilation, layouts

CPU = torch.device("cpu")
OPTIONS = {
    "plain": LayerOptions(),
    "pissa": LayerOptions(init="pissa"),
    "dora": LayerOptions(dora="output"),
    "dora by input": LayerOptions(dora="input"),
    "up_bias": LayerOptions(up_bias=True),
}


def adapted(options=None, **settings):
    """(a UNet, its layers) with memory settings applied."""
    unet = make_unet()
    layers = inject.attach(unet, choose(unet), options)
    for layer in layers.values():
        layer.set_dtype(settings.get("dtype", torch.float32))
    return unet, layers


def learning(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def gradients(unet, inputs):
    unet.train()
    unet(*inputs).sample.square().sum().backward()
    return [weight.grad for weight in learning(unet)]


# --- the adapter's precision ---


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_fresh_adapter_in_bfloat16_is_the_identity(options, unet_inputs):
    unet, layers = adapted(options, dtype=torch.bfloat16)
    assert {layer.lora_down.weight.dtype for layer in layers.values()} == {torch.bfloat16}
    with torch.no_grad():
        out, bare = unet(*unet_inputs).sample, make_unet()(*unet_inputs).sample
    torch.testing.assert_close(out, bare, atol=1e-5, rtol=0)
    if options.dora == "off":
        assert torch.equal(out, bare)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_bfloat16_adapter_is_saved_and_loaded_to_the_bit(options, tmp_path, unet_inputs):
    unet, layers = adapted(options, dtype=torch.bfloat16)
    randomise(unet)
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    exact = inject.collect(unet, exact=True)
    save_adapter(exact, tmp_path / "a.safetensors", torch.float32, exact=True)
    again, fresh = adapted(options, dtype=torch.bfloat16)
    inject.load(fresh, load_adapter(tmp_path / "a.safetensors", shapes))
    for name, layer in layers.items():
        for mine, other in zip(layer.parameters(), fresh[name].parameters(), strict=True):
            assert mine.dtype == other.dtype and torch.equal(mine, other), name
    with torch.no_grad():
        assert torch.equal(unet(*unet_inputs).sample, again(*unet_inputs).sample)


def test_a_layer_without_factors_has_no_precision():
    layer = LinearLoRA(torch.nn.Linear(2, 2), 0)
    layer.set_dtype(torch.bfloat16)
    assert {weight.dtype for weight in layer.parameters()} == {torch.float32}


def test_a_bfloat16_adapter_learns_under_autocast_and_without(unet_inputs):
    found = []
    for enabled in (False, True):
        unet, layers = adapted(dtype=torch.bfloat16)
        randomise(unet)
        optimizer = torch.optim.AdamW(learning(unet), lr=1e-3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads = gradients(unet, unet_inputs)
        assert all(grad.dtype == torch.bfloat16 for grad in grads)
        before = [weight.clone() for weight in learning(unet)]
        optimizer.step()
        changed = zip(before, learning(unet), strict=True)
        assert all(not torch.equal(old, new) for old, new in changed)
        found.append(torch.cat([grad.float().flatten() for grad in grads]))
    one, other = found
    assert (one - other).norm() < 0.1 * one.norm()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_in_bfloat16_are_those_of_float32_rounded(options, unet_inputs):
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        unet, layers = adapted(options, dtype=torch.bfloat16)
        randomise(unet)
        for layer in layers.values():
            layer.set_dtype(dtype)
        grads = gradients(unet, unet_inputs)
        found.append(torch.cat([grad.float().flatten() for grad in grads]))
    one, other = found
    assert 0 < (one - other).norm() < 0.05 * other.norm()


def test_a_text_encoder_s_adapter_in_bfloat16_adapts_tokens_too():
    ids = torch.tensor([[1, 5, 7, 2]])
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        parts = {"text_encoder": make_parts()["text_encoder"]}
        layers = inject.attach(parts, choose(parts, include=["token_embedding"]))
        assert any(name.endswith("token_embedding") for name in layers)
        randomise(parts)
        for layer in layers.values():
            layer.set_dtype(dtype)
        with torch.no_grad():
            found.append(parts["text_encoder"](ids).last_hidden_state)
    assert 0 < (found[0] - found[1]).norm() < 0.05 * found[1].norm()


# --- layouts ---


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_channels_last_computes_the_same(options, unet_inputs, tmp_path):
    plain, _ = adapted(options)
    unet, layers = adapted(options)
    randomise(plain)
    randomise(unet)
    own = {id(weight) for weight in unet.parameters()}
    layouts.use_channels_last(unet)
    assert own == {id(weight) for weight in unet.parameters()}
    convs = [one for one in unet.modules() if isinstance(one, torch.nn.Conv2d)]
    last = {"memory_format": torch.channels_last}
    assert convs and all(conv.weight.is_contiguous(**last) for conv in convs)
    with torch.no_grad():
        out, wanted = unet(*unet_inputs).sample, plain(*unet_inputs).sample
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    for mine, other in zip(
        gradients(unet, unet_inputs), gradients(plain, unet_inputs), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    save_adapter(inject.collect(unet), tmp_path / "a.safetensors", torch.float32)
    found = load_adapter(tmp_path / "a.safetensors", {n: x.weight.shape for n, x in layers.items()})
    saved = inject.collect(plain).layers
    assert all(torch.equal(found.layers[name].down, one.down) for name, one in saved.items())


def test_a_vae_that_was_let_go_comes_back_in_its_layout(base):
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    plain, _ = base.encode_picture(pixels)
    layouts.use_channels_last(base.vae)
    out, _ = base.encode_picture(pixels)
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    base.release("vae")
    assert torch.equal(base.encode_picture(pixels)[0], out)
    conv = base.vae.encoder.conv_in.weight
    assert conv.is_contiguous(memory_format=torch.channels_last) and not conv.is_contiguous()


# --- attention and the VAE's tiles ---


def test_attention_is_scaled_dot_product_or_sliced_and_means_the_same(unet_inputs):
    found = []
    for sliced, name in ((False, "scaled-dot-product"), (True, "sliced")):
        unet, _ = adapted()
        randomise(unet)
        unet.set_attn_processor(AttnProcessor())
        assert attention.attention_in_use(unet) == "AttnProcessor"
        attention.use_attention(unet, sliced)
        assert attention.attention_in_use(unet) == name
        found.append([unet(*unet_inputs).sample, *gradients(unet, unet_inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_fresh_unet_uses_scaled_dot_product_attention():
    assert attention.attention_in_use(make_unet()) == attention.SDPA


def test_vae_slices_are_the_same_and_tiles_nearly(base):
    torch.manual_seed(0)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, deviation = base.encode_picture(pixels)
    before = base.vae_fingerprint()
    base.vae.tile_sample_min_size, base.vae.tile_latent_min_size = 16, 8
    attention.slice_vae(base.vae)
    sliced = base.encode_picture(pixels)
    torch.testing.assert_close(sliced[0], mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sliced[1], deviation, atol=1e-5, rtol=1e-5)
    assert base.vae_fingerprint() != before  # larger pictures' latents are others
    large = torch.rand(1, 3, 32, 32) * 2 - 1
    tiled, _ = base.encode_picture(large)
    base.vae.disable_tiling()
    assert base.vae_fingerprint() == before
    whole, _ = base.encode_picture(large)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert len(base.decode(mean)) == 3


# --- compiling ---


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def few_blocks(options=None, **changes):
    """A UNet of few blocks, as compiling is slow, with an adapter as if trained."""
    shape = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    unet = make_unet(**{**shape, **changes})
    inject.attach(unet, choose(unet, "attention"), options)
    randomise(unet)
    return unet


def test_compiled_blocks_compute_the_same_under_the_same_names(unet_inputs, fresh_compiler):
    plain, unet = few_blocks(), few_blocks()
    names = [name for name, _ in unet.named_modules()], list(unet.state_dict())
    layers = inject.lora_layers(unet).keys()
    assert compilation.compile_blocks(unet, backend="eager") == 9
    assert names == ([name for name, _ in unet.named_modules()], list(unet.state_dict()))
    assert inject.lora_layers(unet).keys() == layers
    for mine, other in zip(
        gradients(unet, unet_inputs), gradients(plain, unet_inputs), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_blocks_have_the_same_gradients(
    options, checkpointing, unet_inputs, fresh_compiler
):
    plain, _ = adapted(options)
    unet, _ = adapted(options)
    randomise(plain)
    randomise(unet)
    compilation.compile_blocks(unet, backend="aot_eager")
    if checkpointing:
        plain.enable_gradient_checkpointing()
        unet.enable_gradient_checkpointing()
    for mine, other in zip(
        gradients(unet, unet_inputs), gradients(plain, unet_inputs), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_only_training_is_compiled_and_any_size_is_after_the_second(unet_inputs, fresh_compiler):
    unet = few_blocks()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compilation.compile_blocks(unet, backend)
    _, timesteps, captions = unet_inputs
    unet.eval()
    unet(*unet_inputs)
    unet.train()
    with torch.no_grad():
        unet(*unet_inputs)
    assert not compiled
    counts = []
    for height, width in [(8, 8), (8, 12), (12, 8), (16, 12), (20, 16)]:
        sized = torch.randn(2, 4, height, width)
        unet(sized, timesteps, captions).sample.sum().backward()
        counts.append(len(compiled))
    assert counts[0] > 0 and counts[1] > counts[0]
    assert counts[-1] == counts[-2] == counts[-3]


@pytest.mark.slow
def test_dropout_in_compiled_blocks_goes_by_the_seed(unet_inputs, fresh_compiler):
    unet = few_blocks(LayerOptions(dropout=0.3, rank_dropout=0.3))
    compilation.compile_blocks(unet, backend="aot_eager")
    unet.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(unet(*unet_inputs).sample)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_compiled_unet_can_be_copied():
    unet = few_blocks()
    compilation.compile_blocks(unet, backend="eager")
    assert copy.deepcopy(unet).state_dict().keys() == unet.state_dict().keys()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("base_weights", ["full", "int8", "fp8", "nf4"])
def test_inductor_compiles_blocks_over_any_weights(base_weights, fresh_compiler):
    if reason := compilation.why_not_compile(CPU):
        pytest.skip(reason)
    from lora_sd.memory.quantization import quantize

    torch.manual_seed(2)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 16)
    found = []
    for compile in (False, True):
        unet = few_blocks(block_out_channels=(16,), cross_attention_dim=16)
        if base_weights != "full":
            quantize(unet, base_weights)
        if compile:
            compilation.compile_blocks(unet)
        found.append(gradients(unet, inputs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


# --- what cannot be ---


def problems(mixed_precision="no", device=CPU, **settings):
    with pytest.raises(ConfigError) as caught:
        memory.check(device, mixed_precision, **settings)
    return caught.value.problems


def test_settings_that_cannot_go_together_are_refused_in_a_sentence_each(monkeypatch):
    for kind, dora in itertools.product(("int8", "fp8", "nf4"), ("input", "output")):
        (said,) = problems(base_weights=kind, dora=dora)
        assert "adapter.dora" in said and kind in said
    (said,) = problems("fp16", adapter_dtype="bfloat16")
    assert "float32" in said and "bf16" in said
    (said,) = problems(device=torch.device("mps"), base_weights="fp8")
    assert "Apple" in said
    monkeypatch.setattr(compilation, "why_not_compile", lambda device: "there is no g++")
    (said,) = problems(compile=True)
    assert "no g++" in said and "memory.compile" in said
    assert len(problems("fp16", adapter_dtype="bfloat16", compile=True)) == 2
    monkeypatch.setattr(compilation, "why_not_compile", lambda device: "")
    (said,) = problems(compile=True, module_dropout=0.1)
    assert "adapter.module_dropout" in said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (said,) = problems(base_weights="int8")
    assert "pip install" in said and "torchao" in said


@pytest.mark.parametrize(
    ("mixed_precision", "settings"),
    [
        ("no", {}),
        ("bf16", {"adapter_dtype": "bfloat16", "base_weights": "nf4"}),
        ("fp16", {"base_weights": "int8"}),
        ("no", {"dora": "input", "adapter_dtype": "bfloat16"}),
    ],
)
def test_settings_that_can_go_together_are_let_through(mixed_precision, settings):
    memory.check(CPU, mixed_precision, **settings)


def test_a_gpu_without_float8_does_not_compile_it(monkeypatch):
    monkeypatch.setattr(compilation, "why_not_compile", lambda device: "")
    for capability, refused in (((8, 6), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        for kind in ("fp8", "int8"):
            settings = {"compile": True, "base_weights": kind}
            if refused and kind == "fp8":
                assert "int8" in problems(device=torch.device("cuda"), **settings)[0]
            else:
                memory.check(torch.device("cuda"), "bf16", **settings)


def test_a_compiler_that_fails_is_a_reason(monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fail)
    compilation.why_not_compile.cache_clear()
    try:
        assert compilation.why_not_compile(CPU) == "no compiler"
    finally:
        compilation.why_not_compile.cache_clear()


# --- all of it, in a run ---

SETTINGS = {
    "none": {},
    "int8": {"base_weights": "int8"},
    "fp8": {"base_weights": "fp8"},
    "nf4": {"base_weights": "nf4"},
    "bfloat16": {"adapter_dtype": "bfloat16"},
    "channels_last": {"channels_last": True},
    "sliced": {"attention_slicing": True, "vae_slicing": True},
    "all": {
        "base_weights": "int8",
        "adapter_dtype": "bfloat16",
        "channels_last": True,
        "attention_slicing": True,
        "vae_slicing": True,
        "idle_parts": "cpu",
    },
}


def steps(unet, optimizer, first, last):
    losses = []
    unet.train()
    for step in range(first, last):
        torch.manual_seed(step)
        inputs = torch.randn(2, 4, 8, 8), torch.randint(1000, (2,)), torch.randn(2, 5, 8)
        loss = (unet(*inputs).sample - torch.randn(2, 4, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_goes_on_to_the_bit_from_what_was_saved(settings, model_folder, tmp_path):
    from lora_sd.base_loading import load_base_model

    def begin():
        base = load_base_model(str(model_folder), CPU, torch.float32)
        layers = inject.attach(base.components, choose({"unet": base.unet}))
        told = memory.apply(base, layers, **settings)
        assert ("base_weights" in settings) == any("linear layers" in one for one in told)
        return base, layers, torch.optim.AdamW(learning(base.unet), lr=1e-2)

    base, layers, optimizer = begin()
    straight = steps(base.unet, optimizer, 0, 3)
    file = tmp_path / "adapter.safetensors"
    save_adapter(inject.collect(base.components, exact=True), file, torch.float32, exact=True)
    state = copy.deepcopy(optimizer.state_dict())
    straight += steps(base.unet, optimizer, 3, 6)
    result = inject.collect(base.components)

    again, fresh, optimizer = begin()
    inject.load(fresh, load_adapter(file, {n: one.weight.shape for n, one in layers.items()}))
    optimizer.load_state_dict(state)
    assert steps(again.unet, optimizer, 3, 6) == straight[3:]
    for name, weights in inject.collect(again.components).layers.items():
        assert torch.equal(weights.down, result.layers[name].down), name
        assert torch.equal(weights.up, result.layers[name].up), name
