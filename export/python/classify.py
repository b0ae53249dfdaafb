"""Classify images with a model that ``python -m nodeshape.export`` wrote: ``classify.py model.onnx image.png ...``.

Needs onnxruntime, NumPy and Pillow, and sees an image as ``python -m nodeshape.predict`` does, to the byte.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

CONTRAST = 8  # a picture whose values differ by less, of 255, has nothing on it


def main(model: str, *files: str) -> None:
    """Print the class and probability of each file."""
    session = onnxruntime.InferenceSession(model)
    metadata = session.get_modelmeta().custom_metadata_map
    classes, size = json.loads(metadata["classes"]), int(metadata["image_size"])
    for file in files:
        pixels = load(file, size, {"grey": "L", "rgb": "RGB"}[metadata["channels"]])
        if (np.ptp(pixels, axis=(1, 2)) < CONTRAST).all():
            print(f"{file}  (empty)  -")
            continue
        (logits,) = session.run(["logits"], {"image": pixels[None].astype(np.float32) / 255})
        probabilities = np.exp(logits[0] - logits[0].max())
        probabilities /= probabilities.sum()
        best = probabilities.argmax()
        print(f"{file}  {classes[best]}  {probabilities[best]:.4f}")


def load(file: str, size: int, mode: str) -> np.ndarray:
    """An image upright, on white where transparent, scaled to fit a square, on the median colour of its border."""
    image = Image.open(file)
    image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255
        values, info = np.asarray(image).astype(np.int64), image.info
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        image.info = {key: value for key, value in info.items() if key != "transparency"}  # a 16-bit value
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    scale = size / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    square = np.full((size, size, pixels.shape[2]), np.median(border, axis=0).astype(np.uint8))
    top, left = (size - image.height) // 2, (size - image.width) // 2
    square[top : top + image.height, left : left + image.width] = pixels
    return square.transpose(2, 0, 1)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: classify.py MODEL.onnx IMAGE...")
    main(*sys.argv[1:])
