"""The card at hand: what it is, what it can do at most, and what its context takes."""

import os
import re
import shutil
import statistics
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from report import machine

from card_parts.timing import now

# Dense TFLOP/s of matrix products in bf16 (fp16 before Ampere) summed in fp32, as NVIDIA's
# architecture papers and data sheets have them; by what torch calls the card. The name of most
# words that fits counts. GeForce cards have half of what they reach when summing in fp16.
PEAKS = {
    "RTX 2060": 25.8, "RTX 2070": 29.9, "RTX 2080": 40.3, "RTX 2080 Ti": 53.8,
    "RTX 3060": 25.5, "RTX 3060 Ti": 32.4, "RTX 3070": 40.6, "RTX 3070 Ti": 43.5,
    "RTX 3080": 59.5, "RTX 3080 Ti": 68.2, "RTX 3090": 71.0, "RTX 3090 Ti": 80.0,
    "RTX 4060": 30.2, "RTX 4060 Ti": 44.1, "RTX 4070": 58.3, "RTX 4070 SUPER": 71.0,
    "RTX 4070 Ti": 80.2, "RTX 4070 Ti SUPER": 88.2, "RTX 4080": 97.5,
    "RTX 4080 SUPER": 104.4, "RTX 4090": 165.2,
    "RTX 5070": 61.7, "RTX 5070 Ti": 87.9, "RTX 5080": 112.6, "RTX 5090": 209.5,
    "RTX A6000": 154.8, "RTX 6000 Ada": 364.2, "T4": 65.0, "V100": 125.0, "A10": 125.0,
    "A100": 312.0, "A40": 149.7, "L4": 121.0, "L40": 181.0, "L40S": 362.0, "H100": 989.0,
    "H100 PCIe": 756.0, "H200": 989.0,
}  # fmt: skip
PACKAGES = ("torch", "deepspeed", "bitsandbytes", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx",
            "tensorrt")  # fmt: skip
SIDE = 8192  # of the matrices
REPEATS = 20
_USED = (
    "import torch; torch.zeros(1, device='cuda'); a, b = torch.cuda.mem_get_info(); print(b - a)"
)


def measure(side: int = SIDE) -> dict[str, Any]:
    """The machine, the card's peak and the memory of a bare context.

    Args:
        side: Of the matrices that are multiplied.
    """
    has_card = torch.cuda.is_available()
    found: dict[str, Any] = {
        "machine": machine(),
        "card": "no card",
        "is_card": has_card,
        "versions": versions(),
    }
    if has_card:
        facts = torch.cuda.get_device_properties(0)
        free, everything = torch.cuda.mem_get_info()
        found |= {
            "card": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "memory": everything,
            "free": free,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "has_bf16": (facts.major, facts.minor) >= (8, 0),
            "peak_by_name": peak_by_name(facts.name),
            "context": context_bytes(),
        } | nvidia_smi()
    return found | {"peaks": _peaks(side)}


def _peaks(side: int) -> dict[str, float]:
    """TFLOP/s by the kind of numbers, of those that the card has."""
    kinds = {"fp32": torch.float32}
    if torch.cuda.is_available():
        kinds |= {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
    found = {}
    for kind, dtype in kinds.items():
        with suppress(RuntimeError):  # bf16 before Ampere
            found[kind] = matmul_peak(dtype, side, tf32=kind == "tf32")
    return found


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_by_name(name: str) -> float | None:
    """TFLOP/s that the maker states; None for a card that is not in the table."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if "laptop" in words or "q" in words:  # another chip, or another limit of power
        return None
    fitting = [known for known in PEAKS if set(known.lower().split()) <= words]
    return PEAKS[max(fitting, key=lambda known: len(known.split()))] if fitting else None


def matmul_peak(dtype: torch.dtype, side: int, *, tf32: bool = False) -> float:
    """TFLOP/s of a large square matrix product here, the median of some."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == torch.float32 and not tf32:
        side //= 2  # an eighth of the work: slower by as much where there are tensor cores
    a = torch.randn(side, side, device=device).to(dtype)
    b, out = a.clone(), torch.empty_like(a)
    seconds = []
    for _ in range(REPEATS):
        start = now()
        torch.mm(a, b, out=out)
        seconds.append(now() - start)
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * side**3 / statistics.median(seconds[2:]) / 1e12


def context_bytes() -> int | None:
    """Memory of the card that a process takes before it holds a tensor worth the name.

    A second process makes a context while this one's is there: the difference is its own.
    """
    free, everything = torch.cuda.mem_get_info()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _USED], capture_output=True, text=True, timeout=60, check=True
        )
        # The allocator's first block, 2 MiB, is in it.
        return max(0, int(done.stdout) - (everything - free) - 2**21) or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def nvidia_smi() -> dict[str, str]:
    """What the driver's tool tells; empty without it."""
    keys = ("driver_version", "power.limit", "clocks.max.sm", "pcie.link.gen.max",
            "pcie.link.width.max")  # fmt: skip
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    if visible:
        query += ["--id", visible]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        values = done.stdout.splitlines()[0].split(", ")
    except (OSError, IndexError, subprocess.SubprocessError):
        return {}
    return dict(zip(keys, values, strict=False))
