"""How torch's allocators are told to take memory, before torch starts."""

import os
from importlib.metadata import PackageNotFoundError, version

# Segments that grow leave fewer holes on a full card. Pinned blocks are not rounded up to powers of
# two, which made them 1.2 to 1.6 times as large as ZeRO's states and activations on the host.
SETTINGS = {"expandable_segments": "True", "pinned_max_round_threshold_mb": "1"}
SINCE = (2, 13)  # torch that has them all


def settle_allocators() -> None:
    """Adds `SETTINGS` to what the user has set, which wins; call it before torch is imported."""
    try:
        installed = tuple(int(part) for part in version("torch").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return
    if installed < SINCE:  # an unknown word would end the process
        return
    name = "PYTORCH_ALLOC_CONF" if "PYTORCH_ALLOC_CONF" in os.environ else "PYTORCH_CUDA_ALLOC_CONF"
    written = [word for word in os.environ.get(name, "").split(",") if word]
    known = {word.partition(":")[0].strip() for word in written}
    added = [f"{key}:{value}" for key, value in SETTINGS.items() if key not in known]
    os.environ[name] = ",".join([*written, *added])
