"""The bound, the count of convolutions, the bounded members of families, the command, the sweep."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ttest_rel

from timm_lean import load_model, save_model
from timm_lean.depth import (
    Budget,
    bounded_model,
    dataset_entropy,
    depth_bound,
    list_families,
    list_rules,
    register_rule,
)
from timm_lean.depth import bound as bound_module
from timm_lean.depth.family import FAMILIES, default_baseline, describe_member
from timm_lean.errors import LeanError
from timm_lean.measure import count_macs, count_params, measure_steps
from timm_lean.measure.conv_depth import conv_depth, module_depths
from timm_lean.measure.identity import identity_ratios, near_identity_share
from timm_lean.training import TrainConfig
from timm_lean.training.config import load_yaml
from timm_lean.training.depth_sweep import (
    Run,
    Sweep,
    compare,
    default_depths,
    format_sweep,
    report_sweep,
    run_sweep,
    summarize,
)
from timm_lean_cli import main

# --- bound ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bits, size, expected', [
    (7.32, 32, 24), (7.32, 224, 40), (7.32, 8, 8), (7.32, 64, 32), (2.3, 8, 3), (2.3, 16, 6), (0., 32, 3), (8., 32, 24),
    (8 + 1e-12, 32, 24), (8.1, 32, 27), (7.32, 1, 8), (7.32, (224, 32), 24)])
def test_bits_per_stage(bits, size, expected):
    assert depth_bound(bits, size) == expected


def test_bound_takes_a_result():
    noise = np.random.default_rng(0).permutation(np.arange(4096) % 256).astype(np.uint8).reshape(64, 64)
    assert depth_bound(dataset_entropy([noise]), 32) == 24


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 16), st.floats(0, 16), st.integers(1, 2048), st.integers(1, 2048), st.sampled_from(list_rules()))
def test_rules_grow_with_entropy_and_size(a, b, s, t, rule):
    (a, b), (s, t) = sorted((a, b)), sorted((s, t))
    assert 1 <= depth_bound(a, s, rule=rule) <= depth_bound(b, s, rule=rule) <= depth_bound(b, t, rule=rule)


def test_own_rules(monkeypatch):
    assert depth_bound(5., 32, 1, 7, rule=lambda h, size, chs, classes: int(h) + size + chs + classes) == 45
    monkeypatch.setattr(bound_module, '_RULES', dict(bound_module._RULES))

    @register_rule
    def half(entropy, image_size, channels, num_classes):
        return math.ceil(entropy / 2)

    assert 'half' in list_rules()
    assert depth_bound(5., 32, rule='half') == 3
    with pytest.raises(LeanError, match="'half'"):
        register_rule(half)


@pytest.mark.parametrize('rule', list_rules())
def test_rules_say_what_they_are(rule):
    text = bound_module.get_rule(rule).__doc__
    assert 'limits' in text.lower()
    assert 'EBCLE' not in text


@pytest.mark.parametrize('args, kwargs, words', [
    ((-1., 32), {}, '-1.0'), ((math.nan, 32), {}, 'nan'), (('8', 32), {}, "'8'"), ((8., 0), {}, 'image_size'),
    ((8., 32, 0), {}, 'channels'), ((8., 32, 3, 2.5), {}, 'num_classes'),
    ((8., 32), dict(rule='ebcle'), 'bits_per_stage'),
    ((8., 32), dict(rule=lambda *a: 0), 'at least 1, got 0'), ((8., 32), dict(rule=lambda *a: 7.5), '7.5'),
])
def test_bad_bounds(args, kwargs, words):
    with pytest.raises(LeanError, match=words):
        depth_bound(*args, **kwargs)


# --- conv_depth -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, depth', [
    ('resnet18', 17), ('resnet50', 49), ('resnet20_cifar', 19), ('resnet56_cifar', 55), ('resnet110_cifar', 109),
    ('densenet121', 120), ('mobilenetv2_100', 52), ('efficientnet_b0', 81), ('resnet32_cifar_s16u1_dual', 31),
    ('vgg16', 15), ('vit_tiny_patch16_224', 1), ('convnext_tiny', 22), ('convnext_atto', 40), ('hrnet_w18_small', 30)])
def test_conv_depth_of_published_networks(name, depth):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert conv_depth(model) == depth
    assert model.training


def test_conv_depth_of_graphs_counted_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.up = nn.ConvTranspose2d(4, 4, 2, 2)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            left, right = x.chunk(2, 1)  # views of one storage
            left = self.b(self.a(left))  # 2
            right = torch.relu_(right.clone())  # 0
            right += left  # 2, in place
            both = torch.cat([self.c(right), self.up(x[:, 4:])[..., :8, :8]], 1)  # max(3, 1)
            unused = self.a(self.a(self.a(self.a(x[:, :4]))))
            assert unused is not None
            return {'out': self.fc(both.mean((2, 3))[:, :4]), 'other': [left]}

    assert conv_depth(Net(), (8, 8, 8)) == 3
    assert conv_depth(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2)) == 0


def test_module_depths_count_to_the_end_of_the_block():
    model = timm.create_model('resnet20_cifar', shared_rank=8)
    names = ['layer1.0', 'layer1.2', 'layer2.0', 'layer3.2']  # two convolutions a block, three blocks a stage, one stem
    assert module_depths(model, names) == {'layer1.0': 3, 'layer1.2': 7, 'layer2.0': 9, 'layer3.2': 19}
    assert conv_depth(model) == 19


def test_conv_depth_leaves_the_model_as_it_was():
    model = timm.create_model('resnet32_cifar_s8u1').train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    conv_depth(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_folding_does_not_change_the_depth():
    from timm_lean import fold
    model = timm.create_model('resnet20_cifar', shared_rank=8, unique_rank=1).eval()
    assert conv_depth(model) == conv_depth(fold(model)) == 19


def test_conv_depth_of_an_input_that_does_not_fit():
    with pytest.raises(LeanError, match=r'ResNet does not run on an input of \[4, 32, 32\]'):
        conv_depth(timm.create_model('resnet18'), (4, 32, 32))


# --- families ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', list_families())
@pytest.mark.parametrize('depth, img_size', [(24, 32), (9, 32), (8, 8), (30, 64)])
def test_members_keep_depth_and_budget(family, depth, img_size):
    budget = Budget(300_000)
    name, arguments = describe_member(family, depth, budget, 10, img_size)
    with torch.device('meta'):
        model = timm.create_model(name, **arguments)
    counted = conv_depth(model, (3, img_size, img_size))
    assert counted == FAMILIES[family].depth(arguments['layers']) <= depth
    assert 0.75 * budget.value <= count_params(model) <= budget.value
    assert depth - counted < 5, 'another block would have fit'


@pytest.mark.slow
@pytest.mark.parametrize('family', list_families())
def test_members_for_large_images(family):
    model = bounded_model(family, 40, num_classes=1000, img_size=224)
    assert 30 < conv_depth(model) <= 40
    limit = count_params(timm.create_model('resnet50'))
    assert 0.85 * limit <= count_params(model) <= limit
    assert model.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_macs_budget():
    model = bounded_model('resnet', 24, 'macs=20M', img_size=32)
    assert 15e6 < count_macs(model, (1, 3, 32, 32)) <= 20e6


def test_the_default_budget_is_the_baselines():
    assert (default_baseline(32), default_baseline(224)) == ('resnet56_cifar', 'resnet50')
    wide = count_params(bounded_model('resnet', 24))
    assert 0.9 * 853_018 < wide <= 853_018
    assert count_params(bounded_model('resnet', 24, baseline='resnet20_cifar')) <= 269_722
    assert count_params(bounded_model('resnet', 24, 100_000)) <= 100_000


def test_bounded_model_is_an_ordinary_timm_model(tmp_path: Path):
    model = bounded_model('resnet', 12, '50k', num_classes=4, img_size=16, in_chans=1).eval()
    assert model.pretrained_cfg['input_size'] == (1, 16, 16)
    x = torch.randn(2, 1, 16, 16)
    assert model(x).shape == (2, 4)
    assert model.forward_features(x).shape[-2:] == model.pretrained_cfg['pool_size']
    save_model(model, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors')
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert conv_depth(loaded) == conv_depth(model) <= 12


@pytest.mark.parametrize('args, words', [
    (('vgg', 24), 'Known: densenet, efficientnet'),
    (('resnet', 2), 'nearest depth that can be met is 3'),
    (('densenet', 1), 'nearest depth that can be met is 3'),
    (('shared_resnet', 4), 'nearest depth that can be met is 5'),
    (('resnet', 24, 10), r'nearest that can be met is params=\d+'),
    (('resnet', 24, 'macs=1k'), r'nearest that can be met is macs=\d+'),
    (('resnet', 3, '1000000G'), r'wider than 4096 .* nearest that can be met is params=\d+'),
    (('resnet', 24, '5 apples'), '5 apples'), (('resnet', 24, 'flops=5M'), 'flops'), (('resnet', 24, 'nan'), 'nan'),
    (('resnet', 24, 0), 'at least 1, got 0'), (('resnet', 2.5), 'depth'), (('resnet', 24, None, 0), 'num_classes'),
])
def test_what_cannot_be_met(args, words):
    with pytest.raises(LeanError, match=words):
        describe_member(*args)


def test_the_nearest_that_is_named_can_be_met():
    with pytest.raises(LeanError) as e:
        describe_member('resnet', 24, 10)
    nearest = int(str(e.value).split('params=')[1].split(';')[0])
    describe_member('resnet', 24, nearest)
    with pytest.raises(LeanError):
        describe_member('resnet', 24, nearest - 1)


# --- identity ---------------------------------------------------------------------------------------------------------

def test_identity_ratios_by_hand():
    model = timm.create_model('lean_resnet', layers=(2, 2), widths=(8, 16)).train()
    with torch.no_grad():
        model.layer1[0].bn2.weight.zero_()
    x = torch.randn(6, 3, 8, 8)
    ratios = identity_ratios(model, [(x[:4], None), (x[4:], None)])
    assert list(ratios) == ['layer1.0', 'layer1.1', 'layer2.1']
    assert ratios['layer1.0'] == 0
    model.eval()
    with torch.no_grad():
        y = model.layer1[0](model.act1(model.bn1(model.conv1(x))))
        block = model.layer1[1]
        f = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(y)))))
    expected = (f.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).mean().item()
    assert ratios['layer1.1'] == pytest.approx(expected, rel=1e-5)
    assert near_identity_share(ratios) == pytest.approx(1 / 3)


def test_identity_of_inverted_residuals_and_of_none():
    model = timm.create_model('lean_mobilenetv2', layers=(2, 2), widths=(8, 16))
    ratios = identity_ratios(model, [torch.randn(2, 3, 8, 8)])
    assert list(ratios) == ['layer1.1', 'layer2.1']
    with pytest.raises(LeanError, match='no residual block'):
        identity_ratios(timm.create_model('lean_densenet'), [torch.randn(2, 3, 8, 8)])
    with pytest.raises(LeanError, match='at least one batch'):
        identity_ratios(timm.create_model('resnet20_cifar'), [])


# --- sweep ------------------------------------------------------------------------------------------------------------

def test_compare_is_scipys_paired_test():
    top1 = {5: [90., 91., 92.5], 9: [91., 92., 93.], 15: [90.5, 92.5, 91.]}
    runs = [Run(d, s, 1000, t, d / 10, 0.5, {'a': 0.2}) for d, v in top1.items() for s, t in enumerate(v)]
    rows = compare(runs, 10)
    assert [(r['bounded'], r['deeper'], r['seeds']) for r in rows] == [(9, 15, 3)]
    assert rows[0]['p'] == pytest.approx(ttest_rel(top1[9], top1[15]).pvalue)
    assert rows[0]['difference'] == pytest.approx(np.mean(top1[9]) - np.mean(top1[15]))
    assert rows[0]['time_saved'] == pytest.approx(1 - 9 / 15)
    assert compare([r for r in runs if r.seed == 0], 10)[0]['p'] is None
    assert compare(runs, 3) == []
    text = format_sweep(summarize(runs), rows, 10)
    assert '| 9 (within) | 1,000 | 92.00 ± 1.00 (3) |' in text
    assert 'p = ' in text


def test_default_depths():
    assert default_depths(24, 3) == [6, 12, 24, 36, 48, 72]
    assert default_depths(6, 3) == [3, 6, 9, 12, 18]


@pytest.mark.timeout(300)
def test_sweep_trains_measures_draws_and_continues(tmp_path: Path):
    config = TrainConfig(model='-', data='digits', img_size=8, epochs=1, batch_size=64, cache=True, train_images=128,
                         opt='momentum', device='cpu', workers=0)
    sweep = Sweep(3, (3, 5), (0,), 'resnet', '4k', 10, config, str(tmp_path / 'sweep'))
    runs = run_sweep(sweep)
    assert [(r.depth, r.seed) for r in runs] == [(3, 0), (5, 0)]
    assert all(r.params <= 4000 and 0 <= r.top1 <= 100 and r.epoch_seconds > 0 for r in runs)
    assert list(runs[1].ratios) == ['layer1.0', 'layer1.1']
    assert runs[1].places == {'layer1.0': 3, 'layer1.1': 5}
    assert run_sweep(sweep) == runs  # nothing is trained again
    result = report_sweep(runs, 3, tmp_path)
    assert (tmp_path / 'sweep.png').stat().st_size > 10_000
    assert json.loads((tmp_path / 'sweep.json').read_text())['rows'] == result['rows']
    with pytest.raises(LeanError, match='other settings'):
        run_sweep(Sweep(3, (3, 5), (0,), 'resnet', '5k', 10, config, str(tmp_path / 'sweep')))


def test_step_times():
    models = [timm.create_model('lean_resnet', layers=(n,), widths=(8,)) for n in (1, 6)]
    small, large = measure_steps(models, (4, 3, 16, 16), torch.device('cpu'), repeats=5)
    assert 0 < small.median < large.median


# --- command ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with train/ and test/ of two classes, 16 x 16 pixels."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('test', 4)):
        for i in range(count):
            path = tmp_path / 'data' / split / 'ab'[i % 2] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / 'data'


def depth(**kwargs) -> int:
    """Run `timm-lean depth` with flags by name, over settings that make it quick."""
    flags = {'budget': '20k', 'batch_size': 4, 'device': 'cpu', 'workers': 0, 'no_step_time': True, **kwargs}
    arguments = []
    for name, value in flags.items():
        if value is not False:
            arguments += [f'--{name.replace("_", "-")}', *([] if value is True else map(
                str, value if isinstance(value, list) else [value]))]
    return main(['depth', *arguments])


def run(capsys, **kwargs) -> dict:
    assert depth(json=True, **kwargs) == 0
    return json.loads(capsys.readouterr().out)


def test_command(data, capsys):
    result = run(capsys, data_dir=data)
    assert result['entropy']['count'] == 12, 'the training images alone'
    assert (result['img_size'], result['num_classes'], result['channels']) == (16, 2, 3)
    assert result['bound'] == depth_bound(result['entropy']['bits'], 16)
    baseline, suggested = result['models']
    assert (baseline['model'], baseline['depth']) == ('resnet56_cifar', 55)
    assert suggested['model'] == 'lean_resnet'
    assert suggested['depth'] <= result['bound']
    model = timm.create_model(suggested['model'], **suggested['model_args'], num_classes=2)
    assert count_params(model) == suggested['params'] <= 20_000


def test_command_in_words(data, capsys):
    assert depth(data_dir=data, no_step_time=False, baseline='resnet20_cifar', img_size=16) == 0
    out = capsys.readouterr().out
    assert 'bits' in out
    assert 'bound by the rule bits_per_stage at 16 px: 16 convolution layers' in out
    assert 'resnet20_cifar' in out
    assert "timm.create_model('lean_resnet', layers=(" in out
    assert ' ms (' in out


def test_command_writes_a_config_that_trains(data, capsys, tmp_path):
    from timm_lean.training import train
    file = tmp_path / 'config.yaml'
    result = run(capsys, data_dir=data, write_config=file, family='mobilenetv2')
    config = TrainConfig.from_args({
        **load_yaml(str(file)), 'epochs': 1, 'batch_size': 4, 'workers': 0, 'device': 'cpu',
        'output': str(tmp_path / 'run')})
    assert config.model_args == result['models'][1]['model_args']
    train(config)
    assert load_model(tmp_path / 'run' / 'last.safetensors').num_classes == 2


def test_command_on_digits_and_gray_images(capsys):
    result = run(capsys, data='digits')
    assert (result['img_size'], result['channels'], result['num_classes']) == (8, 1, 10)
    assert result['bound'] == 3
    assert result['models'][1]['depth'] == 3


def test_command_verifies(capsys, tmp_path):
    result = run(capsys, data='digits', img_size=8, verify=True, depths=[3, 5], seeds=1, epochs=1,
                 train_images=128, budget='4k', batch_size=32, output=tmp_path / 'sweep')
    assert [r['depth'] for r in result['verify']['rows']] == [3, 5]
    assert (tmp_path / 'sweep' / 'sweep.png').exists()


@pytest.mark.parametrize('kwargs, words', [
    (dict(data_dir='nowhere'), 'does not exist'), (dict(data='digits', rule='magic'), 'magic'),
    (dict(data='digits', family='vgg'), 'vgg'), (dict(data='digits', baseline='resnet5000'), 'resnet5000'),
    (dict(data='digits', img_size=0), 'img_size'), (dict(data='digits', budget='1'), 'nearest'),
    (dict(data_dir='.', write_config='x.yaml'), 'train/'), (dict(data='folder'), 'data-dir'),
    (dict(data='digits', verify=True, depths=[-1]), 'depths'), (dict(data='digits', verify=True, seeds=0), 'seeds'),
    (dict(data='digits', verify=True, lr=math.nan), 'lr'), (dict(data='digits', verify=True, depths=[1]), 'nearest')])
def test_command_bad_input(kwargs, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert depth(**kwargs) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_the_command_line_measures_the_digits(capsys):
    assert main(['depth', '--no-step-time', '--budget', '20k', '--workers', '0', '--json']) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['entropy']['count'] == 1437, 'four fifths of the 1,797 digits'
    assert (report['bound'], report['models'][1]['model']) == (3, 'lean_resnet')
    assert main(['depth', '--rule', 'ebcle']) == 2
    assert 'bits_per_stage' in capsys.readouterr().err
    assert main(['depth', '--data-dir', 'nowhere']) == 2
    assert 'nowhere' in capsys.readouterr().err


def test_written_config_of_gray_images_trains(tmp_path: Path):
    file = tmp_path / 'd.yaml'
    assert main(['depth', '--data', 'digits', '--budget', '4k', '--no-step-time', '--write-config', str(file)]) == 0
    assert main(['train', '--config', str(file), '--epochs', '1', '--output', str(tmp_path / 'run'),
                 '--device', 'cpu']) == 0
