"""Counts the bytes of live tensors, real or fake."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Within it, `now` is the bytes of all storages made since and still alive; `peak` their most.

    Works on fake tensors too: what a network would need is known without the memory to run it.
    Unlike hooks on saved tensors, it sees whatever keeps a tensor alive: checkpointing holds its
    inputs by reference.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def forget_peak(self) -> None:
        """Starts a new peak from what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation and notes the storages that it made."""
        kwargs = kwargs or {}
        # What comes in unseen was made elsewhere, e.g. a weight: its views are not new either.
        self._note_all((args, kwargs), 0)
        out = func(*args, **kwargs)
        # `set_` takes over a storage that exists, e.g. a mapped file's.
        made = 0 if func.overloadpacket is torch.ops.aten.set_ else 1
        self._note_all(out, made)
        return out

    def _note_all(self, values: Any, times: int) -> None:
        # By hand: torch's pytree builds the containers anew, which took half of a plan's time.
        if isinstance(values, torch.Tensor):
            self._note(values, times)
        elif isinstance(values, (tuple, list)):
            for value in values:
                self._note_all(value, times)
        elif isinstance(values, dict):
            for value in values.values():
                self._note_all(value, times)

    def _note(self, tensor: torch.Tensor, times: int) -> None:
        if tensor.device.type == "meta":  # a shape, not memory
            return
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes() * times
        if key not in self._seen:
            self._seen.add(key)
            weakref.finalize(storage, self._forget, key, nbytes)
            self.now += nbytes
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes
