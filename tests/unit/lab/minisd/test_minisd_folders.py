"""Concept folders: every image mode, and what a user's folder can get wrong."""

import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from lab.core.errors import UserError
from lab.core.images import read_image, stack
from lab.minisd.world.folders import read, write

pytestmark = pytest.mark.filterwarnings("ignore:.*are left out")


def _folder(path, *lines: str, header: str = "file_name,text,object"):
    path.mkdir()
    Image.new("RGB", (20, 10), "red").save(path / "a.png")
    (path / "metadata.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def load(path, size: int) -> torch.Tensor:
    return stack([read_image(path, size, "concept.path", draft=False)])[0]


def test_round_trip_and_select(tmp_path) -> None:
    images = (
        torch.arange(3 * 3 * 16 * 16, dtype=torch.int64)
        .reshape(3, 3, 16, 16)
        .remainder(256)
        .to(torch.uint8)
    )
    rows = [
        {"text": 'a, "quoted" fox', "object": "fox"},
        {"text": "é", "object": "fox"},
        {"text": "x", "object": "owl"},
    ]
    folder = write(tmp_path / "c", images, rows)
    back = read(folder, 16)
    assert torch.equal(back.images, images)
    assert back.texts == [r["text"] for r in rows]
    assert [r["file_name"] for r in read(folder, 16, select={"object": "fox"}).rows] == [
        "00000.png",
        "00001.png",
    ]
    with pytest.raises(UserError, match="owl"):
        read(folder, 16, select={"object": "owle"})


def test_write_refuses_to_mix(tmp_path) -> None:
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match="not empty"):
        write(_folder(tmp_path / "c", "a.png,x,y"), images, [{"text": "x"}])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 128, (128, 128, 128)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 255, 255), (0, 0, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 0x8000, (127, 127, 127)),
        ("I;16", 200, (1, 1, 1)),  # dark, not an image of 8 bits
        ("F", 0.5, (127, 127, 127)),
        ("CMYK", (0, 255, 255, 0), (254, 0, 0)),
    ],
)
def test_modes(tmp_path, mode: str, colour, expected) -> None:
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16", "F") else "x.png")
    Image.new(mode, (16, 16), colour).save(path)
    assert (load(path, 8)[:, 4, 4].int() - torch.tensor(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["r.jpg", "r.tiff"])
def test_exif_rotation(name, tmp_path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255  # upper half white; orientation 6 turns the image by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / name, exif=exif, quality=95)
    turned = load(tmp_path / name, 32)[0].float()
    assert turned[:, :12].mean() < 15 < 240 < turned[:, 20:].mean()


@pytest.mark.filterwarnings("ignore:.*EXIF", "ignore:Truncated", "ignore:Metadata")
def test_damaged_exif_is_no_reason_to_refuse_an_image(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # orientation, resolution
    exif.get_ifd(0x8769)[0x829A] = 0.5
    path = tmp_path / "r.jpg"
    Image.new("RGB", (8, 8), "red").save(path, exif=exif)
    whole = path.read_bytes()
    start = whole.index(b"Exif\0\0") + 6
    length = struct.unpack(">H", whole[start - 8 : start - 6])[0] - 8
    for i in range(start, start + length):
        for value in (0, 255):
            path.write_bytes(whole[:i] + bytes([value]) + whole[i + 1 :])
            assert load(path, 8)[0].float().mean() > 240


def test_decompression_bomb_is_refused_before_decoding(tmp_path) -> None:
    file = BytesIO()
    Image.new("1", (12_000, 12_000)).save(file, "PNG")
    (tmp_path / "bomb.png").write_bytes(file.getvalue()[:100])  # the header tells the size
    with pytest.raises(UserError, match="more than 100,000,000 pixels"):
        load(tmp_path / "bomb.png", 64)


def test_other_formats_are_refused(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "page.ppm")
    (tmp_path / "page.ppm").rename(tmp_path / "page.png")
    with pytest.raises(UserError, match=r"cannot be read as an image"):
        load(tmp_path / "page.png", 16)


def test_paths_that_leave_the_folder(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    for i, name in enumerate(("../outside.png", str(tmp_path / "outside.png"))):
        with pytest.raises(UserError, match="leaves the folder"):
            read(_folder(tmp_path / f"c{i}", f"{name},x,y"), 8)
    linked = _folder(tmp_path / "linked", "link.png,x,y")
    (linked / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match="leaves the folder"):
        read(linked, 8)


@pytest.mark.parametrize(
    ("header", "line", "match"),
    [
        ("file_name,text", "missing.png,x", "cannot be read as an image"),
        ("name,text", "a.png,x", "file_name and text"),
        ("file_name,text", "", "no image"),
        ("file_name,text", "a.png,x,surplus", "does not fit the header"),
        ("file_name,text", 'a.png,"unclosed', "cannot be read as a CSV"),
    ],
)
def test_broken_metadata(tmp_path, header: str, line: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read(_folder(tmp_path / "c", line, header=header), 8, key="scenario.path")
    assert caught.value.key == "scenario.path"


def test_metadata_in_another_encoding(tmp_path) -> None:
    folder = _folder(tmp_path / "c")
    (folder / "metadata.csv").write_bytes("file_name,text\na.png,café\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read(folder, 8)
    (folder / "metadata.csv").write_bytes("file_name,text\r\na.png,café\r\n".encode("utf-8-sig"))
    assert read(folder, 8).texts == ["café"]


def test_folders_without_metadata_or_text_are_captioned_by_name(tmp_path) -> None:
    plain = _folder(tmp_path / "my_old-dog")
    (plain / "metadata.csv").unlink()
    Image.new("L", (9, 9)).save(plain / "B.JPG", "JPEG")
    with pytest.warns(UserWarning, match="my old dog"):
        got = read(plain, 8)
    assert got.texts == ["a photo of my old dog"] * 2


def test_empty_and_missing(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image"):
        read(tmp_path / "empty", 8)
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nowhere", 8)
