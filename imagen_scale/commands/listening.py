"""Where commands that serve listen."""

import socket

from imagen_scale.errors import EnvironmentProblem


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: A name or an address of this machine.
        port: 0 takes any that is free.

    Raises:
        EnvironmentProblem: If another program listens there, or the machine has no such address.
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


def _unusable(host: str, port: int, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{host}:{port} cannot be used ({error.strerror}), perhaps since another program is open "
        f"there; name another with --port, or take any that is free with --port 0."
    )
