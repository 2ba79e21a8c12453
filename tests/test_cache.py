"""Encoding ahead: what the models give, once, whatever is encoded beside it."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_store import is_same

from lora_sd.base_loading import load_base_model
from lora_sd.data import cache
from lora_sd.data.augment import apply, choose_variant, drawn_crop, variant_count
from lora_sd.data.buckets import fit
from lora_sd.data.cache import encode_captions, encode_views, latent_key, text_key, to_pixels
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.picture_set import load_picture
from lora_sd.data.store import DiskStore, MemoryStore
from lora_sd.data.views import View
from lora_sd.errors import DataError, UserError

SIDE_PX = 24


def go_on(done, of):
    return False


@pytest.fixture
def folder(tmp_path):
    """Six pictures of noise, of three shapes; one has a mask."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "noise"
    folder.mkdir()
    for number, size in enumerate([(40, 40), (60, 40), (40, 60)] * 2):
        values = draw.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise, number {number}")
    mask = Image.new("L", (40, 40))
    mask.paste(255, (0, 0, 10, 40))
    mask.save(folder / "0-mask.png")
    return folder


def views_of(folder, **options):
    options = FolderOptions(folder, resolution_px=(SIDE_PX,), **options)
    pictures = read_folders([options]).pictures
    return [View(one, fit(one.size_px, SIDE_PX, 8)) for one in pictures]


def entries(base, views, store):
    """All latents that a store holds of some views."""
    numbers = range(variant_count(views[0].picture.options))
    return [store.get(latent_key(view, number, base)) for view in views for number in numbers]


def all_same(some, others):
    return all(is_same(one, other) for one, other in zip(some, others, strict=True))


WILD = {"flip": True, "crop_jitter": 0.3, "colour_jitter": 0.2, "variants": 3, "masks": "file"}


def test_entries_are_what_the_vae_gives_for_the_crop(base, folder):
    views, store = views_of(folder, **WILD), MemoryStore()
    assert encode_views(base, views, store, on_done=go_on) == 18
    for view in views:
        picture, mask = load_picture(view.picture)
        for number in range(3):
            variant = choose_variant(view.picture, view.crop, number)
            drawn, _ = apply(variant, picture, mask)
            mean, deviation = base.encode_picture(to_pixels(drawn)[None])
            entry = store.get(latent_key(view, number, base))
            assert torch.equal(entry["mean"], mean[0]) and mean.dtype == torch.float32
            assert torch.equal(entry["deviation"], deviation[0])
            assert variant.crop == drawn_crop(view.picture, view.crop, number)
            assert ("mask" in entry) == (view.picture.name == "0.png")


def test_the_plain_variant_is_what_the_vae_s_own_preprocessing_gives(base, folder):
    view, store = views_of(folder)[0], MemoryStore()
    encode_views(base, [view], store, on_done=go_on)
    picture = Image.open(folder / "0.png").resize((24, 24), Image.Resampling.LANCZOS)
    pixels = base.pipeline().image_processor.preprocess(picture)
    posterior = base.vae.encode(pixels).latent_dist
    entry = store.get(latent_key(view, 0, base))
    scale = base.vae.config.scaling_factor
    torch.testing.assert_close(entry["mean"], posterior.mean[0] * scale)
    torch.testing.assert_close(entry["deviation"], posterior.std[0] * scale)


def test_a_mask_is_the_share_of_each_latent_that_counts(base, folder):
    view, store = views_of(folder, masks="file", flip=True)[0], MemoryStore()
    encode_views(base, [view], store, on_done=go_on)
    mask = store.get(latent_key(view, 0, base))["mask"]
    assert mask.shape == (1, 12, 12) and mask.min() == 0 and mask.max() == 1
    assert float(mask.mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(mask[0, :, 0], torch.ones(12)) and not mask[0, :, 6:].any()
    mirrored = store.get(latent_key(view, 1, base))["mask"]
    assert torch.allclose(mirrored, mask.flip(2), atol=0.01)


def test_memory_and_disk_hold_the_same(base, folder, tmp_path):
    views = views_of(folder, **WILD)
    stores = [MemoryStore(), DiskStore(tmp_path / "cache")]
    assert [encode_views(base, views, store, on_done=go_on) for store in stores] == [18, 18]
    assert all_same(*(entries(base, views, store) for store in stores))


def test_nothing_is_encoded_twice(base, folder, tmp_path):
    views = views_of(folder, **WILD)
    encode_views(base, views, DiskStore(tmp_path / "cache"), on_done=go_on)
    base.encode_picture = None
    next_run = DiskStore(tmp_path / "cache")
    assert encode_views(base, [*views, *views], next_run, on_done=go_on) == 0
    assert next_run.damaged == 0


@pytest.mark.parametrize("workers", [2, 5])
def test_an_entry_depends_on_nothing_beside_it(base, folder, monkeypatch, workers):
    views, alone, together = views_of(folder, **WILD), MemoryStore(), MemoryStore()
    monkeypatch.setattr(cache, "_workers", lambda *_: 1)
    for view in reversed(views):
        encode_views(base, [view], alone, on_done=go_on)
    monkeypatch.setattr(cache, "_workers", lambda *_: workers)
    encode_views(base, views, together, on_done=go_on)
    assert all_same(entries(base, views, alone), entries(base, views, together))


def test_progress_is_told_in_the_calling_thread(base, folder):
    told = []

    def on_done(done, of):
        told.append((done, of, threading.current_thread()))

    encode_views(base, views_of(folder, flip=True), MemoryStore(), on_done=on_done)
    assert told == [(done, 12, threading.current_thread()) for done in range(1, 13)]


def test_a_stop_keeps_what_is_done_and_the_next_run_makes_the_rest(base, folder, monkeypatch):
    monkeypatch.setattr(cache, "_workers", lambda *_: 2)
    views, store, encode = views_of(folder, flip=True), MemoryStore(), base.encode_picture

    def slowly(pixels):
        time.sleep(0.05)
        return encode(pixels)

    base.encode_picture = slowly
    made = encode_views(base, views, store, on_done=lambda done, of: done == 3)
    assert 3 <= made <= 6  # each of two threads ends what it is at
    assert sum(entry is not None for entry in entries(base, views, store)) == made
    assert encode_views(base, views, store, on_done=go_on) == 12 - made


def test_an_error_ends_the_work(base, folder):
    def on_done(done, of):
        raise KeyboardInterrupt

    store = MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        encode_views(base, views_of(folder), store, on_done=on_done)
    assert not [one for one in threading.enumerate() if one.name.startswith("encode")]


def test_a_damaged_entry_is_made_again_and_counted(base, folder, tmp_path):
    views, store = views_of(folder), DiskStore(tmp_path / "cache")
    encode_views(base, views, store, on_done=go_on)
    before = entries(base, views, store)
    file = next((tmp_path / "cache").rglob(f"{latent_key(views[2], 0, base)}*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert encode_views(base, views, store, on_done=go_on) == 1
    assert store.damaged == 1 and all_same(before, entries(base, views, store))


def test_a_picture_is_read_once_for_all_its_views_and_then_let_go(base, folder, monkeypatch):
    monkeypatch.setattr(cache, "_workers", lambda *_: 2)
    read, held, most = [], [], []

    def counted(picture):
        read.append(picture.name)
        loaded = load_picture(picture)
        held.append(weakref.ref(loaded[0]))
        most.append(sum(one() is not None for one in held))
        return loaded

    monkeypatch.setattr(cache, "load_picture", counted)
    views = views_of(folder, crop_jitter=0.2)
    smaller = [View(view.picture, fit(view.picture.size_px, 16, 8)) for view in views]
    alternating = [view for pair in zip(views, smaller, strict=True) for view in pair]
    assert encode_views(base, alternating, MemoryStore(), on_done=go_on) == 96
    assert sorted(read) == [f"{number}.png" for number in range(6)]
    assert max(most) <= 3


def test_all_pictures_whose_latents_are_not_finite_are_named(base, folder):
    views, store, encode = views_of(folder), MemoryStore(), base.encode_picture

    def overflow(pixels):
        mean, deviation = encode(pixels)
        return (mean * float("inf") if pixels.shape[2] > pixels.shape[3] else mean), deviation

    base.encode_picture = overflow
    with pytest.raises(DataError, match="not finite numbers for .*2.png' and .*5.png'"):
        encode_views(base, views, store, on_done=go_on)
    assert sum(entry is not None for entry in entries(base, views, store)) == 4


def test_all_pictures_that_changed_meanwhile_are_named(base, folder):
    views, store = views_of(folder, flip=True), MemoryStore()
    Image.new("RGB", (40, 40)).save(folder / "3.png")
    (folder / "4.png").unlink()
    with pytest.raises(DataError) as caught:
        encode_views(base, views, store, on_done=go_on)
    assert ["3.png" in caught.value.problems[0], "4.png" in caught.value.problems[1]] == [True] * 2
    assert len(caught.value.problems) == 2
    assert sum(entry is not None for entry in entries(base, views, store)) == 8


def test_a_store_that_cannot_be_written_is_told(base, folder, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cache' cannot be written"):
        encode_views(base, views_of(folder), DiskStore(tmp_path / "cache"), on_done=go_on)


def test_each_thread_computes_on_one_core_and_what_was_set_comes_back(base, folder):
    seen, encode = set(), base.encode_picture

    def watched(pixels):
        seen.add(torch.get_num_threads())
        return encode(pixels)

    base.encode_picture = watched
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        encode_views(base, views_of(folder), MemoryStore(), on_done=go_on)
        assert seen == {1} and torch.get_num_threads() == 3
        with ThreadPoolExecutor() as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_a_narrow_vae_is_asked_one_picture_at_a_time(model_folder, folder, monkeypatch):
    """It may be widened for a picture that it overflows on."""
    monkeypatch.setattr(cache, "_workers", lambda *_: 4)
    base = load_base_model(str(model_folder), torch.device("cpu"), torch.bfloat16)
    busy, most, encode = [], [], base.encode_picture

    def watched(pixels):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.01)
        busy.pop()
        return encode(pixels)

    base.encode_picture = watched
    store, views = MemoryStore(), views_of(folder)
    encode_views(base, views, store, on_done=go_on)
    assert max(most) == 1
    assert {entry["mean"].dtype for entry in entries(base, views, store)} == {torch.float32}


def test_large_pictures_are_encoded_by_as_many_threads_as_memory_holds():
    cpu = torch.device("cpu")
    assert cache._workers(10**15, cpu) == 1 <= cache._workers(1, cpu) == cache._workers(0, cpu)


def keys(base, view, **changes):
    """Variants' keys of a view whose picture or options are changed."""
    picture = view.picture
    on_options = {k: v for k, v in changes.items() if hasattr(picture.options, k)}
    on_picture = {k: v for k, v in changes.items() if k not in on_options and k != "crop"}
    picture = replace(picture, options=replace(picture.options, **on_options), **on_picture)
    view = View(picture, changes.get("crop", view.crop))
    return [latent_key(view, number, base) for number in range(3)]


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"sha256": "ab" * 32}, [0, 1, 2]),
        ({"mask_sha256": "ab" * 32}, [0, 1, 2]),
        ({"masks": "alpha"}, [0, 1, 2]),
        ({"background": "black"}, [0, 1, 2]),
        ({"crop": fit((40, 40), 8, 8)}, [0, 1, 2]),
        ({"crop_jitter": 0.4}, [1, 2]),
        ({"colour_jitter": 0.1}, [1, 2]),
        ({"flip": False}, [1]),
        ({"variants": 8}, []),
        ({"name": "b.png", "repeats": 4.0}, []),
        ({"caption": "else", "loss_weight": 3.0, "shuffle_tags": True, "unmasked_weight": 0.5}, []),
    ],
)
def test_a_key_changes_with_what_the_latents_depend_on(base, folder, changes, changed):
    view = views_of(folder, **WILD)[0]
    before, after = keys(base, view), keys(base, view, **changes)
    assert len(set(before)) == 3
    assert [number for number in range(3) if before[number] != after[number]] == changed


def test_keys_change_with_the_models(base, folder):
    view = views_of(folder)[0]
    before = latent_key(view, 0, base), text_key("a", base, 75)
    assert text_key("b", base, 75) != before[1] != text_key("a", base, 150)
    base.vae_fingerprint = base.text_fingerprint = lambda: "of other weights"
    assert latent_key(view, 0, base) != before[0] and text_key("a", base, 75) != before[1]


@pytest.mark.parametrize("workers", [1, 4])
def test_captions_are_encoded_as_each_alone(base, monkeypatch, workers):
    monkeypatch.setattr(cache, "_workers", lambda *_: workers)
    texts, store, told = (
        [f"word {number}" for number in range(9)] + ["", "word 3"],
        MemoryStore(),
        [],
    )
    made = encode_captions(
        base, texts, store, 150, on_done=lambda done, of: bool(told.append((done, of)))
    )
    assert made == 10 and told == [(done, 10) for done in range(1, 11)]
    for text in texts:
        alone = base.encode_text([text], 150)
        entry = store.get(text_key(text, base, 150))
        assert is_same(entry, {"hidden": alone.hidden[0]})
    assert encode_captions(base, texts, store, 150, on_done=go_on) == 0


def test_captions_are_encoded_without_gradient(base):
    base.text_encoder.requires_grad_(True)
    store = MemoryStore()
    encode_captions(base, ["a"], store, 75, on_done=go_on)
    assert not store.get(text_key("a", base, 75))["hidden"].requires_grad


def test_captions_stop_and_go_on(base, tmp_path):
    texts, store = [str(number) for number in range(30)], DiskStore(tmp_path / "cache")
    made = encode_captions(base, texts, store, 75, on_done=lambda done, of: done == 2)
    assert made >= 2
    assert encode_captions(base, texts, store, 75, on_done=go_on) == 30 - made
