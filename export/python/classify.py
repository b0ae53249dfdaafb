"""Classify images with a model that ``python -m nodeshape.export`` wrote: ``classify.py model.onnx image.png ...``.

Needs onnxruntime, NumPy and Pillow, and sees an image as ``python -m nodeshape.predict`` does, to the byte.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

CONTRAST = 8  # a picture whose values differ by less, of 255, has nothing on it


def read_picture(file: str, size: int, mode: str) -> np.ndarray:
    """A file as pixels ``[channels, size, size]``, uint8; ``mode`` is ``"L"`` or ``"RGB"``.

    It is turned upright as its EXIF tag says, laid on white where it is transparent, scaled to fit with its aspect kept
    and centred on its border's median colour; 16-bit grey (or 12, if no value is larger) is scaled to 8.
    """
    with Image.open(file) as image:
        image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
        if image.mode.startswith("I"):
            info, values = dict(image.info), np.asarray(image).astype(np.int64)
            white = 65535 if values.max() > 4095 else 4095  # cameras write 12-bit values into 16-bit files
            image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
            image.info = {name: value for name, value in info.items() if name != "transparency"}  # of 16 bits
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, -1)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    square = np.empty((size, size, pixels.shape[2]), np.uint8)
    square[:] = np.median(border, axis=0).astype(np.uint8)
    left, top = (size - width) // 2, (size - height) // 2
    square[top : top + height, left : left + width] = pixels
    return np.ascontiguousarray(square.transpose(2, 0, 1))


def main(model: str, *files: str) -> None:
    """Print the class and probability of each file."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    classes, size = json.loads(metadata["classes"]), int(metadata["image_size"])
    mode = {"grey": "L", "rgb": "RGB"}[metadata["channels"]]
    image = session.get_inputs()[0]
    for file in files:
        pixels = read_picture(file, size, mode)[None]
        if (np.ptp(pixels, axis=(0, 2, 3)) < CONTRAST).all():
            print(f"{file}  (empty)  -")
            continue
        if image.type == "tensor(float)":
            pixels = pixels.astype(np.float32) / 255
        (logits,) = session.run(["logits"], {image.name: pixels})
        probabilities = np.exp(logits[0] - logits[0].max())
        probabilities /= probabilities.sum()
        best = probabilities.argmax()
        print(f"{file}  {classes[best]}  {probabilities[best]:.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: classify.py MODEL.onnx IMAGE...")
    main(*sys.argv[1:])
