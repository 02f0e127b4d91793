"""Feature-map similarity on data."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

from timm_lean import LeanError
from timm_lean.layers import FilterBasis, SharedBasisConv2d
from timm_lean.measure import similarity
from timm_lean.measure.similarity import feature_similarity, format_similarity, plot_similarity


def by_definition(maps: np.ndarray) -> float:
    """Mean over images of the mean over pairs, for `[B, C, H, W]`."""
    per_image = []
    for image in maps.reshape(*maps.shape[:2], -1):
        per_image.append(np.mean([abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
                                  for a, b in itertools.combinations(image, 2)]))
    return float(np.mean(per_image))


def test_equals_the_definition_over_uneven_batches(monkeypatch):
    monkeypatch.setattr(similarity, '_MAX_COSINES', 40)  # two images at once
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False))
    images = torch.randn(5, 3, 8, 8)
    loader = [(images[:3], torch.zeros(3)), (images[3:], torch.zeros(2))]
    with torch.no_grad():
        first = model[0](images)
        second = model(images)
    result = feature_similarity(model, loader)
    assert list(result) == ['0', '2']
    assert result['0'] == pytest.approx(by_definition(first.numpy()), rel=1e-5)
    assert result['2'] == pytest.approx(by_definition(second.numpy()), rel=1e-5)
    only = feature_similarity(model, loader, max_batches=1)
    assert only['0'] == pytest.approx(by_definition(first[:3].numpy()), rel=1e-5)


def test_extremes():
    same, different = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        same.weight.copy_(torch.tensor([1.0, -3.0]).view(2, 1, 1, 1))
        different.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
    assert feature_similarity(same, [torch.randn(2, 1, 4, 4)]) == {'': pytest.approx(1)}
    orthogonal = torch.zeros(1, 2, 2, 2)
    orthogonal[0, 0, 0, 0] = orthogonal[0, 1, 1, 1] = 1
    assert feature_similarity(different, [orthogonal]) == {'': 0}
    assert feature_similarity(different, [torch.zeros(1, 2, 2, 2)]) == {'': 0}  # dead maps, not NaN


def test_a_shared_layer_counts_as_one():
    basis = FilterBasis(6, 4, 3)
    model = nn.Sequential(*(SharedBasisConv2d(4, 5 - i, 3, basis) if i else nn.Conv2d(3, 4, 3) for i in range(2)))
    images = torch.randn(2, 3, 6, 6)
    result = feature_similarity(model, [images])
    assert list(result) == ['0', '1']
    with torch.no_grad():
        assert result['1'] == pytest.approx(by_definition(model.eval()(images).numpy()), rel=1e-5)


def test_uninformative_layers_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))
    assert list(feature_similarity(model, [torch.randn(1, 3, 8, 8)])) == ['1']


def test_restores_modes_and_removes_hooks():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model.train()
    model[1].eval()
    statistics = model[1].running_mean.clone()
    feature_similarity(model, [torch.randn(2, 3, 8, 8)])
    assert model.training and not model[1].training and model[2].training
    assert torch.equal(model[1].running_mean, statistics)

    def broken():
        yield torch.randn(2, 3, 8, 8)
        raise RuntimeError('disk')
    with pytest.raises(RuntimeError, match='disk'):
        feature_similarity(model, broken(), device='cpu')
    assert not model[0]._forward_hooks and model.training and not model[1].training


def test_bad_input():
    with pytest.raises(LeanError, match='has none'):
        feature_similarity(nn.Linear(2, 2), [])
    with pytest.raises(LeanError, match='no images'):
        feature_similarity(nn.Conv2d(3, 4, 3), [])
    with pytest.raises(LeanError, match='max_batches'):
        feature_similarity(nn.Conv2d(3, 4, 3), [], max_batches=0)


def test_table():
    text = format_similarity({'conv1': 0.25, 'layer1.conv': 0.75}, {'conv1': 0.2, 'layer1.conv': 0.5})
    assert text.splitlines() == [
        'layer            before       after      change',
        'conv1            0.2500      0.2000     -0.0500',
        'layer1.conv      0.7500      0.5000     -0.2500',
        'mean             0.5000      0.3500     -0.1500',
    ]
    assert format_similarity({'a': 0.5}).splitlines()[-1].split() == ['mean', '0.5000']
    with pytest.raises(LeanError, match='no layer'):
        format_similarity({'a': 0.5}, {'b': 0.5})


def test_plot(tmp_path):
    before = {f'layer{i}': i / 10 for i in range(8)}
    for after in (None, {k: v / 2 for k, v in before.items()}):
        path = tmp_path / f'{after is None}.png'
        plot_similarity(before, after, path)
        with Image.open(path) as image:
            assert min(image.size) > 300 and len(image.convert('RGB').getcolors(2 ** 20)) > 3
    with pytest.raises(LeanError, match='Cannot write to the folder'):
        plot_similarity(before, None, tmp_path / 'True.png' / 'x.png')
    with pytest.raises(LeanError, match='must end in'):
        plot_similarity(before, None, tmp_path / 'x.nonsense')
