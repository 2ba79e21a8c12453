"""Facts of a base that the data report needs: those of the loaded model, without loading it."""

import shutil
from pathlib import Path

import pytest
from make_bases import save_single_file

from lora_sd.base_model import BaseModel
from lora_sd.data.report.base_facts import base_facts
from lora_sd.errors import BaseModelError


@pytest.mark.parametrize("model, step_px", [("tiny-sd", 16), ("sd15", 64), ("sdxl", 32)])
def test_facts_of_a_base(model: str, step_px: int) -> None:
    text = "A Photo of sks cat"
    facts = base_facts(model)
    assert facts.step_px == step_px
    assert [text[begin:end] for begin, end in facts.spans(text)] == text.split()


def test_facts_of_a_base_are_those_of_the_loaded_model(base: BaseModel) -> None:
    facts = base_facts(base.name)
    assert facts.step_px == base.size_step_px
    assert [len(facts.spans("a cat"))] == base.token_counts(["a cat"])


def test_facts_of_a_single_file_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    """With a tokenizer of its own, which the file carries."""
    single = str(save_single_file("tiny-sd", tmp_path / "one.safetensors"))
    facts, embedded = base_facts(single), base_facts("tiny-sd")
    assert facts.step_px == embedded.step_px == 16 and not facts.notice
    assert facts.spans("Zwölf foxes") == embedded.spans("Zwölf foxes")
    assert facts.spans("Zwölf foxes") != base_facts("sd15").spans("Zwölf foxes")


def test_a_base_that_does_not_say_how_it_is_built_is_told(base: BaseModel, tmp_path: Path) -> None:
    folder = shutil.copytree(base.name, tmp_path / "model")
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(BaseModelError, match="lacks 'vae/config.json'") as caught:
        base_facts(str(folder))
    assert "name its family" in caught.value.problems[-1]
