"""One table of types and ranges: flags, YAML files and Python refuse the same values with the same words."""
import dataclasses
import json
import re

import pytest

from timm_lean import LeanError
from timm_lean.training import PruneConfig, TrainConfig
from timm_lean.training.config import load_yaml
from timm_lean.training.finetune import check_finetune
from timm_lean_cli import app, build_parser, main

NUMBERS = {
    'batch_size': [0, -1, 10 ** 30], 'workers': [-1], 'img_size': [-5, 0, 10 ** 9], 'smoothing': [5., -0.1, 1.],
    'seed': [-1, 2 ** 80], 'hflip': ['nan', 1.5], 're_prob': [5., -1.], 'clip_grad': [-1., 0., 'inf'],
    'decay_rate': ['nan', 0.], 'lr': ['nan', 'inf', -1.], 'epochs': [0], 'ema_decay': [2.], 'momentum': [-1., 2.],
    'num_classes': [0], 'train_images': [0], 'weight_decay': ['nan'], 'mixup': ['inf'], 'warmup_epochs': [-1],
}
CASES = [(name, value) for name, values in NUMBERS.items() for value in values]
TEXTS = [('sched', 'cosin'), ('aug', 'flip'), ('amp', 'fp8'), ('init', 'zero'), ('model', 'x' * 5000),
         ('output', 'a\x00b'), ('device', 'a\nb')]


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    """The configs that would have been trained with."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr('timm_lean.training.train', lambda config: configs.append(config) or {
        'best_top1': 0., 'best_epoch': 1, 'output': 'o'})
    return configs


def message_of(call) -> str:
    with pytest.raises(LeanError) as e:
        call()
    return str(e.value)


@pytest.mark.parametrize('name, value', CASES + TEXTS, ids=lambda v: str(v)[:20])
def test_the_three_ways_in_refuse_alike(name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {'model': 'resnet20_cifar', name: value}
    expected = message_of(lambda: TrainConfig(**{k: float(v) if v in ('nan', 'inf') else v
                                                 for k, v in settings.items()}))
    assert expected.startswith(f'{name} must be ') and len(expected) < 300
    (tmp_path / 'c.yaml').write_text(json.dumps(settings))
    written = message_of(lambda: TrainConfig.from_args(load_yaml('c.yaml')))
    assert written.split(', got')[0] == expected.split(', got')[0]
    flags = [f'--{k.replace("_", "-")}={v}' for k, v in settings.items()]
    assert main(['train', *flags]) == 2
    assert capsys.readouterr().err == f'timm-lean train: {expected}\n'
    assert [p.name for p in tmp_path.iterdir()] == ['c.yaml']


@pytest.mark.parametrize('settings, message', [
    ({'batch_size': 8.5}, 'batch_size must be a whole number'), ({'model': 5}, 'model must be a text, got 5'),
    ({'opt': 5}, 'opt must be a text, got 5'), ({'epochs': True}, 'epochs must be a whole number'),
    ({'lr': [1]}, 'lr must be a number'), ({'model': ['a']}, 'model must be a text'),
    ({'milestones': ['a']}, 'milestones must be a whole number'), ({'milestones': {'a': 1}}, 'must be a list'),
    ({'reg': [1]}, 'reg must be a text'), ({'model_args': [1]}, 'model_args must be a mapping'),
    ({'model_args': {1: 2}}, 'model_args must be a mapping'), ({'cache': 1}, 'cache must be true or false'),
    ({'img_size': '32'}, 'img_size must be a whole number'), ({'prune': 5}, 'prune must be a mapping of settings'),
    ({'prune': {'amount': 'half'}}, 'amount of prune must be a number'),
    ({'prune': {5: 1}}, "Unknown setting 5 of prune"), ({5: 1}, "Unknown setting '5'"),
    ({'auto_augment': 'nope', 'aug': 'rrc'}, "Unknown auto_augment policy 'nope'"),
    ({'auto_augment': 'rand-q9', 'aug': 'rrc'}, "Unknown auto_augment policy 'rand-q9'"),
    ({'auto_augment': 'rand-m9'}, 'is a part of --aug rrc'),
    ({'model_args': {'num_classes': 3}}, 'num_classes is no model argument: give --num-classes'),
    ({'model_args': {'drop_rate': 5}}, 'drop_rate of model_args must be a number from 0 to 1, got 5'),
    ({'model_args': {'drop_path_rate': 'x'}}, 'drop_path_rate of model_args must be a number'),
    ({'model_args': {'pretrained': True}}, 'pretrained is no model argument: give --pretrained'),
])
def test_values_of_another_type_in_a_file(settings, message, tmp_path, capsys):
    import yaml
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump({'model': 'resnet20_cifar', **settings}))
    assert main(['train', '--config', str(tmp_path / 'c.yaml')]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


@pytest.mark.parametrize('text', ['a: [1', '- 1', '', '\x01', 'a: &a [*a', '[' * 1000, 'model: 2001-01-01'])
def test_files_that_are_no_settings(text, tmp_path, capsys):
    (tmp_path / 'c.yaml').write_text(text)
    assert main(['train', '--config', str(tmp_path / 'c.yaml')]) == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_prune_settings_come_from_file_and_flags(tmp_path, trained):
    (tmp_path / 'c.yaml').write_text(
        'model: a\nprune:\n  criterion: weight\n  amount: 5e-1\n  epochs: 3\n  exclude: stem*\n')
    assert main(['train', '--config', str(tmp_path / 'c.yaml'), '--prune-amount', '0.7', '--prune-include', 'layer*',
                 '--no-prune-again']) == 0
    assert trained[0].prune == PruneConfig('weight', amount=0.7, epochs='3', include=['layer*'], exclude=['stem*'])
    assert main(['train', '--model', 'a', '--prune', 'det', '--prune-threshold', '1e-4']) == 0
    assert trained[1].prune == PruneConfig('det', threshold=1e-4)
    again = TrainConfig.from_args(json.loads(json.dumps(trained[0].rerun_args())))
    assert dataclasses.replace(again, output=trained[0].output) == trained[0]


def test_every_setting_has_a_flag_of_its_type_and_the_help_says_its_default():
    """The parser is written without importing torch, so types and defaults stand in two places: here they are equal."""
    import argparse
    import typing
    train, = (a.choices['train'] for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    flags = {action.dest: action for action in train._actions}
    for config, prefix in ((TrainConfig, ''), (PruneConfig, 'prune_')):
        types = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            flag = flags['prune' if prefix and field.name == 'criterion' else prefix + field.name]
            wanted = str(types[field.name])
            for kind in (int, float):
                if kind.__name__ in wanted:
                    assert flag.type is kind, field.name
            assert flag.default is None, field.name
            said = re.search(r'default ([\w.-]+)|([\w.-]+) \(default\)', flag.help or '')
            if said and field.default is not dataclasses.MISSING:
                text = said[1] or said[2]
                assert text == str(field.default) or float(text) == field.default, field.name


def test_no_flag_of_any_command_has_a_default_that_the_library_has():
    import argparse
    commands, = (a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands) == set(app.COMMANDS)
    found = {f'{name} {action.dest}': action.default for name, p in commands.items() for action in p._actions
             if action.default not in (None, False, argparse.SUPPRESS)}
    assert found == {'prune granularity': 'kernel', 'info vs': [], 'demo output': 'output/demo'}


def test_equal_things_are_called_equal_in_every_command():
    import argparse
    commands, = (a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    flags = {name: {s for a in p._actions for s in a.option_strings} for name, p in commands.items()}
    assert all('--ignore' not in f and '--prune-ignore' not in f for f in flags.values())
    for name in ('validate', 'predict', 'prune', 'share', 'export', 'analyze', 'info'):
        assert {'--pretrained', '--random-weights', '--json'} <= flags[name], name
    for name in ('prune', 'share', 'analyze'):
        assert {'--include', '--exclude'} <= flags[name]
    for name in ('validate', 'prune', 'share', 'export', 'analyze', 'info', 'depth', 'train'):
        assert {'--data', '--data-dir', '--img-size', '--batch-size', '--workers', '--device'} <= flags[name], name
    trained = flags['train'] - {f for f in flags['train'] if f.startswith(('--prune', '--no-prune'))}
    trained -= {'--config', '--model', '--model-args', '--num-classes', '--epochs', '--lr', '--init', '--init-steps',
                '--output', '--resume', '--no-pretrained'}
    for name in ('prune', 'share'):
        assert trained | {'--finetune-epochs', '--finetune-lr'} <= flags[name]


def test_fine_tuning_is_checked_before_it_starts():
    config = check_finetune(epochs=1, data='digits', train_images=33, mixup=0.2)
    assert (config.batch_size, config.lr) == (32, 0.01)
    with pytest.raises(LeanError, match='at least 2 training images'):
        check_finetune(epochs=1, data='digits', train_images=1)
    with pytest.raises(LeanError, match='at least 1 epoch'):
        check_finetune(epochs=0, data='digits')
    with pytest.raises(LeanError, match="'nowhere' does not exist"):
        check_finetune(epochs=1, data_dir='nowhere')
