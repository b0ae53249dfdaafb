"""examples/timeseries.py: files and their errors, the ODE-RNN's parts, and that it learns and exports."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

import nodeshape as ns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import series
import timeseries
from series import Series
from timeseries import Recurrent

LABELS = ["fall", "rise"]


def drawn(count, seed=0):
    """Lines that rise or fall, seen at random times through two channels, a fifth of the values missing."""
    random = np.random.default_rng(seed)
    found = []
    for k in range(count):
        times = np.sort(random.uniform(0, 600, random.integers(8, 16)))
        line = (-1, 1)[k % 2] * (times / 300 - 1)
        values = np.stack([5 + 2 * line, -line], 1) + 0.3 * random.normal(size=(len(times), 2))
        values[random.uniform(size=values.shape) < 0.2] = np.nan
        values[0, 0] = 5.0  # one at least
        found.append(Series(LABELS[k % 2], "train" if k < count * 2 // 3 else "test", times, values.astype("f")))
    return found


def written(path, found):
    lines = ["series,label,split,time,a,b"]
    for k, x in enumerate(found):
        for t, row in zip(x.times, x.values):
            cells = ["" if np.isnan(v) else repr(float(v)) for v in row]
            lines.append(",".join([str(k), x.label, x.split, repr(float(t)), *cells]))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def main(*arguments):
    sys.argv = ["timeseries.py", *map(str, arguments)]
    with pytest.raises(SystemExit) as end:
        timeseries.EXAMPLE.main()
    return end.value.code


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    found = drawn(120)
    model = Recurrent(found[:80], 2, 16, flows=True)
    before = timeseries.accuracy(model, found[80:], LABELS)
    timeseries.fit(model, found[:80], LABELS, 120, "test")
    return model, found[80:], before


def test_a_file_is_read_as_it_was_written(tmp_path):
    found = drawn(6)
    read, channels = series.read_series(written(tmp_path / "x.csv", found))
    assert channels == ["a", "b"]
    for a, b in zip(read, found):
        assert (a.label, a.split) == (b.label, b.split)
        np.testing.assert_array_equal(a.times, b.times)
        np.testing.assert_array_equal(a.values, b.values)


GOOD = "series,label,time,a\n1,x,0,1\n1,x,1,2\n2,x,0,1\n3,y,0,1\n4,y,0,2\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no column series, label, time"),
        ("series,time,a\n1,0,1\n", "has no column label"),
        ("series,label,time\n1,x,0\n", "a column for each channel"),
        ("series,label,time,a,a\n1,x,0,1,1\n", "names of their own"),
        (GOOD + "5,y,0\n", "line 7: 3 cells, but the first line has 4"),
        (GOOD + "5,y,0,zero\n", "line 7: a must be a number, got 'zero'"),
        (GOOD + "5,y,0,inf\n", "line 7: values must be finite"),
        (GOOD + "5,y,0,1e39\n", "line 7: values must be finite and below 1e30"),
        (GOOD + "5,y,,1\n", "line 7: time must be a finite number, got ''"),
        (GOOD + "5,y,nan,1\n", "line 7: time must be a finite number, got 'nan'"),
        (GOOD + ",y,0,1\n", "line 7: series and label may not be empty"),
        (GOOD + "1,x,0.5,1\n", "line 7: times of series '1' must increase"),
        (GOOD + "1,y,2,1\n", "line 7: series '1' had another label"),
        (GOOD + "5,y,0,\n", "series '5' has no value at all"),
        (GOOD + "5,z,0,1\n", "label 'z' has one series"),
        ("series,label,time,a\n1,x,0,1\n2,x,0,1\n", "at least two labels, got 1"),
        ("series,label,time,a\n", "at least two labels, got 0"),
        ("series,label,split,time,a\n1,x,both,0,1\n", "split must be train or test, got 'both'"),
        ("series,label,split,time,a\n1,x,train,0,1\n2,x,train,0,1\n3,y,train,0,1\n4,y,train,0,1\n", "to test with"),
        ("series,label,split,time,a\n1,x,train,0,1\n2,x,train,0,1\n3,y,test,0,1\n4,y,test,0,1\n", "label 'y' has no"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_code_2(tmp_path, capsys, text, says):
    path = tmp_path / "x.csv"
    path.write_text(text, "utf-8")
    assert main("--data", path, "--quick", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


def test_bytes_that_are_no_text_and_channels_that_never_speak_are_errors_too(tmp_path, capsys):
    path = tmp_path / "x.csv"
    path.write_bytes(b"series,label,time,a\n\xff\xfe,x,0,1\n")
    assert main("--data", path, "--out", tmp_path) == 2
    assert "no CSV file in UTF-8" in capsys.readouterr().err
    rows = ["series,label,split,time,a,b", *(f"{k},{k % 2},{'train' if k < 4 else 'test'},0,1," for k in range(6))]
    path.write_text("\n".join(rows), "utf-8")
    assert main("--data", path, "--out", tmp_path) == 2
    assert "channel b has no value" in capsys.readouterr().err


def test_the_vowels_are_written_as_such_a_file(tmp_path, monkeypatch):
    x = np.arange(12 * 9, dtype=float).reshape(12, 9)
    vowels = SimpleNamespace(load_japanese_vowels=lambda split: ([x] * 4, np.array(["1", "1", "2", "2"])))
    monkeypatch.setitem(sys.modules, "aeon", SimpleNamespace(datasets=vowels))
    monkeypatch.setitem(sys.modules, "aeon.datasets", vowels)
    series.write_vowels(tmp_path / "x.csv")
    found, channels = series.read_series(tmp_path / "x.csv")
    assert len(found) == 8 and len(channels) == 12
    for one in found:
        assert len(one.times) == 5
        expected = x[:, np.round(one.times / 6.4).astype(int)].T
        seen = ~np.isnan(one.values)
        assert 0.4 < seen.mean() < 0.9
        np.testing.assert_allclose(one.values[seen], expected[seen])


def test_without_aeon_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "aeon.datasets", None)
    assert main("--quick", "--out", tmp_path) == 2
    assert "pip install aeon" in capsys.readouterr().err


def test_without_a_split_each_label_is_divided_alike():
    found = [Series("xy"[k % 2], "", np.zeros(1), np.zeros((1, 1))) for k in range(40)]
    to_train, to_test = series.divided(found, 0)
    assert (len(to_train), len(to_test)) == (28, 12)
    assert sum(x.label == "x" for x in to_test) == 6


def test_a_gap_is_crossed_as_by_a_solve_over_that_time():
    torch.manual_seed(0)
    flow = timeseries.Flow(6, 8).double()
    fused = ns.fuse(flow, (torch.zeros(2, 6).double(), torch.zeros(2, 1).double()))
    h, gaps = torch.randn(3, 6).double(), torch.tensor([[0.0], [0.3], [1.7]]).double()
    ours = ns.odeint(fused, (h, gaps), [0.0, 1.0], method="rk4", steps=50)[0][-1]
    assert torch.equal(ours[0], h[0])
    for k in (1, 2):
        alone = ns.odeint(lambda t, y: flow.net(y), h[k : k + 1], [0.0, gaps[k].item()], rtol=1e-10, atol=1e-12)[-1]
        torch.testing.assert_close(ours[k : k + 1], alone, rtol=1e-7, atol=1e-7)
    state = (torch.zeros(2, 6).double(), torch.zeros(2, 1).double())
    assert ns.backend(fused, state, [0.0, 1.0], method="rk4", steps=2).name == "fused"


def test_padding_and_batch_mates_change_nothing(trained):
    model, found, _ = trained
    together = model.classify(*series.batch(found[:5], LABELS)[:2])
    for k in range(5):
        alone = model.classify(*series.batch([found[k]], LABELS)[:2])
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_rival_gru_is_as_large():
    found = drawn(6)
    ours = Recurrent(found, 2, 16, flows=True)
    gru = timeseries.as_large_a_gru(found, 2, timeseries.parameters(ours))
    assert 1 <= timeseries.parameters(gru) / timeseries.parameters(ours) < 1.1


def test_training_learns_and_regression_does_too(trained):
    model, test, before = trained
    assert timeseries.accuracy(model, test, LABELS) > max(before, 0.5) + 0.25
    simple = timeseries.regression(drawn(80, seed=3))
    assert 0 <= simple.score(series.summaries(test), [x.label for x in test]) <= 1


def test_steps_across_a_gap_are_enough(trained, monkeypatch):
    model, test, _ = trained
    gaps, values, _ = series.batch(test, LABELS)
    few = model.classify(gaps, values).softmax(1)
    monkeypatch.setattr(timeseries, "STEPS", 4 * timeseries.STEPS)
    torch.testing.assert_close(few, model.classify(gaps, values).softmax(1), rtol=0, atol=0.02)


def test_the_exported_cell_follows_a_sensor_to_the_same_classes(trained, tmp_path):
    model, test, _ = trained
    gaps, values, _ = series.batch(test[:6], LABELS)
    hidden = 0.1 * torch.randn(6, 16)
    ns.to_onnx(model, (hidden, gaps[:, 1:2], values[:, 1]), tmp_path / "cell.onnx")
    cell = onnxruntime.InferenceSession(tmp_path / "cell.onnx")
    state = np.zeros((6, 16), "f")
    for k in range(gaps.shape[1]):
        inputs = {"hidden": state, "gap": gaps[:, k : k + 1].numpy(), "values": values[:, k].numpy()}
        state, logits = cell.run(None, inputs)
    expected = model.classify(gaps, values).detach()
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert (logits.argmax(1) == expected.argmax(1).numpy()).all()


@pytest.mark.slow
def test_the_command_takes_a_users_file(tmp_path, capsys):
    path = written(tmp_path / "x.csv", drawn(60))
    assert main("--data", path, "--quick", "--out", tmp_path) == 0
    assert (tmp_path / "timeseries.png").exists() and (tmp_path / "timeseries.json").exists()


@pytest.mark.slow
def test_an_iteration_is_faster_than_on_torchdiffeq():
    assert timeseries.speed()["training iteration"] > 1.5
