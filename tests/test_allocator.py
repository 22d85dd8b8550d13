"""What torch's allocators are told before torch starts."""

import pytest
import torch

from imagen_scale.commands import allocator
from imagen_scale.commands.allocator import SETTINGS, settle_allocators

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def settled(monkeypatch):
    def settle(version="2.13.0", **environment):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(allocator, "version", lambda package: version)
        settle_allocators()
        return {name: allocator.os.environ.get(name) for name in NAMES}

    return settle


def test_pinned_blocks_are_not_rounded_up_and_segments_grow(settled):
    assert settled() == {
        "PYTORCH_ALLOC_CONF": None,
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,pinned_max_round_threshold_mb:1",
    }


def test_what_the_user_wrote_stays(settled):
    written = "expandable_segments:False,max_split_size_mb:64"
    found = settled(PYTORCH_CUDA_ALLOC_CONF=written)["PYTORCH_CUDA_ALLOC_CONF"]
    assert found == f"{written},pinned_max_round_threshold_mb:1"
    # The newer name where it is in use: both at once are an error.
    found = settled(PYTORCH_ALLOC_CONF="backend:native")
    assert found["PYTORCH_ALLOC_CONF"].startswith("backend:native,expandable")
    assert found["PYTORCH_CUDA_ALLOC_CONF"] is None


def test_an_older_torch_is_told_nothing_that_it_does_not_know(settled):
    assert settled("2.10.1") == dict.fromkeys(NAMES)


def test_torch_knows_these_words():
    """An unknown one passes here in silence, a wrong value does not; so both are looked at."""
    for name, value in SETTINGS.items():
        torch._C._accelerator_setAllocatorSettings(f"{name}:{value}")
    with pytest.raises(ValueError, match="Expected"):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:nonsense")
