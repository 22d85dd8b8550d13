"""Batches on their way to the card while it computes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from imagen_scale.data.sequence import Batch


class Feed(Iterator[Batch]):
    """The batches of a loader on the device, the next one under way before it is asked for.

    On a card copies run on a stream of their own, beside the kernels. Without one the batches come
    as they are.

    Args:
        batches: From the loader; pinned where that is possible, or the host waits for each copy.
        device: Where they are computed. Positions, which the host reads, stay on the host.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | None = None

    def __next__(self) -> Batch:
        """The next batch, for use in the current stream."""
        self.prefetch()
        batch, self._ahead = self._ahead, None
        if batch is None:
            raise StopIteration
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            for tensor in _moved(batch).values():
                # Its memory is the other stream's, which must not reuse it before this one is done.
                tensor.record_stream(stream)
        return batch

    def prefetch(self) -> None:
        """Loads the next batch and starts its copy, if that was not done and there is one.

        Best called when the card has been given its work and before the host waits for it.
        """
        if self._ahead is None and (batch := next(self._batches, None)) is not None:
            self._ahead = batch if self._stream is None else self._sent(batch, self._stream)

    def _sent(self, batch: Batch, stream: torch.cuda.Stream) -> Batch:
        with torch.cuda.stream(stream):
            sent = {
                name: tensor.to(self._device, non_blocking=True)
                for name, tensor in _moved(batch).items()
            }
        return Batch(**(batch._asdict() | sent))


def _moved(batch: Batch) -> dict[str, Tensor]:
    """What is computed with; the host reads the rest."""
    return {
        name: value
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor) and name != "positions"
    }
