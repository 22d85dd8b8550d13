"""A frozen text encoder as an ONNX file, and its tokenizer as the package tokenizers reads it."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from imagen_scale.data.encoder import TextEncoder
from imagen_scale.errors import ParityError
from imagen_scale.sampling.runtimes.onnx_runtime import onnx_session
from imagen_scale.sampling.runtimes.ports import (
    OPSETS,
    text_encoder_inputs,
    text_encoder_output,
)
from imagen_scale_export.to_onnx import export_graph
from imagen_scale_export.verify import LIMITS
from imagen_scale_export.verify_text import PROMPTS


class LastHiddenState(nn.Module):
    """An encoder's features alone.

    Args:
        network: Of transformers. Its attention is computed in parts from here on: T5's fused one
            has a layout that tracing cannot follow.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        network.set_attn_implementation("eager")
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features of tokens, (B, L, D)."""
        return self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def export_text_encoder(encoder: TextEncoder, path: Path, embed_dim: int) -> None:
    """Writes the encoder's graph in float32, whatever the denoisers compute in.

    Args:
        encoder: On the CPU.
        path: The ONNX file.
        embed_dim: Width of the features.

    Raises:
        ExportError: If a dimension meant to be free came out fixed.
    """
    export_graph(
        LastHiddenState(encoder.network), path,
        text_encoder_inputs(), [text_encoder_output(embed_dim)],
        opset=OPSETS["fp32"], size=1, divisor=1, max_tokens=encoder.max_tokens,
    )  # fmt: skip


def verify_text_encoder(encoder: TextEncoder, path: Path, tokenizer: Path) -> float:
    """Largest relative error of the exported encoder over a few prompts, tokenizer included.

    Args:
        encoder: The reference.
        path: Its ONNX file.
        tokenizer: Its tokenizer.json.

    Raises:
        ParityError: If it is above float32's limit.
    """
    from tokenizers import Tokenizer

    read, session = Tokenizer.from_file(str(tokenizer)), onnx_session(path, "CPUExecutionProvider")
    read.enable_truncation(encoder.max_tokens)
    worst = 0.0
    for prompt in filter(None, PROMPTS):  # none is what no encoder is asked for
        ids = np.array([read.encode(prompt).ids], np.int64)
        (expected,) = encoder.encode([prompt])
        found = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0]
        if found.shape != expected.shape:
            raise ParityError(
                f"the exported tokenizer makes {len(found)} tokens of {prompt!r}, and the "
                f"encoder's own {len(expected)}"
            )
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    if not worst <= LIMITS["fp32"].relative_error:
        raise ParityError(f"the text encoder differs by {worst:.2e} of its largest value")
    return worst
