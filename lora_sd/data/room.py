"""Memory for decoding: threads wait while pictures of too many pixels together are in work."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from lora_sd.data.images import FORMATS, MOST_PIXELS

PIXELS_AT_ONCE = 2 * MOST_PIXELS
"""A transparent picture that is decoded and measured takes up to 21 bytes a pixel: 2.7 GB in all.
Without a bound, eight threads took 9.6 GB."""

# In blocks of 16 MB, Pillow's own size, the C library keeps what a thread has freed to itself, and
# the bound does not help; from 32 MB on it gives all back.
Image.core.set_block_size(2**26)

_changed = threading.Condition()
_in_work = 0


@contextmanager
def room_for(data: bytes) -> Iterator[None]:
    """Wait until there is room to decode a picture's file, and keep it. Not to be nested."""
    global _in_work
    pixels = _pixels(data)
    with _changed:
        _changed.wait_for(lambda: _in_work + pixels <= PIXELS_AT_ONCE)
        _in_work += pixels
    try:
        yield
    finally:
        with _changed:
            _in_work -= pixels
            _changed.notify_all()


def _pixels(data: bytes) -> int:
    """As the file's first bytes say; 0 for what is refused before it is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
    except Exception:  # of a damaged file, anything
        return 0
    return pixels if pixels <= MOST_PIXELS else 0
