"""Distances between sets of pictures, taken on the features of a trained network."""

import warnings

import torch
from torch import Tensor

from imagen_scale.data.storage import first_line
from imagen_scale.errors import MissingExtraError, ShapeError, option

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Fréchet distance between the Gaussians that two sets of features have.

    |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with unbiased covariances. It falls with the number
    of pictures: only values over equally many compare.

    Args:
        generated: (N, D), N at least 2.
        real: (M, D), M at least 2.

    Raises:
        MissingExtraError: If torchmetrics is not installed.
        ShapeError: If there are too few pictures.

    Source: Heusel et al. 2017, arXiv:1706.08500, equation 6.
    """
    _check_counts(generated, real)
    require_torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_given(generated))
    # In double precision: the metric answers in that of the features.
    metric.update(generated.double(), real=False)
    metric.update(real.double(), real=True)
    distance = metric.compute().item()
    return 0.0 if distance < 0 else distance  # rounding; NaN stays what it is


def kernel_distance(generated: Tensor, real: Tensor) -> float:
    """Kernel distance (KID) between two sets of features: an unbiased squared MMD.

    The kernel is (x·y / D + 1)³. Unbiased, so that few pictures do, and values below 0 occur. Up
    to 1000 pictures are taken together; of more, 100 random subsets of 1000 are averaged.

    Args:
        generated: (N, D), N at least 2.
        real: (M, D), M at least 2.

    Raises:
        MissingExtraError: If torchmetrics is not installed.
        ShapeError: If there are too few pictures.

    Source: Bińkowski et al. 2018, arXiv:1801.01401, section 4.
    """
    fewest = _check_counts(generated, real)
    require_torchmetrics()
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it says that it keeps all features
        torch.manual_seed(0)  # of the subsets
        metric = KernelInceptionDistance(
            feature=_given(generated),
            subsets=1 if fewest <= KID_SUBSET_SIZE else KID_SUBSETS,
            subset_size=min(fewest, KID_SUBSET_SIZE),
        )
        metric.update(generated.double(), real=False)
        metric.update(real.double(), real=True)
        return metric.compute()[0].item()


def clip_score(image_features: Tensor, text_features: Tensor) -> float:
    """Mean of max(100 cos(picture, caption), 0) over pairs.

    Args:
        image_features: (N, D).
        text_features: (N, D), the i-th of the caption of the i-th picture.

    Source: Hessel et al. 2021, arXiv:2104.08718, section 3, with the weight 100 that torchmetrics
    uses in place of 2.5.
    """
    cosines = torch.nn.functional.cosine_similarity(image_features, text_features)
    return (100 * cosines).clamp(min=0).mean().item()


def require_torchmetrics() -> None:
    """Raises MissingExtraError, with the command that installs it, if torchmetrics cannot be used.

    It imports torch-fidelity where that is installed, which imports torchvision, which has to fit
    torch: any of them may be at fault.
    """
    try:
        import torchmetrics.image.fid  # noqa: F401
    except Exception as error:  # a torchvision that does not fit raises RuntimeError
        raise MissingExtraError(
            f"FID and KID need the package torchmetrics ({first_line(error)}); run "
            f"pip install 'imagen-scale[evaluate]'."
        ) from None


def _given(features: Tensor) -> torch.nn.Module:
    """In place of torchmetrics' network: what is handed over are features already."""
    given = torch.nn.Identity()
    given.num_features = torch.tensor(features.shape[1])
    return given


def _check_counts(generated: Tensor, real: Tensor) -> int:
    fewest = min(len(generated), len(real))
    if fewest < 2:
        raise ShapeError(
            f"{fewest} picture has no covariance; give 2 at least with {option('num')}."
        )
    return fewest
