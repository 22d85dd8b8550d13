"""What makes a process of this machine find what one of another machine would."""

import os
import shutil
import time
from pathlib import Path


def with_other_code(folder):
    """Another version of this package's files, as far as anybody looks at them."""
    import imagen_scale

    os.chdir(folder)
    copy = Path(folder) / "imagen_scale"
    shutil.copytree(Path(imagen_scale.__file__).parent, copy)
    (copy / "version.py").write_text("# changed\n" + (copy / "version.py").read_text())
    imagen_scale.__file__ = str(copy / "__init__.py")


def that_sees_nothing_late(folder):
    """A file system that shows other machines' files never."""
    from imagen_scale.training import agreement

    agreement.SEEN_WITHIN_S = 1.0
    os.chdir(folder)


def that_looks_seldom(folder):
    """A rank that is told of the others every few seconds once it leaves, as on a busy machine."""
    from imagen_scale.training import circle

    circle.LOOK_S = 3.0
    os.chdir(folder)


def that_fails_late(folder):
    """A rank 0 that others hear before it acts itself upon what it told them."""
    from imagen_scale.training.meeting import Meeting

    tell = Meeting.heard_from_rank_0

    def slowly(*told):
        try:
            return tell(*told)
        finally:
            time.sleep(1)

    Meeting.heard_from_rank_0 = slowly
    os.chdir(folder)
