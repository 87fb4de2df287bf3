"""The demo is non-local means: against a brute force, against scikit-image, and from the shell."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.ExifTags
import PIL.Image
import pytest
from skimage import data
from skimage.restoration import denoise_nl_means

from cuneigh import cli
from cuneigh._backends.cpu.threads import thread_count
from cuneigh.cli import demo

PATCH, WINDOW, SIGMA = 5, 13, 0.1

Image = npt.NDArray[np.float64]


def noisy_photograph(rows: int, columns: int, channels: int) -> Image:
    image = data.chelsea()[100 : 100 + rows, 140 : 140 + columns, :channels] / 255
    return image + np.random.default_rng(1).normal(scale=SIGMA, size=image.shape)


def brute_force(image: Image, strength: float) -> Image:
    """Non-local means by its definition; the square is pushed inwards at the borders."""
    rows, columns, channels = image.shape
    radius = PATCH // 2
    padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    row, column = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    bell = np.exp(-(row**2 + column**2) / (2 * ((PATCH - 1) / 4) ** 2))
    weight = (bell / bell.sum() / channels)[:, :, None]
    result = np.empty_like(image)
    for x, y in np.ndindex(rows, columns):
        top = min(max(x - WINDOW // 2, 0), rows - WINDOW)
        left = min(max(y - WINDOW // 2, 0), columns - WINDOW)
        total, mean = 0.0, np.zeros(channels)
        for i, j in np.ndindex(WINDOW, WINDOW):
            i, j = top + i, left + j
            difference = padded[x : x + PATCH, y : y + PATCH] - padded[i : i + PATCH, j : j + PATCH]
            share = np.exp(-(weight * difference**2).sum() / strength**2)
            total += share
            mean += share * image[i, j]
        result[x, y] = mean / total
    return result


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written lands in a directory of the test."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_is_non_local_means(channels: int) -> None:
    image = noisy_photograph(20, 17, channels)
    expected = brute_force(image, SIGMA)
    for dtype in ("float32", "float64"):
        tensors = demo.tensors_of(image.astype(dtype), PATCH, np)
        result = demo.denoise(tensors, WINDOW, SIGMA)

        # A dot product of n terms errs by n eps |query| |key| at most, a mean of n pixels by n eps.
        query, key = (np.linalg.norm(tensor, axis=-1).max() for tensor in tensors[:2])
        terms = tensors.query.shape[-1] * 2 / SIGMA**2 * query * key + WINDOW**2
        bound = np.finfo(dtype).eps * terms * abs(image).max()
        assert result.dtype == dtype
        assert abs(result - expected).max() <= bound


@pytest.mark.parametrize("channels", [1, 3])
def test_agrees_with_scikit_image_away_from_the_borders(channels: int) -> None:
    # scikit-image drops patches whose distance, in units of h, is above 5, and takes a fast
    # exponential: together about 1e-2. At the borders it cuts the square off instead of pushing
    # it inwards.
    image, strength = noisy_photograph(64, 64, channels), 1.2 * SIGMA
    tensors = demo.tensors_of(image, PATCH, np)
    result = demo.denoise(tensors, WINDOW, strength)
    expected = denoise_nl_means(
        image, PATCH, WINDOW // 2, strength, fast_mode=False, channel_axis=-1
    ).reshape(image.shape)
    inside = slice(WINDOW // 2, -(WINDOW // 2))
    assert abs(result - expected)[inside, inside].max() < 1e-2


def test_query_and_value_have_different_dims() -> None:
    query, key, value = demo.tensors_of(noisy_photograph(16, 18, 3), PATCH, np)
    assert query.shape == key.shape == (1, 16, 18, 1, 3 * PATCH**2 + 1)
    assert value.shape == (1, 16, 18, 1, 3)


def facts_of(printed: str) -> dict[str, str]:
    """What the command printed, by the word that each line begins with."""
    return dict(line.split(maxsplit=1) for line in printed.splitlines())


def decibels(facts: dict[str, str]) -> tuple[float, ...]:
    """PSNR before and after."""
    return tuple(float(part.split()[0]) for part in facts["PSNR"].split(", "))


def test_runs_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--backend=cpu"]) == 0
    facts = facts_of(capsys.readouterr().out)
    assert facts["backend"] == "cpu on the CPU"
    assert re.search(r"loops that numba|pip install 'cuneigh\[numba\]'", facts["method"])
    assert facts["query"] == "[1, 300, 451, 1, 76] float32"
    assert facts["value"] == "[1, 300, 451, 1, 3] float32"
    assert facts["compared"].startswith("128 x 128 pixels in the middle (with --compare: all), on ")
    assert {"total", "exact", "fast"} <= facts.keys()
    before, after = decibels(facts)
    assert after > before + 8
    picture = np.asarray(PIL.Image.open(tmp_path / "cuneigh-demo.png"))
    assert picture.shape[0] > 300
    assert picture.shape[1] > 3 * 451


def test_compares_with_scikit_image_on_one_thread(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole image with --compare; the middle of 128 x 128 pixels is tried above."""
    threads, whole = [], demo.seconds_of_scikit_image

    def seconds_of_scikit_image(*given: Any) -> dict[str, float]:
        threads.append(thread_count())
        return whole(*given)

    monkeypatch.setattr(demo, "seconds_of_scikit_image", seconds_of_scikit_image)
    monkeypatch.setattr(demo, "COMPARED_SIDE", 16)
    monkeypatch.setenv("CUNEIGH_NUM_THREADS", "3")
    PIL.Image.fromarray(data.chelsea()[:24, :20]).save("small.png")
    assert cli.main(["demo", "small.png", "--backend=cpu", "--compare"]) == 0
    assert threads == [1]
    assert thread_count() == 3
    facts = facts_of(capsys.readouterr().out)
    assert facts["compared"] == "24 x 20 pixels, on one core each"
    total, exact = (float(facts[word].split()[0]) for word in ("total", "exact"))
    printed = float(facts["exact"].split(", ")[1].split()[0])
    assert printed == pytest.approx(exact / total, rel=0.02)
    assert "fast" in facts


@pytest.mark.gpu
def test_runs_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--backend=cpu"]) == 0
    on_cpu = facts_of(capsys.readouterr().out)
    assert cli.main(["demo", "--backend=naive"]) == 0
    on_gpu = facts_of(capsys.readouterr().out)
    assert on_gpu["backend"].startswith("naive on ")
    assert decibels(on_gpu) == pytest.approx(decibels(on_cpu), abs=0.011)  # two digits are printed


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)])
def test_denoises_a_given_image(
    mode: str, channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PIL.Image.fromarray(data.chelsea()[:60, :80]).convert(mode).save("photograph.png")
    assert cli.main(["demo", "photograph.png", "--backend=cpu", "--output=result.png"]) == 0
    assert f"image    photograph.png, 60 x 80 x {channels}\n" in capsys.readouterr().out
    assert (tmp_path / "result.png").exists()


def test_sixteen_bits_are_read_as_such() -> None:
    deep = data.chelsea()[:, :, 0].astype("uint16") * 257
    PIL.Image.fromarray(deep).save("deep.png")
    read = np.round(demo.read("deep.png")[:, :, 0] * 65535)
    assert np.array_equal(read, deep)


def test_without_added_noise_there_is_no_psnr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PIL.Image.fromarray(data.chelsea()[:40, :40]).save("photograph.png")
    options = ["--sigma=0", "--strength=0.05", "--backend=cpu"]
    assert cli.main(["demo", "photograph.png", *options]) == 0
    assert "PSNR" not in capsys.readouterr().out


def test_a_photograph_is_shown_upright() -> None:
    sideways = PIL.Image.fromarray(data.chelsea())
    exif = sideways.getexif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # turn it clockwise to show it
    sideways.save("sideways.png", exif=exif)
    assert np.array_equal(demo.read("sideways.png"), np.rot90(demo.read(None), -1))


def test_a_large_image_is_reduced_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--max-side=64", "--backend=cpu"]) == 0
    printed = capsys.readouterr().out
    assert "reducing 300 x 451 pixels to 43 x 64" in printed
    assert "query    [1, 43, 64, 1, 76] float32" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "missing.png"),
        (["text.png"], "text.png"),
        (["--window=301"], "kernel_size=301"),
        (["--backend=magic"], "backend='magic'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("text.png").write_text("no image")
    assert cli.main(["demo", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    "option", ["--sigma=-1", "--sigma=nan", "--strength=0", "--patch=4", "--max-side=0"]
)
def test_bad_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", option])
    assert option.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("module", ["skimage", "matplotlib"])
def test_says_what_to_install(
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{module} is missing; pip install 'cuneigh[demo]'" in error
