"""Measure how fast many pictures are scanned, and in how much memory: run by hand.

    python tests/scan_speed.py FOLDER [PICTURES]

makes the pictures (1 MP, mixed JPEG and PNG, every file's content its own) in FOLDER, which must
not exist, scans them twice in processes that do nothing else, and removes them.
"""

import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

SIDE_PX = 1024
ORIGINALS = 24
ONE_SCAN = """
import json, sys, time
from pathlib import Path
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
began, cpu = time.monotonic(), time.process_time()
found = read_folders([FolderOptions(Path(sys.argv[1]))], index=Path(sys.argv[2]))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "pictures": len(found.pictures), "seconds": round(time.monotonic() - began, 1),
    "cpu_seconds": round(time.process_time() - cpu, 1), "peak_mib": int(peak.split()[1]) // 1024,
    "torch": "torch" in sys.modules,
}))
"""


def originals() -> list[tuple[str, bytes]]:
    """Pictures that compress like photographs: soft shapes with a little noise."""
    made = []
    for number in range(ORIGINALS):
        random = np.random.default_rng(number)
        soft = Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8))
        soft = soft.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        noise = random.normal(0, 3, (SIDE_PX, SIDE_PX, 3))
        picture = Image.fromarray((np.asarray(soft) + noise).clip(0, 255).astype(np.uint8))
        file = io.BytesIO()
        kind = "PNG" if number % 2 else "JPEG"
        picture.filter(ImageFilter.SMOOTH).save(file, kind, quality=92)
        made.append((".png" if kind == "PNG" else ".jpg", file.getvalue()))
    return made


def make(folder: Path, pictures: int) -> None:
    folder.mkdir()
    for number, (suffix, data) in zip(range(pictures), itertools.cycle(originals())):
        (folder / f"{number:05d}{suffix}").write_bytes(data + number.to_bytes(4, "big"))
        (folder / f"{number:05d}.txt").write_text(f"picture {number}")


def measure(folder: Path, pictures: int) -> list[dict[str, float]]:
    """What the first and the second scan took."""
    index = folder.with_name(folder.name + "-index.json")
    try:
        make(folder, pictures)
        command = [sys.executable, "-c", ONE_SCAN, str(folder), str(index)]
        return [json.loads(subprocess.check_output(command)) for _ in range(2)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        index.unlink(missing_ok=True)


if __name__ == "__main__":
    for result in measure(Path(sys.argv[1]), int([*sys.argv, 10_000][2])):
        print(result)
