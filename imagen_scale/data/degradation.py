"""Small pictures as people have them: shrunk by whatever program, blurred, packed as JPEG."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter

from imagen_scale.data.seeds import seeded
from imagen_scale.data.sources.images import PixelArray

# What browsers, cameras and painting programs shrink with.
KERNELS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.HAMMING,
           Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)  # fmt: skip
BLURRED = JPEG = 0.5  # shares of the pictures
MOST_BLUR = 0.8  # standard deviation in pixels of the small picture
QUALITIES = 30, 95  # of JPEG


def degraded(image: PixelArray, side: int, seed: int) -> PixelArray:
    """A picture shrunk, and in a way of its own made worse; equal seeds do the same.

    Blur comes before shrinking, as a lens's does, and JPEG after it: a much shortened form of the
    chain of Wang et al. 2021 (Real-ESRGAN, arXiv:2107.10833), whose noise
    `training.lowres_aug_max` adds.

    Args:
        image: (3, H, H).
        side: Of the result in pixels, at most H.
        seed: Of the way.

    Returns:
        (3, side, side).
    """

    def drawn(what: str) -> float:
        return seeded(what, seed) / 2**63  # in [0, 1)

    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    if drawn("is blurred") < BLURRED:
        radius = MOST_BLUR * drawn("blur") * picture.width / side
        picture = picture.filter(ImageFilter.GaussianBlur(radius))
    kernel = KERNELS[int(len(KERNELS) * drawn("kernel"))]
    picture = picture.resize((side, side), kernel)
    if drawn("is JPEG") < JPEG:
        least, most = QUALITIES
        packed = BytesIO()
        quality = least + int((most - least + 1) * drawn("quality"))
        picture.save(packed, "JPEG", quality=quality)
        picture = Image.open(packed)
    return np.asarray(picture).transpose(2, 0, 1).copy()
