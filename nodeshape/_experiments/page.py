"""The paper as a Markdown page: every sentence with a number in it is made from the figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import inf, sqrt
from statistics import stdev
from typing import Any

from nodeshape._experiments.networks import NETWORKS, RESIDUAL_BLOCKS
from nodeshape._experiments.source import METHOD_TITLES, PARENT_TABLE, solver_title
from nodeshape._experiments.table1 import DIGITS_TEST_SIZE, HIDDEN, IMAGES, STEPS

#: 97.5% quantiles of Student's t for 2 runs (one degree of freedom), 3, and so on.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def page(paper: dict[str, Any]) -> str:
    """The whole page."""
    sections = (
        _head,
        _goals,
        _experiments,
        _small,
        _epoch_alone,
        _networks,
        _table1,
        _depth,
        _evaluations,
        _other_solvers,
        _sweep,
        _protocol,
    )
    return "\n".join(line for section in sections for line in section(paper))


def headline(paper: dict[str, Any]) -> str:
    """One sentence: how many of the report's accuracies are met."""
    cells = list(_cells(paper))
    met = sum(cell["met"] for cell in cells)
    return f"{met} of the report's {len(cells)} accuracies are met or beaten by the mean of {_seeds(paper)}"


def _head(paper: dict[str, Any]) -> Iterator[str]:
    yield "# The report's experiments, side by side\n"
    if paper["quick"]:
        yield "**A miniature that shows that the command works. Its figures mean nothing: leave out `--quick`.**\n"
    yield (
        "The 2021 report *Project Neural Ordinary Differential Equations* trains Neural-ODE classifiers on images of"
        " shapes. This page repeats its experiments with its protocol, and adds those of the parent paper (Chen et al.,"
        " arXiv:1806.07366). The report does not say how its images were drawn or how large they are; ours are our own"
        " (32×32 pixels, filled or outlined, bright on dark or dark on bright, with noise). So this is a comparison of"
        " protocol, not of pixels.\n"
    )
    yield f"**{headline(paper)}.**\n"
    missed = [
        f"{cell['title']}, {METHOD_TITLES[cell['method']]}, epoch {cell['epoch']}: {cell['mean']:.2f} against"
        f" {cell['report']:.2f}"
        for cell in _cells(paper)
        if not cell["met"]
    ]
    if missed:
        yield "Not met:\n"
        yield from _list(missed)
        yield from _shortfalls(paper)
    machine = paper["machine"]
    yield (
        f"Made by `python -m nodeshape.paper` on {machine['cpu']}, {machine['threads']} cores, {machine['isa']}, torch"
        f" {machine['torch']}.\n"
    )


def _shortfalls(paper: dict[str, Any]) -> Iterator[str]:
    """Whether the report's figures that are missed lie where one more run of ours may."""
    if not 2 <= paper["seeds"] <= len(STUDENT) + 1:
        return
    rows, near, likely = [], 0, 0
    missed = [cell for cell in _cells(paper) if not cell["met"]]
    perfect = sum(cell["report"] == 100 for cell in missed)
    for cell in missed:
        runs, spread = cell["runs"], stdev(cell["runs"])
        short = cell["report"] - cell["mean"]
        further = STUDENT[len(runs) - 2] * spread * sqrt(1 + 1 / len(runs))
        near += short <= spread
        likely += short <= further
        rows.append(
            [
                f"{cell['title']}, {METHOD_TITLES[cell['method']]}, epoch {cell['epoch']}",
                ", ".join(f"{run:.2f}" for run in runs),
                f"{short:.3f}",
                f"{short * paper['test_size'] / 100:.1f}",
                f"{spread:.3f}",
                f"{cell['mean'] - further:.2f} to {min(100, cell['mean'] + further):.2f}",
                "within the spread" if short <= spread else "within the range" if short <= further else "**outside**",
            ]
        )
    yield (
        f"Every figure of the report is of one run, as far as it says. {near} of these {len(missed)} lie within one"
        f" spread (standard deviation over {_seeds(paper)}) of our mean, and {likely} within the range that holds one"
        " more run of ours with a probability of 95% (Student's t, the runs taken as normal; a wide range, as so few"
        f" seeds give it). {perfect} of them are 100.00, which a mean meets only if no run errs on a single image."
        " Short by: in points, and in test images.\n"
    )
    header = ["missed", "our runs, %", "short by", "images", "spread", "range", "the report's figure is"]
    yield from _table(header, rows)


def _goals(paper: dict[str, Any]) -> Iterator[str]:
    yield "## What we set out to reach\n"
    words = {True: "met", False: "**missed**", None: "not measured"}
    yield from _table(
        ["goal", "bound", "measured", ""],
        [
            [
                goal["name"],
                f"{'≥' if goal['least'] else '≤'} {goal['bound']:.4g}{_unit(goal['unit'])}",
                "–" if goal["measured"] is None else f"{goal['measured']:.2f}{_unit(goal['unit'])}",
                words[goal["met"]],
            ]
            for goal in paper["goals"]
        ],
    )


def _experiments(paper: dict[str, Any]) -> Iterator[str]:
    yield "## Accuracy after each epoch\n"
    spread = ", ± the sample standard deviation" if paper["seeds"] > 1 else ""
    threads = paper["machine"]["threads"]
    yield (
        f"Percent of the {paper['test_size']:,} test images, mean of {_seeds(paper)}{spread}. ✓: the mean is at least"
        " the report's figure (in brackets); ✗: it is below. Seconds per epoch are of training alone, with one thread"
        f" per run while {threads} runs share the machine, and rough: whatever else ran then is in them. The report's"
        " are those of a hosted notebook.\n"
    )
    for experiment in paper["experiments"]:
        columns = experiment["methods"]
        yield f"### {experiment['title']}\n"
        rows = [
            [str(epoch + 1), *(_against(column, epoch) for column in columns.values())]
            for epoch in range(len(columns["euler"]["mean"]))
        ]
        seconds = [f"{c['seconds']:.1f} ({_or_dash(c['report_seconds'], '.0f')})" for c in columns.values()]
        yield from _table(["epoch", *(METHOD_TITLES[method] for method in columns)], [*rows, ["s/epoch", *seconds]])
        yield f"![Learning curves: {experiment['title']}]({experiment['name']}.png)\n"


def _small(paper: dict[str, Any]) -> Iterator[str]:
    columns = paper["small"]
    yield "### Single, 500 images, h = 0.01, `--recipe small`\n"
    yield (
        "Not the report's protocol: `python -m nodeshape.train --train-size 500 --step-size 0.01 --recipe small`, with"
        " smaller batches and augmented images, in as many passes over the same images.\n"
    )
    rows = [
        [str(i + 1), *(_mean({key: c[key][i] for key in ("mean", "spread")}) for c in columns.values())]
        for i in range(len(columns["euler"]["mean"]))
    ]
    seconds = [f"{column['seconds']:.1f}" for column in columns.values()]
    yield from _table(["epoch", *(METHOD_TITLES[method] for method in columns)], [*rows, ["s/epoch", *seconds]])


def _epoch_alone(paper: dict[str, Any]) -> Iterator[str]:
    yield "### The default epoch by itself\n"
    threads = paper["machine"]["threads"]
    report = paper["experiments"][0]["methods"]
    yield f"Single, {threads} threads and nothing else running; seconds of training, first epoch.\n"
    yield from _table(
        ["", *METHOD_TITLES.values()],
        [
            ["here", *(f"{paper['epoch_alone'][m]:.1f}" for m in METHOD_TITLES)],
            ["the report", *(_or_dash(report[m]["report_seconds"], ".0f") for m in METHOD_TITLES)],
        ],
    )


def _networks(paper: dict[str, Any]) -> Iterator[str]:
    yield "## ODE-Net, ResNet and RK-Net\n"
    yield (
        "Same stem, same head, same recipe, 2,700 images, h = 0.05, explicit Euler. The ResNet has six residual blocks"
        " with weights of their own and the layers of the ODE's function. The RK-Net is the ODE-Net whose steps are"
        " written out in PyTorch and differentiated by autograd. s/epoch as above.\n"
    )
    for task, models in paper["networks"].items():
        rows = [
            [NETWORKS[network], _mean(model), f"{model['parameters']:,}", f"{model['seconds']:.1f}"]
            for network, model in models.items()
        ]
        yield from _table([f"{task}", "test accuracy, %", "parameters", "s/epoch"], rows)


def _table1(paper: dict[str, Any]) -> Iterator[str]:
    yield "## The parent paper's table 1\n"
    yield "There, on MNIST (L blocks, L̃ evaluations of f):\n"
    yield from _table(["", "test error", "parameters", "memory", "time"], PARENT_TABLE)
    batch = paper["batch_size"]
    yield (
        f"Here, mean of {_seeds(paper)}; the perceptron has {HIDDEN} hidden units on the pixels, as there, and every"
        f" network the same recipe and {len(paper['experiments'][0]['methods']['euler']['mean'])} epochs. Order: how"
        " memory grows with depth, by construction; the section after this one measures it. Peak: memory of a training"
        f" step of {batch} images beyond what was resident before, in a process of its own. Time: processor seconds of"
        " the training steps of an epoch, from the median of several on one thread; other work on the machine hardly"
        " counts in it.\n"
    )
    for images, table in paper["table1"].items():
        yield f"{_table1_images(paper, images, table['train_size'])}\n"
        steps = -(-table["train_size"] // batch)
        yield from _table(
            [images, "test error, %", "parameters", "order", "peak, MiB", "s/epoch"],
            [
                [
                    row["name"],
                    _mean(row),
                    f"{row['parameters']:,}",
                    row["memory"],
                    "–" if row["peak_bytes"] is None else _three_digits(row["peak_bytes"] / 2**20),
                    _three_digits(row["seconds"] * steps),
                ]
                for row in table["rows"]
            ],
        )
        yield f"{_table1_verdict(table['rows'])}\n"


def _table1_images(paper: dict[str, Any], images: str, train: int) -> str:
    """What the images are, and how deep the networks."""
    size = IMAGES[images][1]
    depth = (
        f"The ODE-Net and the RK-Net take {STEPS[images]} explicit Euler steps, the ResNet {RESIDUAL_BLOCKS} blocks."
    )
    if images == "digits":
        return (
            f"The {train + DIGITS_TEST_SIZE:,} handwritten digits of scikit-learn, enlarged to {size}×{size} pixels;"
            f" {train:,} to train with, {DIGITS_TEST_SIZE} to test, one of which is"
            f" {100 / DIGITS_TEST_SIZE:.2f} points. {depth}"
        )
    return (
        f"Shapes (Single, {size}×{size} pixels): {train:,} images to train with, {paper['test_size']:,} to test."
        f" {depth} ResNet, RK-Net and ODE-Net `discrete` are those of the section before."
    )


def _table1_verdict(rows: Sequence[dict[str, Any]]) -> str:
    """The paper's claims about its table, from our figures."""
    mlp, resnet, rknet, _, ode = rows
    lost, spread = ode["mean"] - resnet["mean"], max(ode["spread"] or 0.0, resnet["spread"] or 0.0)
    equal = abs(lost) <= spread
    words = (
        "as good as the ResNet, to within the spread"
        if equal
        else (f"{abs(lost):.2f} points {'behind' if lost > 0 else 'ahead of'} the ResNet")
    )
    text = (
        f"The ODE-Net ({ode['name'].split(', ')[-1]}) is {words}, with {ode['parameters'] / resnet['parameters']:.0%}"
        f" of its parameters; the perceptron errs {mlp['mean']:.2f}%."
    )
    if ode["peak_bytes"] and rknet["peak_bytes"]:
        text += f" Its memory, O(1), is {ode['peak_bytes'] / rknet['peak_bytes']:.0%} of the RK-Net's."
    return text


def _depth(paper: dict[str, Any]) -> Iterator[str]:
    yield "## Memory and time against depth\n"
    lines = paper["depth"]
    depths = lines[0]["depths"]
    yield (
        f"A training step of {paper['batch_size']} images in a process of its own, one thread, one depth after another"
        " while no other experiment runs. Memory is the peak of"
        " what is resident beyond what was before the step, working space included; time is the median of three"
        " further steps. Depth is the number of residual blocks, or of explicit Euler steps, whose reversal costs"
        " `reversible` an implicit solve each.\n"
    )
    growth = f"× from {depths[0]} to {depths[-1]}"
    for title, name, scale in (("peak memory, MiB", "peak_bytes", 2**20), ("time of a step, s", "seconds", 1)):
        rows = []
        for line in lines:
            values = line[name]
            ratio = f"{values[-1] / values[0]:.2f}" if values[0] and values[-1] else "–"
            cells = ["–" if v is None else _three_digits(v / scale) for v in values]
            rows.append([line["name"], *cells, ratio])
        yield from _table([title, *map(str, depths), growth], rows)
    yield "![Peak memory and time of a training step against depth](depth.png)\n"


def _evaluations(paper: dict[str, Any]) -> Iterator[str]:
    yield "## Evaluations of f, forwards and backwards\n"
    counts_of = paper["evaluations"]
    yield (
        f"Of a trained model (Single, 2,700 images, h = 0.05), mean over {paper['count_images']} images; a backward"
        " evaluation is one of f or of its vector–Jacobian product. The parent paper's figure 4 finds about half as"
        " many backwards as forwards.\n"
    )
    settings = [c for c in counts_of["euler"] if c["adjoint"] == counts_of["euler"][0]["adjoint"]]
    columns = [solver_title(setting) for setting in settings]
    rows = []
    for method, counts in counts_of.items():
        for adjoint in dict.fromkeys(c["adjoint"] for c in counts):
            cells = [_forward_backward(c) for c in counts if c["adjoint"] == adjoint]
            rows.append([METHOD_TITLES[method], f"`{adjoint}`", *cells])
    yield from _table(["forward / backward", "", *columns], rows)
    if any("refused" in row for row in rows):
        yield "Refused: the solver or the gradient did not reach its tolerance, and said so.\n"
    yield "![Backward against forward evaluations of f](evaluations.png)\n"


def _other_solvers(paper: dict[str, Any]) -> Iterator[str]:
    table = paper["other_solvers"]
    yield "## Trained with one solver, tested with another\n"
    yield (
        f"Single, {table['train_size']:,} training images, first seed; percent of {paper['solver_images']:,} test"
        " images, of which a few more or less mean nothing. Error control is that of the implicit midpoint method. A"
        " dash is a solve that did not reach its tolerance, and said so, or a model whose training failed.\n"
    )
    drops = []
    for row in table["rows"]:
        named = [
            (c, value)
            for c, value in zip(table["columns"], row["accuracy"])
            if value is not None and c["method"] == row["method"] and "steps" in c
        ]
        if named:
            drops.append((max(v for _, v in named) - min(v for _, v in named), row, named))
    if drops:
        _, row, named = max(drops, key=lambda drop: drop[0])
        worst, best = min(named, key=lambda cell: cell[1]), max(named, key=lambda cell: cell[1])
        yield (
            f"Within a method the number of steps matters most to {METHOD_TITLES[row['method']]} trained with"
            f" {solver_title(row)}: {best[1]:.1f}% in {best[0]['steps']} steps, {worst[1]:.1f}% in"
            f" {worst[0]['steps']}.\n"
        )
    yield "![Test accuracy by the solver of training and of testing](other-solvers.png)\n"
    yield "Trained at one tolerance of error control (rows), tested at another (columns):\n"
    tolerances = [i for i, column in enumerate(table["columns"]) if "rtol" in column]
    yield from _table(
        ["implicit midpoint", *(solver_title(table["columns"][i]) for i in tolerances)],
        [
            [solver_title(row), *(_or_dash(row["accuracy"][i], ".1f") for i in tolerances)]
            for row in table["rows"]
            if "rtol" in row
        ],
    )


def _sweep(paper: dict[str, Any]) -> Iterator[str]:
    cells = paper["sweep"]
    yield "## Few images and small steps\n"
    yield (
        "The report closes with: with few images and small steps the midpoint method holds up best. Single, accuracy"
        f" after the last epoch, mean of {_seeds(paper)}, on {paper['sweep_test_size']:,} test images"
        f" ({paper['test_size']:,} in the report's own cells). Combinations of many images and small steps are left"
        " out for their cost. `failed`: with one of the seeds a stage equation could not be solved, or the loss did not"
        " stay finite.\n"
    )
    rows = [
        [f"{cell['train_size']:,}", f"{cell['step_size']:g}", *(_mean(cell["methods"][m]) for m in METHOD_TITLES)]
        for cell in cells
    ]
    yield from _table(["images", "h", *METHOD_TITLES.values()], rows)
    yield f"{_answer(cells)}\n"
    yield "![Accuracy against training images, a panel per step size](sweep.png)\n"


def _answer(cells: Sequence[dict[str, Any]]) -> str:
    """The report's closing question, answered by counting cells that the midpoint method leads.

    Those of the two smallest numbers of images and of all steps but the largest; a rival whose training failed is led
    clearly, and a cell in which all failed says nothing.
    """
    sizes = sorted({cell["train_size"] for cell in cells})[:2]
    steps = sorted({cell["step_size"] for cell in cells})[:-1]
    few = [
        cell["methods"]
        for cell in cells
        if cell["train_size"] in sizes
        and cell["step_size"] in steps
        and any(column["mean"] is not None for column in cell["methods"].values())
    ]
    if not few:
        return "Whether the midpoint method holds up best we cannot tell: no such training succeeded."
    best = clear = 0
    for methods in few:
        ours = methods["implicit_midpoint"]
        rivals = [methods[m] for m in METHOD_TITLES if m != "implicit_midpoint" and methods[m]["mean"] is not None]
        if ours["mean"] is None:
            continue
        rival = max(rivals, key=lambda other: other["mean"], default={"mean": -inf, "spread": None})
        lead = ours["mean"] - rival["mean"]
        best += lead > 0
        clear += lead > (ours["spread"] or 0.0) + (rival["spread"] or 0.0)
    verdict = (
        "so the report's finding holds here too"
        if clear > len(few) / 2
        else "so our images do not show it"
        if clear == 0
        else "so the finding holds in part"
    )
    return (
        f"With {sizes[0]:,} or {sizes[-1]:,} images and h of at most {steps[-1]:g} the midpoint method has the highest"
        f" mean in {best} of {len(few)} cells, in {clear} of them by more than the two spreads together; {verdict}."
    )


def _protocol(paper: dict[str, Any]) -> Iterator[str]:
    yield "## Protocol\n"
    yield (
        "Cross-entropy, batches of 120 (300 in testing), five epochs, and an optimiser of the Adam family: AdamW under"
        " a one-cycle learning rate, where the report has Adam. After each epoch the statistics of batch normalisation"
        " are taken anew for the weights as they are. A seed fixes the images, the initial weights and the order. The"
        " solver is the fused one and the gradient `discrete`, except where a table says otherwise. Every figure here"
        " is in [results.json](results.json), accuracies seed by seed.\n"
    )


def _cells(paper: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every accuracy that the report gives, with ours."""
    for experiment in paper["experiments"]:
        for method, column in experiment["methods"].items():
            for i, mean in enumerate(column["mean"]):
                yield {
                    "title": experiment["title"],
                    "method": method,
                    "epoch": i + 1,
                    "mean": mean,
                    "runs": [run[i] for run in column["runs"]],
                    "report": column["report"][i],
                    "met": column["met"][i],
                }


def _against(column: dict[str, Any], epoch: int) -> str:
    mark = "✓" if column["met"][epoch] else "✗"
    cell = {"mean": column["mean"][epoch], "spread": column["spread"][epoch]}
    return f"{_mean(cell)} {mark} ({column['report'][epoch]:.2f})"


def _mean(cell: dict[str, Any]) -> str:
    if cell["mean"] is None:
        return "failed"
    return f"{cell['mean']:.2f}" + ("" if cell["spread"] is None else f" ± {cell['spread']:.2f}")


def _forward_backward(count: dict[str, Any]) -> str:
    return "refused" if count["forward"] is None else f"{count['forward']:.0f} / {count['backward']:.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _unit(unit: str) -> str:
    return f" {unit}" if unit == "s" else unit


def _seeds(paper: dict[str, Any]) -> str:
    return "one seed" if paper["seeds"] == 1 else f"{paper['seeds']} seeds"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _list(items: Iterable[str]) -> Iterator[str]:
    for item in items:
        yield f"- {item}"
    yield ""
