"""The measures against pictures whose score is known."""

import pytest
import torch

from imagen_scale.evaluation import psnr_db, retrieval_accuracy


def test_retrieval_counts_nearest_neighbours():
    real = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert retrieval_accuracy(real + 0.05, real, 8) == 1
    assert retrieval_accuracy(real.roll(1, dims=0), real, 8) == 0
    half = real.clone()
    half[:5] = real[5:]
    assert retrieval_accuracy(half, real, 8) == 0.5


def test_psnr_of_a_known_error():
    real = torch.zeros(2, 3, 4, 4)
    # An error of 0.2 on a range of 2 is 20 dB.
    assert psnr_db(real + 0.2, real).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert psnr_db(real, real).isinf().all()
