"""Counts against numbers worked out by hand, and the table."""
import pytest
import timm
import torch
import torch.nn as nn

from timm_lean.measure import (
    ModelReport,
    count_macs,
    count_params,
    format_table,
    human_bytes,
    human_count,
    macs_by_module,
    measure_latency,
    measure_steps,
    model_reports,
    peak_memory,
)
from timm_lean.measure.timing import Timing, time_in_turn


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


def test_macs_of_every_module_by_hand():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)  # 4 * 4 * 9 * 5 * 5 = 3,600
            self.norm = nn.BatchNorm2d(4)              # 2 * 4 * 5 * 5     =   200
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.norm(self.conv(x)) @ torch.ones(5, 7)  # 4 * 5 * 5 * 7 = 700, of no module below

    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 1)), Twice())
    assert macs_by_module(model, (2, 1, 5, 5)) == {name: 2 * macs for name, macs in {
        '': 100 + 2 * 3_800 + 700, '0': 100, '0.0': 100, '1': 2 * 3_800 + 700, '1.conv': 2 * 3_600, '1.norm': 2 * 200,
        '1.unused': 0}.items()}


def test_a_shared_convolutions_macs_are_those_of_the_layer_that_uses_the_basis():
    counts = macs_by_module(timm.create_model('resnet20_cifar', shared_rank=16, unique_rank=1), (1, 3, 32, 32))
    layer = 'layer1.1.conv1'
    filters, norm, mix = 17 * 16 * 9 * 1024, 2 * 17 * 1024, 17 * 16 * 1024
    assert counts[layer] == filters + norm + mix and counts[f'{layer}.coeff'] == mix
    assert counts[f'{layer}.basis'] == counts[f'{layer}.unique'] == 0
    assert counts[''] == sum(counts[name] for name in ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'fc'))


def test_counting_leaves_a_model_that_cannot_run_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1))
    with pytest.raises(RuntimeError):
        count_macs(model, (1, 3, 4, 4))
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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
    fast, slow = measure_latency([small, large], shapes, torch.device('cpu'), repeats=5)
    assert 0 < fast.median < slow.median and len(fast.seconds) == 5
    x = torch.randn(shapes[1])
    with torch.no_grad():
        peak = peak_memory(lambda: large(x), torch.device('cpu'))
    assert 64 * 62 * 62 * 4 + 64 * 60 * 60 * 4 <= peak < 3 * 64 * 64 * 64 * 4


def test_peak_memory_is_the_most_at_once_and_not_the_sum():
    def work():
        for _ in range(3):
            torch.empty(250_000).zero_()  # 1 MB, freed in each round
    assert 1_000_000 <= peak_memory(work, torch.device('cpu')) < 1_100_000


def test_work_is_timed_in_turn_after_a_warmup():
    calls = []
    timings = time_in_turn(
        {'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, torch.device('cpu'), 2, warmup=1,
        before=lambda: calls.append('-'))
    assert ''.join(calls) == '-a-b' * 3
    assert {name: len(t.seconds) for name, t in timings.items()} == {'a': 2, 'b': 2}


def test_ratios_are_of_the_same_round():
    form, anchor = Timing([2., 4., 6.]), Timing([1., 4., 2.])
    assert form.ratios(anchor) == [2, 1, 3] and form.ratio(anchor) == 2
    assert (form.median, form.quartiles, form.spread) == (4, (3, 5), 1), 'quartiles as numpy.quantile has them'


def test_a_training_step_changes_the_weights():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 4, 4))
    before = model[0].weight.clone()
    timing, = measure_steps([model], (2, 3, 4, 4), torch.device('cpu'), repeats=2)
    assert len(timing.seconds) == 2 and not torch.equal(model[0].weight, before)


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
