"""Captions cut to the width of their column, so that different ones stay different."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import takewhile

from imagen_scale.files import lettering

CUT = "..."
Fit = Callable[[str], tuple[str, ...]]


def fit_labels(
    labels: Sequence[str], *, width: int, size: int, lines: int = 1
) -> list[tuple[str, ...]]:
    """Labels on so many lines each, cut at their ends.

    Where that would make different labels the same, what they begin with in common is left out.

    Args:
        labels: Any texts.
        width: Of a line in pixels.
        size: Of the letters in pixels.
        lines: Of each label.
    """

    def fit(label: str) -> tuple[str, ...]:
        return tuple(_lines(label, lambda line: lettering.width(line, size) <= width, lines))

    shown = _told_apart(list(dict.fromkeys(labels)), fit)
    return [shown[label] for label in labels]


def _told_apart(labels: Sequence[str], fit: Fit, left_out: str = "") -> dict[str, tuple[str, ...]]:
    """What is shown of different labels that all begin with `left_out`."""
    alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    fitted: dict[str, tuple[str, ...]] = {}
    for label in labels:
        rest = label.removeprefix(left_out)
        fitted[label] = fit(f"{CUT} {rest}" if left_out else rest)
        alike[_whole_words(fitted[label])].append(label)
    shown: dict[str, tuple[str, ...]] = {}
    for group in alike.values():
        same = takewhile(lambda letters: len(set(letters)) == 1, zip(*group, strict=False))
        common = "".join(letters[0] for letters in same)
        words = common[: common.rfind(" ") + 1]
        longer = words if len(words) > len(left_out) else common
        if len(group) == 1 or len(longer) <= len(left_out):
            shown |= {label: fitted[label] for label in group}
        else:
            shown |= _told_apart(group, fit, longer)
    return shown


def _whole_words(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Lines without the rest of a word that was cut: one letter of it tells nobody anything."""
    *others, last = lines
    if last.endswith(CUT) and " " in last:
        last = last.rpartition(" ")[0]
    return *others, last


def _lines(label: str, fits: Callable[[str], bool], lines: int) -> list[str]:
    words, found = label.split(), list[str]()
    while words and len(found) < lines - 1:
        count = 1
        while count < len(words) and fits(" ".join(words[: count + 1])):
            count += 1
        found.append(_cut(" ".join(words[:count]), fits))
        words = words[count:]
    return [*found, _cut(" ".join(words), fits)]


def _cut(line: str, fits: Callable[[str], bool]) -> str:
    if fits(line):
        return line
    low, high = 0, len(line)  # letters that fit, and that do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(line[:middle] + CUT) else (low, middle)
    return line[:low] + CUT
