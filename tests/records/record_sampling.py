"""Records what MinImagen samples, for tests/test_importing.py.

With minimagen 0.0.9 and einops installed: python tests/records/record_sampling.py

The weights are those of tests/golden/minimagen_cascade.safetensors, the noise is NumPy's
`RandomState(SEED)`, whose sequence never changes: only the pictures are stored.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "minimagen_cascade.safetensors"
RECORD = HERE / "minimagen_sampling.safetensors"
TIMESTEPS, COND_SCALE, SEED = 25, 3.0, 0


def main() -> None:
    """Runs MinImagen's own sampling loop of both stages."""
    from transformers import T5EncoderModel, T5Tokenizer  # noqa: F401  # before the next lines

    for name in ("torchvision", "torchvision.transforms"):  # imported for what is not used here
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    from minimagen.Imagen import Imagen
    from minimagen.Unet import Unet

    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = {name: json.loads(file.metadata()[name]) for name in ("imagen", "unets")}
    facts["imagen"] |= {"timesteps": TIMESTEPS, "text_embed_dim": 512}
    imagen = Imagen(unets=[Unet(**unet) for unet in facts["unets"]], **facts["imagen"]).eval()
    noise = np.random.RandomState(SEED)

    def drawn(shape: tuple[int, ...], **options: object) -> torch.Tensor:
        return torch.from_numpy(noise.standard_normal(tuple(shape)).astype(np.float32))

    torch.randn, torch.randn_like = drawn, lambda x: drawn(x.shape)
    text = {"text_embeds": tensors["inputs/text_embeds"], "text_mask": tensors["inputs/text_mask"]}
    record = {}
    for number, unet in enumerate(imagen.unets, start=1):
        prefix = f"unet{number}/weights/"
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        unet.load_state_dict(weights)
        size = facts["imagen"]["image_sizes"][number - 1]
        lowres = {}
        if number > 1:  # as it lies before it is normalised
            lowres["lowres_cond_img"] = (tensors["unet2/inputs/lowres_cond_img"] + 1) / 2
            lowres["lowres_noise_times"] = torch.tensor([3, 9])
        pictures = imagen._p_sample_loop(
            unet, (2, 3, size, size), cond_scale=COND_SCALE,
            noise_scheduler=imagen.noise_schedulers[number - 1], **text, **lowres,
        )  # fmt: skip
        record[f"unet{number}"] = pictures
    save_file(record, RECORD, {"source": "minimagen 0.0.9", "torch": torch.__version__})


if __name__ == "__main__":
    main()
