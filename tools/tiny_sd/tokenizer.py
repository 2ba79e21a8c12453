"""A byte-pair vocabulary in CLIP's format, in which every caption word is one token."""

import json
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from tools.tiny_sd.subjects import caption_words

MAX_LENGTH = 32
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2 and CLIP: any text can be spelled."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is a single symbol.

    Because the merges are applied in the order in which they were learned, each of the words is
    sure to come out whole.
    """
    spelled = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges = []
    while pairs := Counter(p for s in spelled for p in zip(s, s[1:], strict=False)):
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(pair)
        spelled = [merge(symbols, pair) for symbols in spelled]
    return merges


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Replace each occurrence of the pair, from the left."""
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        if tuple(symbols[position : position + 2]) == pair:
            merged.append("".join(pair))
            position += 2
        else:
            merged.append(symbols[position])
            position += 1
    return merged


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt to `folder` and load them as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_letters()
    merges = learn_merges(caption_words())
    symbols = [*letters, *(c + WORD_END for c in letters), *("".join(pair) for pair in merges)]
    vocabulary = {s: i for i, s in enumerate(dict.fromkeys([*symbols, START, END]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return CLIPTokenizer.from_pretrained(folder)
