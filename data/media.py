"""Images and videos, from files, records or objects, to upright RGB.

to_rgb(image)            a PIL image of any mode, or an array, in the form that all other files use
middle_square(pixels)    what a policy sees of an image that is not square
open_image, load_image   an image file (or its bytes in a BytesIO)
load_video(path)         a folder of images, an animated GIF or WebP, or a video file, as frames
locate(source, root)     the file of a record's image: a path, file:// or data:
"""

import base64
from contextlib import contextmanager
from io import BytesIO
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from cli import UserError
from files import inside, reading

MAX_PIXELS = 64_000_000  # in an image; larger ones are refused before they are decoded
MAX_FILM_PIXELS = 1_000_000_000  # in all frames of a video: 3 GB
MAX_FRAMES = 768  # in a video: Qwen2.5-VL's own limit
FRAMES_A_SECOND = 2  # of a video file, as in Qwen2.5-VL's training
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Image.MAX_IMAGE_PIXELS = None  # `open_image` has a stricter limit than PIL, and says what to do


def to_rgb(image):
    """A PIL image as upright RGB: transparency becomes white, deep grays are scaled to 0..255.

    A uint8 (height, width, 3) array is returned as it is. UserError on anything else.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return image
    if not isinstance(image, Image.Image):
        kind = f"{getattr(image, 'dtype', type(image))} {np.shape(image)}"
        raise UserError(f"a picture must be PIL or uint8 (height, width, 3), not {kind}")
    image = ImageOps.exif_transpose(image)  # phones store the rotation of an image in EXIF
    if image.mode[0] in "IF":  # more than 8 bits of gray, which PIL would clip at 255
        grey = np.nan_to_num(np.asarray(image))
        if grey.dtype.kind == "f" and grey.max() <= 1:  # 0..1
            grey = grey * 255
        elif grey.max() > 255:  # 16 bits; images that stay below 256 are not scaled
            grey = grey // 256
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def middle_square(pixels):
    """The central (side, side, 3) of pixels (height, width, 3): what a policy sees of a wide image.

    Cropped, because that is what a square camera of the same height would see. Of 20 episodes with
    cameras of 640x480 (WidowX PickCube, Panda StackCube) 19 succeed, compared with 18 for square
    cameras, and none if the image is padded with black or squeezed.
    """
    height, width, _ = pixels.shape
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    return pixels[top : top + side, left : left + side]


@contextmanager
def open_image(path):
    """The image in a file (PIL). Only the header is read until the pixels are used.

    UserError if it is not an image, is too large, or is truncated.
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
    """The image in a file, as returned by `to_rgb`. UserError as in `open_image`."""
    with open_image(path) as image:
        return to_rgb(image)


def load_video(path):
    """A video's frames [PIL RGB]: a folder of images, an animation, or a video file, 2 per second.

    path may also be a list of image files. UserError if it cannot be decoded, exceeds the limits
    above, or its frames differ in size.
    """
    # frames come one by one, so that too long a video is refused before it fills the memory: the
    # header of a video file may not give its length
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
            assert frame.size == kept[0].size, "its frames must all have the same size"
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
        import av  # an extra: few people train on video files
    shown = None
    with reading(path), av.open(str(path)) as film:
        for frame in film.decode(video=0):
            tick = int(frame.time * FRAMES_A_SECOND)
            if tick != shown:
                shown = tick
                yield frame.to_image().rotate(frame.rotation, expand=True)  # upright


def locate(source, root):
    """The file of an image or video named in a record, or its bytes in a BytesIO.

    source: a path below `root`, a file:// or data: URI, or a list of them, the frames of a video.
    UserError if the file does not exist, or is outside `root`.
    """
    if isinstance(source, list):
        return [locate(frame, root) for frame in source]
    if source.startswith("data:"):
        return BytesIO(base64.b64decode(source.partition(",")[2]))
    name = source
    if source.startswith("file://"):
        name = unquote(source.removeprefix("file://"))
    path = inside(root, name.replace("\\", "/"))  # Windows paths
    if not path.exists():
        raise UserError(f"{source} does not exist")
    return path
