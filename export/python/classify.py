"""Classify images with a model that ``python -m nodeshape.export`` wrote: ``classify.py model.onnx image.png ...``.

Needs onnxruntime, NumPy and Pillow. It scales an image to the model's square with its aspect kept, on a background of
its top left pixel's colour; ``python -m nodeshape.predict`` does the same with more care.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, *files: str) -> None:
    """Print the class and probability of each file."""
    session = onnxruntime.InferenceSession(model)
    metadata = session.get_modelmeta().custom_metadata_map
    classes, size = json.loads(metadata["classes"]), int(metadata["image_size"])
    mode = {"grey": "L", "rgb": "RGB"}[metadata["channels"]]
    for file in files:
        picture = Image.open(file).convert(mode)
        background = picture.getpixel((0, 0))
        picture = ImageOps.pad(picture, (size, size), Image.Resampling.BILINEAR, color=background)
        pixels = np.asarray(picture, dtype=np.float32).reshape(size, size, -1).transpose(2, 0, 1)
        (logits,) = session.run(["logits"], {"image": pixels[None] / 255})
        probabilities = np.exp(logits[0] - logits[0].max())
        probabilities /= probabilities.sum()
        best = probabilities.argmax()
        print(f"{file}  {classes[best]}  {probabilities[best]:.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: classify.py MODEL.onnx IMAGE...")
    main(*sys.argv[1:])
