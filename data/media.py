"""Pictures and films: from files, from what records hold, or from objects, to upright RGB.

to_rgb(image)            a PIL picture of any mode, or an array, as all other files want it
middle_square(pixels)    what a policy sees of a picture that is not square
open_image, load_image   a picture's file (or its bytes in a BytesIO)
load_video(path)         a folder of pictures, an animated GIF or WebP, or a film, as frames
locate(source, root)     where a record's picture is: a path, file:// or data:
"""

import base64
from contextlib import contextmanager
from io import BytesIO
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from cli import UserError
from files import inside, reading

MAX_PIXELS = 64_000_000  # of a picture; larger ones are refused before they are decoded
MAX_FILM_PIXELS = 1_000_000_000  # of all frames of a video: 3 GB
MAX_FRAMES = 768  # of a video: Qwen2.5-VL's own limit
FRAMES_A_SECOND = 2  # of a film: what Qwen2.5-VL was trained on
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Image.MAX_IMAGE_PIXELS = None  # `open_image` has a lower limit than PIL's, and says what to do


def to_rgb(image):
    """A PIL picture as upright RGB, transparency on white, deep greys scaled to 0..255.

    A uint8 (height, width, 3) array stays as it is. UserError on any other.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return image
    if not isinstance(image, Image.Image):
        kind = f"{getattr(image, 'dtype', type(image))} {np.shape(image)}"
        raise UserError(f"a picture must be PIL or uint8 (height, width, 3), not {kind}")
    image = ImageOps.exif_transpose(image)  # phones turn pictures by a note in the file
    if image.mode[0] in "IF":  # greys deeper than 8 bits, which PIL would clip at 255
        grey = np.nan_to_num(np.asarray(image))
        if grey.dtype.kind == "f" and grey.max() <= 1:  # 0..1
            grey = grey * 255
        elif grey.max() > 255:  # 16 bits; darker ones are taken as they are
            grey = grey // 256
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def middle_square(pixels):
    """The middle (side, side, 3) of pixels (height, width, 3): what a policy sees of a wide camera.

    Cropped, since a camera of the same height sees the same middle: of 20 episodes with cameras of
    640x480 (WidowX PickCube, Panda StackCube) 19 succeed, 18 with square ones, and none with the
    picture padded with black or squeezed.
    """
    height, width, _ = pixels.shape
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    return pixels[top : top + side, left : left + side]


@contextmanager
def open_image(path):
    """The picture in a file (PIL), of which only the header is read until it is used.

    UserError if it is none, too large, or breaks off when it is used.
    """
    name = "a picture's bytes" if isinstance(path, BytesIO) else path
    with reading(name), Image.open(path) as image:
        size = f"{image.width}x{image.height} pixels"
        low, high = sorted(image.size)
        assert low * high <= MAX_PIXELS, f"{size} are more than {MAX_PIXELS:,}: shrink it first"
        # Qwen's own limit
        assert 1 < low and high <= 200 * low, f"{size} are too thin a picture"
        yield image


def load_image(path):
    """The picture in a file as `to_rgb` has it. UserError as `open_image`."""
    with open_image(path) as image:
        return to_rgb(image)


def load_video(path):
    """A video's frames [PIL RGB]: a folder of pictures, an animation, or a film, two a second.

    path: also a list of pictures' files. UserError if it cannot be played, is longer than the
    limits above, or its frames differ in size.
    """
    # frames come one by one: what is too long is told before it fills the memory, and a film's
    # own header may not say how long it is
    if isinstance(path, list):
        frames = map(load_image, path)
    elif path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in PICTURES]
        # 2.png comes before 10.png
        files.sort(key=lambda file: (len(file.stem), file.stem))
        frames = map(load_image, files)
    elif path.suffix.lower() in (".gif", ".webp"):
        frames = play_animation(path)
    else:
        frames = play_film(path)
    kept = []
    with reading("the video"):
        for frame in frames:
            kept.append(frame)
            assert frame.size == kept[0].size, "its frames must have one size"
            most = min(MAX_FRAMES, MAX_FILM_PIXELS // (frame.width * frame.height))
            assert len(kept) <= most, f"it is longer than {most} frames: cut or shrink it first"
        assert kept, f"no pictures in {path}"
    return kept


def play_animation(path):
    with open_image(path) as film:
        for frame in ImageSequence.Iterator(film):
            yield to_rgb(frame)


def play_film(path):
    with reading(path, "films need PyAV: `pip install -r requirements-video.txt`"):
        import av  # an extra: few people train on films
    shown = None
    with reading(path), av.open(str(path)) as film:
        for frame in film.decode(video=0):
            tick = int(frame.time * FRAMES_A_SECOND)
            if tick != shown:
                shown = tick
                yield frame.to_image().rotate(frame.rotation, expand=True)  # held upright


def locate(source, root):
    """The file of a picture or video as records name it, or its bytes in a BytesIO.

    source: a path below `root`, a file:// or data: URI, or a list of them, the frames of a video.
    UserError if it is not there on the disk, or leads out of `root`.
    """
    if isinstance(source, list):
        return [locate(frame, root) for frame in source]
    if source.startswith("data:"):
        return BytesIO(base64.b64decode(source.partition(",")[2]))
    name = source
    if source.startswith("file://"):
        name = unquote(source.removeprefix("file://"))
    path = inside(root, name.replace("\\", "/"))  # as Windows writes it
    if not path.exists():
        raise UserError(f"{source} is not there")
    return path
