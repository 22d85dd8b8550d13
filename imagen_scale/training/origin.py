"""What a training begins with in place of random weights: a trained stage of another run."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from imagen_scale.config import Config, StageConfig
from imagen_scale.errors import ConfigError
from imagen_scale.files.atomic import sha256
from imagen_scale.files.caches import expanded
from imagen_scale.runs.checkpoint import list_checkpoints
from imagen_scale.runs.folders import inference_path, unet_dir
from imagen_scale.runs.inference import InferenceFile, read_inference


class Origin(NamedTuple):
    """A trained stage that another one starts from."""

    file: InferenceFile
    sha256: str  # of the file

    def said_of(self, stage: StageConfig) -> str:
        """In a sentence, what `stage` starts with."""
        run, few = self.file.path.parents[1], stage.few_steps
        if few is not None:
            own = self.file.stage.few_steps
            steps = few.steps_of_ordinary_teacher if own is None else own.steps
            guidance = f"{'' if own is None else 'built-in '}guidance {few.cond_scale:g}"
            return (
                f"{stage.name}: learns {few.steps} {'step' if few.steps == 1 else 'steps'} from "
                f"{steps} of {run} (step {self.file.step}), {guidance}, and starts as it is"
            )
        theirs, ours = self.file.stage.unet.pred_type, stage.unet.pred_type
        change = "" if theirs == ours else f"; it predicted {theirs} there and learns {ours} here"
        return f"{stage.name}: starts from the weights of {run} (step {self.file.step}){change}"


def find_origin(config: Config, unet_number: int, run_dir: Path, *, fresh: bool) -> Origin | None:
    """What a U-Net starts from; None for random weights, or where a checkpoint goes before.

    Args:
        config: The run.
        unet_number: From 1.
        run_dir: Its folder.
        fresh: Whether checkpoints that are there will be deleted.

    Raises:
        ConfigError: If there is no such stage, it is not trained to its end, or of another network.
        CheckpointError: If its file is damaged.
    """
    written = config.stage(unet_number).start_from
    if written is None or (not fresh and list_checkpoints(unet_dir(run_dir, unet_number))):
        return None
    return read_origin(config, unet_number, expanded(written), run_dir, key="training.start_from")


def read_origin(config: Config, unet_number: int, run: Path, run_dir: Path, *, key: str) -> Origin:
    """A trained stage of another run, checked against the one that is to start from it.

    Args:
        config: Of the run that is to be trained.
        unet_number: From 1.
        run: The other run's folder.
        run_dir: The run's own folder.
        key: Of the configuration, which names `run`.

    Raises:
        ConfigError: If it cannot be started from.
        CheckpointError: If its file is damaged.
    """
    if run.resolve() == run_dir.resolve():
        raise ConfigError(f"{key}: {run} is this run itself; name another, or another --run.")
    path, name = inference_path(run, unet_number), config.stage(unet_number).name
    if not path.is_file():
        raise ConfigError(
            f"{key}: {run} has no trained {name} ({path} does not exist); train it first, or name "
            f"another run."
        )
    file = read_inference(path)
    if not file.is_finished:
        raise ConfigError(
            f"{key}: {name} of {run} is half-trained ({file.step} of {file.steps} steps); run its "
            f"training command again to finish it."
        )
    problems = list(_differences(config, file, run))
    if problems:
        raise ConfigError("\n".join(problems))
    return Origin(file, sha256(path))


def check_encoder(origin: Origin, fingerprint: str, encoder: str) -> None:
    """Refuses a stage that was trained with another text encoder, whatever its name.

    Raises:
        ConfigError: Naming both.
    """
    if origin.file.text_fingerprint != fingerprint:
        raise ConfigError(
            f"text.encoder: {encoder!r} here is not the one that {origin.file.path} was trained "
            f"with ({origin.file.config.text_encoder!r}, or another version of it); put the same "
            f"files there."
        )


def _differences(config: Config, file: InferenceFile, run: Path) -> Iterator[str]:
    """A sentence for each value of the network that is not the other's."""
    number = file.unet_number
    theirs, ours = file.stage.network, config.stage(number, file.text_embed_dim).network
    for field in fields(ours):
        own, other = getattr(ours, field.name), getattr(theirs, field.name)
        if own != other and field.name != "pred_type":
            yield (
                f"unets.{number - 1}.{field.name}: {_plain(own)}, but {run} has {_plain(other)}; "
                f"what starts from another's weights has its network: write {_plain(other)}."
            )


def _plain(value: object) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text.lower() if "True" in text or "False" in text else text
