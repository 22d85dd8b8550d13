"""Counts where the host would wait for a card, on a machine without one."""

import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operators whose result, or its shape, the host has to know.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2,
    aten.unique_dim, aten.unique_consecutive,
}  # fmt: skip
READING = ("tolist", "numpy")


class Waits(TorchDispatchMode):
    """While it is entered, counts reads of tensors by the file and function that made them.

    Args:
        on_host: Tensors that are on the host in any case: reading them is no wait.
    """

    def __init__(self, *on_host):
        super().__init__()
        self.found = Counter()
        self._on_host = {tensor.untyped_storage().data_ptr() for tensor in on_host}
        self._before = {}

    def __enter__(self):
        for name in READING:
            self._before[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._reading(self._before[name]))
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self._before.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def of(self, package):
        """How many reads a package's own code made."""
        return sum(number for (place, _), number in self.found.items() if place == package)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITING:
            self._note(args[0])
        return func(*args, **(kwargs or {}))

    def _reading(self, method):
        def read(tensor, *args):
            self._note(tensor)
            return method(tensor, *args)

        return read

    def _note(self, tensor):
        if tensor.untyped_storage().data_ptr() in self._on_host:
            return
        for frame in reversed(traceback.extract_stack(limit=40)):
            for package in ("imagen_scale", "deepspeed", "torch/optim"):
                if f"/{package}/" in frame.filename and "/support/" not in frame.filename:
                    self.found[package, f"{frame.filename.rpartition('/')[2]}:{frame.name}"] += 1
                    return
        self.found["elsewhere", ""] += 1
