"""What computes the U-Nets, as a user chooses it; needs no torch."""

from typing import Literal

from pydantic import Field

from imagen_scale.sampling.option_model import OptionModel

RuntimeName = Literal["auto", "torch", "compile", "onnx", "tensorrt", "openvino"]
Precision = Literal["fp16", "bf16", "fp32"]
EXPORTED = ("onnx", "tensorrt", "openvino")


class RuntimeOptions(OptionModel):
    """The runtime, and how it computes; exports take the precision only."""

    runtime: RuntimeName = Field(
        "auto",
        description="What computes the U-Nets: the best that can be used (auto says what it took "
        "and why), torch, torch compiled, or an export.",
    )
    precision: Precision | None = Field(
        None, description="Numbers that are computed with; by default what suits the device."
    )
    channels_last: bool = Field(False, description="Memory layout for torch.")
    sequential: bool = Field(
        False, description="Two passes for guidance, in torch: less memory, more time."
    )
