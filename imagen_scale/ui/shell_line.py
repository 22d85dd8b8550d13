"""The command line that makes a picture again."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.ui.history import Facts

# By the first word of what a runtime calls itself.
RUNTIMES = {
    "torch": "torch",
    "torch.compile": "compile",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt",
}


def sample_command(
    facts: Facts,
    run: Path,
    *,
    num_unets: int,
    thresholds: Sequence[float | None],
    allow_unfinished: bool = False,
) -> str:
    """`imagen-scale sample ...` with all that the picture depends on.

    Args:
        facts: What stands beside the picture.
        run: The run's folder.
        num_unets: Stages of the run.
        thresholds: Each stage's own, which the command takes by itself.
        allow_unfinished: Whether stages may be half-trained.
    """
    stages = facts.stages
    words = ["imagen-scale", "sample"]
    # A prompt that looks like an option comes last, behind `--`.
    last = ["--", facts.prompt] if facts.prompt.startswith("-") else []
    if not last:
        words.append(facts.prompt)
    if facts.negative_prompt:
        words += _option("--negative-prompt", facts.negative_prompt)
    words += _option("--run", str(run))
    words += _option("--seed", str(facts.seed))
    words += _option("--steps", _per_stage([stage.steps for stage in stages]))
    words += _option("--cond-scale", ",".join(_text(stage.cond_scale) for stage in stages))
    for name in StageSettings.model_fields:
        values = [getattr(stage, name) for stage in stages]
        default: Any = SamplingOptions.model_fields[name].default
        if name == "threshold":
            pairs = zip(values, thresholds, strict=False)
            values = [None if value == own else value for value, own in pairs]
        if name not in ("steps", "cond_scale") and any(value != default for value in values):
            words += _option("--" + name.replace("_", "-"), _per_stage(values))
    if facts.tile is not None:
        words += _option("--tile", str(facts.tile))
    if len(stages) < num_unets:
        words += _option("--unet-limit", str(len(stages)))
    words += _runtime([stage.runtime for stage in stages])
    if allow_unfinished:
        words.append("--allow-unfinished")
    return shlex.join([*words, *last])


def _option(name: str, value: str) -> list[str]:
    """In one word where the value would be taken for another option."""
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


def _per_stage(values: Sequence[Any]) -> str:
    """One value where all stages have the same."""
    texts = [_text(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else ",".join(texts)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _runtime(names: list[str]) -> list[str]:
    """Where the stages were computed in different ways, `auto` chose; it does so again."""
    if len(set(names)) != 1:
        return []
    kind, *rest = names[0].split()
    if kind not in RUNTIMES:
        return []
    words = ["--runtime", RUNTIMES[kind]]
    if kind.startswith("torch") and rest[:1] != ["fp32"]:
        words += ["--precision", *rest[:1]]
    return words
