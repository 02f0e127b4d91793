"""The style of pictures: colours by a published model of colour blindness, matplotlib left alone, files whole."""
import itertools
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from timm_lean import LeanError
from timm_lean.measure.pictures import COLORS, layer_figure, new_figure, save_figure

# Machado, Oliveira, Fernandes 2009, severity 1.0, for linear RGB
BLINDNESS = {
    'none': [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    'protanopia': [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    'deuteranopia': [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    'tritanopia': [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colors, blindness):
    """CIE L*a*b* (D65) of hex colours as somebody with this blindness sees them."""
    srgb = np.array([[int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)] for c in colors])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(BLINDNESS[blindness]).T, 0, 1)
    to_xyz = [[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750], [.0193339, .1191920, .9503041]]
    xyz = seen @ np.array(to_xyz).T / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize('blindness', BLINDNESS)
def test_colours_can_be_told_apart_and_seen_on_white(blindness):
    values = lab(COLORS, blindness)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(values, 2)) > 15
    assert values[:, 0].max() < 75, 'lightness of white is 100'


def test_the_measure_of_colours_finds_matplotlibs_own_wanting():
    default = ['#1f77b4', '#ff7f0e', '#2ca02c', '#d62728', '#9467bd', '#8c564b', '#e377c2']
    values = lab(default, 'deuteranopia')
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(values, 2)) < 10


def test_more_lines_than_colours_stay_distinct():
    _, (axes,) = new_figure()
    looks = {(line.get_color(), line.get_linestyle()) for line in [axes.plot([i])[0] for i in range(14)]}
    assert len(looks) == 14


def test_axes_come_row_by_row_and_layers_have_a_place_each(tmp_path):
    figure, axes = new_figure((6, 4), rows=2, columns=3)
    assert [(a.get_subplotspec().rowspan.start, a.get_subplotspec().colspan.start) for a in axes] == [
        (row, column) for row in range(2) for column in range(3)]
    save_figure(figure, tmp_path / 'a.png')
    assert Image.open(tmp_path / 'a.png').size == (720, 480)
    figure, axes = layer_figure([f'layer{i}' for i in range(60)])
    assert [t.get_text() for t in axes.get_xticklabels()] == [f'layer{i}' for i in range(60)]
    assert list(axes.get_xticks()) == list(range(60)) and figure.get_size_inches()[0] > 15


def test_pyplot_and_its_settings_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)  # whoever imports it now fails
    before = matplotlib.rcParams.copy()
    figure, (axes,) = new_figure()
    axes.plot([1, 2])
    save_figure(figure, tmp_path / 'a.png')
    assert matplotlib.rcParams.copy() == before


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / 'a.png'
    save_figure(new_figure()[0], path)
    before = path.read_bytes()
    figure, _ = new_figure()

    def break_off(file, **kwargs):
        file.write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(figure, 'savefig', break_off)
    with pytest.raises(LeanError, match=r'Cannot write .*a\.png: No space left on device'):
        save_figure(figure, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['a.png']
