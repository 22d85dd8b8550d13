"""What the options of a call are made of: a frozen model whose errors name the option."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from imagen_scale.errors import UsageError, option


class OptionModel(BaseModel):
    """Options of a call, strict and frozen; `make` and `changed` refuse with a sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in dict(values).items()
        }

    @classmethod
    def make(cls, **values: Any) -> Self:
        """Options with these values and the defaults of all others.

        Raises:
            UsageError: Naming every option that is wrong.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            raise UsageError("\n".join(_problems(error, known))) from None

    def changed(self, **values: Any) -> Self:
        """The same options with other values.

        Raises:
            UsageError: Naming every option that is wrong.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return self.make(**given | values)


def _problems(error: ValidationError, known: str) -> list[str]:
    """One sentence for each option that is wrong."""
    problems: dict[str, str] = {}
    # Of a list, what is said of its entries is more to the point than that it is no number.
    for details in sorted(error.errors(), key=lambda details: -len(details["loc"])):
        name = str(details["loc"][0])
        if details["type"] == "extra_forbidden":
            sentence = f"{option(name)}: unknown option; known are {known}."
        else:
            reason = details["msg"].removeprefix("Input ")
            sentence = f"{option(name)} {details['input']!r}: it {reason[0].lower()}{reason[1:]}."
        problems.setdefault(name, sentence)
    return list(problems.values())
