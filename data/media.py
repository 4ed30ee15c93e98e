"""Pictures from files."""
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from cli import UserError

MAX_IMAGE_PIXELS = 64_000_000            # larger files are refused before they are decoded
SHIFTED = ("I;16", "I;16B", "I;16L", "I;16N", "I")


@contextmanager
def open_image(path):
    """The picture in file `path` (PIL), of which only the header is read until it is used. UserError if it is none, too large, or breaks off when it is used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)      # our own limit is lower
            image = Image.open(path)
        with image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UserError(f"{path} has {image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS:,}: shrink it first")
            yield image
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more than {MAX_IMAGE_PIXELS:,} pixels: shrink it first") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:                # PIL's decoders raise all of these on broken files
        raise UserError(f"cannot read the picture {path}: {error if getattr(error, 'strerror', None) is None else error.strerror}") from None


def load_image(path):
    """The picture in file `path` as PIL RGB: upright (EXIF), transparency on white, 16-bit greys scaled. UserError as `open_image`."""
    with open_image(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in SHIFTED:                                                # PIL would clip at 255
            grey = np.asarray(image).astype(np.int64)
            image = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


