"""Room for decoding: small pictures together, large ones in turn, and nothing waits for ever."""

import io
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from lora_sd.data import room
from lora_sd.data.room import room_for


def png(side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def most_at_once(datas):
    """How many of so many threads were let in at the same time."""
    inside, counts = [], []

    def work(data):
        with room_for(data):
            inside.append(1)
            counts.append(len(inside))
            time.sleep(0.03)
            inside.pop()

    with ThreadPoolExecutor(len(datas)) as pool:
        list(pool.map(work, datas))
    return max(counts)


@pytest.mark.parametrize(("side", "together"), [(10, 4), (20, 1), (14, 2)])
def test_pictures_are_in_work_together_as_far_as_their_pixels_go(monkeypatch, side, together):
    monkeypatch.setattr(room, "PIXELS_AT_ONCE", 400)
    assert most_at_once([png(side)] * 4) == together


def test_room_is_given_back_whatever_happens(monkeypatch):
    monkeypatch.setattr(room, "PIXELS_AT_ONCE", 400)
    for _ in range(2):
        with pytest.raises(MemoryError), room_for(png(20)):
            raise MemoryError
    assert room._in_work == 0


@pytest.mark.parametrize("data", [b"nothing", png(20)[:20], png(9000)])
def test_what_is_not_decoded_takes_no_room(data):
    with room_for(data):
        assert room._in_work == 0
