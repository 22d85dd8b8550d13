"""Features of a U-Net's deeper levels, which later evaluations take again."""

from .names import Array


class DeepCache:
    """Which evaluations of a U-Net are whole, and what the others take from the last such one.

    From step to step the levels below the first change little, and most of the work is theirs. All
    evaluations are counted, so both of a step of Heun's. Where guidance sets in or ends, the next
    one is whole: the branch without text has features of its own.

    Args:
        interval: One evaluation is whole, the `interval` - 1 after it are not.

    Source: Ma et al. 2023 (DeepCache), arXiv:2312.00858, its uniform 1:N inference.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._features: Array | None = None
        self._guided, self._left = False, 0

    def take(self, *, guided: bool) -> Array | None:
        """The features for an evaluation; None where it has to be whole.

        Args:
            guided: Whether it computes both branches of guidance.
        """
        if self._left <= 0 or guided != self._guided:
            self._features = None
        self._left -= 1
        return self._features

    def keep(self, features: Array, *, guided: bool) -> None:
        """Keeps what a whole evaluation gave.

        Args:
            features: As the U-Net returned them.
            guided: As for `take`.
        """
        self._features, self._guided, self._left = features, guided, self.interval - 1
