"""Pictures of every kind are read correctly, or refused in one line."""

import io
import json
import os
import warnings

import layouts
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from spoilt import JUNK, half, refused

import prepare_data
from hanorec.model.images import load_tensors, open_image
from hanorec.run.files import UserError


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RED = Image.new("RGB", (40, 20), (200, 0, 0))
STEPS = Image.fromarray(np.linspace(0, 65535, 800).reshape(20, 40).astype(np.uint16))
CLEAR = Image.new("RGBA", (40, 20), (200, 0, 0, 0))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
TURNED = RED.copy()
TURNED.paste((0, 0, 200), (0, 0, 20, 20))  # its left half is blue
# Content of the file, and either words of the error or (size, colour at one pixel, tolerance)
PICTURES = {
    "truncated": (half(encoded(RED.resize((300, 300)), "JPEG")), "truncated"),
    "of no bytes": (b"", "cannot identify"),
    "text": (b"this is no picture", "cannot identify"),
    "PostScript, which a program would read": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    "a decompression bomb": (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "decompression bomb"),
    "a smaller bomb": (encoded(Image.new("1", (11_000, 11_000)), "PNG"), "decompression bomb"),
    "a strip": (encoded(Image.new("RGB", (1, 400)), "PNG"), "too narrow"),
    "1x1": (encoded(Image.new("RGB", (1, 1), (200, 0, 0)), "PNG"), ((1, 1), (200, 0, 0), 0)),
    "CMYK": (encoded(RED.convert("CMYK"), "JPEG"), ((40, 20), (200, 0, 0), 12)),
    "16-bit": (encoded(STEPS, "PNG"), ((40, 20), (128, 128, 128), 8)),
    "palette": (encoded(RED.convert("P"), "PNG"), ((40, 20), (204, 0, 0), 8)),
    "grey": (encoded(RED.convert("L"), "PNG"), ((40, 20), (60, 60, 60), 3)),
    "black and white": (encoded(Image.new("1", (40, 20), 1), "PNG"), ((40, 20), (255, 255, 255), 0)),
    "transparent": (encoded(CLEAR, "PNG"), ((40, 20), (255, 255, 255), 0)),
    "animated": (
        encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20))]),
        ((40, 20), (200, 0, 0), 8),
    ),
    "rotated by EXIF": (encoded(TURNED, "JPEG", exif=ROTATED, quality=95), ((20, 40), (200, 0, 0), 60)),
    "spoilt EXIF": (encoded(RED, "JPEG", exif=b"Exif\0\0" + JUNK[:99]), ((40, 20), (200, 0, 0), 8)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name, tmp_path, capsys):
    content, expected = PICTURES[name]
    argv = [*layouts.write("csv", tmp_path / "raw", images=True), "--out", tmp_path / "data", "--max-pixels", 784]
    picture = tmp_path / "raw" / "images" / "i7.jpg"
    picture.write_bytes(content)
    if isinstance(expected, str):
        error = refused(capsys, prepare_data.main, *argv)
        assert expected in error and "i7.jpg" in error and not (tmp_path / "data" / "encoded").exists()
        return
    size, colour, tolerance = expected
    image = open_image(picture)
    assert image.mode == "RGB" and image.size == size
    where = (size[0] // 2, size[1] // 2) if name in ("16-bit", "grey") else (0, size[1] - 1)
    assert np.abs(np.subtract(image.getpixel(where), colour)).max() <= tolerance
    if name in ("1x1", "16-bit"):  # prepare the data too; opened, the other pictures are ordinary ones
        prepare_data.main([str(word) for word in argv])
        counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
        assert counts["items_without_image"] == 1


def test_links_and_pipes_for_pictures(tmp_path, capsys, monkeypatch):
    argv = [*layouts.write("csv", tmp_path / "raw", images=True), "--out", tmp_path / "data", "--max-pixels", 784]
    picture = tmp_path / "raw" / "images" / "i7.jpg"
    picture.rename(tmp_path / "elsewhere.jpg")
    picture.symlink_to(tmp_path / "elsewhere.jpg")
    prepare_data.main([str(word) for word in argv])
    counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
    assert (counts["images_that_are_links"], counts["items_without_image"]) == (1, 1)
    (tmp_path / "elsewhere.jpg").unlink()
    assert "i7.jpg; restore them" in refused(capsys, prepare_data.main, *argv)
    picture.unlink()
    os.mkfifo(picture)  # a pipe that is never written to
    assert "i7.jpg cannot be read (not a regular file)" in refused(capsys, prepare_data.main, *argv)
    picture.unlink()
    picture.mkdir()  # a folder is no picture
    prepare_data.main([str(word) for word in argv])
    counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
    assert (counts["images_that_are_links"], counts["items_without_image"]) == (0, 2)


def test_opening_an_image_changes_no_warning_filters(tmp_path):
    (tmp_path / "red.png").write_bytes(encoded(RED, "PNG"))
    before = list(warnings.filters)
    open_image(tmp_path / "red.png")
    assert warnings.filters == before


def test_tensors_that_are_missing_or_of_another_shape_are_named(tmp_path):
    path = tmp_path / "items.safetensors"
    save_file({"grid": np.zeros((2, 3))}, path)
    assert set(load_tensors(path, {"grid": (2, None)}, "encode again")) == {"grid"}
    for shapes, message in (
        ({"text": (2, None)}, "has no tensor text; encode again"),
        ({"grid": (2, 4)}, r"grid has shape \[2, 3\], expected \[2, 4\]"),
        ({"grid": (2,)}, r"grid has shape \[2, 3\], expected \[2\]"),
        ({"grid": (2, None, 1)}, r"expected \[2, None, 1\] \(None: any\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_tensors(path, shapes, "encode again")
