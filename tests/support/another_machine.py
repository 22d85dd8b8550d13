"""What makes a process of this machine find what one of another machine would."""

import os
import shutil
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
