"""This machine's address, and what is told of a network that cannot be reached."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from imagen_scale.data.storage import first_line
from imagen_scale.files.caches import UNWRITABLE, cannot_write, hub_home

LOCALHOST = "127.0.0.1"
PROXY_AUTHENTICATION_REQUIRED = 407  # the one answer that comes from a proxy itself


def network_reason(error: Exception, environ: Mapping[str, str] = os.environ) -> str:
    """What a library's error says of the network, and which variable sends it through a proxy.

    Args:
        error: Of a look-up or download over HTTPS.
        environ: Whose variables count.
    """
    reason, variables = first_line(error), _variables(error, environ)
    is_offline = environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if is_offline or not variables or not _is_unreachable(error):
        return reason
    return f"{reason} (through the proxy of {' and '.join(variables)}: correct it, or unset it)"


def hub_reason(error: Exception) -> str:
    """`network_reason`, unless what was downloaded could not be written.

    Raises:
        EnvironmentProblem: Naming the hub's cache then.
    """
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        raise cannot_write(hub_home(), error, "HF_HOME") from None
    return network_reason(error)


@contextmanager
def without_proxies() -> Iterator[None]:
    """Hides proxies from what fetches nothing, but opens a client for it when it is imported."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _is_proxy(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _variables(error: BaseException, environ: Mapping[str, str]) -> list[str]:
    """The variables that are to blame: those of SOCKS where it is what is lacking."""
    kinds = {name: value.lower() for name, value in environ.items() if _is_proxy(name) and value}
    kinds.pop("no_proxy", None)
    kinds.pop("NO_PROXY", None)
    if any("socks" in str(one).lower() for one in _chain(error)):
        return [name for name, value in kinds.items() if value.startswith("socks")]
    found = [name for name in kinds if name.lower() in ("https_proxy", "all_proxy")]
    return sorted(found, key=lambda name: name.lower() == "all_proxy")[:1]


def _is_unreachable(error: BaseException) -> bool:
    """Whether no server answered."""
    for one in _chain(error):
        answer: Any = getattr(one, "response", None)
        if getattr(answer, "status_code", PROXY_AUTHENTICATION_REQUIRED) != (
            PROXY_AUTHENTICATION_REQUIRED
        ):
            return False
    return True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_proxy(name: str) -> bool:
    return name.lower().endswith("_proxy")
