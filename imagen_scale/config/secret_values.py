"""Secrets do not belong into a configuration, which is copied into runs, files and reports."""

import re
from collections.abc import Iterator
from typing import Any

_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|access_?key|private_?key|token|secret|passw(or)?d|credentials?)$", re.I
)
# Tokens of Hugging Face, Weights & Biases (new and old), OpenAI, GitHub, Amazon and Slack, and a
# password inside an address.
_SECRET_VALUE = re.compile(
    r"hf_\w{20,}|wandb_v\d_\w{20,}|^[0-9a-f]{40}$|sk-[\w-]{20,}|gh[pousr]_\w{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|://[^/\s:@]*:[^/\s@]+@"
)


def secret_problems(data: Any) -> list[str]:
    """Where JSON data holds what looks like a secret; the value itself is never repeated.

    Refused are keys that are called like a secret and hold something, and strings that look like
    one whatever their key.
    """
    return [
        f"{path}: looks like a secret, and a configuration is copied into every run; remove it "
        f"and set an environment variable such as WANDB_API_KEY or HF_TOKEN."
        for path in _secrets(data, [])
    ]


def _secrets(node: Any, path: list[str]) -> Iterator[str]:
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            # A token may even stand where a key should.
            is_secret = bool(_SECRET_VALUE.search(str(key)))
            here = [*path, "(hidden)" if is_secret else str(key)]
            if is_secret or (value not in (None, "", {}, []) and _SECRET_KEY.search(str(key))):
                yield ".".join(here)
            else:
                yield from _secrets(value, here)
    elif isinstance(node, str) and _SECRET_VALUE.search(node):
        yield ".".join(path)
