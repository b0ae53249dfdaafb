"""``python -m nodeshape.data``: write drawn shapes to disk, one folder per class, and a contact sheet to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nodeshape._cli import Parser, positive_int, run, say, seed, shell_word, whole
from nodeshape._data.drawn_folder import write_folder
from nodeshape._data.images import CONTACT_SHEET
from nodeshape._data.shapes import CLASSES, MAX_IMAGE_SIZE, MIN_IMAGE_SIZE


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the images that the command line asks for and say what to type next."""
    parser = Parser("data", "Draw images of shapes as PNG files, one folder per class.")
    parser.add_argument("--task", choices=tuple(CLASSES), default="single", help="one shape, up to two, or one by hand")
    parser.add_argument("--count", type=positive_int, default=700, help="number of images")
    parser.add_argument("--seed", type=seed, default=0, help="another seed gives other images")
    size = whole(MIN_IMAGE_SIZE, MAX_IMAGE_SIZE)
    parser.add_argument("--image-size", type=size, default=32, help="pixels per side")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args(argv)

    counts = write_folder(args.out, args.task, args.count, args.seed, args.image_size)
    say(f"Wrote {args.count} images of {len(counts)} classes to {args.out}")
    say("  " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    say(f"Look at them: {args.out / CONTACT_SHEET}")
    if min(counts.values()) < 2:
        say(f"Too few to train on: --count {2 * len(counts)} or more gives each class two.")
    else:
        say(f"Next: python -m nodeshape.train --data {shell_word(args.out)}")


if __name__ == "__main__":
    run(main, though_unheard=True)
