"""Captions as the UNet reads them: as diffusers' own pipelines, and longer than those can."""

import pytest
import torch
from make_bases import make_base

from lora_sd import inject
from lora_sd.base_loading import load_base_model

CPU = torch.device("cpu")
TEXTS = ["a photo of a cat", "two dogs, and a wall of red bricks"]
LONG = " ".join(["red"] * 80 + ["cat"] * 100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: make_base(kind, root / kind) for kind in ("sd1", "sd2", "sdxl")}


@pytest.fixture(scope="module")
def bases(folders):
    return {kind: load(folder) for kind, folder in folders.items()}


def load(folder, **options):
    return load_base_model(str(folder), CPU, torch.float32, **options)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_short_texts_are_read_as_diffusers_reads_them(bases, kind):
    base = bases[kind]
    embedding = base.encode_text(TEXTS)
    expected = base.pipeline().encode_prompt(
        TEXTS, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(embedding.hidden, expected[0])
    assert embedding.hidden.shape[:2] == (2, 77)
    if kind == "sdxl":
        assert torch.equal(embedding.pooled, expected[2])
    else:
        assert embedding.pooled is None


def test_known_tokens_and_their_padding(bases):
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]
    pads = {"sd1": [49407], "sd2": [0], "sdxl": [49407, 0]}
    for kind, base in bases.items():
        tokens = base.tokens(["a photo of a cat"])
        assert tokens.shape == (1, len(pads[kind]), 1, 77) and tokens.dtype == torch.int64
        for ids, pad in zip(tokens[0, :, 0].tolist(), pads[kind], strict=True):
            assert ids == cat + [pad] * 70
        assert base.token_counts(["a photo of a cat", ""]) == [5, 0]


def test_long_texts_are_read_in_chunks_with_starts_and_ends_of_their_own(bases):
    base = bases["sdxl"]
    tokens = base.tokens([LONG, "cat"], max_tokens=225)
    assert tokens.shape == (2, 2, 3, 77)
    assert base.max_tokens_for(["a cat", LONG]) == 225 and base.max_tokens_for(["a"]) == 75
    assert (tokens[:, :, :, 0] == 49406).all()
    assert (tokens[0, :, :2, 76] == 49407).all()  # a full chunk ends
    assert (tokens[1, :, 1:, 1] == 49407).all()  # an empty chunk ends at once
    red, cat = base.tokens(["red"])[0, 0, 0, 1], base.tokens(["cat"])[0, 0, 0, 1]
    assert (tokens[0, 0] == red).sum() == 80 and (tokens[0, 0] == cat).sum() == 100
    embedding = base.encode_tokens(tokens)
    assert embedding.hidden.shape[:2] == (2, 3 * 77)
    for chunk in range(3):
        part = base.encode_tokens(tokens[:, :, chunk : chunk + 1])
        shown = embedding.hidden[:, 77 * chunk : 77 * (chunk + 1)]
        torch.testing.assert_close(shown, part.hidden)
    first = base.encode_tokens(tokens[:, :, :1])
    torch.testing.assert_close(embedding.pooled, first.pooled)


def test_what_is_too_long_is_cut(bases):
    base = bases["sd1"]
    assert torch.equal(base.tokens([LONG]), base.tokens([LONG + " dog"]))
    assert torch.equal(base.tokens([LONG])[0, 0, 0], base.tokens([LONG], 150)[0, 0, 0])


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_clip_skip_takes_an_earlier_layer_and_norms_it(folders, kind):
    base = load(folders[kind], clip_skip=2)
    encoder = base.text_encoder
    ids = base.tokens(TEXTS)[:, 0, 0]
    state = encoder(ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(base.encode_text(TEXTS).hidden, encoder.final_layer_norm(state))
    assert base.text_fingerprint() != load(folders[kind]).text_fingerprint()


def test_the_last_layer_is_the_same_by_either_way(bases):
    base = bases["sd1"]
    encoder = base.text_encoder
    ids = base.tokens(TEXTS)[:, 0, 0]
    state = encoder(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(base.encode_text(TEXTS).hidden, encoder.final_layer_norm(state))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_wrapped_encoder_learns(folders, kind):
    base = load(folders[kind])

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.inner(*args, **kwargs)

    wrapped = [Wrapper(encoder) for encoder in base.text_encoders]
    base.text_encoder.requires_grad_(True)
    embedding = base.encode_tokens(base.tokens(TEXTS), wrapped)
    embedding.hidden.sum().backward()
    assert [one.calls for one in wrapped] == [1] * len(wrapped)
    weight = base.text_encoder.encoder.layers[0].mlp.fc1.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert not base.encode_text(TEXTS).hidden.requires_grad


def test_a_scale_for_each_text_holds_for_all_its_chunks(bases, folders):
    base = load(folders["sdxl"])
    layers = inject.attach(
        base.components,
        [
            plan
            for plan in _plans(base)
            if plan.name.endswith("layers.0.mlp.fc1") and "text_encoder" in plan.name
        ],
    )
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_up.weight)
    inject.set_scale(base.components, torch.tensor([0.0, 1.0]))
    embedding = base.encode_text([LONG, LONG], 225)
    plain = bases["sdxl"].encode_text([LONG], 225)
    torch.testing.assert_close(embedding.hidden[:1], plain.hidden)
    apart = (embedding.hidden[1] - plain.hidden[0]).abs().view(3, -1).amax(1)
    assert (apart > 1e-3).all()


def _plans(base):
    from lora_sd.layer_choice import choose_layers
    from lora_sd.layer_names import layer_shapes

    return choose_layers(
        layer_shapes(base.components), "attention-ff", rank=2, alpha=2, conv_rank=0, conv_alpha=2
    )
