"""Make `assets/clip_tokenizer/`: CLIP's tokenizer, for checkpoints that come without one.

    pip download open_clip_torch==3.3.0 --no-deps
    python -m tools.clip_tokenizer open_clip_torch-3.3.0-py3-none-any.whl

The package (MIT) ships CLIP's list of merges in the order in which they were learnt. Of it come the
two files that transformers reads: the merges that CLIP uses, and its 49,408 tokens, which are the
256 bytes, the same ending a word, one for each merge, and start and end.
"""

import gzip
import json
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "clip_tokenizer"
MERGES_IN_WHEEL = "open_clip/bpe_simple_vocab_16e6.txt.gz"
TOKENS = 49_408
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CONFIG = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
}


def byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's tokens: first the bytes that are
    printable themselves, then the others, which borrow the letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(256, 256 + others)]]


def build(all_merges: list[str]) -> tuple[dict[str, int], list[str]]:
    """(tokens with their ids, merges) of CLIP, of all merges that were learnt."""
    letters = byte_letters()
    merges = all_merges[: TOKENS - 2 * len(letters) - 2]
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    tokens += ["".join(merge.split()) for merge in merges]
    tokens += [START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def main(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(MERGES_IN_WHEEL)).decode("utf-8").split("\n")
    vocabulary, merges = build(lines[1:])  # the first line is a version
    FOLDER.mkdir(exist_ok=True)
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")),
        "merges.txt": "\n".join(["#version: 0.2", *merges]),
        "tokenizer_config.json": json.dumps(CONFIG, indent=2),
    }
    for name, text in files.items():
        (FOLDER / name).write_text(f"{text}\n", encoding="utf-8")
    print(f"{FOLDER}: {len(vocabulary)} tokens, {len(merges)} merges")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
