"""Reading, fitting, normalising, and the way back."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sam3.transforms import Preprocess, fallback_counts, read_image
from tests.parity.fill import image


@pytest.fixture(autouse=True)
def _fresh_counts():
    fallback_counts.clear()


def save(path, picture, **options):
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path


def test_jpeg_equals_pillow_and_needs_no_fallback(tmp_path):
    path = save(tmp_path / "a.jpg", image(37, 53), quality=90)
    with Image.open(path) as file:
        expected = np.asarray(file)
    read = read_image(path)
    assert read.dtype == torch.uint8
    assert read.shape == (3, 37, 53)
    # Two builds of the decoder may differ by rounding.
    assert np.abs(read.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2
    assert not fallback_counts


def test_png_under_a_jpg_name_is_counted_and_logged_once(tmp_path, caplog):
    pixels = image(20, 30)
    paths = [save(tmp_path / f"{i}.jpg", pixels, format="PNG") for i in range(3)]
    with caplog.at_level(logging.INFO):
        for path in paths:
            assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), pixels)
    assert fallback_counts == {"PNG RGB": 3}
    assert len([r for r in caplog.records if "PNG RGB" in r.getMessage()]) == 1


def test_grey_cmyk_palette_alpha_become_rgb(tmp_path):
    picture = Image.fromarray(image(24, 40))
    grey = read_image(save(tmp_path / "grey.jpg", picture.convert("L"), quality=95))
    assert grey.shape == (3, 24, 40)
    assert torch.equal(grey[0], grey[2])
    cmyk = read_image(save(tmp_path / "cmyk.jpg", picture.convert("CMYK"), quality=95))
    difference = cmyk.permute(1, 2, 0).numpy().astype(int) - np.asarray(picture)
    assert np.abs(difference).mean() < 6  # right colours, not the negative
    palette = read_image(save(tmp_path / "p.png", picture.convert("P", palette=Image.Palette.ADAPTIVE)))
    assert np.abs(palette.permute(1, 2, 0).numpy().astype(int) - np.asarray(picture)).mean() < 8
    picture.putalpha(7)
    alpha = read_image(save(tmp_path / "a.png", picture))
    assert np.array_equal(alpha.permute(1, 2, 0).numpy(), np.asarray(picture)[:, :, :3])
    one_bit = read_image(save(tmp_path / "one.png", Image.new("1", (5, 4), 1)))
    assert one_bit.eq(255).all()


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 128, 257, 32896, 65535]], dtype=np.uint16)
    read = read_image(save(tmp_path / "deep.png", values))
    assert read[1].tolist() == [[0, 0, 1, 128, 255]]


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    assert read_image(save(tmp_path / "turned.jpg", image(20, 30), exif=exif)).shape == (3, 20, 30)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.02])
@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}])
def test_truncated_pictures_are_named(tmp_path, keep, options):
    path = save(tmp_path / "half.jpg", image(200, 300), **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=r"half\.jpg"):
        read_image(path)


def test_a_jpeg_whose_end_is_zeros_or_missing_by_two_bytes_is_named(tmp_path):
    path = save(tmp_path / "holey.jpg", image(200, 300))
    data = path.read_bytes()
    for damaged in (data[:-2], data[: len(data) // 2] + bytes(len(data) - len(data) // 2)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"holey\.jpg"):
            read_image(path)


def test_empty_missing_and_foreign_files(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.jpg is empty"):
        read_image(tmp_path / "empty.jpg")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.jpg"):
        read_image(tmp_path / "page.jpg")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.jpg")
    save(tmp_path / "float.tif", np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="floating-point"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize(
    ("height", "width", "fitted"),
    [
        (1500, 2250, (672, 1008)),
        (2250, 1500, (1008, 672)),
        (3, 2, (1008, 672)),
        (1, 5000, (1, 1008)),
        (1008, 1008, (1008, 1008)),
    ],
)
def test_fitted_size(height, width, fitted):
    assert Preprocess().fitted_size(height, width) == fitted
    assert Preprocess(resize="square").fitted_size(height, width) == (1008, 1008)


def test_fit_pads_right_and_bottom_and_stays_near_the_float_resize():
    picture = torch.from_numpy(image(90, 130)).permute(2, 0, 1)
    fitted, (h, w) = Preprocess(img_size=56).fit(picture)
    assert (h, w) == (39, 56)  # 90 * 56 / 130 = 38.8
    assert fitted.dtype == torch.uint8
    assert not fitted[:, h:].any()
    exact = torch.nn.functional.interpolate(picture[None].float(), (h, w), mode="bilinear", antialias=True)[0]
    assert (fitted[:, :h].float() - exact).abs().max() <= 1
    # The memory layout of the picture changes nothing.
    assert torch.equal(fitted, Preprocess(img_size=56).fit(picture.contiguous())[0])


def test_fit_of_a_fitting_picture_is_the_picture():
    picture = torch.from_numpy(image(56, 40)).permute(2, 0, 1)
    fitted, size = Preprocess(img_size=56).fit(picture)
    assert size == (56, 40)
    assert torch.equal(fitted[:, :, :40], picture)


def test_normalise_by_hand():
    preprocess = Preprocess(img_size=2, mean=(0, 100, 127.5), std=(1, 50, 127.5))
    images = torch.full((2, 3, 2, 2), 200, dtype=torch.uint8)
    result = preprocess.normalise(images, torch.tensor([[2, 2], [1, 2]]))
    expected = torch.tensor([200.0, 2.0, (200 - 127.5) / 127.5])
    assert torch.equal(result[0], expected.view(3, 1, 1).expand(3, 2, 2))
    assert torch.equal(result[1, :, 0], expected.view(3, 1).expand(3, 2))
    assert torch.equal(result[1, :, 1], torch.zeros(3, 2))
    assert not torch.signbit(result[1, :, 1]).any()
    assert images.eq(200).all()


@pytest.mark.parametrize("resize", ["pad", "square"])
@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (7, 1), (33, 101)])
def test_coordinates_and_maps_agree(resize, height, width):
    preprocess = Preprocess(img_size=1008, resize=resize)
    boxes = torch.tensor([[0.0, 0.0, width, height], [1.0, 2.0, 3.0, 4.0]])
    there = preprocess.coords_to_input(boxes, (height, width))
    h, w = preprocess.fitted_size(height, width)
    assert torch.allclose(there[0], torch.tensor([0, 0, w / 1008, h / 1008]))
    assert torch.allclose(preprocess.coords_to_image(there, (height, width)), boxes)
    assert torch.equal(preprocess.coords_to_input(boxes[:, :2], (height, width)), there[:, :2])

    # A map that holds its own coordinates, brought back to the picture, holds where each pixel lies in the square.
    cells = (torch.arange(288) + 0.5) / 288
    maps = torch.stack([cells.expand(288, 288), cells[:, None].expand(288, 288)])[None]
    back = preprocess.maps_to_image(maps, (height, width))[0]
    assert back.shape == (2, height, width)
    x, y = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    pixels = preprocess.coords_to_input(torch.stack([x, y], -1), (height, width))
    assert (back.permute(1, 2, 0) - pixels).abs().max() < 0.5 / 288  # half a cell, at the clamped border


def test_crop_valid_keeps_cut_cells():
    maps = torch.zeros(5, 72, 72)
    rows = math.ceil(672 / 14)
    assert Preprocess().crop_valid(maps, (1500, 2250)).shape == (5, rows, 72)
    assert Preprocess().crop_valid(maps, (1502, 2250)).shape == (5, rows + 1, 72)
    assert Preprocess(resize="square").crop_valid(maps, (1500, 2250)).shape == (5, 72, 72)


def test_meta_round_trip_and_bad_values():
    preprocess = Preprocess(img_size=224, resize="square", mean=(1, 2, 3), std=(4, 5, 6))
    assert Preprocess.from_meta(preprocess.to_meta()) == preprocess
    with pytest.raises(ValueError, match="fields"):
        Preprocess.from_meta({"img_size": 3})
    with pytest.raises(ValueError, match="'squish' is unknown"):
        Preprocess(resize="squish")
    with pytest.raises(ValueError, match="std"):
        Preprocess(std=(1, 0, 1))
    with pytest.raises(ValueError, match="img_size"):
        Preprocess(img_size=0)
