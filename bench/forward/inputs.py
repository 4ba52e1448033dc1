"""A network and perhaps a picture file enter; what the network is shown leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bench.networks import Network
from bench.photo import load_photo
from bench.session import CommandError

# Of ImageNet's training images in 0 ... 1, red, green, blue: what its classifiers are trained behind.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MARGIN = 256 / 224  # a picture is made so much larger than what is cut from its middle
SEED = 0


@dataclass(frozen=True)
class Shown:
    """What a network is shown.

    =====  ===========================================================================
    x      (N, C, ...), ready for the network
    image  (H, W, 3) or (H, W) in 0 ... 1, the part of the picture that it sees; None
           for signals
    text   where that comes from
    =====  ===========================================================================
    """

    x: np.ndarray
    image: np.ndarray | None
    text: str


def make_input(network: Network, path: Path | None, batch: int) -> Shown:
    """The picture, by default the photograph of `bench photo`, as often as asked for; noise for signals."""
    channels, *spatial = network.input_shape
    if len(spatial) != 2 or channels not in (1, 3):
        if path is not None:
            shape = "x".join(map(str, network.input_shape))
            raise CommandError(f"--image needs a network of pictures, got {network.name} (input {shape})")
        signal = np.random.default_rng(SEED).standard_normal((batch, *network.input_shape), np.float32)
        return Shown(signal, None, f"normal noise, seed {SEED}")
    picture, text = (_open(path), str(path)) if path else (_open_photo(), "photograph of Grace Hopper")
    image = cut(picture.convert("RGB" if channels == 3 else "L"), *spatial)
    sample = np.moveaxis((image - MEAN) / DEVIATION, -1, 0) if channels == 3 else image[None]
    x = np.repeat(sample[None].astype(np.float32), batch, axis=0)
    return Shown(x, image, text)


def _open(path: Path) -> Image.Image:
    """A picture as its camera meant it to be seen."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CommandError(f"--image must be a picture that can be read, got {path}: {error}") from error


def _open_photo() -> Image.Image:
    pixels = np.moveaxis(load_photo()[0], 0, -1)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def cut(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The middle of a picture, in 0 ... 1, after its shorter side has become a little more than that size."""
    scale = MARGIN * max(height / picture.height, width / picture.width)
    size = round(picture.width * scale), round(picture.height * scale)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = picture.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + width, top + height)), np.float64) / 255
