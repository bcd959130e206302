"""Laws of the picture of a partition: its figures are right, and it can be read for one client and for ten thousand."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from fedray.cli import _Parser, main
from fedray.errors import ConfigError
from fedray.report import partition as room
from fedray.report.partition import Dealt, partition_command, picture, record, save, summary, words


def manifest_of(counts):
    counts = np.asarray(counts)
    return {
        "hash": "f00d",
        "num_clients": len(counts),
        "num_samples": int(counts.sum()),
        "histogram": counts.tolist(),
    }


def skewed(num_clients, num_classes, seed=0):
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(num_classes, 0.2), num_clients)
    counts = random.poisson(shares * random.lognormal(5, 1.5, (num_clients, 1)))
    counts[np.arange(num_clients), random.integers(0, num_classes, num_clients)] += 1
    return manifest_of(counts)


def drawn(manifest, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(picture(manifest, width=width))
    return console.file.getvalue()


def test_the_figures_are_those_of_a_computation_by_hand():
    found = summary(manifest_of([[4, 0], [2, 2], [0, 12]]))
    whole = np.array([6, 14]) / 20
    assert found.num_samples == 20
    assert found.size_quantiles[0] == found.size_quantiles[3] == 4
    assert found.size_quantiles[-1] == 12
    assert found.classes_per_client == pytest.approx(4 / 3)
    assert found.total_variation == pytest.approx((0.7 + 0.2 + 0.3) / 3)

    def distance(p):
        m = (p + whole) / 2
        terms = [x * np.log2(x / y) for one in (p, whole) for x, y in zip(one, m, strict=True) if x > 0]
        return np.sqrt(sum(terms) / 2)

    shares = np.array([[1, 0], [0.5, 0.5], [0, 1]])
    assert found.jensen_shannon == pytest.approx(np.mean([distance(p) for p in shares]))


def test_equal_clients_have_no_skew_and_foreign_ones_have_much():
    assert summary(manifest_of([[3, 5]] * 7)).total_variation == pytest.approx(0)
    assert summary(manifest_of([[3, 5]] * 7)).jensen_shannon == pytest.approx(0, abs=1e-7)
    foreign = summary(manifest_of(np.eye(50, dtype=int)))
    assert foreign.total_variation == pytest.approx(0.98)
    assert 0.9 < foreign.jensen_shannon < 1


def test_the_record_is_json_with_everything_of_the_manifest():
    manifest = skewed(5, 3)
    found = record(manifest)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps({**found, **manifest}))
    assert found["summary"]["num_clients"] == 5


def test_the_words_say_what_is_dealt_out_and_what_is_not():
    text = words(manifest_of([[20, 20], [0, 40]]), 60_000)
    assert "80 samples of the 60,000 of the training set" in text
    assert "40 samples, as every other" in text
    assert "1.5 of 2 at a client" in text
    assert "80 samples, every one of the training set" in words(manifest_of([[20, 20], [0, 40]]), 80)
    assert "8 samples in the median, from 4 to 12" in words(manifest_of([[4], [8], [12]]))


@pytest.mark.parametrize("num_clients", [1, 10, 40])
def test_few_clients_have_a_row_each_with_classes_in_proportion(num_clients):
    manifest = skewed(num_clients, 10)
    lines = drawn(manifest).splitlines()
    assert len(lines) == num_clients + 2
    columns = re.search(r"classes +", lines[0]).end() - re.search("classes", lines[0]).start() - 1
    for client, line in enumerate(lines[1:-1]):
        counts = np.array(manifest["histogram"][client])
        head = f"{client:>{len(str(num_clients - 1))}} "
        assert line.startswith(head)
        bar = line[len(head) : len(head) + columns]
        cells = np.array([bar.count(str(label)) for label in range(10)])
        assert cells.sum() == columns
        assert (abs(cells - counts / counts.sum() * columns) < 1).all()
        assert f" {counts.sum():,} " in line[len(head) + columns :]


@pytest.mark.parametrize("num_clients", [41, 100, 500, 10_000])
@pytest.mark.parametrize("num_classes", [2, 10, 62, 1000])
def test_many_clients_fit_a_screen_and_are_all_counted(num_clients, num_classes):
    manifest = skewed(num_clients, num_classes)
    lines = drawn(manifest).splitlines()
    assert len(lines) < 55
    assert all(len(line) <= 100 for line in lines)
    clients = [int(found[1]) for line in lines if (found := re.match(r" *(\d+) clients ", line))]
    assert sum(clients) == num_clients
    start = next(index for index, line in enumerate(lines) if line.rstrip().endswith("samples clients"))
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines[start + 1 :]) == num_clients


def test_the_heat_map_is_dark_where_clients_are():
    lines = drawn(manifest_of(np.repeat(np.eye(4, dtype=int) * 5, 16, axis=0))).splitlines()
    rows = [line.split(" clients ")[1][:16] for line in lines if " clients " in line]
    assert rows == [" " * 4 * (row // 8) + "████" + " " * 4 * (3 - row // 8) for row in range(32)]


def test_chance_does_not_look_like_skew():
    counts = np.random.default_rng(0).multinomial(120, np.full(10, 0.1), 500)
    assert "█" not in drawn(manifest_of(counts)).split("Clients are sorted")[0]


@pytest.mark.parametrize(("num_clients", "num_classes"), [(10, 10), (10, 100), (500, 10), (10_000, 62), (1, 1)])
def test_the_picture_is_written(tmp_path, num_clients, num_classes):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    save(skewed(num_clients, num_classes), path, title="a title")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("num_clients", [10, 40, 100, 500])
def test_no_label_of_an_axis_covers_another(num_clients, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    save(skewed(num_clients, 10), tmp_path / "picture.png", title="a title")
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [text.get_window_extent(renderer) for text in axis.get_ticklabels() if text.get_text()]
            shown = [box for box in boxes if box.width and box.height]
            overlaps = [a for i, a in enumerate(shown) for b in shown[i + 1 :] if a.overlaps(b)]
            assert overlaps == []


def command(arguments, manifest=None):
    asked = []

    def deal(overrides, config_dir):
        asked.append((list(overrides), config_dir))
        return Dealt(manifest=manifest or skewed(6, 3), num_available=10**6, title="mnist, partition dirichlet")

    partition_command(arguments, parser=_Parser, deal=deal)
    return asked


def test_the_command_prints_and_writes_and_takes_overrides_on_both_sides_of_options(tmp_path, capsys):
    path = tmp_path / "manifest.json"
    asked = command(["+experiment=x", "--json", str(path), "seed=1", "--config-dir", "mine", "~pruner.start"])
    assert asked == [(["+experiment=x", "seed=1", "~pruner.start"], "mine")]
    out = capsys.readouterr().out
    assert out.startswith("mnist, partition dirichlet\n")
    assert "label skew" in out
    assert json.loads(path.read_text())["summary"]["num_classes"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "picture.txt"], "--output is 'picture.txt'; its name must end in .png, .pdf or .svg"),
        (["--output", "/nowhere/at/all.png"], "the folder /nowhere/at does not exist, so make it first"),
        (["--json", "/nowhere/at/all.json"], "the folder /nowhere/at does not exist, so make it first"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_what_cannot_be_written_is_refused_before_data_are_read(arguments, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        partition_command(arguments, parser=_Parser, deal=lambda *_: pytest.fail("read data"))


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=re.escape("--output needs matplotlib: pip install 'fedray[report]'")):
        save(skewed(3, 3), tmp_path / "picture.png")


def test_a_manifest_without_a_histogram_is_refused():
    with pytest.raises(ConfigError, match="the manifest has no histogram; take what"):
        summary({"hash": "f00d"})
    with pytest.raises(ConfigError, match="it needs a row with at least one sample for each client"):
        summary(manifest_of([[1, 0], [0, 0]]))


def test_the_partition_of_an_experiment_is_shown_without_a_model_and_without_ray(capsys, monkeypatch, tmp_path):
    import sys

    monkeypatch.chdir(tmp_path)
    started = set(sys.modules)
    unbuilt = "model._target_=no.such.Model"
    assert main(["partition", "+experiment=quickstart", "num_clients=12", "seed=3", unbuilt]) == 0
    out = capsys.readouterr().out
    assert out.startswith("quickstart: digits, partition dirichlet, seed 3")
    assert "clients       12" in out
    assert "ray" in started or "ray" not in sys.modules
    assert list(tmp_path.iterdir()) == []
    assert main(["partition", "+experiment=quickstart", "partition.alpha=-1"]) == 2
    assert "partition.alpha is -1; it must be above 0" in capsys.readouterr().err
