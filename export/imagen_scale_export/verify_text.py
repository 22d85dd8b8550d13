"""Prompts for the check of an export, as the run's own text encoder gives them."""

from imagen_scale.data.encoder import encoder_folder
from imagen_scale.errors import ImagenScaleError
from imagen_scale.models.host import host_memory
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.prompts import encode
from imagen_scale.sampling.runtimes.contract import Text

# Short, none and long: two of them stand in the smallest batches.
PROMPTS = ("red heart", "", "a small wooden house beside a lake, seen from above at dusk")


def real_text(file: InferenceFile) -> tuple[Text | None, str]:
    """Features of `PROMPTS`, or None and why the check does without."""
    try:
        folder = encoder_folder(file.config.text_encoder)
        needed = 2 * sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        if needed > host_memory().available:
            return None, "checked with random text: the text encoder does not fit into memory"
        return encode([file], PROMPTS).text, ""
    except ImagenScaleError as error:
        return None, f"checked with random text: {error}"
