"""One training at a time in a run's folder: a second would overwrite the first one's files.

Each U-Net that is trained has an owner's file beside its folder, with host, process and start, and
is touched every few seconds. On the owner's own machine a process number tells whether it lives; on
another only whether the file is still touched.

A file is there complete or not at all, and what is removed is the file that was judged: of several
processes that find the same one dead, one gets its place.
"""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from imagen_scale.errors import UsageError
from imagen_scale.files.atomic import temporary_path
from imagen_scale.runs.folders import owner_path
from imagen_scale.training.beats import pid_namespace, started

TOUCH_S = 5.0
STALE_S = 60.0  # a file that lies still for so long has no owner: more than NFS remembers


class Owner:
    """Owns U-Nets of a run while it is entered; on rank 0 only.

    Args:
        run_dir: The run's folder; it is made.
        numbers: Of the U-Nets, from 1.
        say: Told why it waits.
    """

    def __init__(
        self, run_dir: Path, numbers: list[int], say: Callable[[str], None] = print
    ) -> None:
        self._run_dir, self._say = run_dir, say
        self._files = [owner_path(run_dir, number) for number in numbers]
        self._taken: list[Path] = []
        self._own = json.dumps(
            {
                "host": platform.node(), "machine": pid_namespace(), "pid": os.getpid(),
                "started": started(os.getpid()),
            }
        )  # fmt: skip
        self._is_over = threading.Event()

    def take(self) -> None:
        """Takes all of them.

        Raises:
            UsageError: If another process owns one of them; none is taken then.
        """
        self._run_dir.mkdir(parents=True, exist_ok=True)
        try:
            for file in self._files:
                self._take(file)
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._touch, name="owner", daemon=True).start()

    def release(self) -> None:
        """Gives them back."""
        self._is_over.set()
        for file in self._taken:
            if _read(file) == self._own:
                file.unlink(missing_ok=True)
        self._taken.clear()

    def _take(self, file: Path) -> None:
        while not _put(file, self._own):
            try:
                other = _content(file)
            except FileNotFoundError:  # it has left
                continue
            _refuse_the_living(file, other, self._say)
            _remove(file, other)
        self._taken.append(file)

    def _touch(self) -> None:
        while not self._is_over.wait(TOUCH_S):
            for file in self._taken:
                with contextlib.suppress(OSError):
                    os.utime(file)


def check_owner(run_dir: Path, numbers: list[int]) -> None:
    """Refuses at once what `Owner.take` would refuse, as far as this machine can tell.

    Raises:
        UsageError: Naming the process.
    """
    for number in numbers:
        file = owner_path(run_dir, number)
        other = _read(file)
        if other is not None and _lives_here(other):
            raise _in_use(file, other)


def _refuse_the_living(file: Path, other: str, say: Callable[[str], None]) -> None:
    """Returns once it is certain that the owner is gone, or that the file is another's."""
    lives = _lives_here(other)
    if lives is False:
        return
    if lives is None:  # on another machine, in another container, or before this one's last start
        say(f"{file.parent} is {_who(other)}'s: looking for signs of life, {STALE_S:.0f} s at most")
        since, touched = time.monotonic(), _touched(file)
        while time.monotonic() < since + STALE_S:
            time.sleep(1)
            if _read(file) != other:  # it left, or somebody else is faster
                return
            if _touched(file) != touched:
                raise _in_use(file, other)
        return
    raise _in_use(file, other)


def _lives_here(owner: str) -> bool | None:
    """Whether an owner's process is alive; None where this machine cannot tell."""
    try:
        facts = json.loads(owner)
        if facts["machine"] == pid_namespace():
            return bool(started(facts["pid"]) == facts["started"])
    except (ValueError, KeyError, TypeError):
        pass  # cut by a full disk, or being written: its time tells
    return None


def _who(owner: str) -> str:
    try:
        facts = json.loads(owner)
        return f"process {facts['pid']} on {facts['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _in_use(file: Path, owner: str) -> UsageError:
    name = file.name.split(".")[1]
    return UsageError(
        f"{file.parent}: {name} is being trained there by {_who(owner)}. Wait for it, stop it, or "
        f"train into another folder with --run."
    )


def _put(file: Path, words: str) -> bool:
    """Puts an owner's file where none is, complete from the first moment; whether it did."""
    complete = _beside(file)
    try:
        complete.write_text(words, encoding="utf-8")
        try:
            os.link(complete, file)
        except FileExistsError:
            return False
        except OSError:  # no links on this file system: whoever sees it empty looks again
            with contextlib.suppress(FileExistsError), file.open("x", encoding="utf-8") as opened:
                opened.write(words)
                return True
            return False
        return True
    finally:
        complete.unlink(missing_ok=True)


def _remove(file: Path, stale: str) -> None:
    """Removes a file with this content; one that has taken its place since stays."""
    if _read(file) != stale:
        return
    apart = _beside(file)
    try:
        file.rename(apart)  # which one process can do
    except FileNotFoundError:
        return
    if (found := _content(apart)) != stale:  # renewed between the look and the move
        _put(file, found)
    apart.unlink()


def _beside(file: Path) -> Path:
    """A new name in the same folder."""
    return temporary_path(file.with_name(f"{file.name}.{uuid.uuid4().hex}"))


def _content(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")  # it may be damaged


def _read(file: Path) -> str | None:
    try:
        return _content(file)
    except OSError:
        return None


def _touched(file: Path) -> int:
    """Time of the last touch; a file has to be opened before NFS asks its server."""
    _read(file)
    with contextlib.suppress(OSError):
        return file.stat().st_mtime_ns
    return 0
