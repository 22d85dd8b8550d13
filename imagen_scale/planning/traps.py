"""Traps that a table of bytes does not show."""

from imagen_scale.config import StageConfig
from imagen_scale.config.section import per_level
from imagen_scale.planning.words import gb

# Self-attention over more pixels than this is said aloud: 128 x 128.
MANY_TOKENS = 128**2


def traps(stage: StageConfig) -> list[str]:
    """Traps that a table of bytes does not show."""
    unet, side = stage.unet, stage.train_size
    found = []
    for level, attends in enumerate(per_level(unet.layer_attns, unet.num_levels)):
        pixels = (side // 2 ** (level + unet.memory_efficient)) ** 2
        if attends and pixels > MANY_TOKENS:
            scores = unet.attn_heads * pixels**2 * 4
            found.append(
                f"unets.{stage.number - 1}.layer_attns.{level}: every pixel of a "
                f"{side // 2 ** (level + unet.memory_efficient)} px level attends to every "
                f"other ({pixels} tokens): {gb(scores)} of scores per picture and layer if "
                f"they were kept. They are not, but the time is spent: set it to false."
            )
    return found
