"""Tensors of the card brought to the host piece by piece, one on its way while another is used."""

from collections.abc import Iterator

import torch
from torch import Tensor

from imagen_scale.files.pinning import can_pin


class Ferry:
    """Two small buffers of the host that take turns; no copy of a whole tensor is made there.

    Where there is no card, or nothing can be pinned, the host waits for each piece.

    Args:
        elements: The most in a piece.
        device: Where the tensors are.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        on_card = device.type == "cuda"
        self._buffers = [torch.empty(elements, pin_memory=on_card and can_pin()) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if on_card else None

    def bring(self, flat: Tensor, pieces: Iterator[slice]) -> Iterator[tuple[slice, Tensor]]:
        """Yields pieces of a tensor (N,) as float32 on the host, each good until the next.

        Args:
            flat: The tensor, as the work given to the current stream so far leaves it; not to be
                changed before the last piece was taken.
            pieces: Which, in order.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(flat.device))
        under_way = None
        for number, piece in enumerate(pieces):
            # Its buffer held the piece before the last, which has been used by now.
            sent = piece, *self._send(flat[piece], self._buffers[number % 2])
            if under_way is not None:
                yield _landed(*under_way)
            under_way = sent
        if under_way is not None:
            yield _landed(*under_way)

    def _send(self, part: Tensor, buffer: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        landing = buffer[: part.numel()]
        if self._stream is None:
            return landing.copy_(part), None
        with torch.cuda.stream(self._stream):
            landing.copy_(part, non_blocking=True)
        return landing, self._stream.record_event()


def _landed(
    piece: slice, landing: Tensor, arrival: torch.cuda.Event | None
) -> tuple[slice, Tensor]:
    if arrival is not None:
        arrival.synchronize()
    return piece, landing
