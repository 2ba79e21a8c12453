"""Small colour profiles, written from the ICC specification, and what they mean in sRGB."""

import struct
from collections.abc import Sequence

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# Columns: the primaries' XYZ under D50.
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
)
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
ADOBE_RGB = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
ADOBE_GAMMA = 563 / 256


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    tags = {f"{c}XYZ": _xyz(primaries[:, i]) for i, c in enumerate("rgb")}
    tags |= {f"{c}TRC": _curve(gamma) for c in "rgb"}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile(corners: dict[tuple[int, int, int, int], tuple[float, float, float]]) -> bytes:
    """A printer's profile whose inks, full or none, give these Lab colours, else black."""
    table = b""
    for number in range(16):
        inks = tuple(number >> bit & 1 for bit in (3, 2, 1, 0))
        lightness, a, b = corners.get(inks, (0, 0, 0))
        table += bytes([round(lightness * 2.55), round(a + 128), round(b + 128)])
    identity = b"".join(_fixed(float(i == j)) for i in range(3) for j in range(3))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity
    lut += bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {"A2B0": lut})


def rgb_in_srgb(colour: Sequence[int], primaries: np.ndarray, gamma: float) -> tuple[int, ...]:
    xyz = primaries @ (np.array(colour) / 255) ** gamma
    return _encoded(np.linalg.solve(SRGB, xyz))


def grey_in_srgb(grey: int, gamma: float) -> tuple[int, ...]:
    return _encoded(np.full(3, (grey / 255) ** gamma))


def lab_in_srgb(lightness: float, a: float, b: float) -> tuple[int, ...]:
    y = (lightness + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    return _encoded(np.linalg.solve(SRGB, xyz))


def _encoded(linear: np.ndarray) -> tuple[int, ...]:
    linear = linear.clip(0, 1)
    values = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(int(value) for value in (values * 255).round())


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(float(value)) for value in values)


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(kind: bytes, colours: bytes, between: bytes, tags: dict[str, bytes]) -> bytes:
    tags = {"wtpt": _xyz(D50)} | tags
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s12s4s", offset + len(body), b"", 0x02400000, kind, colours,
                         between, b"\x07\xe8\0\1\0\1" + b"\0" * 6, b"acsp")  # fmt: skip
    header += b"\0" * 28 + b"".join(map(_fixed, D50))
    return header.ljust(128, b"\0") + table + body
