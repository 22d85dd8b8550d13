"""Where commands that serve listen."""

import errno
import socket

from imagen_scale.errors import EnvironmentProblem, ImagenScaleError, UsageError, option


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: A name or an address of this machine.
        port: 0 takes any that is free.

    Raises:
        UsageError: If the machine has no such address.
        EnvironmentProblem: If another program listens there, or this one may not.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise _unusable(host, port, error) from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise _unusable(host, port, error) from None
    return listener


def _unusable(host: str, port: int, error: OSError) -> ImagenScaleError:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return UsageError(
            f"{option('host')} {host}: is no address of this machine ({error.strerror}); take "
            f"127.0.0.1 for this machine alone, or 0.0.0.0 for all that reach it."
        )
    reason = "another program is open there"
    if error.errno == errno.EACCES:
        reason = "ports below 1024 are the system's"
    elif error.errno != errno.EADDRINUSE:
        reason = str(error.strerror)
    return EnvironmentProblem(
        f"{host}:{port} cannot be used: {reason}; name another with --port, or take any that is "
        f"free with --port 0."
    )
