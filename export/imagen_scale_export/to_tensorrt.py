"""ONNX files to TensorRT engines: TensorRT-RTX, which needs no GPU to build, or TensorRT."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagen_scale.data.storage import first_line
from imagen_scale.errors import EnvironmentProblem, ExportError, UsageError
from imagen_scale.sampling.runtimes.manifest import Profile
from imagen_scale.sampling.runtimes.ports import BATCH, HEIGHT, WIDTH, Port
from imagen_scale.sampling.runtimes.tensorrt_library import Library, make_logger

PORTABLE = "portable"  # Ampere, Ada, Blackwell and later cards in one engine


def parse_range(text: str) -> tuple[int, int, int]:
    """Reads MIN:OPT:MAX.

    Raises:
        UsageError: If it is not three increasing whole numbers from 1 on.
    """
    parts = text.split(":")
    if len(parts) == 3 and all(part.isdecimal() for part in parts):
        low, best, high = map(int, parts)
        if 1 <= low <= best <= high:
            return low, best, high
    raise UsageError(f"--batch {text}: write MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, e.g. 1:2:8.")


def parse_targets(text: str, library: Library) -> tuple[str, ...]:
    """Reads `portable` or a list such as SM86,SM89,SM120.

    Raises:
        UsageError: If the library cannot build for one of them.
    """
    if text == PORTABLE:
        return (PORTABLE,)
    known = [name for name in _capabilities(library) if re.fullmatch(r"SM\d+", name)]
    if not known:
        raise UsageError(
            f"--target {text}: {library.name} {library.version} builds for the card at hand only; "
            f"leave --target out, or install tensorrt-rtx, which builds for others too."
        )
    targets = tuple(dict.fromkeys(part.strip().upper() for part in text.split(",")))
    if unknown := [target for target in targets if target not in known]:
        raise UsageError(
            f"--target {unknown[0]}: {library.name} {library.version} builds for "
            f"{', '.join([PORTABLE, *known])}."
        )
    return targets


def _capabilities(library: Library) -> list[str]:
    kinds = getattr(library.module, "ComputeCapability", None)
    return list(kinds.__members__) if kinds else []


class TensorRTNetwork:
    """An ONNX file as TensorRT parsed it.

    Args:
        library: From `find_library`.
        onnx_file: With its weights beside it.

    Raises:
        ExportError: If the parser refuses it.
    """

    def __init__(self, library: Library, onnx_file: Path) -> None:
        trt = library.module
        self.library, self.log = library, make_logger(trt)
        try:
            self.builder = trt.Builder(self.log)
        except (TypeError, RuntimeError) as error:  # the binding's way to say that there is none
            reason = self.log.errors[-1] if self.log.errors else first_line(error)
            raise EnvironmentProblem(
                f"{library.name} {library.version} cannot build engines here: {reason}. TensorRT "
                f"needs an NVIDIA driver for that; tensorrt-rtx (imagen-scale[tensorrt]) does not."
            ) from None
        # TensorRT 10 must be told to take its types from the file; later ones always do.
        flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.definition = self.builder.create_network(0 if flags is None else 1 << int(flags))
        self._parser = trt.OnnxParser(self.definition, self.log)
        if not self._parser.parse_from_file(str(onnx_file)):
            errors = [self._parser.get_error(i).desc() for i in range(self._parser.num_errors)]
            raise ExportError(
                f"{onnx_file}: {library.name} {library.version} cannot read it: {errors[0]}"
            )

    def norm_groups(self) -> list[int]:
        """Groups of each normalisation layer that has several: the network's GroupNorms."""
        trt = self.library.module
        groups = []
        for i in range(self.definition.num_layers):
            layer = self.definition.get_layer(i)
            if layer.type == trt.LayerType.NORMALIZATION:
                layer.__class__ = trt.INormalizationLayer  # the binding's way of a downcast
                groups.append(int(layer.num_groups))
        return [count for count in groups if count > 1]

    def config(self) -> Any:
        """A builder configuration in which float32 is float32.

        TensorRT rounds the inputs of float32 convolutions to 10 bits by default (TF32), which moves
        a picture by more than an export may differ.
        """
        config = self.builder.create_builder_config()
        config.clear_flag(self.library.module.BuilderFlag.TF32)
        return config

    def build(self, ports: Sequence[Port], profile: Profile, targets: Sequence[str]) -> bytes:
        """Builds the engine.

        Args:
            ports: The graph's inputs.
            profile: Batches and sides it shall take.
            targets: From `parse_targets`.

        Raises:
            ExportError: With the library's own reason, if it builds none.
        """
        trt = self.library.module
        config = self.config()
        shapes = self.builder.create_optimization_profile()
        for port in ports:
            free = {BATCH: profile.batch, HEIGHT: profile.side, WIDTH: profile.side}
            if any(dim in free for dim in port.dims):
                shapes.set_shape(
                    port.name,
                    *(
                        tuple(free[dim][i] if isinstance(dim, str) else dim for dim in port.dims)
                        for i in range(3)
                    ),
                )
        config.add_optimization_profile(shapes)
        if tuple(targets) != (PORTABLE,):
            config.num_compute_capabilities = len(targets)
            for i, target in enumerate(targets):
                config.set_compute_capability(trt.ComputeCapability.__members__[target], i)
        engine = self.builder.build_serialized_network(self.definition, config)
        if engine is None:
            reason = self.log.errors[-1] if self.log.errors else "it gave no reason"
            raise ExportError(
                f"{self.library.name} {self.library.version} built no engine: {reason}"
            )
        return bytes(memoryview(engine))
