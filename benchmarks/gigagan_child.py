"""Trains gigagan-pytorch on this project's batches; a child of gigagan.py.

    python benchmarks/gigagan_child.py RUN OUT --seconds S --parameters P

Its generator and discriminator as it comes, but for two things that it would download: captions are
the features that this project's stages read, and there is no loss by CLIP.
"""

import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import peers
import torch
from safetensors.torch import save_file
from torch import Tensor

from imagen_scale.config import load_config
from imagen_scale.data.embeddings import pad_embeddings
from imagen_scale.data.encoder import MAX_TOKENS
from imagen_scale.data.loading import batches
from imagen_scale.data.prepared import Prepared, prepare
from imagen_scale.files.pictures import from_uint8
from imagen_scale.runs.folders import config_path
from imagen_scale.training.samples import split_samples

BATCH, GRADIENT_PENALTY_EVERY = 8, 4  # the second is the package's
AVERAGED_FROM = 100  # steps; the package's
STYLE, LARGEST = 128, 256  # widths of the style and of the widest layer


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seconds", type=float, required=True, help="Of processor time.")
@click.option("--parameters", type=int, required=True, help="That the generator may have.")
def main(run: Path, out: Path, seconds: float, parameters: int) -> None:
    """See the module."""
    giga = imported()
    config = load_config(config_path(run))
    prepared = prepare(config)
    stage = config.stages(prepared.embeddings.dim)[-1]
    torch.manual_seed(config.training.seed)
    gan = made(giga, prepared, stage.size, parameters, out)
    samples = split_samples(config, stage, prepared)
    given = _pairs(samples.train)
    start, steps = time.process_time(), 0
    while time.process_time() < start + seconds:
        steps += 1
        gan.train_discriminator_step(
            dl_iter=given, apply_gradient_penalty=steps % GRADIENT_PENALTY_EVERY == 0
        )
        gan.train_generator_step(dl_iter=given, batch_size=BATCH)
        gan.steps += 1
    trained = time.process_time() - start
    captions = json.loads((out / "captions.json").read_text())
    pictures, spent = drawn(gan, captions)
    save_file({"pictures": pictures}, out / "gigagan.safetensors")
    facts = {
        "parameters": sum(p.numel() for p in gan.unwrapped_G.parameters()),
        "discriminator": sum(p.numel() for p in gan.unwrapped_D.parameters()),
        "seconds": trained, "steps": steps, "pictures": steps * BATCH, "picture": spent,
    }  # fmt: skip
    (out / "gigagan.json").write_text(json.dumps(facts))


def imported() -> Any:
    """The package; OpenCLIP, which it imports and is not used here, need not be installed."""
    sys.modules["open_clip"] = types.ModuleType("open_clip")
    peers.import_torchvision()
    import gigagan_pytorch.gigagan_pytorch

    return gigagan_pytorch.gigagan_pytorch


def made(giga: Any, prepared: Prepared, size: int, parameters: int, folder: Path) -> Any:
    """Its trainer, with the widest generator that has no more parameters than asked for."""

    class Features(giga.OpenClipAdapter):  # type: ignore[misc,name-defined]  # found at run time
        """What its text encoder takes for CLIP."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        @property
        def dim_latent(self) -> int:
            return prepared.embeddings.dim

        def embed_texts(self, texts: list[str]) -> tuple[None, Tensor]:
            features, _ = pad_embeddings(
                [prepared.embeddings.stored(text) for text in texts], MAX_TOKENS
            )
            return None, features.float()

    def text_encoder() -> Any:
        return giga.TextEncoder(dim=STYLE, depth=2, clip=Features(), dim_head=32, heads=4)

    def generator(capacity: int) -> Any:
        return giga.Generator(
            image_size=size, dim_capacity=capacity, dim_max=LARGEST, dim_latent=STYLE,
            style_network={"dim": STYLE, "depth": 4, "dim_text_latent": STYLE},
            text_encoder=text_encoder(), self_attn_dim_head=32, self_attn_heads=4,
            cross_attn_dim_head=32, cross_attn_heads=4,
        )  # fmt: skip

    chosen = generator(1)
    for capacity in range(2, 33):
        wider = generator(capacity)
        if sum(p.numel() for p in wider.parameters()) > parameters:
            break
        chosen = wider
    discriminator = giga.Discriminator(
        image_size=size, dim_capacity=capacity - 1, dim_max=LARGEST, text_encoder=text_encoder(),
        attn_dim_head=32, attn_heads=4,
    )  # fmt: skip
    return giga.GigaGAN(
        generator=chosen, discriminator=discriminator, generator_contrastive_loss_weight=0.0,
        model_folder=str(folder / "models"), results_folder=str(folder / "results"),
    )  # fmt: skip


def _pairs(dataset: Any) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches as its steps take them: pictures from 0 to 1, and captions."""
    for batch in batches(
        dataset, start_step=0, steps=2**40, global_batch=BATCH, micro_batch=BATCH, rank=0,
        world_size=1, num_workers=0,
    ):  # fmt: skip
        yield (from_uint8(batch.images) + 1) / 2, batch.captions


def drawn(gan: Any, captions: list[str]) -> tuple[Tensor, float]:
    """Pictures of captions in [-1, 1]; processor seconds of one.

    By the averaged generator, which in the package is the untrained one for the first 100 steps:
    until then by the generator itself.
    """
    if gan.steps.item() <= AVERAGED_FROM:
        gan.has_ema_generator = False
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(captions), STYLE, generator=generator)
    pictures, times = [], []
    for i, caption in enumerate(captions):
        start = time.process_time()
        made = gan.generate(batch_size=1, noise=noise[i : i + 1], texts=[caption])
        times.append(time.process_time() - start)
        pictures.append(made.clamp(0, 1) * 2 - 1)
    return torch.cat(pictures), sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
