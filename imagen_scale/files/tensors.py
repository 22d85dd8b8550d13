"""Writes a safetensors file one tensor at a time.

The library writes a whole dictionary at once, which would need a second copy of the weights in
memory. Files are read with the library.

Source: the format's description, huggingface/safetensors README, "Format".
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Brought onto the disk at once. Many GB in one call at the end look from outside like a disk that
# does nothing.
PIECE_BYTES = 256 * 2**20
_NAMES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8", "int8": "I8",
    "int64": "I64", "int32": "I32", "bool": "BOOL",
}  # fmt: skip


def write_tensors(
    path: Path,
    shapes: "Mapping[str, tuple[torch.dtype, Iterable[int]]]",
    tensors: "Iterable[tuple[str, Tensor]]",
    metadata: dict[str, str],
) -> None:
    """Writes tensors as they come.

    Args:
        path: The file.
        shapes: Type and shape of every tensor, by name.
        tensors: Every one of them once, in the order of `shapes`, on any device.
        metadata: For the header.
    """
    import torch

    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in shapes.items():
        sides = list(shape)
        begin = end
        end += torch.Size(sides).numel() * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[str(dtype).removeprefix("torch.")],
            "shape": sides,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    expected, waiting = iter(shapes.items()), 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, tensor in tensors:
            wanted, (dtype, shape) = next(expected)
            assert (name, tensor.dtype, tuple(tensor.shape)) == (wanted, dtype, tuple(shape)), name
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            for piece in raw.split(PIECE_BYTES):
                file.write(piece.numpy().data)  # unlike tofile it tells why it failed
                waiting += len(piece)
                if waiting >= PIECE_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    waiting = 0
        assert next(expected, None) is None, "a tensor is missing"
