"""data/media.py keeps its promises: any image becomes upright RGB, or gives a one-line error."""

import base64
import os
import sys

import numpy as np
import pytest
from PIL import Image
from small import IMAGES, picture

from cli import UserError
from data import media
from data.media import load_image, load_video, locate, to_rgb
from processor import process_images


def test_bad_pictures_are_user_errors(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(picture(40, 40)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:400])
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "larger.png")  # past PIL's own limit as well
    for name, said in (
        ("text.png", "cannot read"),
        ("cut.png", "cannot read"),
        ("bomb.png", "shrink"),
        ("larger.png", "shrink"),
        ("absent.png", "No such file"),
        ("", "not a regular file"),
    ):
        with pytest.raises(UserError, match=said):
            load_image(tmp_path / name)
    for size in ((1, 50), (50, 1), (2, 500)):
        with pytest.raises(UserError, match="too thin"):
            process_images([picture(*size)], IMAGES)
    with pytest.raises(UserError, match="uint8"):
        process_images([np.zeros((40, 40, 3))], IMAGES)


def test_pictures_of_any_mode_open(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "CMYK"):
        path = tmp_path / ("a.tif" if mode in ("CMYK", "I") else "a.png")
        Image.new(mode, (6, 4)).save(path)
        assert load_image(path).mode == "RGB" and load_image(path).size == (6, 4)
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 6)


def test_a_picture_means_the_same_from_a_file_and_as_an_object(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(picture(6, 9))
    clear = noise.convert("RGBA")
    clear.putalpha(80)
    cases = {
        "turned.jpg": (noise, {"exif": exif}),
        "clear.png": (clear, {}),
        "palette.png": (noise.convert("P"), {"transparency": 0}),
        "deep.png": (Image.fromarray(np.full((4, 4), 40000, np.uint16)), {}),
        "float.tif": (Image.fromarray(np.full((4, 4), 0.5, np.float32)), {}),
        "float255.tif": (Image.fromarray(np.full((4, 4), 200.0, np.float32)), {}),
    }
    for name, (image, options) in cases.items():
        image.save(tmp_path / name, **options)
        handed = to_rgb(Image.open(tmp_path / name))
        assert handed.mode == "RGB" and handed.tobytes() == load_image(tmp_path / name).tobytes()
    assert load_image(tmp_path / "turned.jpg").size == (6, 9)
    assert load_image(tmp_path / "float.tif").getpixel((0, 0)) == (127, 127, 127)
    assert load_image(tmp_path / "float255.tif").getpixel((0, 0)) == (200, 200, 200)
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (156, 156, 156)


@pytest.mark.parametrize("image", [None, "a.png", [1, 2], np.zeros((4, 4), np.uint8), 3.0])
def test_what_is_no_picture_is_told(image):
    with pytest.raises(UserError, match="a picture must be"):
        to_rgb(image)


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.gif")
    with pytest.raises(UserError, match="pipe.png"):
        load_image(tmp_path / "pipe.png")
    for name in ("pipe.gif", "pipe.png"):
        with pytest.raises(UserError, match="pipe"):
            load_video(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_play_up_to_a_limit(tmp_path, monkeypatch, suffix):
    frames = [Image.fromarray(picture(16, 24, seed)) for seed in range(5)]
    path = tmp_path / f"film.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert [frame.size for frame in load_video(path)] == [(24, 16)] * 5
    for limit, value in (("MAX_FRAMES", 4), ("MAX_FILM_PIXELS", 16 * 24 * 4)):
        with monkeypatch.context() as patch:
            patch.setattr(media, limit, value)
            with pytest.raises(UserError, match="longer than"):
                load_video(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=f"cannot read .*film.{suffix}"):
        load_video(path)


def write_film(path, seconds, rate=10):
    av = pytest.importorskip("av", reason="films: pip install -r requirements-video.txt")
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(seconds * rate):
            pixels = np.full((48, 64, 3), 10 * i % 250, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        film.mux(stream.encode())


def test_films_play_two_frames_a_second(tmp_path, monkeypatch):
    write_film(tmp_path / "film.mp4", 3)
    frames = load_video(tmp_path / "film.mp4")
    assert len(frames) == 6 and frames[0].size == (64, 48)
    brightness = [np.asarray(frame).mean() for frame in frames[:5]]
    assert np.allclose(brightness, [0, 50, 100, 150, 200], atol=8)
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "film.mp4").read_bytes()[:300])
    (tmp_path / "text.mp4").write_text("no film")
    for name in ("broken.mp4", "text.mp4", "absent.mp4"):
        with pytest.raises(UserError, match=name):
            load_video(tmp_path / name)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="requirements-video.txt"):
        load_video(tmp_path / "film.mp4")


def test_pictures_are_found_wherever_records_name_them(tmp_path):
    image = Image.fromarray(picture(6, 9))
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "a b.png")
    body = (tmp_path / "in" / "a b.png").read_bytes()
    encoded = base64.b64encode(body).decode()
    link = (tmp_path / "in" / "a b.png").as_uri()
    sources = ["in/a b.png", link]
    sources += [f"data:image/png;base64,{encoded}", "in\\a b.png"]
    for source in sources:
        assert load_image(locate(source, tmp_path)).tobytes() == image.tobytes()
    bad = ["../a.png", "/etc/hostname", "file:///etc/hostname", "http://host/a.png"]
    for source in bad:
        with pytest.raises(UserError):
            locate(source, tmp_path)
    for source in ("data:image/png;base64,AAAA", "data:image/png;base64,", "data:"):
        with pytest.raises(UserError):
            load_image(locate(source, tmp_path))
