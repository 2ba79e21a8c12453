"""The tokenizer that ships with the project, and where a base's tokenizers come from."""

import json
import shutil

import pytest
from make_bases import make_base
from transformers import CLIPTokenizer

from lora_sd.base_files import open_base
from lora_sd.base_files.tokenizers import load_tokenizers
from lora_sd.errors import BaseModelError
from lora_sd.known_bases import CLIP_TOKENIZER, CLIP_TOKENS
from tools.clip_tokenizer import TOKENS, build

TEXTS = ["a photo of a cat", "hello! World's 1st\n 猫 <|endoftext|> 😀"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: make_base(kind, root / kind) for kind in ("sd1", "sd2", "sdxl")}


def test_known_ids_of_clip():
    tokenizer = CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER))
    assert len(tokenizer) == TOKENS == CLIP_TOKENS and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello  WORLD!").input_ids == [49406, 3306, 1002, 256, 49407]


def test_the_tokens_follow_from_the_merges():
    merges = (CLIP_TOKENIZER / "merges.txt").read_text(encoding="utf-8").splitlines()
    tokens, used = build([*merges[1:], "a merge that CLIP does not use"])
    assert tokens == json.loads((CLIP_TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
    assert used == merges[1:]


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_folder_without_tokenizers_gets_clip_s(folders, kind, tmp_path):
    own = load_tokenizers(open_base(str(folders[kind])))
    bare = shutil.copytree(folders[kind], tmp_path / "bare")
    for name in own:
        shutil.rmtree(bare / name)
    shipped = load_tokenizers(open_base(str(bare)))
    assert shipped.keys() == own.keys()
    for name, tokenizer in shipped.items():
        for text in (TEXTS[0], TEXTS[1].replace("!", "")):
            options = {"padding": "max_length", "max_length": 77}
            assert tokenizer(text, **options).input_ids == own[name](text, **options).input_ids


@pytest.mark.parametrize("damage", ["no JSON", "other tokens"])
def test_a_damaged_tokenizer_is_refused(folders, tmp_path, damage):
    broken = shutil.copytree(folders["sd1"], tmp_path / "broken")
    if damage == "no JSON":
        (broken / "tokenizer" / "tokenizer.json").write_text("[")
    else:
        shutil.rmtree(broken / "tokenizer")
        (broken / "tokenizer").mkdir()
        tokens = {f"t{number}": number for number in range(60_000)}
        (broken / "tokenizer" / "vocab.json").write_text(json.dumps(tokens))
        (broken / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    said = {"no JSON": "is damaged", "other tokens": "60,0.*49,408"}[damage]
    with pytest.raises(BaseModelError, match=f"tokenizer of the base model.*{said}"):
        load_tokenizers(open_base(str(broken)))
