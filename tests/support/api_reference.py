"""The list of public names in docs/api.md, made from the package itself."""

import ast
import inspect
import textwrap
from typing import get_args

from pydantic import BaseModel

import imagen_scale
from imagen_scale import errors
from imagen_scale.diffusion.names import Sampler, Spacing
from imagen_scale.sampling.option_facts import OptionFacts, facts_of
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import Precision, RuntimeName

MARKS = ("<!-- names: written by tests/refresh_docs.py -->\n", "<!-- end of names -->\n")
OPTION_MARKS = ("<!-- options: written by tests/refresh_docs.py -->\n", "<!-- end of options -->\n")
NAMES = {"RuntimeName": RuntimeName, "Precision": Precision, "Sampler": Sampler, "Spacing": Spacing}


def refreshed(page: str) -> str:
    """The page with its list of names, or its table of options, as it should be."""
    for marks, make in ((MARKS, reference), (OPTION_MARKS, options_table)):
        if marks[0] in page:
            before, _, rest = page.partition(marks[0])
            page = before + marks[0] + make() + marks[1] + rest.partition(marks[1])[2]
    return page


def options_table() -> str:
    """Every option of sampling, as the command line spells it."""
    rows = [f"| `--{one.name.replace('_', '-')}` | {_default(one)} | {one.sentence} |\n"
            for one in facts_of(SamplingOptions)]  # fmt: skip
    return "\n| option | default | |\n|---|---|---|\n" + "".join(rows) + "\n"


def _default(facts: OptionFacts) -> str:
    return "" if facts.default is None else f"`{facts.default}`"


def reference() -> str:
    """Every public name with its signature and the first sentence of its docstring."""
    parts = ["\n"]
    for name in imagen_scale.__all__:
        value = getattr(imagen_scale, name)
        if name == "ImagenScaleError":
            parts.append(f"### `{name}`\n\n{_sentence(value)}\n\n{_table_of_errors()}\n")
        elif inspect.isclass(value) and issubclass(value, BaseModel):
            parts.append(f"### `{name}`\n\n{_sentence(value)}\n\n{_table_of_options(value)}\n")
        elif inspect.isclass(value):
            parts.append(f"### `{name}`\n\n{_sentence(value)}\n\n")
            parts += [_member(name, member, value) for member in _members(value)]
        else:
            parts.append(f"### `{name}`\n\nThe version, e.g. `{value!r}`.\n\n")
    return "".join([*parts, _values()])


def _members(cls: type) -> list[str]:
    fields = list(getattr(cls, "_fields", ()))
    own = [name for name in vars(cls) if not name.startswith("_") and name not in fields]
    return [*fields, *own]


def _member(owner: str, name: str, cls: type) -> str:
    raw = inspect.getattr_static(cls, name)
    if name in getattr(cls, "_fields", ()):
        end = "\n" if name == cls._fields[-1] else ""
        (kind,) = [ast.unparse(node.annotation) for node in ast.walk(_syntax(cls))
                   if isinstance(node, ast.AnnAssign) and node.target.id == name]  # fmt: skip
        return f"- `{owner}.{name}: {kind}`\n{end}"
    function = getattr(raw, "fget", None) or getattr(raw, "__func__", raw)
    syntax = _syntax(function)
    kind = ast.unparse(syntax.returns).strip("'")
    if isinstance(raw, property):
        return f"#### `{owner}.{name}: {kind}`\n\n{_sentence(raw)}\n\n"
    written = {one.arg: _plain(one) for one in (*syntax.args.args[1:], *syntax.args.kwonlyargs)}
    lines = []
    for one in list(inspect.signature(function).parameters.values())[1:]:  # without self
        if one.kind is one.KEYWORD_ONLY and "    *,\n" not in lines:
            lines.append("    *,\n")
        # Options are added to what is written, with annotations that are text.
        text = written.get(one.name, f"{one.name}: {one.annotation}")
        default = "" if one.default is one.empty else f" = {one.default!r}"
        lines.append(f"    {text}{default},\n")
    code = f"{owner}.{name}(\n{''.join(lines)}) -> {kind}"
    return f"#### `{owner}.{name}`\n\n{_sentence(raw)}\n\n```text\n{code}\n```\n\n"


def _syntax(value: object) -> ast.AST:
    """Annotations as they are written: typing prints them otherwise from version to version."""
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


def _plain(argument: ast.arg) -> str:
    return f"{argument.arg}: {ast.unparse(argument.annotation)}"


def _table_of_options(model: type[BaseModel]) -> str:
    rows = []
    for one in facts_of(model):
        kind = one.annotation.replace("|", "or")
        rows.append(f"| `{one.name}` | {kind} | {_default(one)} | {one.sentence} |\n")
    return "| option | type | default | |\n|---|---|---|---|\n" + "".join(rows)


def _values() -> str:
    rows = [f"| `{name}` | {', '.join(f'`{value!r}`' for value in get_args(names))} |\n"
            for name, names in NAMES.items()]  # fmt: skip
    return "### Values\n\n| | one of |\n|---|---|\n" + "".join(rows) + "\n"


def _table_of_errors() -> str:
    found = [value for value in vars(errors).values()
             if inspect.isclass(value) and issubclass(value, errors.ImagenScaleError)]  # fmt: skip
    rows = [f"| `{one.__name__}` | {one.exit_code} | {_sentence(one)} |\n" for one in found]
    return "| in `imagen_scale.errors` | exit code | |\n|---|---|---|\n" + "".join(rows)


def _sentence(value: object) -> str:
    raw = value.__func__ if isinstance(value, classmethod) else value
    return inspect.getdoc(raw).partition("\n\n")[0].replace("\n", " ")
