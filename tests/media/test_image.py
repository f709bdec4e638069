"""Pictures of every kind, read against Pillow's or plain arithmetic's idea of them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from musetalk.errors import InputError
from musetalk.media.image import read_image

COLOUR = (200, 120, 40)  # RGB


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    """Smooth RGB, so that JPEG hardly changes it."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 6, 255 - x * 2], axis=2).clip(0, 255).astype(np.uint8)


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG made by hand: Pillow can't write 16-bit colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_lossless_pictures_keep_their_bytes_in_bgr_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    Image.fromarray(gradient()).save(path)
    frame = read_image(path)
    assert frame.dtype == np.uint8
    assert frame.flags.c_contiguous
    np.testing.assert_array_equal(frame, gradient()[:, :, ::-1])


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_pictures_stay_close(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    Image.fromarray(gradient()).save(path, quality=95)
    difference = read_image(path).astype(int) - gradient()[:, :, ::-1]
    assert np.abs(difference).mean() < 4


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "really a png.jpg"
    Image.fromarray(gradient()).save(path, format="PNG")
    np.testing.assert_array_equal(read_image(str(path)), gradient()[:, :, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = gradient()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "p.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    np.testing.assert_array_equal(read_image(path), upright[:, :, ::-1])


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[:, :, :3] = COLOUR
    rgba[:, 10:20, 3] = 128
    rgba[:, 20:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "p.png")
    frame = read_image(tmp_path / "p.png")
    half = [round((c * 128 + 255 * 127) / 255) for c in COLOUR[::-1]]
    assert frame[3, 5].tolist() == [255, 255, 255]
    assert frame[3, 15].tolist() == half
    assert frame[3, 25].tolist() == list(COLOUR[::-1])


def test_grey_with_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20, 2), (100, 0), np.uint8), "LA").save(tmp_path / "p.png")
    assert (read_image(tmp_path / "p.png") == 255).all()


def test_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([*COLOUR, 1, 2, 3])
    image.paste(0, (0, 0, 20, 10))
    image.save(tmp_path / "p.png", transparency=1)
    frame = read_image(tmp_path / "p.png")
    assert frame[5, 5].tolist() == list(COLOUR[::-1])
    assert frame[15, 5].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_bilevel_become_three_channels(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(gradient()).convert(mode)
    image.save(tmp_path / "p.png")
    expected = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), np.stack([expected] * 3, axis=2))


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "p.jpg", quality=100)
    b, g, r = read_image(tmp_path / "p.jpg")[16, 16].tolist()
    assert r > 250
    assert g < 5
    assert b < 5


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 20 * 30).astype(np.uint16).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "p.png")
    frame = read_image(tmp_path / "p.png").astype(int)
    assert np.abs(frame - values[:, :, None] / 257).max() <= 1


def test_sixteen_bit_colour_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (20, 30, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "p.png").write_bytes(png(30, 20, 16, 2, rows))
    frame = read_image(tmp_path / "p.png").astype(int)
    assert np.abs(frame[:, :, ::-1] - values.astype(int) / 257).max() <= 1


def test_float_tiff_in_unit_range(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "p.tif")
    assert set(np.unique(read_image(tmp_path / "p.tif"))) == {128}


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_first_picture_of_an_animation(tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str) -> None:
    first, second = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
    first.save(tmp_path / f"still{suffix}", lossless=True)
    assert read_image(tmp_path / f"still{suffix}")[5, 5].tolist() == [0, 0, 255]
    assert not caplog.records
    first.save(tmp_path / f"p{suffix}", save_all=True, append_images=[second], lossless=True, duration=100)
    assert read_image(tmp_path / f"p{suffix}")[5, 5].tolist() == [0, 0, 255]
    assert "animated" in caplog.text


def test_names_with_spaces_chinese_and_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("-小哈 (2)%d.png")
    Image.fromarray(gradient()).save(name)
    assert read_image(name).shape == (40, 60, 3)


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_image(path)
    assert caught.value.hint
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message + caught.value.hint


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.jpg", "not found")
    assert_refused(tmp_path, "folder")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert_refused(tmp_path / "empty.jpg", "empty")


def test_text_named_jpg(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture " * 50)
    assert_refused(tmp_path / "text.jpg", "not an image")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_truncated_pictures_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"p{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert_refused(path)


def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    Image.fromarray(gradient()).save(tmp_path / "good.png")
    good = np.frombuffer((tmp_path / "good.png").read_bytes(), np.uint8)
    refused = 0
    for _ in range(150):
        bad = good.copy()
        bad[random.integers(8, len(bad), 4)] = random.integers(0, 256, 4)
        (tmp_path / "bad.png").write_bytes(bad.tobytes())
        try:
            assert read_image(tmp_path / "bad.png").dtype == np.uint8
        except InputError:
            refused += 1
    assert refused > 50


def test_too_small(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "p.png")
    assert_refused(tmp_path / "p.png", "1×1", "16 to 8192")


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (9_000, 100), (60_000, 60_000)])
def test_too_large_is_refused_from_the_header_alone(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "p.png").write_bytes(png(width, height, 8, 2, b"no rows at all"))
    assert_refused(tmp_path / "p.png", "8192")


def test_no_program_is_run_for_postscript(tmp_path: Path) -> None:
    """Pillow would hand EPS to Ghostscript."""
    (tmp_path / "p.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n")
    assert_refused(tmp_path / "p.jpg", "not an image")


GAMUTS = {
    "Adobe RGB": (
        [
            (0.6097559, 0.3111242, 0.0194811),
            (0.2052401, 0.6256560, 0.0608902),
            (0.1492240, 0.0632197, 0.7448387),
        ],
        563 / 256,
    ),
    "Display P3": (
        [
            (0.5151215, 0.2411957, -0.0010505),
            (0.2919769, 0.6922455, 0.0418854),
            (0.1571045, 0.0665741, 0.7840729),
        ],
        2.2,
    ),
}
"""XYZ of the primaries, white of D50, and a gamma."""


def profile(name: str) -> bytes:
    """The ICC profile of a colour space: sRGB's from Pillow, one with other primaries and gamma by hand."""
    if name == "sRGB":
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    primaries, gamma = GAMUTS[name]

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642) + fixed(1) + fixed(0.8249)}
    for channel, xyz in zip((b"r", b"g", b"b"), primaries, strict=True):
        tags[channel + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz))
        tags[channel + b"TRC"] = curve
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78) + b"\0"
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s12x4s", offset + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp"
    )
    header += bytes(28) + fixed(0.9642) + fixed(1) + fixed(0.8249) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


SKINS = [(224, 172, 105), (198, 134, 66), (60, 46, 40), (128, 128, 128), (20, 200, 90), (250, 40, 60)]
SRGB_FROM_D50 = np.array(
    [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
)


@pytest.mark.parametrize("name", ["Adobe RGB", "Display P3"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_colours_of_a_profile_become_srgb_s(tmp_path: Path, name: str, suffix: str) -> None:
    """Worked out from the primaries: light in XYZ of D50, then sRGB's matrix and curve."""
    picture = np.repeat(np.array(SKINS, np.uint8), 16, axis=0)[None].repeat(32, axis=0)
    options = (
        {"lossless": True}
        if suffix == ".webp"
        else {"quality": 100, "subsampling": 0}
        if suffix == ".jpg"
        else {}
    )
    Image.fromarray(picture).save(tmp_path / f"p{suffix}", icc_profile=profile(name), **options)
    primaries, gamma = GAMUTS[name]
    light = ((np.array(SKINS) / 255) ** gamma @ np.array(primaries) @ SRGB_FROM_D50.T).clip(0, 1)
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    frame = read_image(tmp_path / f"p{suffix}")[16, 8::16, ::-1].astype(int)
    assert np.abs(frame - expected).max() <= (4 if suffix == ".jpg" else 2)


def test_srgb_s_own_profile_changes_no_byte(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "p.png", icc_profile=profile("sRGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), gradient()[:, :, ::-1])


def test_a_profile_is_obeyed_beside_transparency(tmp_path: Path) -> None:
    opaque, clear = Image.new("RGB", (32, 32), SKINS[0]), Image.new("RGBA", (32, 32), (*SKINS[0], 255))
    for image, name in ((opaque, "a.png"), (clear, "b.png")):
        image.save(tmp_path / name, icc_profile=profile("Adobe RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), read_image(tmp_path / "b.png"))


def test_a_damaged_profile_is_said_and_left_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(gradient()).save(tmp_path / "p.png", icc_profile=b"no profile at all" * 10)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), gradient()[:, :, ::-1])
    assert "colour profile" in caplog.text
