"""What benchmarks/few_steps.py says of pictures of captions that mean many."""

import few_steps
import torch
from report import split_at_marks
from support import ROOT


def test_the_drawings_of_each_caption_are_compared(tmp_path):
    drawings = [torch.linspace(-1, 1, 4)[:, None, None, None].expand(4, 3, 2, 2)] * 2
    way = few_steps.Way("a", tmp_path, steps=4, cond_scale=2.0)
    name, evaluations, near, met, spread, share, apart = few_steps.row(
        way, drawings, drawings, drawings
    )
    assert (name, evaluations, met) == ("a", "8", "8 of 8")
    assert (float(near), float(share), float(apart)) == (0, 1, 0)
    # Levels 0, 1/3, 2/3, 1: three pairs are a third apart, two two thirds, one all.
    assert float(spread) == round((3 / 3 + 2 * 2 / 3 + 1) / 6, 4)

    one = [pictures[:1].expand(4, 3, 2, 2) for pictures in drawings]
    found = few_steps.row(way._replace(cond_scale=1), one, drawings, drawings)
    assert found[1:4] == ["4", "0.0000", "2 of 8"] and found[4:6] == ["0.0000", "0.00"]
    assert float(found[6]) == 0.5  # the mean of 0, 1/3, 2/3 and 1


def test_captions_are_kinds_and_pictures_the_demos(tmp_path):
    found = few_steps.written_drawings(tmp_path)
    assert [len(pictures) for pictures in found] == [
        len(names) for names in few_steps.KINDS.values()
    ]
    assert (tmp_path / "banana.txt").read_text() == "fruit"
    assert len(list(tmp_path.glob("*.png"))) == 47


def test_the_document_has_the_marks():
    split_at_marks(ROOT / "docs" / "few_steps.md", few_steps.MARK)
