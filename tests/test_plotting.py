import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from datasets import build_dataset
from datasets.stats import class_statistics
from tests.conftest import ROOT, write_voc_layout
from utils.pictures import plotting

NAMES = ["天空", "道路", "木 tree", "자동차"]
NOWHERE = ["\U00100000\U00100001", "road", "\U00100002", "car"]  # private characters, which no font of a system has


def write_font(path: Path, family: str, characters: str) -> Path:
    """A font in which each of these characters is a triangle, and the rest is missing."""
    pen = TTGlyphPen(None)
    for number, point in enumerate([(0, 0), (900, 0), (450, 900)]):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    glyphs = {".notdef": TTGlyphPen(None).glyph(), "triangle": pen.glyph()}
    font = FontBuilder(1000)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap({ord(character): "triangle" for character in characters})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    font.save(path)
    return path


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed(family=characters, ...)`: these are all the fonts to choose from, in this order."""
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))

    def install(**fonts):
        for family, characters in fonts.items():
            fontManager.addfont(write_font(tmp_path / f"{family}.ttf", family, characters))
        monkeypatch.setattr(plotting, "FONTS", tuple(fonts))

    return install


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """`draw(names)`: samples, statistics and curves of data with these classes; returns figures and paths."""
    figures, choose = [], plotting.choose_fonts

    def keep(figure):
        figures.append(figure)
        choose(figure)

    def start(names, choose=keep):
        figures.clear()
        monkeypatch.setattr(plotting, "choose_fonts", choose)
        folder = write_voc_layout(tmp_path / "own", {"train": ["a1", "a2"], "val": ["b1"]}, class_names=names)
        dataset = build_dataset("folder", folder, "train")
        paths = [tmp_path / f"{name}.png" for name in ("samples", "stats", "curves")]
        rows = [{"itr": k, "epoch": k, "mean_iou": 0.1 * k, "loss": 1 / k, "lr": 0.01} for k in (1, 2, 3)]
        with warnings.catch_warnings(action="error"):  # matplotlib's, one for each glyph
            plotting.draw_samples(dataset, [0, 1], paths[0])
            plotting.draw_statistics(class_statistics(dataset), dataset.palette, paths[1])
            plotting.draw_curves({names[0]: rows}, paths[2])
        return figures, [path.read_bytes() for path in paths]

    return start


def texts(figure):
    return {text.get_text(): text for text in figure.findobj(Text)}


def names_in(figures):
    """The class names in the legend and on the axis, and the name of the run."""
    samples, stats, curves = figures
    legend = [text.get_text() for text in samples.legends[0].get_texts()]
    axis = [label.get_text() for label in stats.axes[0].get_yticklabels()]
    return legend[:-1], sorted(axis), curves.legends[0].get_texts()[0].get_text().partition(":")[0]


def test_names_are_drawn_with_the_first_fonts_that_have_their_characters(installed, draw, caplog):
    installed(Latin="abc", Hanzi="天空道路木", Kanji="天木", Hangul="자동차", Rest="天자")
    figures, _ = draw(NAMES)
    assert names_in(figures) == (NAMES, sorted(NAMES), NAMES[0])
    assert texts(figures[0])["天空"].get_fontfamily()[-2:] == ["Hanzi", "Hangul"]
    label = next(label for label in figures[1].axes[0].get_yticklabels() if label.get_text() == "자동차")
    assert label.get_fontfamily()[-2:] == ["Hanzi", "Hangul"]
    assert texts(figures[2])["iteration"].get_fontfamily()[-1] == "Hanzi"  # its run is called 天空
    assert not caplog.records


def test_names_without_such_characters_change_no_byte_of_a_picture(installed, draw):
    installed(Hanzi="天sky road")
    names = ["sky", "Straße", "$tree", "été"]
    _, after = draw(names)
    _, before = draw(names, choose=lambda figure: None)
    assert after == before


def test_characters_of_no_font_become_question_marks(installed, draw):
    installed(Hanzi="天空道")
    figures, _ = draw(NAMES)
    shown = ["天空", "道?", "? tree", "???"]
    assert names_in(figures) == (shown, sorted(shown), "天空")


def test_stacked_curves_fit_a_narrow_column_even_with_a_long_name(tmp_path):
    rows = [{"itr": k, "epoch": k, "mean_iou": 0.1 * k, "loss": 1 / k, "lr": 0.01} for k in (1, 2, 3)]
    plotting.draw_curves({"run_" * 30: rows, "b": rows}, tmp_path / "curves.png", stacked=True)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.height > picture.width
        pixels = np.array(picture.convert("L"))
    assert (pixels[:, [0, -1]] == 255).all()  # nothing is cut off


def test_wide_characters_get_room_in_the_legend(installed, tmp_path):
    names = [character * 12 for character in "天空道路木街車人"]
    installed(Hanzi="".join(names))
    folder = write_voc_layout(tmp_path / "own", {"train": ["a1", "a2"], "val": ["b1"]}, class_names=names)
    plotting.draw_samples(build_dataset("folder", folder, "train"), [0, 1], tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        pixels = np.array(picture.convert("L"))
    assert (pixels[:, [0, -1]] == 255).all()  # nothing is cut off


def test_missing_font_is_reported_once_and_found_once_it_is_installed(tmp_path):
    folder = write_voc_layout(tmp_path / "own", {"train": ["a1", "a2"], "val": ["b1"]}, class_names=NOWHERE)
    data = ["--dataset", "folder", "--data_root", str(folder)]
    commands = [[name, *data, "--out", str(tmp_path / f"{name}.png")] for name in ("samples", "stats")]
    script = [sys.executable, "-c", f"import visualize\nfor command in {commands!r}: visualize.main(command)"]
    # matplotlib keeps its list of fonts there, so that the second process reads the list of the first.
    environment = os.environ | {
        "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
        "XDG_DATA_HOME": str(tmp_path / "share"),
    }

    def run():
        process = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        lines = [line for line in process.stderr.splitlines() if "font cache" not in line]
        return lines, [(tmp_path / f"{name}.png").read_bytes() for name in ("samples", "stats")]

    lines, without = run()
    assert len(lines) == 1 and lines[0].startswith('some names are drawn with "?"') and "fonts-noto-cjk" in lines[0]
    write_font(tmp_path / "share/fonts/new.ttf", "Unifont", "".join(NOWHERE))
    lines, found = run()
    assert lines == [] and all(a != b for a, b in zip(without, found, strict=True))
