"""`python -m cuneigh demo`: non-local means denoising of a photograph, as one call of `na2d`.

Non-local means replaces each pixel by a mean of the pixels around it, in which pixel y counts for
pixel x with the weight exp(-|P_x - P_y|^2 / h^2), where P_x is the patch of pixels that surrounds
x. Now |P_x - P_y|^2 = |P_x|^2 - 2 (<P_x, P_y> - |P_y|^2 / 2), and a softmax over y does not see
|P_x|^2. So this mean is neighborhood attention: the query is (P_x, 1), the key (P_y, -|P_y|^2 / 2),
the value the pixel y, and the scale 2 / h^2.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

import cuneigh
from cuneigh._backends import BackendName, choose
from cuneigh._device import CPU, Device, cuda
from cuneigh._parameters import window_arguments
from cuneigh._problem import Problem, Spec
from cuneigh._settings import NUM_THREADS
from cuneigh._validate import attention_problem
from cuneigh.cli.terminal import patience

Image = npt.NDArray[np.float32]
"""Rows, columns and channels; white is 1."""

COMPARED_SIDE = 128
"""Pixels that scikit-image denoises in its exact mode in a second or so."""
REPETITIONS = 3
"""Of what takes moments, of which the shortest time counts."""


class Tensors(NamedTuple):
    """What `na2d` is given, each `[1, rows, columns, 1, dim]`."""

    query: Any
    key: Any
    value: Any


def tensors_of(image: Any, patch: int, xp: Any) -> Tensors:
    """Query, key and value of an image; `xp` is the array library that holds it.

    `patch` is the side of the patches and odd. |P_x - P_y|^2 is a mean over the pixels of a patch,
    in which a Gaussian weighs them, and over the channels. Beyond its border the image is mirrored.
    """
    rows, columns, channels = image.shape
    radius = patch // 2
    bell = np.exp(-((2 * np.arange(-radius, radius + 1) / radius) ** 2) / 2)
    weight = bell[:, None] * bell
    weight /= channels * weight.sum()

    # Taking the mean off changes no distance, but makes <P_x, P_y> and |P_y|^2 / 2 smaller, so
    # that their difference loses fewer digits to cancellation.
    border = ((radius, radius), (radius, radius), (0, 0))
    centered = xp.pad(image - image.mean(), border, mode="reflect")
    patches = xp.lib.stride_tricks.sliding_window_view(centered, (patch, patch), axis=(0, 1))
    patches = xp.moveaxis(patches, 2, -1)  # channels last, as in memory, so that copies are fast

    *shape, dim = rows, columns, patch * patch * channels
    query = xp.empty((*shape, dim + 1), image.dtype)
    query[..., :dim].reshape(patches.shape)[...] = patches
    query[..., :dim] *= xp.asarray(np.repeat(np.sqrt(weight), channels), dtype=image.dtype)
    query[..., dim] = 1
    key = query.copy()
    key[..., dim] = xp.einsum("ijk,ijk->ij", key[..., :dim], key[..., :dim]) / -2
    return Tensors(*(tensor[None, :, :, None] for tensor in (query, key, image)))


def denoise(
    tensors: Tensors, window: int, strength: float, backend: BackendName | None = None
) -> Any:
    """The denoised image; `strength` is the h of the weights."""
    scale = 2 / strength**2
    return cuneigh.na2d(*tensors, kernel_size=window, scale=scale, backend=backend)[0, :, :, 0]


def seconds_of_cuneigh(
    image: Image, xp: Any, backend: BackendName, window: int, patch: int, strength: float
) -> tuple[float, float]:
    """What query and key take, and what the whole job does, at best."""
    times = []
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        tensors = tensors_of(xp.asarray(image), patch, xp)
        synchronize(xp)
        made = time.perf_counter()
        denoise(tensors, window, strength, backend)
        synchronize(xp)
        times.append((time.perf_counter() - begin, made - begin))
    total, making = min(times)
    return making, total


def seconds_of_scikit_image(
    image: Image, window: int, patch: int, strength: float
) -> dict[str, float]:
    """What non-local means of scikit-image take, on one core as all that it does.

    Its fast mode at best; the exact one takes too long for several times.
    """
    from skimage.restoration import denoise_nl_means

    def once(fast_mode: bool) -> float:
        begin = time.perf_counter()
        denoise_nl_means(image, patch, window // 2, strength, fast_mode=fast_mode, channel_axis=-1)
        return time.perf_counter() - begin

    return {"exact": once(False), "fast": min(once(True) for _ in range(REPETITIONS))}


@contextmanager
def one_thread() -> Iterator[None]:
    """The CPU backend computes on one core, as scikit-image does."""
    name = NUM_THREADS.name
    given = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given


def middle(image: Image, side: int) -> Image:
    """What lies in the middle, no larger than `side` either way."""
    rows, columns = (max((length - side) // 2, 0) for length in image.shape[:2])
    return image[rows : rows + side, columns : columns + side]


def psnr(image: Image, original: Image) -> float:
    """Peak signal to noise ratio in decibels."""
    error = np.mean((image - original) ** 2, dtype=np.float64)
    return -10 * math.log10(error) if error else math.inf


def read(path: str | None) -> Image:
    """The image at `path`, without transparency, or a photograph out of scikit-image."""
    import PIL.Image
    import PIL.ImageOps
    import skimage
    from matplotlib.image import pil_to_array

    if path is None:
        pixels = skimage.data.chelsea()
    else:
        with PIL.Image.open(path) as file:
            pixels = pil_to_array(PIL.ImageOps.exif_transpose(file))
    image: Image = skimage.util.img_as_float32(pixels)
    return image[:, :, :3] if image.ndim == 3 else image[:, :, None]


def reduce(image: Image, longest: int) -> Image:
    """The image, made smaller if it has a side above `longest`."""
    from skimage.transform import resize

    shrink = max(image.shape) / longest
    if shrink <= 1:
        return image
    rows, columns = (max(round(side / shrink), 1) for side in image.shape[:2])
    print(f"reducing {image.shape[0]} x {image.shape[1]} pixels to {rows} x {columns}")
    smaller: Image = resize(image, (rows, columns), anti_aliasing=True).astype(image.dtype)
    return smaller


def draw(panels: dict[str, Image], path: Path) -> None:
    """Write the images side by side, each under its title."""
    from matplotlib.figure import Figure

    rows, columns, _ = next(iter(panels.values())).shape
    zoom = max(1, round(450 / columns))  # whole, so that every pixel keeps its sharp edges
    rows, columns = zoom * rows, zoom * columns
    gap, head, dpi = 16, 36, 100
    width, height = gap + len(panels) * (columns + gap), head + rows + gap
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    for index, (title, image) in enumerate(panels.items()):
        left = gap + index * (columns + gap)
        axes = figure.add_axes((left / width, gap / height, columns / width, rows / height))
        axes.imshow(image.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(path)


def synchronize(xp: Any) -> None:
    """Wait for what `xp` computes."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def array_library(backend: str | None) -> tuple[Any, Device]:
    """CuPy and its current GPU; NumPy and the CPU without one, or for `backend="cpu"`."""
    if backend != "cpu":
        try:
            import cupy
        except ImportError:
            pass
        else:
            if cupy.cuda.is_available():
                return cupy, cuda(cupy.cuda.Device().id)
    return np, CPU


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="denoise a photograph",
        description="Add noise to a photograph, remove it by non-local means, which is one call of "
        "na2d, and write a picture of both beside the original.",
    )
    parser.add_argument(
        "image", nargs="?", metavar="IMAGE", help="default: a photograph out of scikit-image"
    )
    parser.add_argument(
        "--sigma",
        type=_number(float, lambda sigma: sigma >= 0, "not negative"),
        default=0.1,
        help="standard deviation of the noise to add, where white is 1; 0 for an image that is "
        "noisy as it is (default: %(default)s)",
    )
    parser.add_argument(
        "--strength",
        type=_number(float, lambda strength: strength > 0, "positive"),
        metavar="H",
        help="the h of the weights exp(-distance^2 / h^2) (default: sigma, or 0.1 if that is 0)",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=13,
        metavar="PIXELS",
        help="side of the square of pixels that each pixel attends to (default: %(default)s)",
    )
    parser.add_argument(
        "--patch",
        type=_number(int, lambda patch: patch >= 3 and patch % 2 == 1, "3 or a larger odd number"),
        default=5,
        metavar="PIXELS",
        help="side of the patches that are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--max-side",
        type=_number(int, lambda side: side >= 1, "positive"),
        default=1024,
        metavar="PIXELS",
        help="an image with a longer side is reduced to this (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="compare with scikit-image's non-local means on the whole image, for which it takes a "
        "minute or more if that has 1024 x 1024 pixels (default: on a CPU, on the 128 x 128 pixels "
        "in the middle)",
    )
    parser.add_argument("--backend", help="the backend to use (default: the fastest)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("cuneigh-demo.png"),
        metavar="PNG",
        help="where to write the picture (default: %(default)s)",
    )


def _number(
    convert: Callable[[str], Any], legal: Callable[[Any], bool], rule: str
) -> Callable[[str], Any]:
    """An argparse type: a number that obeys a rule."""

    def parse(text: str) -> Any:
        number = convert(text)
        if not legal(number):
            raise argparse.ArgumentTypeError(f"{text} is not {rule}")
        return number

    parse.__name__ = convert.__name__  # argparse says "invalid float value"
    return parse


def run(options: argparse.Namespace) -> int:
    try:
        _run(options)
    except ImportError as error:
        message = f"{error.name} is missing; pip install 'cuneigh[demo]' brings it"
    except (OSError, RuntimeError, ValueError) as error:
        message = str(error)
    else:
        return 0
    print(f"python -m cuneigh demo: {message}", file=sys.stderr)
    return 1


def _run(options: argparse.Namespace) -> None:
    for package in ("skimage", "matplotlib"):  # before any work is done
        import_module(package)
    sigma, strength = options.sigma, options.strength or options.sigma or 0.1
    original = reduce(read(options.image), options.max_side)
    noise = np.random.default_rng(0).normal(scale=sigma, size=original.shape)
    noisy = original + noise.astype(original.dtype)

    xp, device = array_library(options.backend)
    tensors = tensors_of(xp.asarray(noisy), options.patch, xp)
    problem = _problem(tensors, options.window)
    chosen = choose(problem, device, options.backend)
    backend = cast(BackendName, chosen.NAME)
    print(f"image    {options.image or 'chelsea.png'}, {' x '.join(map(str, original.shape))}")
    for name, tensor in tensors._asdict().items():
        print(f"{name:8} {list(tensor.shape)} {tensor.dtype}")
    print(f"window   {options.window} x {options.window}")
    print(f"backend  {backend} on {device.name or 'the CPU'}")
    method = getattr(chosen, "method", None)
    if method:
        print(f"method   {method(problem)}")

    seconds = []
    with patience("denoising"):
        for _ in range(2):
            begin = time.perf_counter()
            output = denoise(tensors, options.window, strength, backend)
            synchronize(xp)
            seconds.append(time.perf_counter() - begin)
    rate = problem.flops() / seconds[1] / 1e9
    print(f"time     {seconds[1]:.3g} s, {rate:.0f} GFLOP/s (first call {seconds[0]:.3g} s)")
    if options.compare or xp is np:
        longest = None if options.compare else max(COMPARED_SIDE, options.window)
        _compare(noisy, longest, xp, backend, options.window, options.patch, strength)

    denoised = output if xp is np else output.get()
    if sigma:
        before, after = psnr(noisy, original), psnr(denoised, original)
        print(f"PSNR     {before:.2f} dB before, {after:.2f} dB after")
        panels = {
            f"Noisy, {before:.1f} dB": noisy,
            f"Denoised, {after:.1f} dB": denoised,
            "Original": original,
        }
    else:
        panels = {"Original": original, "Denoised": denoised}
    draw(panels, options.output)
    print(f"wrote    {options.output}")


def _compare(
    image: Image,
    longest: int | None,
    xp: Any,
    backend: BackendName,
    window: int,
    patch: int,
    strength: float,
) -> None:
    """Print what the whole job takes, by cuneigh and by both modes of scikit-image.

    Of the middle of the image, no longer than `longest` either way, unless that is None.
    """
    pixels = image if longest is None else middle(image, longest)
    with patience("denoising by scikit-image"), one_thread():
        making, total = seconds_of_cuneigh(pixels, xp, backend, window, patch, strength)
        theirs = seconds_of_scikit_image(pixels, window, patch, strength)
    size = f"{pixels.shape[0]} x {pixels.shape[1]} pixels"
    part = "" if pixels.shape == image.shape else " in the middle (with --compare: all)"
    cores = "on one core each" if xp is np else "scikit-image on one core"
    print(f"compared {size}{part}, {cores}")
    print(f"total    {total:.3g} s by cuneigh, of which query and key {making:.3g} s")
    for mode, taken in theirs.items():
        ratio = f"{taken / total:.3g} times as long"
        print(f"{mode:8} {taken:.3g} s by scikit-image in its {mode} mode, {ratio}")


def _problem(tensors: Tensors, window: int) -> Problem:
    query, key, value = (Spec(tensor.shape, tensor.dtype.name) for tensor in tensors)
    axes = window_arguments("na2d", 2, window, 1, 1, False)
    return attention_problem("na2d", "forward", query, key, value, axes, None)
