"""Pictures and films: from files, from what records hold, or from objects, to upright RGB.

to_rgb(image)            a PIL picture of any mode, or an array, as the rest of the house wants it
open_image, load_image   a picture's file (or its bytes in a BytesIO)
load_video(path)         a folder of pictures, an animated GIF or WebP, or a film, as frames
locate(source, root)     where a record's picture is: a path, file:// or data:
"""

import base64
import re
import warnings
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from cli import UserError, one_line
from files import inside

MAX_PIXELS = 64_000_000  # of a picture; larger ones are refused before they are decoded
MAX_FILM_PIXELS = 1_000_000_000  # of all frames of a video: 3 GB
MAX_FRAMES = 768  # of a video: Qwen2.5-VL's own limit
FRAMES_A_SECOND = 2  # of a film: what Qwen2.5-VL was trained on
GREYS = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # deeper than 8 bits
PICTURES = (".png", ".jpg", ".jpeg", ".webp")

# PIL warns of pictures that are larger than ours may be, which are refused in one line
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def to_rgb(image):
    """A PIL picture as upright RGB, transparency on white, deep greys scaled to 0..255.

    A uint8 (height, width, 3) array stays as it is. UserError on any other.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            kind = f"{image.dtype} {image.shape}"
            raise UserError(f"a picture must be PIL or uint8 (height, width, 3), not {kind}")
        return image
    if not isinstance(image, Image.Image):
        raise UserError(f"a picture must be PIL or an array, not {type(image).__name__}")
    image = ImageOps.exif_transpose(image)
    if image.mode in GREYS:  # PIL would clip at 255
        grey = np.nan_to_num(np.asarray(image))
        if grey.dtype.kind == "f" and grey.max() <= 1:
            grey = grey * 255
        elif grey.max() > 255:
            grey = grey // 256
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@contextmanager
def decoding(path):
    """Whatever a decoder raises in the block becomes one line with the file's name."""
    name = "a picture's bytes" if isinstance(path, BytesIO) else path
    try:
        if not isinstance(path, BytesIO) and Path(path).exists() and not Path(path).is_file():
            raise UserError(f"cannot read {name}: a directory or device is no picture")
        yield name
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {MAX_PIXELS:,} pixels: shrink it first") from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (decoders raise whatever they like)
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        raise UserError(f"cannot read the picture {name}: {reason}") from None


@contextmanager
def open_image(path):
    """The picture in a file (PIL), of which only the header is read until it is used.

    UserError if it is none, too large, or breaks off when it is used.
    """
    with decoding(path) as name, Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width}x{image.height}"
            raise UserError(f"{name}: {size} is more than {MAX_PIXELS:,} pixels: shrink it first")
        low, high = sorted(image.size)
        if low < 2 or high > 200 * low:  # Qwen's own limit
            raise UserError(f"{name}: {image.width}x{image.height} pixels are too thin a picture")
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
    if isinstance(path, list):
        frames = map(load_image, path)
        path = f"a list of {len(path)} pictures"
    elif path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in PICTURES]
        frames = map(load_image, sorted(files, key=numeric))
    elif path.suffix.lower() in (".gif", ".webp"):
        frames = play_animation(path)
    else:
        frames = play_film(path)
    kept = []
    pixels = 0
    for frame in frames:
        kept.append(frame)
        pixels += frame.width * frame.height
        if len(kept) > MAX_FRAMES or pixels > MAX_FILM_PIXELS:
            most = f"{MAX_FRAMES} frames or {MAX_FILM_PIXELS:,} pixels"
            raise UserError(f"{path} is longer than {most}: cut or shrink it first")
        if frame.size != kept[0].size:
            raise UserError(f"{path}: the frames of a video must have one size")
    if not kept:
        raise UserError(f"no pictures in {path}")
    return kept


def numeric(path):
    """A sort key of file names by which 2.png comes before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def play_animation(path):
    with open_image(path) as film:
        for frame in ImageSequence.Iterator(film):
            yield to_rgb(frame)


def play_film(path):
    try:
        import av
    except ImportError:
        advice = "`pip install -r requirements-video.txt`, or cut it into a folder of pictures"
        raise UserError(f"playing {path} needs PyAV: {advice}") from None
    with decoding(path), av.open(str(path)) as film:
        due = None
        for frame in film.decode(video=0):
            due = frame.time if due is None else due
            if frame.time >= due:
                due += 1 / FRAMES_A_SECOND
                yield frame.to_image().rotate(frame.rotation, expand=True)  # held upright


def locate(source, root):
    """The file of a picture or video as records name it: a path below `root`, or a BytesIO.

    source: a path, a file:// or data: URI. UserError if it leads out of `root`, or to the net.
    """
    if source.startswith("data:"):
        return BytesIO(base64.b64decode(source.partition(",")[2]))
    if source.startswith(("http://", "https://")):
        raise UserError(f"{source} is not on this disk: download it first")
    if source.startswith("file://"):
        source = unquote(source.removeprefix("file://").removeprefix("localhost"))
    return inside(root, source.replace("\\", "/"))  # as Windows writes it
