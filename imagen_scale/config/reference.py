"""The configuration's reference in Markdown, made from the models that check it."""

import json
from typing import Any

from imagen_scale.config.schema import Config

INTRODUCTION = """\
# Configuration

A run is one JSON file. Its keys, made by `imagen-scale config reference` from the models that check them; `imagen-scale config check FILE` names every mistake in a file, and `imagen-scale config schema` gives editors the JSON schema. On the command line, `--set section.key=value` changes one key, e.g. `--set unets.1.dim=64`.

`imagen` and `unets` take MinImagen's own names. "One or a list" takes one value for all, or one for each level or U-Net as the description says. Unknown keys are refused.
"""  # noqa: E501
DEEPSPEED = """\
Passed to DeepSpeed as it is, e.g. `{"zero_optimization": {"stage": 2}}`; keys that DeepSpeed does not know are refused, and so are those stated elsewhere in this file: batch sizes, accumulation, precision, clipping, optimizer. With `memory.budget` the planner writes `zero_optimization` itself unless it is given.
"""  # noqa: E501
_LARGE = 2**31  # bounds from here on only say that the number fits


def reference() -> str:
    """The whole reference, one table for each section."""
    schema = Config.model_json_schema()
    for field in schema["properties"].values():  # pydantic leaves out what is said twice
        field.setdefault("description", (_section(schema, field) or {}).get("description", ""))
    parts = [INTRODUCTION, "## Sections\n", _table(schema)]
    for key, field in schema["properties"].items():
        section = _section(schema, field)
        if section is None:
            parts += [f"## {key}\n", DEEPSPEED]
            continue
        parts += [f"## {_title(key, field)}\n", f"{section['description']}\n", _table(section)]
        for inner, inner_field in section["properties"].items():
            below = _section(schema, inner_field)
            if below is not None:
                parts += [
                    f"### {_title(key, field)}.{inner}\n",
                    f"{below['description']}\n",
                    _table(below),
                ]
    return "\n".join(parts)


def _title(key: str, field: dict[str, Any]) -> str:
    return f"{key}[i]" if field.get("type") == "array" else key


def _section(schema: dict[str, Any], field: dict[str, Any]) -> Any:
    """The section that a field holds, directly, in a list or or-null; None for a plain value."""
    for part in (field, field.get("items", {}), *field.get("anyOf", [])):
        if "$ref" in part:
            return schema["$defs"][part["$ref"].rpartition("/")[2]]
    return None


def _table(section: dict[str, Any]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for key, field in section["properties"].items():
        default = "**required**" if key in required else _default(field)
        cells = (f"`{key}`", _value(field), default, field.get("description", ""))
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if isinstance(value, dict):
        return "its defaults"
    if "default" not in field:
        return "`{}`"
    return f"`{json.dumps(value)}`"


def _value(field: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "anyOf" in field:
        kinds = list(dict.fromkeys(_value(part) for part in field["anyOf"]))
        lists = [kind for kind in kinds if kind.startswith("list of ")]
        plain = [kind for kind in kinds if kind not in lists and kind != "`null`"]
        if lists and plain:  # "one value, or one per level"
            plain = [f"{' or '.join(plain)}, one or a list"]
        else:
            plain += lists
        return " or ".join(plain + ["`null`"] * ("`null`" in kinds))
    if "$ref" in field:
        return "section"
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"[{', '.join(_value(item) for item in field['prefixItems'])}]"
        return f"list of {_value(field['items'])}"
    name = {"boolean": "`true`, `false`", "string": "text", "null": "`null`", "object": "object"}
    return name.get(field["type"], field["type"]) + _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    words = {
        "minimum": "at least", "exclusiveMinimum": "above",
        "maximum": "at most", "exclusiveMaximum": "below",
    }  # fmt: skip
    found = [
        f"{word} {field[key]:g}"
        for key, word in words.items()
        if key in field and field[key] < _LARGE
    ]
    return " " + ", ".join(found) if found else ""
