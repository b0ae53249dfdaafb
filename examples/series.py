"""Irregular series as a CSV file, a row per observation: read and checked, divided, thinned, summarised, as tensors."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nodeshape._errors import UserError

#: Columns that each file has; ``split`` is one that it may have, all others are channels.
NAMED = ("series", "label", "time")


@dataclass
class Series:
    """One: its label, times ``[observations]``, values ``[observations, channels]`` (NaN: missing), train or test."""

    label: str
    split: str
    times: np.ndarray
    values: np.ndarray


def read_series(path: Path) -> tuple[list[Series], list[str]]:
    """The series of a CSV file and the names of its channels; UserError, with the line, for what is wrong with it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = list(csv.reader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is no CSV file in UTF-8: {error}") from error
    header = [name.strip() for name in lines[0]] if lines else []
    missing = [name for name in NAMED if name not in header]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; its first line must name {', '.join(NAMED)}")
    channels = [name for name in header if name not in (*NAMED, "split")]
    if not channels or len(set(header)) < len(header):
        raise UserError(f"{path} needs a column for each channel, all with names of their own, got {', '.join(header)}")
    rows: dict[str, list[tuple[str, str, float, list[float]]]] = {}
    for number, cells in enumerate(lines[1:], 2):
        where = f"{path}, line {number}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} cells, but the first line has {len(header)}")
        row = dict(zip(header, (cell.strip() for cell in cells)))
        if not (row["series"] and row["label"]):
            raise UserError(f"{where}: series and label may not be empty")
        split = row.get("split", "")
        if "split" in row and split not in ("train", "test"):
            raise UserError(f"{where}: split must be train or test, got {split!r}")
        time = _number(row["time"], f"{where}: time")
        if not math.isfinite(time):
            raise UserError(f"{where}: time must be a finite number, got {row['time']!r}")
        values = [_number(row[name], f"{where}: {name}") for name in channels]
        if any(abs(x) > 1e30 for x in values):
            raise UserError(f"{where}: values must be finite and below 1e30, or empty where they are missing")
        before = rows.setdefault(row["series"], [])
        if before and before[-1][:2] != (row["label"], split):
            raise UserError(f"{where}: series {row['series']!r} had another label or split before")
        if before and time <= before[-1][2]:
            raise UserError(f"{where}: times of series {row['series']!r} must increase; sort its rows by time")
        before.append((row["label"], split, time, values))
    found = [
        Series(x[0][0], x[0][1], np.array([row[2] for row in x]), np.array([row[3] for row in x], np.float32))
        for x in rows.values()
    ]
    for name, series in zip(rows, found):
        if np.isnan(series.values).all():
            raise UserError(f"{path}: series {name!r} has no value at all; leave it out")
    _check_classes(path, found)
    return found, channels


def _number(cell: str, what: str) -> float:
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        raise UserError(f"{what} must be a number, got {cell!r}") from None


def _check_classes(path: Path, found: list[Series]) -> None:
    labels = [series.label for series in found]
    if len(set(labels)) < 2:
        raise UserError(f"{path} needs series of at least two labels, got {len(set(labels))}")
    for label in sorted(set(labels)):
        if labels.count(label) < 2:
            raise UserError(f"{path}: label {label!r} has one series; two at least, to train and to test")
        if all(series.split == "test" for series in found if series.label == label):
            raise UserError(f"{path}: label {label!r} has no series to train with; set split of some to train")
    if all(series.split == "train" for series in found):
        raise UserError(f"{path} has no series to test with; set split of some to test, or leave the column out")


def divided(found: list[Series], seed: int) -> tuple[list[Series], list[Series]]:
    """To train and to test: as the file says, or three in ten of each label at random to test."""
    random = np.random.default_rng(seed)
    for label in sorted({series.label for series in found if not series.split}):
        own = [series for series in found if series.label == label]
        for place, k in enumerate(random.permutation(len(own))):
            own[k].split = "test" if place < max(1, round(0.3 * len(own))) else "train"
    return [x for x in found if x.split == "train"], [x for x in found if x.split == "test"]


def write_vowels(path: Path) -> None:
    """The vowels of aeon as such a file, the same each time: half of the frames, two thirds of their values."""
    try:
        from aeon.datasets import load_japanese_vowels
    except ImportError:
        raise UserError(
            "the Japanese vowels come with aeon: pip install aeon, or give series of your own by --data"
        ) from None
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*NAMED, "split", *(f"c{k}" for k in range(1, 13))])
        for split in ("train", "test"):
            for k, (x, label) in enumerate(zip(*load_japanese_vowels(split=split))):
                kept = np.flatnonzero(random.permutation(x.shape[1]) < (x.shape[1] + 1) // 2)
                for frame in kept:
                    cells = ["" if random.uniform() < 1 / 3 else f"{value:.6f}" for value in x[:, frame]]
                    writer.writerow([f"{split}-{k}", label, f"{6.4 * frame:.1f}", split, *cells])


def batch(found: list[Series], labels: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps since the observation before ``[batch, length]``, values ``[batch, length, channels]``, classes ``[batch]``.

    Shorter series end in gaps of 0 without values, which change nothing.
    """
    length, channels = max(len(x.times) for x in found), found[0].values.shape[1]
    gaps = torch.zeros(len(found), length)
    values = torch.full((len(found), length, channels), math.nan)
    for k, x in enumerate(found):
        gaps[k, : len(x.times)] = torch.as_tensor(np.diff(x.times, prepend=x.times[0]), dtype=torch.float32)
        values[k, : len(x.times)] = torch.as_tensor(x.values)
    return gaps, values, torch.tensor([labels.index(x.label) for x in found])


def thinned(series: Series, share: float) -> Series:
    """The series without a share of its observations, drawn by torch's generator; at least one stays."""
    count = len(series.times)
    kept = torch.randperm(count)[: max(1, round(count * (1 - share)))].sort().values.numpy()
    return Series(series.label, series.split, series.times[kept], series.values[kept])


def summaries(found: list[Series]) -> np.ndarray:
    """Of each channel mean, spread, extremes, first and last value, and of the series its length and duration."""

    def of(x: Series) -> list[float]:
        row = [float(len(x.times)), float(x.times[-1] - x.times[0])]
        for channel in x.values.T:
            seen = channel[~np.isnan(channel)]
            row += [seen.mean(), seen.std(), seen.min(), seen.max(), seen[0], seen[-1]] if len(seen) else [math.nan] * 6
        return row

    return np.array([of(x) for x in found])
