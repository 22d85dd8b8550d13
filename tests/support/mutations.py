"""Wrong configurations: mutations of the valid ones, and mistakes that people make."""

import copy
import json
import re
from typing import Any, NamedTuple

from hypothesis import strategies as st

from imagen_scale.config import dump_config, parse_config
from imagen_scale.errors import ConfigError
from support import ROOT
from support.tiny import TINY

SHIPPED = sorted((ROOT / "configs").glob("*.json"))
VALID = [json.loads(text) for text in (json.dumps(TINY), *(file.read_text() for file in SHIPPED))]
# So that every section of DeepSpeed's is mutated too.
VALID[0]["deepspeed"] = {
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "reduce_bucket_size": 5e8,
    },
    "aio": {"block_size": 1048576},
    "flops_profiler": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "timers": {"throughput": {"enabled": True}},
    "wall_clock_breakdown": False,
}


class Mutant(NamedTuple):
    """A configuration file's text."""

    text: str
    has_unknown_key: bool = False


def _paths(node: Any, path: tuple = ()) -> list[tuple]:
    """Key path of every value."""
    items = []
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            items += [(*path, key), *_paths(value, (*path, key))]
    return items


def _at(node: Any, path: tuple) -> Any:
    for key in path:
        node = node[key]
    return node


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # half surrogate pairs too
NUMBERS = st.sampled_from([0, -1, 1e-320, 1e308, 2**31, 2**63, 2**64, 10**30, -0.0, 0.5, 7])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "[" * 60 + "]" * 60, "[" * 30_000, "1" * 5000,
            "0123", "'x'", "{}}", "", "nul", "1_000", '"\\ud800"', '{"a": 1, "a": 2}']  # fmt: skip


@st.composite
def mutants(draw: Any) -> Mutant:
    """One change to one valid configuration."""
    config = copy.deepcopy(draw(st.sampled_from(VALID)))
    path = draw(st.sampled_from(_paths(config)))
    parent, key = _at(config, path[:-1]), path[-1]
    change = draw(st.sampled_from(["set", "set", "misspell", "add", "delete", "swap", "literal"]))
    if change == "set":
        parent[key] = draw(JSON_VALUES)
    elif change == "delete":
        del parent[key]
    elif change == "swap":
        other = draw(st.sampled_from(_paths(config)))
        if path[: len(other)] != other and other[: len(path)] != path:  # neither inside the other
            values = parent[key], _at(config, other)
            _at(config, other[:-1])[other[-1]], parent[key] = values
    elif change == "literal":
        parent[key] = "@@"
        literal = draw(st.sampled_from(LITERALS))
        return Mutant(json.dumps(config).replace('"@@"', literal))
    elif isinstance(parent, dict):
        if change == "misspell":
            place = draw(st.integers(0, len(key)))
            parent[key[:place] + draw(st.sampled_from("xqz7_ ")) + key[place:]] = parent.pop(key)
        else:
            parent["not_" + draw(ANY_TEXT)] = draw(JSON_VALUES)
        return Mutant(json.dumps(config), has_unknown_key=True)
    return Mutant(json.dumps(config))


# What people write: the wrong configurations that MinImagen and DeepSpeed were tried with.
MISTAKES = [
    "imagen.image_sizes=[32,16]", "imagen.image_sizes=[16]", "imagen.image_sizes=[17,32]",
    "imagen.image_sizes=[31,64]", "imagen.timesteps=20", 'imagen.timesteps="50"',
    "imagen.cond_drop_prob=1.5", "imagen.cond_drop_prob=-1", "imagen.loss_type=l3",
    "imagen.dynamic_thresholding_percentile=9", "imagen.text_encoder=t5", "unets=[]",
    "unets.0.attn_heads=0", "unets.0.layer_attns=[true,true,true]", 'unets.0.dim="16"',
    "unets.0.dim=12", "unets.0.dim_mults=[1,0]", "unets.0.lowres_cond=true", "unets.0.dims=8",
    "deepspeed.zero_optimisation={}", "deepspeed.gradient_acumulation_steps=2",
    "deepspeed.gradient_clipping=x", 'deepspeed.zero_optimization={"stge":2}',
    'deepspeed.zero_optimization={"stage":"two"}', "deepspeed.train_batch_size=8",
    'deepspeed.optimizer={"type":"Adamm"}', "training.lr=abc", 'training.lr="1e-4"',
    "training.micro_batch=3", "training.lr=NaN",
]  # fmt: skip

KEY_PATH = re.compile(r".+?: .+", re.S)
REMEDY = re.compile(
    r"known keys|should|use |write |give |set |add |remove|lower|must|change|smaller|correct|its "
    r"keys are|allowed|count from|not valid JSON|from the environment", re.I
)  # fmt: skip


def fault(mutant: Mutant) -> str | None:
    """What is wrong with how a configuration is taken: None for accepted or well explained."""
    try:
        config = parse_config(mutant.text, source="run.json")
    except ConfigError as error:
        for line in str(error).split("\nrun.json: "):
            sentence = line.removeprefix("run.json: ")
            if not KEY_PATH.fullmatch(sentence) or not REMEDY.search(sentence):
                return f"not explained: {sentence!r}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error} from {mutant.text[:200]!r}"
    if mutant.has_unknown_key:
        return f"an unknown key was accepted: {mutant.text!r}"
    if parse_config(dump_config(config)) != config:
        return f"changed by a dump: {mutant.text!r}"
    return None


def mistake_fault(change: str) -> str | None:
    """What is wrong with how one of MISTAKES is taken."""
    try:
        parse_config(json.dumps(TINY), source="run.json", overrides=(change,))
    except ConfigError as error:
        key = change.partition("=")[0]
        known = "image_sizes" in key or "micro_batch" in key  # told where the other key stands
        path = ".".join(key.split(".")[:2])
        return None if known or path in str(error) else f"{change}: key not named: {error}"
    return f"{change}: accepted"
