"""A shell for other machines without sshd: `server`, and `ssh` for what is started through it.

    python remote_shell.py serve ENVIRONMENT.json
    python remote_shell.py [-o OPTION]... HOST COMMAND...

What the command prints comes back over the connection, and at the end its exit code.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

PORT = 22
CODE_BYTES = 4


def serve(environment):
    with socket.create_server(("", PORT)) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_answer, args=(connection, environment)).start()


def _answer(connection, environment):
    with connection, connection.makefile("rwb") as stream:
        command = json.loads(stream.readline())
        code = subprocess.run(
            ["sh", "-c", command], env=environment, cwd=environment["HOME"],
            stdin=subprocess.DEVNULL, stdout=connection, stderr=connection,
        ).returncode  # fmt: skip
        stream.write(f"{code % 256:{CODE_BYTES}}".encode())


def call(words):
    while words[0].startswith("-"):
        words = words[2:]
    host, *command = words
    with socket.create_connection((host, PORT), timeout=20) as connection:
        connection.settimeout(None)
        connection.sendall(json.dumps(" ".join(command)).encode() + b"\n")
        held = b""
        while read := connection.recv(65536):
            held += read
            os.write(1, held[:-CODE_BYTES])
            held = held[-CODE_BYTES:]
    return int(held or b"255")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(json.loads(Path(sys.argv[2]).read_text()))
    sys.exit(call(sys.argv[1:]))
