"""docs/SEEDS.md: every example in it runs as it stands."""

import re

import pytest
from conftest import PROJECT

TEXT = (PROJECT / "docs" / "SEEDS.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (\d{3}): .*?(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_every_seed_has_a_section_with_one_example():
    assert SECTIONS == ["000", "001", "002", "003", "004"]
    assert len(EXAMPLES) == len(SECTIONS)


@pytest.mark.parametrize("example", EXAMPLES, ids=SECTIONS)
def test_an_example_runs(example):
    exec(compile(example, "docs/SEEDS.md", "exec"), {"__name__": "example"})
