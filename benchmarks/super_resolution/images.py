"""Owns what the benchmark sees: luma images, their bicubic reductions, training patches, and PSNR.

An image is a float32 tensor (1, H, W) of BT.601 studio luma, Y = (16 + 65.481 R + 128.553 G + 24.966 B) / 255 with
R, G, B in 0 … 1 (MATLAB's rgb2ycbcr without its rounding): 16/255 … 235/255. Greyscale files count as R = G = B.
Reduction and enlargement are Keys' bicubic, a = −0.5, widened when reducing (antialiased), as MATLAB's imresize and
PIL do it; reduced images are not rounded to bytes. PSNR: peak 1 (255 in bytes), a border of `scale` pixels left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

#: Every ninth image of T91 in order of name never trains; learning rates are chosen on these.
HELD_OUT_EVERY = 9
DARKEST, BRIGHTEST = 16 / 255, 235 / 255


def luma(picture: Image.Image) -> Tensor:
    """Y of a picture of any mode, float32 (1, H, W)."""
    rgb = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float64) / 255.0)
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    return ((16.0 + rgb @ weights) / 255.0).float()[None]


def bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Images (B, 1, H, W) in another size, antialiased when it is smaller."""
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)


def psnr(prediction: Tensor, truth: Tensor, shave: int) -> float:
    """10·log₁₀(1/mean squared error) in dB; infinity for equal images, NaN when a pixel is NaN.

    Args:
        prediction, truth: (…, H, W), 1 is the peak.
        shave: pixels left out on each side, 0 ≤ shave < min(H, W)/2.
    """
    height, width = truth.shape[-2:]
    error = (prediction - truth)[..., shave : height - shave, shave : width - shave]
    mean = float(error.double().square().mean())
    return math.inf if mean == 0.0 else -10.0 * math.log10(mean)


@dataclass(frozen=True)
class Example:
    """A high-resolution image cut to a multiple of the scale, (1, s·h, s·w), and its reduction (1, h, w)."""

    low: Tensor
    high: Tensor


def make_example(image: Tensor, scale: int) -> Example:
    """Cut at bottom and right, reduce."""
    height, width = (n - n % scale for n in image.shape[-2:])
    high = image[:, :height, :width].contiguous()
    return Example(bicubic(high[None], height // scale, width // scale)[0], high)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """File stem → luma of every PNG, in order of name.

    Raises:
        FileNotFoundError: there is none.
    """
    images = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            images[path.stem] = luma(picture)
    if not images:
        raise FileNotFoundError(f"no PNG in {folder}; it should hold T91, Set5 or Set14 (see ../shared/data/README.md)")
    return images


@dataclass(frozen=True)
class Images:
    """All images of one scale: to train, to choose learning rates, and the test sets by name."""

    scale: int
    training: list[Example]
    held_out: list[Example]
    tests: dict[str, list[Example]]


def read_images(folder: Path, scale: int) -> Images:
    """T91, Set5 and Set14 of `folder` at one scale, 2 or more."""
    t91 = [make_example(image, scale) for image in read_folder(folder / "T91").values()]
    tests = {
        name: [make_example(image, scale) for image in read_folder(folder / name).values()]
        for name in ("Set5", "Set14")
    }
    training = [example for place, example in enumerate(t91) if place % HELD_OUT_EVERY]
    return Images(scale, training, t91[::HELD_OUT_EVERY], tests)


class Patches:
    """Random patches of the training images: uniform over images, then over places, then over the eight symmetries.

    The n-th batch depends on seed, n, sizes and images only, so every method sees the same ones.

    Args:
        side: of the low-resolution patch, pixels; images with a shorter side are not used.
    """

    def __init__(self, images: Images, side: int, batch: int, seed: int) -> None:
        self.scale, self.side, self.batch = images.scale, side, batch
        self.examples = [e for e in images.training if min(e.low.shape[-2:]) >= side]
        if not self.examples:
            raise ValueError(f"patch is {side}; no training image is that large at scale {images.scale}")
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next batch: low (B, 1, p, p) and high (B, 1, s·p, s·p)."""
        pairs = [self._patch() for _ in range(self.batch)]
        return torch.stack([low for low, _ in pairs]), torch.stack([high for _, high in pairs])

    def _patch(self) -> tuple[Tensor, Tensor]:
        example = self.examples[self._below(len(self.examples))]
        height, width = example.low.shape[-2:]
        top, left = self._below(height - self.side + 1), self._below(width - self.side + 1)
        symmetry = self._below(8)
        cut = []
        for image, size in ((example.low, 1), (example.high, self.scale)):
            rows = slice(top * size, (top + self.side) * size)
            patch = image[:, rows, left * size : (left + self.side) * size]
            patch = patch.transpose(1, 2) if symmetry >= 4 else patch
            cut.append(torch.rot90(patch, symmetry % 4, (1, 2)))
        return cut[0], cut[1]

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))
