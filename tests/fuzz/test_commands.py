"""Argument lines and YAML files: whatever they say, an exit code; for bad input one line and nothing left behind."""
import argparse
import contextlib
import io
import random
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
import yaml

from timm_lean import LeanError, save_model
from timm_lean.measure.timing import Timing
from timm_lean.training.config import CONFIGS, load_yaml
from timm_lean.training.finetune import check_finetune
from timm_lean_cli import build_parser, main

from . import fuzz, mutate_json, mutate_text

TEXTS = ['', 'x', 'x' * 5000, '\x00', '\n', '\ud800', '..', '/dev/null/x', '/etc/passwd', 'a=b', 'a:b', '1:2', '*', '[',
         'layer1.*', 'spectral_norm', 'digits', 'cpu', 'meta', 'hpu', 'cuda:99', 'out.safetensors', 'out.png', 'out']
NUMBERS = ['0', '-1', '0.9999', '1e30', '-1e-9', 'nan', 'inf', '-inf', '9' * 30, '1e400', 'x', '']
GOOD = {'output': ['out.safetensors', 'out'], 'plot': ['out.png'], 'onnx': ['out.onnx'], 'torch_export': ['out.pt2'],
        'data': ['digits'], 'device': ['cpu', 'auto'], 'criterion': ['weight', 'det'], 'include': ['layer1.*'],
        'exclude': ['layer2.*'], 'hf_dir': ['out'], 'reg': ['l1=1e-4'], 'opt': ['adamw'], 'sched': ['poly'],
        'aug': ['rrc'], 'auto_augment': ['rand-m9'], 'amp': ['bf16'], 'vs': ['resnet20_cifar'], 'fold': ['all'],
        'config': ['cifar10_shared'], 'family': ['resnext'], 'rule': ['bits_per_octave'], 'budget': ['4k']}


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp('network') / 'm.safetensors'
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', layers=(1, 1, 1), num_classes=10)
    model.pretrained_cfg['input_size'] = (3, 8, 8)
    save_model(model, path)
    return str(path)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """What takes seconds is replaced; all that reads and checks arguments stays. Works in an empty folder."""
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    stubs = {
        'training.train': lambda config: dict(best_top1=0., best_epoch=1, output=''),
        'training.evaluate.evaluate_source': lambda *args, **kwargs: dict(
            top1=0., top5=0., loss=0., images=1, images_per_second=1.),
        'training.finetune.finetune': lambda file, **settings: check_finetune(**settings),
        'training.depth_sweep.run_sweep': lambda sweep: [],
        'measure.report.measure_latency': _no_latency,
        'export.table.measure_latency': _no_latency,
        'export.table.save_onnx': lambda *args: 0.,
        'export.table.save_torch_export': lambda *args: 0.,
        'depth.entropy.dataset_entropy': _no_images,
    }
    for name, stub in stubs.items():
        module, _, function = name.rpartition('.')
        monkeypatch.setattr(import_module(f'timm_lean.{module}'), function, stub)


def _no_latency(models, *args):
    return [Timing([0.001])] * len(models)


def _no_images(*args, **kwargs):
    raise LeanError('Reading images is not what is tested here.')


def _line(rng: random.Random, network: str) -> list[str]:
    """A command with a network that exists and a few of its options, most of them with wrong values."""
    commands, = (a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    name = rng.choice([n for n in commands if n not in ('doctor', 'demo', 'models')])
    actions = [a for a in commands[name]._actions if a.option_strings and a.dest not in ('help', 'debug')]
    line = [name]
    if name != 'depth':
        line += [*(['--model'] if name == 'train' else []), rng.choice([*[network] * 20, 'resnet20_cifar', *TEXTS])]
    if name == 'predict':
        line.append(rng.choice(TEXTS))
    chosen = [a for a in actions if a.required or rng.random() < 0.1]
    if name in ('share', 'prune', 'analyze'):
        chosen += [a for a in actions if a.dest in ('amount', 'energy', 'similarity', 'random_weights')]
    for action in chosen:
        line.append(rng.choice(action.option_strings))
        if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
            good = action.choices or GOOD.get(action.dest) or (['1', '2', '0.5'] if action.type else ['x'])
            wrong = NUMBERS if action.type else [*TEXTS, *NUMBERS]
            line.append(rng.choice(list(good) if rng.random() < 0.8 else wrong))
    return line


def _run(line: list[str]) -> None:
    """Run a command in the current folder, emptied before."""
    folder = Path.cwd()
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(line)
        except SystemExit as e:
            code = e.code
    message = err.getvalue()
    assert code in (0, 1, 2), (line, code)
    assert code == 0 or ('Traceback' not in message and len(message) < 3000), (line, message)
    if code == 2:
        assert message.strip().count('\n') == 0 and message.strip(), (line, message)
        assert not list(folder.iterdir()), (line, sorted(folder.iterdir()))
        raise LeanError(message.strip())


def test_argument_lines(network, quick):
    outcome = fuzz(lambda rng: _run(_line(rng, network)), 40, LeanError, seconds=20)
    assert outcome['refused'] > outcome['accepted'] > 0, outcome


def test_config_files(quick, tmp_path):
    names = [path.stem for path in CONFIGS.glob('*.yaml')]

    def attempt(rng: random.Random) -> None:
        settings = {'data': 'digits', 'prune': {'criterion': 'weight', 'amount': 0.5}, **load_yaml(rng.choice(names))}
        try:
            text = yaml.safe_dump(mutate_json(rng, settings))
        except (yaml.YAMLError, RecursionError):
            text = yaml.safe_dump(settings)
        if rng.random() < 0.5:
            text = mutate_text(rng, text)
        file = tmp_path / 'c.yaml'
        file.write_bytes(text.encode('utf-8', 'surrogateescape' if rng.random() < 0.5 else 'replace'))
        _run(['train', '--config', str(file)])

    outcome = fuzz(attempt, 60, LeanError)
    assert outcome['accepted'] and outcome['refused'], outcome
