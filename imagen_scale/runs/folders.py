"""Where things lie in a run's folder."""

import difflib
from pathlib import Path

from imagen_scale.errors import UsageError, option


def unet_dir(run_dir: Path, unet_number: int) -> Path:
    """Folder of one U-Net's checkpoints and inference file inside a run."""
    return run_dir / f"unet{unet_number}"


def inference_path(run_dir: Path, unet_number: int) -> Path:
    """The file that sampling reads."""
    return unet_dir(run_dir, unet_number) / "inference.safetensors"


# Runs -------------------------------------------------------------------------------------------


def find_run(run: str | Path | None, root: Path = Path("runs")) -> Path:
    """The run asked for, by folder or by name under `root`; or the newest one there.

    Raises:
        UsageError: If there is none; the message names where it looked, and the nearest name.
    """
    runs = [path.parent for path in root.glob("*/config.json")]
    if run is not None:
        for folder in (Path(run), root / run):
            if (folder / "config.json").is_file():
                return folder
        names = [folder.name for folder in runs]
        close = difflib.get_close_matches(Path(run).name, names, n=1)
        raise UsageError(
            f"{run}: not a run folder (it has no config.json)."
            + (f" Did you mean {root / close[0]}?" if close else "")
            + (f" Runs under {root}: {', '.join(sorted(names))}." if names else "")
        )
    if not runs:
        raise UsageError(
            f"no run found under {root.resolve()}. Train one with `deepspeed launch/train.py "
            f"--config configs/emoji_demo.json`, or name one with {option('run')}."
        )
    return max(runs, key=_last_change)


def _last_change(run: Path) -> float:
    """When training last wrote into a run."""
    files = [run / "config.json", *run.glob("unet*/*")]
    return max(path.stat().st_mtime for path in files)
