"""Every rule of docs/data.md for captions, one by one."""

import pytest
from support import ROOT
from support.captions import CASES, write_case

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.captions import clean_caption
from imagen_scale.data.sources.opening import open_source
from imagen_scale.errors import DataError


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case, tmp_path):
    write_case(case, tmp_path / "set")
    config = DataConfig(source="folder", path=str(tmp_path / "set"))
    if case.refused:
        with pytest.raises(DataError, match=case.refused):
            open_source(config)
        return
    source = open_source(config)
    captions = dict(zip(source.keys, source.captions, strict=True))
    assert captions.get("case.png") == case.used
    assert [skipped.reason[: len(case.skipped)] for skipped in source.skipped] == (
        [case.skipped] if case.skipped else []
    )


def test_there_are_41_and_the_document_names_each():
    assert len({case.name for case in CASES}) == len(CASES) == 41
    document = (ROOT / "docs" / "data.md").read_text()
    for case in CASES:
        assert f"| {case.name} |" in document, case.name


@pytest.mark.parametrize("caption", ["a cat", "a\u200dcat", "ا", "🐱", "\u0301a"])
def test_a_clean_caption_stays(caption):
    assert clean_caption(caption) == caption
