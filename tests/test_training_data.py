"""What a step sees: the same pictures, however it is worked through."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import PICTURE_PX
from PIL import Image

from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.store import MemoryStore
from lora_sd.data.training_data import TrainingData
from lora_sd.data.views import make_views
from lora_sd.errors import DataError
from lora_sd.objective import Objective

STEP = 8


def data_of(base, *folders, step_pictures=STEP, seed=3, **options):
    """The encoded training data of folders."""
    views, _ = make_views(read_folders(folders), 8)
    data = TrainingData(
        base,
        views,
        MemoryStore(),
        Objective(base.noise_schedule()),
        seed=seed,
        step_pictures=step_pictures,
        **options,
    )
    data.encode(lambda done, of: False)
    return data


@pytest.fixture
def folder(image_folder):
    """Five squares and two landscapes, which are of a second bucket."""
    for number in (5, 6):
        Image.new("RGB", (32, 8), (number * 30, 0, 90)).save(image_folder / f"{number}.png")
        (image_folder / f"{number}.txt").write_text(f"a long wall, number {number}")
    return FolderOptions(image_folder, resolution_px=(PICTURE_PX,), max_aspect_ratio=4)


def rows(batches):
    """Each picture of some batches that counts, as plain numbers."""
    return sorted(
        (
            batch.captions[i],
            int(batch.timesteps[i]),
            batch.latents[i].flatten().tolist(),
            batch.noise[i].flatten().tolist(),
            batch.time_ids[i].tolist(),
            float(batch.weights[i]),
        )
        for batch in batches
        for i in range(len(batch.captions))
        if batch.weights[i] > 0
    )


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (3, 1), (2, 2), (1, 3), (8, 2)])
def test_a_step_is_the_same_however_it_is_worked_through(base, folder, batch_size, world):
    data = data_of(base, folder)
    for step in range(3):
        whole = rows(data.batches(step, STEP))
        parts = [data.batches(step, batch_size, world, rank) for rank in range(world)]
        assert rows(batch for part in parts for batch in part) == whole
        assert len(whole) == STEP
        assert sum(row[-1] for row in whole) == pytest.approx(1)
        assert len({len(part) for part in parts}) == 1  # or processes would wait for ever
        sizes = [len(batch.captions) for part in parts for batch in part]
        assert max(sizes) <= batch_size


def test_a_batch_holds_pictures_of_one_size(base, folder):
    data = data_of(base, folder)
    shapes = {tuple(b.latents.shape[2:]) for step in range(4) for b in data.batches(step, 3)}
    assert shapes == {(8, 8), (4, 16)}


def test_each_picture_is_seen_as_often_as_promised(base, folder):
    twice = replace(folder, repeats=2.0, caption_dropout=0.0)
    data = data_of(base, twice, step_pictures=14)
    seen = Counter(text for batch in data.batches(0, 14) for text in batch.captions)
    assert len(seen) == 7 and set(seen.values()) == {2}


def test_nothing_is_drawn_twice_and_another_seed_draws_otherwise(base, folder):
    data = data_of(base, folder)
    noises = [tuple(row[3]) for step in range(4) for row in rows(data.batches(step, 4))]
    assert len(set(noises)) == len(noises) == 4 * STEP
    other = data_of(base, folder, seed=4)
    assert rows(other.batches(0, 4)) != rows(data.batches(0, 4))


def test_the_caption_is_dropped_as_often_as_asked(base, folder):
    none = data_of(base, replace(folder, caption_dropout=1.0)).batches(0, STEP)
    assert {text for batch in none for text in batch.captions} == {""}
    assert torch.equal(none[0].text.hidden[0], base.encode_text([""]).hidden[0])
    some = data_of(base, replace(folder, caption_dropout=0.5))
    texts = [t for step in range(40) for b in some.batches(step, STEP) for t in b.captions]
    assert 0.4 < texts.count("") / len(texts) < 0.6


def test_texts_that_are_drawn_anew_are_left_to_the_text_encoder(base, folder):
    data = data_of(base, replace(folder, shuffle_tags=True, caption_dropout=0.0))
    (first, *_) = [b for b in data.batches(0, STEP) if b.latents.shape[3] == 16]
    assert first.text is None
    texts = {t for step in range(20) for b in data.batches(step, STEP) for t in b.captions}
    assert {"a long wall, number 5", "number 5, a long wall"} <= texts


def test_regularisation_pictures_balance_the_others_and_bring_their_weight(base, folder, tmp_path):
    (tmp_path / "class").mkdir()
    for number in range(3):
        file = tmp_path / "class" / f"{number}.png"
        Image.new("RGB", (PICTURE_PX, PICTURE_PX), (0, number, 0)).save(file)
    prior = FolderOptions(
        tmp_path / "class",
        kind="regularisation",
        loss_weight=0.5,
        caption="a wall",
        resolution_px=(PICTURE_PX,),
    )
    data = data_of(base, folder, prior, step_pictures=14)
    shown = [row for row in rows(data.batches(0, 14)) if row[0] == "a wall"]
    assert len(shown) == 7
    assert all(row[-1] == pytest.approx(0.5 / 14) for row in shown)


def test_validation_pictures_are_never_trained_on_and_always_the_same(base, folder, tmp_path):
    (tmp_path / "kept").mkdir()
    Image.new("RGB", (PICTURE_PX, PICTURE_PX), "pink").save(tmp_path / "kept" / "a.png")
    kept = FolderOptions(
        tmp_path / "kept", kind="validation", caption="pink", resolution_px=(PICTURE_PX,)
    )
    data = data_of(base, folder, kept)
    assert all("pink" not in b.captions for step in range(4) for b in data.batches(step, STEP))
    first, again = list(data.held_out_batches(8)), list(data.held_out_batches(8))
    assert [rows([b]) for _, b in first] == [rows([b]) for _, b in again]
    ((places, batch),) = first
    assert places == [0, 1, 2, 3] and len(set(batch.timesteps.tolist())) == 4
    apart = list(data.held_out_batches(3))
    assert [places for places, _ in apart] == [[0, 1, 2], [3]]
    assert rows([b for _, b in apart]) == rows([batch])


def test_masks_weigh_the_loss_place_by_place(base, folder, image_folder):
    half = Image.new("RGBA", (PICTURE_PX, PICTURE_PX), (200, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, PICTURE_PX // 2, PICTURE_PX))
    half.save(image_folder / "0.png")
    data = data_of(base, replace(folder, masks="alpha", unmasked_weight=0.25, caption_dropout=0.0))
    masks = {}
    for batch in data.batches(0, STEP):
        for number, text in enumerate(batch.captions):
            if batch.mask is not None:
                masks[text] = batch.mask[number]
    assert masks["a red wall"][0, :, 0].tolist() == [0.25] * 8
    assert masks["a red wall"][0, :, -1].tolist() == [1.0] * 8
    assert torch.equal(masks["a green wall"], torch.ones(1, 8, 8))


def test_what_leaves_the_cache_is_encoded_again(base, folder):
    data = data_of(base, folder)
    before = rows(data.batches(0, STEP))
    data._store = MemoryStore()
    assert rows(data.batches(0, STEP)) == before


def test_a_cache_that_keeps_nothing_is_said(base, folder, monkeypatch):
    data = data_of(base, folder)
    data._store = MemoryStore()
    monkeypatch.setattr(MemoryStore, "put", lambda *_: None)
    with pytest.raises(DataError, match="does not keep it"):
        data.batches(0, STEP)


@pytest.mark.parametrize("options", [{}, {"shuffle_tags": True}, {"learns_text": True}])
def test_captions_that_are_cut_are_told_whatever_is_drawn(base, folder, image_folder, options):
    (image_folder / "0.txt").write_text("word, " * 60)
    learns = {"learns_text": options.pop("learns_text", False)}
    data = data_of(base, replace(folder, **options), **learns)
    assert any("1 caption of more than" in said for said in data.encode(lambda *_: False))


def test_an_epoch_may_be_less_than_a_picture(base, folder):
    data = data_of(base, replace(folder, repeats=0.01))
    assert data.order.epoch_size(0) == 0 and data.order.mean_epoch_size == pytest.approx(0.07)
    assert len(rows(data.batches(0, STEP))) == STEP


def test_pictures_too_small_for_any_bucket_are_named_or_left_out(folder, image_folder):
    Image.new("RGB", (7, 40), "red").save(image_folder / "0.png")
    found = read_folders([folder])
    with pytest.raises(DataError, match=r"0\.png.* has 7 x 40 pixels"):
        make_views(found, 8)
    views, too_small = make_views(found, 8, "skip")
    assert len(views) == 6 and too_small[0].file.name == "0.png"
    assert len(make_views(read_folders([replace(folder, upscale=True)]), 8)[0]) == 7


def test_several_resolutions_show_each_picture_at_each(base, folder):
    views, _ = make_views(read_folders([replace(folder, resolution_px=(8, 16))]), 8)
    assert len(views) == 14
    assert {view.crop.size_px for view in views} == {(8, 8), (16, 16), (32, 8)}
