"""Errors as OpenAI's clients read them."""

from typing import Any

from imagen_scale.errors import ImagenScaleError, UsageError, spelled

MOST_SAID = 1000  # characters: what was sent is not sent back whole
NOT_A_RESULT = "the server could not make this picture; its log says why."


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: Of HTTP.
        message: What was seen, what is allowed, what to do next.
        param: The key of the request that it is about.
        code: A word for programs.
        retry_s: After how many seconds to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_s is None else {"retry-after": str(retry_s)}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {
                "message": self.message[:MOST_SAID],
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def refusal_of(error: BaseException) -> Refusal:
    """What a caller is told of an error.

    Wrong use is theirs, and names the first option that the message names. Of a failure the message
    of one of our exceptions is told, and of all else that there was one.
    """
    if isinstance(error, Refusal):
        return error
    if not isinstance(error, ImagenScaleError):
        return Refusal(500, NOT_A_RESULT)
    named: list[str] = []

    def spell(name: str) -> str:
        named.append(name)
        return name

    message = spelled(error.marked, spell)
    if isinstance(error, UsageError):
        return Refusal(400, message, param=named[0] if named else None, code="invalid_value")
    return Refusal(500, message)
