"""Counts against numbers worked out by hand, and the table."""
import pytest
import torch
import torch.nn as nn

from timm_lean.measure.report import (
    ModelReport,
    count_macs,
    count_params,
    format_table,
    human_bytes,
    human_count,
    measure_latency,
    model_reports,
)


def test_macs_of_a_small_network_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),     # 8 * 3 * 9 * 10 * 10 = 21,600
        nn.BatchNorm2d(8),                             # 2 * 8 * 10 * 10     =  1,600
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4),  # 8 * 2 * 9 * 5 * 5 = 3,600
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),                               # 40
    )
    assert count_macs(model, (1, 3, 10, 10)) == 21_600 + 1_600 + 3_600 + 40
    assert model.training, 'counting must leave the mode as it was'
    assert not any(m._forward_hooks for m in model.modules())


def test_shared_parameters_are_counted_once():
    conv = nn.Conv2d(2, 2, 1)
    assert count_params(nn.Sequential(conv, conv)) == 6


@pytest.mark.parametrize('name, giga', [
    ('resnet34_s48u1_dual', 3.26), ('resnet50_shared', 4.11), ('resnet50_sharedpp', 4.11), ('resnet101_shared', 7.83),
    ('mobilenetv2_100_shared', 0.33), ('mobilenetv2_100_sharedpp', 0.33),
])
def test_macs_match_the_paper_within_one_percent(name, giga):
    assert model_reports([name])[0].macs / 1e9 == pytest.approx(giga, rel=0.01)


def test_name_is_counted_without_allocating_it():
    report = model_reports(['resnet50_shared'], img_size=64)[0]
    assert (report.params, report.img_size, report.latency_ms) == (20_506_664, 64, None)
    assert report.bytes > 4 * report.params


def test_latency_rises_with_work_and_memory_with_the_widest_tensor():
    small, large = nn.Conv2d(1, 1, 1, bias=False), nn.Sequential(*[nn.Conv2d(64, 64, 3, bias=False) for _ in range(8)])
    shapes = [(1, 1, 8, 8), (1, 64, 64, 64)]
    small_result, large_result = measure_latency([small, large], shapes, torch.device('cpu'), repeats=5)
    (fast, _, small_peak), (slow, _, large_peak) = small_result, large_result
    assert 0 < fast < slow
    assert small_peak >= 8 * 8 * 4
    assert large_peak >= 64 * 62 * 62 * 4 + 64 * 60 * 60 * 4


def test_table_is_aligned_and_shows_ratios_to_the_first():
    reports = [ModelReport('dense', 1000, 5_000_000, 4000, 32), ModelReport('much-smaller', 250, 2_500_000, 1000, 32)]
    lines = format_table(reports).splitlines()
    assert lines[0].split() == ['model', 'params', 'MACs', '@32', 'file']
    assert '250 (0.25x)' in lines[2] and '2.50 M (0.50x)' in lines[2] and '1.0 kB (0.25x)' in lines[2]
    assert lines[1].index('1,000') == lines[2].index('250 (')
    assert 'latency' not in lines[0]


def test_numbers_for_people():
    assert [human_count(v) for v in (5, 1234, 4.11e9)] == ['5', '1.23 k', '4.11 G']
    assert [human_bytes(v) for v in (5, 1234, 4.11e6)] == ['5 B', '1.2 kB', '4.1 MB']
