"""Group normalisation as runtimes other than TensorRT compute it best: in nodes with kernels."""

from typing import Any

import torch

GROUP_NORM = torch.ops.aten.group_norm.default


def group_norm_in_parts(
    input: Any, num_groups: int, weight: Any, bias: Any, eps: float, cudnn_enabled: bool = True
) -> Any:
    """`torch.nn.functional.group_norm` around one InstanceNormalization over groups of channels.

    ONNX Runtime has no kernel for GroupNormalization: it takes each apart into 34 nodes, which
    pass over the features seven times and more (microsoft/onnxruntime issue 24538).

    Args:
        input: What the graph has computed, (B, C, H, W); B, H and W may be free.
        num_groups: Groups of channels.
        weight: Scale of each channel, (C,).
        bias: Likewise.
        eps: Added to the variance.
        cudnn_enabled: Of torch's signature; means nothing here.

    Returns:
        Another value of the graph, in the precision of `input`; statistics are float32.
    """
    import numpy as np
    from onnx_ir import DataType, tensor
    from onnxscript import opset21 as op

    is_half = input.dtype != DataType.FLOAT
    x = op.Cast(input, to=DataType.FLOAT) if is_half else input
    # What makes groups differ are the channels' own scales, which follow.
    ones, zeros = (
        op.Constant(value=tensor(np.full(num_groups, value, np.float32))) for value in (1, 0)
    )
    x = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
    x = op.InstanceNormalization(x, ones, zeros, epsilon=eps)
    if is_half:
        x = op.Cast(x, to=input.dtype)
    x = op.Reshape(x, op.Shape(input))
    of_channels = op.Constant(value_ints=[-1, 1, 1])
    return op.Add(op.Mul(x, op.Reshape(weight, of_channels)), op.Reshape(bias, of_channels))
