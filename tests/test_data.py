"""Cached pictures and captions are what the models give."""

import pytest
import torch
from conftest import PICTURE_PX

from lora_sd.data.cache import encode
from lora_sd.data.folder import read_folder
from lora_sd.randomness import picture_at


@pytest.mark.parametrize("pictures", [1, 5, 7])
def test_every_picture_is_seen_once_in_each_epoch(pictures):
    seen = [picture_at(position, pictures, seed=3) for position in range(4 * pictures)]
    for epoch in range(4):
        assert sorted(seen[epoch * pictures : (epoch + 1) * pictures]) == list(range(pictures))
    if pictures > 1:
        assert seen[:pictures] != seen[pictures : 2 * pictures]


def test_cached_latents_and_captions_are_what_the_models_give(base, image_folder):
    examples = read_folder(image_folder, PICTURE_PX).examples
    cache, notices = encode(base, examples, lambda done: False)
    pixels = base.pipeline().image_processor.preprocess(examples[1].picture())
    posterior = base.vae.encode(pixels).latent_dist
    torch.testing.assert_close(cache.mean[1:2], posterior.mean * base.vae.config.scaling_factor)
    tokens = base.tokenizer(
        "a green wall", padding="max_length", truncation=True, return_tensors="pt"
    )
    torch.testing.assert_close(cache.captions[1:2], base.text_encoder(tokens.input_ids)[0])
    assert cache.empty.shape == cache.captions[0].shape
    assert not torch.equal(cache.empty, cache.captions[0])


def test_captions_that_are_cut_are_told(base, image_folder):
    (image_folder / "0.txt").write_text("word " * 60)
    _, notices = encode(base, read_folder(image_folder, PICTURE_PX).examples, lambda done: False)
    assert "1 captions are longer than 14 tokens" in notices[0]
