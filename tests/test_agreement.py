"""Ranks that would train something else than rank 0 are refused by name."""

import pytest

from imagen_scale.training.agreement import _first_difference

OURS = {"imagen-scale": "1", "training.lr": 1e-3, "pictures": 8, "mean colours": [[10, 20, 30]]}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ""),
        ({"mean colours": [[12, 19, 30]]}, ""),  # another decoder
        ({"training.lr": 0.1}, "has training.lr 0.1, rank 0 (host a) has 0.001. All"),
        ({"pictures": 7}, "has pictures 7, rank 0 (host a) has 8."),
        ({"mean colours": [[90, 20, 30]]}, "other pictures under the same names than rank 0"),
    ],
)
def test_the_first_difference_names_the_host_and_both_values(changed, told):
    found = _first_difference([("a", OURS), ("b", OURS | changed)])
    assert told in found
    assert found.startswith("rank 1 (host b) has ") == bool(told)
    assert bool(found) == bool(told)
