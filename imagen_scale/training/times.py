"""Times spread evenly over the samples of a step."""

SEEDS = 2**63  # seeds are below it


def stratified_time(seed: int, slot: int, count: int, timesteps: int) -> int:
    """The time of one of `count` samples that together cover [0, T - 1] evenly.

    Sample i takes the place (u + i / count) mod 1 of [0, 1), u being the same for all, so that each
    of `count` equal shares of the times holds one sample. Each by itself is drawn evenly. Whole
    numbers throughout: the same on every machine.

    Args:
        seed: The step's, in [0, 2**63), from which u is made.
        slot: Which sample of the step, from 0.
        count: Samples of the step over all ranks.
        timesteps: T.

    Source: Kingma et al. 2021 (VDM), arXiv:2107.00630, appendix I.1.
    """
    place = (seed * count + slot * SEEDS) % (SEEDS * count)
    return place * timesteps // (SEEDS * count)
