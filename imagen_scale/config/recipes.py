"""Ways to train that change several keys by one word: `training.recipe`.

Keys that are written keep what is written, so that a configuration says all that it is.
"""

import copy
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from imagen_scale.config.section import MOST_CHANNELS

if TYPE_CHECKING:
    from imagen_scale.config.schema import Config

# Rate times width: 2e-3 for 32 channels, and less for wider networks, whose updates add up over
# more channels. Measured at 32 and 16 channels, carried over to others.
LR_TIMES_DIM = 0.064


class Change(NamedTuple):
    """One key that a recipe fills in."""

    path: tuple[str | int, ...]
    value: Any

    def __str__(self) -> str:
        return ".".join(map(str, self.path))


def modern(data: dict[str, Any]) -> list[Change]:
    """What the recipe "modern" fills in for the U-Nets of a configuration.

    Args:
        data: A configuration as JSON has it, maybe a wrong one.
    """
    unets = data.get("unets")
    if not isinstance(unets, list) or not unets or not all(isinstance(u, dict) for u in unets):
        return []
    changes = [Change(("unets", i, "pred_type"), "x0") for i in range(len(unets))]
    changes.append(Change(("unets", 0, "schedule"), {"type": "cosine"}))
    changes += [
        Change(("unets", i, "lowres_residual"), True)
        for i, unet in enumerate(unets)
        if i > 0 and unet.get("pred_type", "x0") == "x0"  # what it corrects is a picture
    ]
    # Of predicted noise this weight would make nearly all of the loss that of the last times.
    weights = [None if unet.get("pred_type") == "eps" else "v_clipped" for unet in unets]
    changes.append(Change(("training", "loss_weight"), _for_each(weights)))
    changes.append(Change(("imagen", "dynamic_thresholding_percentile"), None))
    dims = [unet.get("dim", 128) for unet in unets]
    if all(isinstance(dim, int) and 0 < dim <= MOST_CHANNELS for dim in dims):
        rates = [float(f"{LR_TIMES_DIM / dim:.1g}") for dim in dims]
        changes.append(Change(("training", "lr"), _for_each(rates)))
    if len(unets) > 1:
        changes.append(Change(("training", "lowres_aug_max"), 0.2))
        changes.append(Change(("imagen", "lowres_sample_noise_level"), 0.02))
    return changes


def _for_each(values: list[Any]) -> Any:
    """A list with one value for each U-Net, or the value of all."""
    return values if len(set(values)) > 1 else values[0]


RECIPES = {"modern": modern}


def fill_in(data: dict[str, Any]) -> dict[str, Any]:
    """A configuration with what its recipe says where nothing is written.

    Args:
        data: As JSON has it; not changed. A wrong one is left to whoever checks it.
    """
    training = data.get("training")
    recipe = training.get("recipe") if isinstance(training, dict) else None
    if not isinstance(recipe, str) or recipe not in RECIPES:
        return data
    filled = copy.deepcopy(data)
    for change in RECIPES[recipe](data):
        node: Any = filled
        for key in change.path[:-1]:
            node = node.setdefault(key, {}) if isinstance(key, str) else node[key]
        if isinstance(node, dict):
            node.setdefault(change.path[-1], change.value)
    return filled


def told_of_recipe(config: "Config") -> str:
    """A sentence about what the recipe of a configuration set, and what was written otherwise."""
    recipe = config.training.recipe
    if recipe is None:
        return ""
    data = config.model_dump(mode="json")
    set_here, written = [], []
    for change in RECIPES[recipe](data):
        value: Any = data
        for key in change.path:
            value = value[key]
        if _is_same(value, change.value):
            set_here.append(f"{change} {_short(value)}")
        else:
            written.append(f"{change} {_short(value)} (the recipe: {_short(change.value)})")
    kept = f"; written otherwise and kept: {', '.join(written)}" if written else ""
    return f"training.recipe {recipe}: {', '.join(set_here)}{kept}"


def _is_same(value: Any, wanted: Any) -> bool:
    if isinstance(value, dict) and isinstance(wanted, dict):
        return wanted.items() <= value.items()  # which has every default written out
    return bool(value == wanted)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return str(value["type"])
    return value if isinstance(value, str) else json.dumps(value)
