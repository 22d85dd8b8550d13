"""Where things lie in a run's folder: every name is here and nowhere else.

```
RUN/config.json  data_report.json  evaluation.json  steps_table.json
    .unetN.owner
    unetN/inference.safetensors  metrics.jsonl  setup.json  step_00001000/...
    unetN/ema/step_00001000_width_0.05.safetensors  trained.safetensors
    unetN/lowres_samples.safetensors  tensorboard/events...
    unetN/ema/best.safetensors  best.json
    samples/00001_0123abcd.png (.json)  unetN_step_00001000.png
    export/unetN/onnx-fp32/...
```
"""

import difflib
from pathlib import Path

from imagen_scale.errors import UsageError


def config_path(run: Path) -> Path:
    """The run's configuration; a folder that has one is a run."""
    return run / "config.json"


def data_report_path(run: Path) -> Path:
    """Which pictures were used and which left out."""
    return run / "data_report.json"


def evaluation_path(run: Path) -> Path:
    """What `evaluate` measured."""
    return run / "evaluation.json"


def steps_table_path(run: Path) -> Path:
    """What `evaluate --steps-table` measured."""
    return run / "steps_table.json"


def unet_dir(run: Path, unet_number: int) -> Path:
    """Folder of one U-Net's checkpoints and files."""
    return run / f"unet{unet_number}"


def inference_path(run: Path, unet_number: int) -> Path:
    """The file that sampling reads."""
    return unet_dir(run, unet_number) / "inference.safetensors"


def snapshot_path(run: Path, unet_number: int, step: int, width: float) -> Path:
    """An average of `training.ema_widths` after a step."""
    name = f"step_{step:08d}_width_{width:g}.safetensors"
    return unet_dir(run, unet_number) / "ema" / name


def snapshot_paths(run: Path, unet_number: int) -> list[Path]:
    """Every saved average of one U-Net, in the order of steps."""
    return sorted((unet_dir(run, unet_number) / "ema").glob("step_*_width_*.safetensors"))


def trained_path(run: Path, unet_number: int) -> Path:
    """The inference file that training wrote, where `ema` put another in its place."""
    return unet_dir(run, unet_number) / "ema" / "trained.safetensors"


def best_path(run: Path, unet_number: int) -> Path:
    """The average of the weights at the best validation; see `training.keep_best`."""
    return unet_dir(run, unet_number) / "ema" / "best.safetensors"


def best_record_path(run: Path, unet_number: int) -> Path:
    """Which validation that was, and what it measured."""
    return best_path(run, unet_number).with_suffix(".json")


def lowres_samples_path(run: Path, unet_number: int) -> Path:
    """Training pictures as the stage before draws them; see `training.lowres_samples`."""
    return unet_dir(run, unet_number) / "lowres_samples.safetensors"


def metrics_path(run: Path, unet_number: int) -> Path:
    """What training reports, a JSON line for each time."""
    return unet_dir(run, unet_number) / "metrics.jsonl"


def setup_path(run: Path, unet_number: int) -> Path:
    """How the U-Net is trained: what was planned, or learned by running out of memory."""
    return unet_dir(run, unet_number) / "setup.json"


def owner_path(run: Path, unet_number: int) -> Path:
    """Who trains a U-Net at the moment; beside its folder, which `--fresh` deletes."""
    return run / f".unet{unet_number}.owner"


def tensorboard_dir(run: Path, unet_number: int) -> Path:
    """One U-Net's curves and grids for TensorBoard."""
    return unet_dir(run, unet_number) / "tensorboard"


def samples_dir(run: Path) -> Path:
    """Pictures: of training, of `sample` and of the page."""
    return run / "samples"


def grid_path(run: Path, unet_number: int, step: int) -> Path:
    """The grid that training draws after a step."""
    return samples_dir(run) / f"unet{unet_number}_step_{step:08d}.png"


def grid_paths(run: Path, unet_number: int) -> list[Path]:
    """Every grid of one U-Net, in the order of steps."""
    return sorted(samples_dir(run).glob(f"unet{unet_number}_step_*.png"))


def export_dir(run: Path, unet_number: int, kind: str) -> Path:
    """An export of one U-Net; `kind` is "<format>-<precision>"."""
    return run / "export" / f"unet{unet_number}" / kind


def bundle_dir(run: Path, precision: str) -> Path:
    """The whole cascade's export, which needs no torch."""
    return run / "export" / f"bundle-{precision}"


def bundle_path(folder: Path) -> Path:
    """What a bundle says of itself; a folder that has one is a bundle."""
    return folder / "bundle.json"


def export_dirs(run: Path) -> list[Path]:
    """Every folder that an export was made in."""
    found = (run / "export").glob("unet*/*")  # locks and what is being made are hidden
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def last_change(run: Path) -> float:
    """When training last wrote into a run, seconds since 1970; 0 where nothing is there."""
    files = [config_path(run), *run.glob("unet*/*")]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def find_run(run: str | Path | None, root: Path = Path("runs")) -> Path:
    """The run asked for, by folder or by name under `root`; or the newest one there.

    Raises:
        UsageError: If there is none; the message names where it looked, and the nearest name.
    """
    runs = [path.parent for path in root.glob("*/config.json")]
    if run is not None:
        for folder in (Path(run), root / run):
            if config_path(folder).is_file():
                # What is written beside a run is called after it: "." has no name.
                return folder if folder.name not in ("", "..") else folder.resolve()
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
            f"--config configs/emoji_demo.json`, or name the folder of one."
        )
    return max(runs, key=last_change)
