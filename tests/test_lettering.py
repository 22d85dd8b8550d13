"""Captions in pictures: no letter is a box, none is lost, and different ones look different."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from imagen_scale.files import lettering
from imagen_scale.files.labels import fit_labels
from imagen_scale.files.pictures import FRAME, LABEL_HEIGHT, MARGIN, MIN_CELL, save_grid

TEXTS = ["red heart", "Äpfel, café", "жук αβγ", "سمكة حمراء", "שלום", "漢字 and ひらがな", "한국어",
         "a 🍕 and ❤️ and 👩‍🚀", "ไทย हिन्दी", "e\u0301 \u200b \ufffd \ue000 \U0010fffe"]  # fmt: skip


def forget():
    for kept in (lettering._files, lettering._file_with, lettering._is_missing):
        kept.cache_clear()


@pytest.fixture
def no_fonts(monkeypatch):
    """A machine without a font of its own."""
    monkeypatch.setattr(lettering, "_folders", lambda: [])
    monkeypatch.setattr(lettering, "_of_emoji", lambda: ())
    forget()
    yield
    forget()


def assert_no_boxes(text):
    runs = lettering._runs(text, 16)
    assert runs
    for run in runs:
        for letter in run.text:
            if not letter.isspace() and not lettering._is_mark(letter):
                assert lettering._shows(run.font, letter), (text, letter)


@pytest.mark.parametrize("text", TEXTS)
def test_no_letter_is_a_box(text):
    assert_no_boxes(text)


@pytest.mark.parametrize("text", TEXTS)
def test_nor_where_there_are_no_fonts(text, no_fonts):
    assert_no_boxes(text)


@given(st.text(min_size=1, max_size=12))
def test_any_text_can_be_written(text):
    picture = Image.new("RGB", (300, 30))
    lettering.write(ImageDraw.Draw(picture), (2, 2), text, 11)
    assert lettering.width(text, 11) >= 0


def test_what_cannot_be_written_is_named(no_fonts):
    assert lettering._written("café") == "cafe"
    assert lettering._written("éə") == "[LATIN x2]"  # of ə there is no plain letter
    assert lettering._written("漢字の猫") == "[CJK x2][HIRAGANA x1][CJK x1]"
    assert lettering._written("a 🍕") == "a [slice of pizza]"
    assert lettering.missing(["red", "漢字の", "🍕"]) == ["CJK", "HIRAGANA", "symbols"]
    assert lettering.missing(["red"]) == []


def test_plain_text_is_as_pillow_writes_it():
    ours, theirs = Image.new("RGB", (200, 30), "white"), Image.new("RGB", (200, 30), "white")
    lettering.write(ImageDraw.Draw(ours), (3, 4), "a red heart, twice", 11)
    font = ImageFont.load_default(size=11)
    ImageDraw.Draw(theirs).text((3, 4), "a red heart, twice", fill="black", font=font)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert lettering.width("a red heart", 11) == font.getlength("a red heart")


def test_labels_keep_what_tells_them_apart():
    labels = ["a drawing of a green heart on white", "a drawing of a green star on white",
              "a drawing of a green sun", "a red fish"]  # fmt: skip
    shown = fit_labels(labels, width=MIN_CELL, size=11)
    assert shown == [("... heart on white",), ("... star on white",), ("... sun",), ("a red fish",)]
    assert fit_labels(labels[:1], width=MIN_CELL, size=11)[0][0].startswith("a drawing of")
    assert fit_labels(labels, width=9 * MIN_CELL, size=11) == [(label,) for label in labels]
    long = ["supercalifragilisticexpialidocious" + end for end in "ab"]
    assert fit_labels(long, width=MIN_CELL, size=11) == [("... a",), ("... b",)]
    assert fit_labels(["sun", "sun"], width=MIN_CELL, size=11) == [("sun",), ("sun",)]


@given(
    st.lists(st.text("abc ", max_size=40), max_size=3).map(" ".join),
    st.sets(st.sampled_from(["heart", "star", "sun", "fish", "key"]), min_size=2),
    st.text("abc ", max_size=40),
    st.integers(1, 3),
)
def test_different_labels_are_never_shown_alike(before, words, after, lines):
    labels = [" ".join(f"{before} {word} {after}".split()) for word in sorted(words)]
    shown = fit_labels(labels, width=MIN_CELL, size=11, lines=lines)
    assert len(set(shown)) == len(labels)
    for text in shown:
        assert len(text) <= lines
        assert all(lettering.width(line, 11) <= MIN_CELL for line in text)


def test_each_caption_stands_in_one_frame_with_its_own_pictures(tmp_path):
    grey = np.full((8, 8, 3), 90, np.uint8)
    save_grid(tmp_path / "grid.png", [[grey] * 10, [grey] * 10], [f"number {i}" for i in range(10)])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    band = LABEL_HEIGHT + MARGIN + 2 * (MIN_CELL + MARGIN)
    for number in (0, 1, 8, 9):
        row, column = divmod(number, 8)
        x, y = MARGIN // 2 + column * (MIN_CELL + MARGIN), row * band
        assert (grid[y, x : x + MIN_CELL] == FRAME).all()  # above the caption, nothing below it
        below = grid[y + LABEL_HEIGHT, x + 1 : x + MIN_CELL]
        assert not (below == FRAME).all(axis=1).any()
        assert (grid[y : y + band, x] == FRAME).all()
