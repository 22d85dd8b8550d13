"""What is measured, in which order: most important first."""

from pathlib import Path
from typing import Any, get_args

from card_parts import pictures, switches, ways
from card_parts.equality import RECORDS
from card_parts.measurement import Measurement, Row
from card_parts.scenes import Scene, scene
from imagen_scale.diffusion.names import Sampler

PARTS = {1: "Numbers", 2: "Memory and speed of training", 3: "Switches", 4: "Sampling"}
COMPILES = 240.0  # more seconds for what compiles, exports or builds an engine
_SLOW = ("compile", "offloaded")  # the first that offloads builds DeepSpeed's Adam
RESUMED = (
    ways.Way("fp32", "adamw", "ZeRO-0"),
    ways.Way("fp32", "adamw", ways.IN_BACKWARD),
    ways.Way("bf16", "adamw", "ZeRO-1"),
    ways.Way("bf16", "adamw", "ZeRO-2, optimizer offloaded"),
    ways.Way("bf16", "adamw", "ZeRO-3, optimizer and weights offloaded"),
    ways.Way("bf16", "adamw_8bit", "ZeRO-1"),
)


def machine(*, rehearse: bool) -> Measurement:
    """The card itself, which the other parts ask about."""
    arguments = {"side": scene(rehearse=rehearse).matrix}
    return Measurement(0, "machine", "card_parts.machine:measure", arguments)


def programme(
    header: Row, parts: tuple[int, ...], limit: int, models: Path, *, rehearse: bool
) -> list[Measurement]:
    """Every measurement; what may be missing at the end of the time comes last.

    Args:
        header: What was measured of the machine.
        parts: Which parts.
        limit: Bytes of the card that training may use.
        models: Folder for networks that are sampled.
        rehearse: Small networks, every kind once, in one process.
    """
    what, has_bf16 = scene(rehearse=rehearse), header.get("has_bf16", True)
    half = "bf16" if has_bf16 else ("fp16" if "fp16" in ways.precisions() else "fp32")
    bounds = {"limit": limit, "context": header.get("context")}
    found = [
        *_numbers(rehearse),
        *_memory(what, bounds, rehearse),
        *_switches(what, half, rehearse),
        *_sampling(what, "bf16" if has_bf16 else "fp16", models, rehearse),
    ]
    if rehearse:  # every kind once, in one process
        return [
            one._replace(group="rehearsal")
            for order, one in found
            if order == 0 and one.part in parts
        ]
    return [one for _, one in sorted(found, key=lambda pair: pair[0]) if one.part in parts]


_Ordered = tuple[int, Measurement]  # 0 before 1, and otherwise as they stand


def _numbers(rehearse: bool) -> list[_Ordered]:
    def one(name: str, call: str, limit_s: float = 120, **arguments: Any) -> _Ordered:
        return 0, Measurement(1, name, f"card_parts.{call}", arguments, limit_s, "numbers")

    scaled = {"rehearse": rehearse}
    taken, refused = ways.ways()
    every = 6 if rehearse else 1
    return [
        *(one(f"MinImagen's record {path.stem}", "equality:golden", record=path.name)
          for path in RECORDS),
        *(one(f"pictures of {sampler}, CPU and here", "equality:samplers", sampler=sampler,
              **scaled) for sampler in get_args(Sampler)[::every]),
        *(one(f"gradients, {precision}, checkpointing none and "
              f"{level if level != 'none' else 'none again'}", "equality:checkpointing",
              level=level, precision=precision, **scaled)
          for precision in ("fp32", "bf16")
          for level in ("none", "norms", "blocks")[:: 2 if rehearse else 1]),
        # The first one compiles DeepSpeed's Adam for the host.
        *(one(f"continued: {way.name}", "equality:resume", 300, way=way, **scaled)
          for way in RESUMED[::every] if way in taken),
        *(one(way.name, "ways:measure", way=way, **scaled)
          for way in taken[:: 10 if rehearse else 1]),
        (0, Measurement(1, "other ways", "", {}, reason=ways.refusal(taken, refused))),
    ]  # fmt: skip


def _memory(what: Scene, bounds: dict[str, Any], rehearse: bool) -> list[_Ordered]:
    stages = [
        (cascade, stage.number, f"`{cascade}` U-Net {stage.number}, {stage.size} px")
        for cascade, config in what.cascades.items()
        for stage in config.stages()
    ]

    def one(name: str, call: str, cascade: str, number: int, **more: Any) -> Measurement:
        arguments = {"cascade": cascade, "number": number, "rehearse": rehearse} | bounds | more
        return Measurement(2, name, f"card_parts.stages:{call}", arguments, 300)

    return [
        *((0, one(title, "measure", *stage)) for *stage, title in stages),
        *((0, one(f"{title}, as MinImagen trains the cascade", "minimagen", *stage,
                  only_this=False)) for *stage, title in stages),
        *((1, one(f"{title}, as MinImagen would train it alone", "minimagen", *stage,
                  only_this=True)) for *stage, title in stages),
    ]  # fmt: skip


def _switches(what: Scene, half: str, rehearse: bool) -> list[_Ordered]:
    return [
        (
            int(network > 0),
            Measurement(
                3,
                f"{switch.name}; {speed.name}",
                "card_parts.switches:measure",
                {"name": switch.name, "network": network, "half": half, "rehearse": rehearse},
                120 + (COMPILES if any(word in switch.name for word in _SLOW) else 0),
                reason=switches.reason_to_leave_out(switch, rehearse=rehearse),
            ),
        )
        for network, speed in enumerate(what.trained)
        for switch in switches.SWITCHES[:: 6 if rehearse else 1]
    ]


def _sampling(what: Scene, half: str, models: Path, rehearse: bool) -> list[_Ordered]:
    found = [
        (
            int(how.is_extra),
            Measurement(
                4,
                f"{pictures.network_name(speed)}: {how.name}",
                "card_parts.pictures:measure",
                {
                    "network": network, "options": how.options, "steps": how.steps,
                    "folder": str(models), "switch": how.switch, "rehearse": rehearse,
                },
                120 + (0 if how.options["runtime"] == "torch" else COMPILES),
            ),
        )
        for network, speed in enumerate(what.sampled)
        for how in pictures.ways(half)
    ]  # fmt: skip
    if not pictures.has_graphs():
        graphs = "CUDA graphs of eager torch"
        found.append((0, Measurement(4, graphs, "", {}, reason=pictures.NO_GRAPHS)))
    return found
