"""Pruning while training: the engine's flags, the zeros through resume, EMA and fine-tuning, and the command."""
import csv
import json

import pytest
import torch

from timm_lean import LeanError, load_model
from timm_lean.pruning.report import live_kernels
from timm_lean.training import PruneConfig, TrainConfig, train
from timm_lean_cli import main

TINY = dict(model='resnet20_cifar', img_size=8, train_images=256, batch_size=128, workers=0, lr=0.02, device='cpu')
CUBIC = dict(criterion='spectral_norm', amount=0.7, schedule='cubic', epochs='1:3')


def dead(path) -> dict[str, torch.Tensor]:
    model = load_model(path)
    return {n: ~live_kernels(m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}


def share(path) -> float:
    masks = dead(path).values()
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def rows(folder) -> list[dict[str, float]]:
    with open(folder / 'summary.csv') as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


@pytest.fixture(scope='module')
def gradual(tmp_path_factory):
    """Three epochs, cubic to 0.7 from the second on, with momentum, weight decay and an EMA."""
    folder = tmp_path_factory.mktemp('gradual')
    train(TrainConfig(**TINY, epochs=3, ema=True, ema_decay=0.9, prune=CUBIC, output=str(folder / 'run')))
    return folder


def test_the_schedule_is_met_and_the_best_network_is_a_pruned_one(gradual):
    pruned = [row['pruned'] for row in rows(gradual / 'run')]
    assert pruned == pytest.approx([0, 100 * 0.7 * (1 - 0.5 ** 3), 70], abs=0.1)  # equation 1 of Zhu & Gupta
    assert share(gradual / 'run' / 'best.safetensors') == pytest.approx(0.7, abs=1e-3)
    plain = sum(p.numel() for p in load_model(gradual / 'run' / 'last.safetensors').parameters()) * 4
    assert (gradual / 'run' / 'last.safetensors').stat().st_size < 0.4 * plain


@pytest.mark.slow
def test_resuming_ends_at_the_same_weights(gradual, tmp_path):
    settings = dict(**TINY, ema=True, ema_decay=0.9, prune=CUBIC, output=str(tmp_path / 'run'))
    from timm_lean.training.engine import Trainer
    trainer = Trainer(TrainConfig(**settings, epochs=3), torch.device('cpu'))
    trainer.config.epochs = 2  # as if killed after the second epoch
    trainer.fit()
    train(TrainConfig(**settings, epochs=3, resume=True))
    whole, parts = (load_model(f / 'run' / 'last.safetensors').state_dict() for f in (gradual, tmp_path))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_fine_tuning_revives_nothing(gradual, tmp_path):
    source = gradual / 'run' / 'last.safetensors'
    train(TrainConfig(**{**TINY, 'model': str(source)}, epochs=1, output=str(tmp_path / 'run')))
    before, after = dead(source), dead(tmp_path / 'run' / 'last.safetensors')
    assert all(torch.equal(before[k], after[k]) for k in before)
    moved = load_model(source).state_dict(), load_model(tmp_path / 'run' / 'last.safetensors').state_dict()
    assert any(not torch.equal(moved[0][k], moved[1][k]) for k in moved[0] if k.endswith('conv1.weight'))


def test_schedule_by_steps(tmp_path):
    # 256 images in batches of 128 are 2 updates an epoch: the mask comes at update 3, in the second epoch
    train(TrainConfig(**TINY, epochs=2, prune=PruneConfig('weight', amount=0.5, steps='3'), output=str(tmp_path / 'r')))
    assert [row['pruned'] for row in rows(tmp_path / 'r')] == pytest.approx([0, 50], abs=0.1)


@pytest.mark.parametrize('settings, words', [
    (dict(amount=0.5), 'needs a criterion'),
    (dict(criterion='eigen', amount=0.5), 'Unknown pruning criterion'),
    (dict(criterion='weight'), 'exactly one of'),
    (dict(criterion='weight', amount=1.0), 'amount of prune must be a number of at least 0 and below 1, got 1.0'),
    (dict(criterion='weight', amount=0.5, epochs='a:b'), '10:30'),
    (dict(criterion='weight', amount=0.5, epochs='nan'), '10:30'),
    (dict(criterion='weight', amount=0.5, epochs='1', steps='5'), 'not both'),
    (dict(criterion='weight', amount=0.5, epochs='7'), 'does not fit'),
    (dict(criterion='weight', amount=0.5, epochs=7), 'does not fit'),
    (dict(criterion='weight', amount=0.5, schedule='linear'), 'needs an end'),
    (dict(criterion='weight', amount=0.5, exclude=['nothing*']), 'nothing'),
    (dict(criterion='weight', amount=0.5, include='nothing*'), 'nothing'),
    (dict(criterion='weight', share=0.5), "Unknown setting 'share' of prune"),
    ('weight', 'prune must be a mapping of settings'),
], ids=str)
def test_bad_settings(settings, words, tmp_path):
    with pytest.raises(LeanError, match=words):
        train(TrainConfig(**TINY, epochs=2, output=str(tmp_path / 'run'), prune=settings))
    assert not (tmp_path / 'run').exists()


def test_a_pruned_model_is_pruned_further_only_on_request(gradual, tmp_path):
    settings = {**TINY, 'model': str(gradual / 'run' / 'last.safetensors'), 'epochs': 1,
                'output': str(tmp_path / 'run')}
    prune = dict(criterion='weight', amount=0.8)
    with pytest.raises(LeanError, match='--prune-again'):
        train(TrainConfig(**settings, prune=prune))
    train(TrainConfig(**settings, prune=PruneConfig(**prune, again=True)))
    assert share(tmp_path / 'run' / 'last.safetensors') == pytest.approx(0.8, abs=1e-3)


def test_the_command_prunes_and_fine_tunes(gradual, tmp_path, capsys):
    train(TrainConfig(**TINY, epochs=1, output=str(tmp_path / 'run')))
    source, out = tmp_path / 'run' / 'last.safetensors', tmp_path / 'pruned.safetensors'
    assert main(['prune', str(source), '--amount', '0.6', '--data', 'digits', '--finetune-epochs', '1',
                 '--workers', '0', '-o', str(out), '--calibrate', '0']) == 0
    text = capsys.readouterr().out
    header = next(line for line in text.splitlines() if 'before' in line and 'pruned' in line)
    assert header.split() == ['before', 'pruned', 'fine-tuned'] and 'top-1' in text
    assert share(out) == pytest.approx(0.6, abs=1e-3)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []
    assert main(['prune', str(out), '--amount', '0.7', '-o', str(tmp_path / 'x.safetensors')]) == 2
    assert '--again' in capsys.readouterr().err and not (tmp_path / 'x.safetensors').exists()


def test_the_recipe_is_recorded_once(gradual):
    from timm_lean.checkpoint.recipe import recipe_of
    recipe = recipe_of(load_model(gradual / 'run' / 'best.safetensors'))
    step, = json.loads(json.dumps(recipe.steps))
    assert step == {'op': 'prune_kernels', 'criterion': 'spectral_norm', 'amount': 0.7}
