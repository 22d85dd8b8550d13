"""A finished run on the Hugging Face hub: its files, and the way there."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from imagen_scale.config import Config
from imagen_scale.errors import CheckpointError, EnvironmentProblem, UsageError, option
from imagen_scale.files.caches import expanded
from imagen_scale.files.numbers import by_number
from imagen_scale.runs.folders import (
    config_path,
    evaluation_path,
    grid_paths,
    inference_path,
    samples_dir,
    steps_table_path,
)
from imagen_scale.runs.inference import InferenceFile, read_inference

CARD = "README.md"  # of the run, and of the repository
MOST_SAMPLES = 8  # newest pictures of `sample`


class Upload(NamedTuple):
    """A file, and its name in the repository."""

    name: str
    file: Path

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.file.stat().st_size


def finished_stages(run: Path, unets: int) -> list[InferenceFile]:
    """The inference files of a run whose training has ended.

    Raises:
        CheckpointError: Naming the stage that is missing or half-trained.
    """
    files = []
    for number in range(1, unets + 1):
        path = inference_path(run, number)
        if not path.is_file():
            raise CheckpointError(
                f"{run}: U-Net {number} is not trained yet; a run is shared when all its stages "
                f"are. Run the training command again."
            )
        file = read_inference(path)
        if not file.is_finished:
            raise CheckpointError(
                f"{run}: U-Net {number} is half-trained ({file.step} of {file.steps} steps); a run "
                f"is shared when it is finished. Run the training command again."
            )
        files.append(file)
    return files


def uploads(run: Path, stages: Sequence[InferenceFile]) -> list[Upload]:
    """What is shared of a run: weights, configuration, measures and pictures.

    Everything keeps its place, so that what is downloaded is a run again.

    Args:
        run: Its folder.
        stages: Of `finished_stages`.
    """
    found = [config_path(run), *(file.path for file in stages)]
    found += [path for path in (evaluation_path(run), steps_table_path(run)) if path.is_file()]
    found += _pictures(run, len(stages))
    return [Upload(path.relative_to(run).as_posix(), path) for path in found]


def _pictures(run: Path, unets: int) -> Iterator[Path]:
    """The last grid of each stage, and the newest sheets, grids and pictures that were made."""
    for number in range(1, unets + 1):
        yield from _there(grid_paths(run, number))[-1:]
    made = samples_dir(run)
    for pattern in ("sheet_*.png", "grid_*.png", "[0-9]*_*.png"):
        for path in _there(sorted(made.glob(pattern), key=by_number))[-MOST_SAMPLES:]:
            yield path
            if (beside := path.with_suffix(".json")).is_file():
                yield beside


def _there(paths: list[Path]) -> list[Path]:
    """Those that are files: a link may lead nowhere."""
    return [path for path in paths if path.is_file()]


def named_places(configs: Iterable[Config]) -> list[str]:
    """Absolute paths of this machine that configurations tell to whoever reads them.

    Args:
        configs: The run's, and that of each stage's file: one taken over has another.
    """
    named = dict.fromkeys(place for config in configs for place in _places(config))
    return [f"{key} {value!r}" for key, value in named if expanded(value).is_absolute()]


def _places(config: Config) -> Iterator[tuple[str, str]]:
    """What may be a path, by its key."""
    started = config.training.start_from
    values = [
        ("data.path", config.data.path), ("data.cache_dir", config.data.cache_dir),
        ("text.encoder", config.text.encoder),
        ("imagen.text_encoder_name", config.imagen.text_encoder_name),
        ("logging.run_dir", config.logging.run_dir),
        *(("training.start_from", one) for one in
          (started if isinstance(started, tuple) else (started,))),
        ("distill.teacher", config.distill and config.distill.teacher),
    ]  # fmt: skip
    for key, value in values:
        if value:
            yield key, value


def check_repo(name: str) -> None:
    """Refuses what is no name of a repository.

    Raises:
        UsageError: Saying how it is written.
    """
    if not is_repo(name):
        raise UsageError(
            f"{option('repo')} {name}: write OWNER/NAME, with letters, figures, '-', '_' and '.'."
        )


def is_repo(name: str) -> bool:
    """Whether it is written as OWNER/NAME, which a folder may be as well."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def push(repo: str, files: Sequence[Upload], *, private: bool, message: str) -> str:
    """Uploads files as one commit, making the repository where there is none.

    Args:
        repo: OWNER/NAME.
        files: What is uploaded.
        private: Whether a new repository is.
        message: Of the commit.

    Returns:
        The repository's address.

    Raises:
        UsageError: If there is no token, or it may not write there.
        EnvironmentProblem: If the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
    )

    if (token := get_token()) is None:
        raise UsageError(
            "the Hugging Face hub takes files only from those it knows: run `hf auth login`, or "
            "set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)."
        )
    if not token.isascii():
        raise UsageError(
            "the token of the Hugging Face hub (HF_TOKEN, or what `hf auth login` kept) holds "
            "characters that no token has; copy it anew from huggingface.co/settings/tokens."
        )
    api = HfApi()
    added = [CommitOperationAdd(one.name, str(one.file)) for one in files]
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        api.create_commit(repo, added, commit_message=message)
    except OfflineModeIsEnabled:
        raise UsageError(
            "HF_HUB_OFFLINE is set, so nothing is uploaded; unset it to share a run."
        ) from None
    except HfHubHTTPError as error:
        raise _refused(repo, error.response.status_code) from None
    except (HTTPError, ConnectionError, TimeoutError) as error:  # of whatever client it uses
        raise EnvironmentProblem(
            f"{repo}: the Hugging Face hub cannot be reached ({type(error).__name__}). Nothing "
            f"half uploaded is to be seen there; run the command again when there is a network."
        ) from None
    except (ValueError, KeyError) as error:  # an answer that is none of the hub's
        raise EnvironmentProblem(
            f"{repo}: what answers is not the Hugging Face hub ({type(error).__name__} in its "
            f"answer): a proxy or a login page in between? Look at HF_ENDPOINT and at the "
            f"network, and run the command again."
        ) from None
    return url


def _refused(repo: str, status: int) -> Exception:
    if status in (401, 403):
        return UsageError(
            f"{repo}: the Hugging Face hub does not let this token write there (HTTP {status}). "
            f"Take a name of your own, or a token that may write (`hf auth login`)."
        )
    return EnvironmentProblem(
        f"{repo}: the Hugging Face hub refuses the files (HTTP {status}). Try again later."
    )
