"""A resume state that is damaged is one line; `weights_only` keeps code out."""
import pytest
import torch

from timm_lean import CheckpointError, LeanError
from timm_lean.training.state import load_state, restoring, save_state

RECIPE = {'architecture': 'resnet20_cifar', 'model_args': {}, 'steps': []}
STATE = {
    'recipe': RECIPE, 'epoch': 2, 'best': {'top1': 50., 'epoch': 1.}, 'rows': [{'epoch': 1}], 'updates': 10,
    'optimizer': {}, 'scaler': None, 'pruner': None, 'state_dict': {'w': torch.zeros(2)}}


def test_a_good_state_comes_back(tmp_path):
    assert load_state(tmp_path, RECIPE) is None
    save_state(tmp_path, STATE)
    assert load_state(tmp_path, RECIPE).keys() == STATE.keys()


@pytest.mark.parametrize('state', [
    5, [], 'x', None, {}, torch.zeros(3), *[{**STATE, key: value} for key, value in (
        ('recipe', 5), ('recipe', []), ('epoch', '2'), ('epoch', -1), ('epoch', True), ('best', {}),
        ('best', {'top1': 'x', 'epoch': 1.}), ('rows', {}), ('rows', [3]), ('updates', 1.5), ('optimizer', None),
        ('scaler', 3), ('pruner', []), ('state_dict', []), ('state_dict', {'w': 3}), ('state_dict_ema', {'w': 'x'}),
        ('task_state', 5))],
    *[{k: v for k, v in STATE.items() if k != key} for key in ('recipe', 'epoch', 'state_dict', 'rows')]], ids=str)
def test_wrong_types_are_one_line(tmp_path, state):
    save_state(tmp_path, state)
    with pytest.raises(CheckpointError, match='is damaged') as e:
        load_state(tmp_path, RECIPE)
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value) and '--output' in str(e.value)


@pytest.mark.parametrize('data', [b'', b'x' * 100, b'PK\x03\x04' + b'a' * 500, b'\x80\x02}q\x00.'])
def test_other_files_are_one_line(tmp_path, data):
    (tmp_path / 'resume.pt').write_bytes(data)
    with pytest.raises(CheckpointError, match='is damaged') as e:
        load_state(tmp_path, RECIPE)
    assert '\n' not in str(e.value)


def test_another_model_is_named(tmp_path):
    save_state(tmp_path, STATE)
    with pytest.raises(CheckpointError, match=r"epoch 2.*'resnet20_cifar'.*not 'resnet32_cifar'"):
        load_state(tmp_path, {**RECIPE, 'architecture': 'resnet32_cifar'})
    save_state(tmp_path, {**STATE, 'recipe': {}})
    with pytest.raises(CheckpointError, match='from another model'):
        load_state(tmp_path, RECIPE)


def test_states_of_another_optimizer_or_network_are_one_line(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for load, state in ((optimizer.load_state_dict, {}), (optimizer.load_state_dict, {'param_groups': 3, 'state': {}}),
                        (model.load_state_dict, {'x': torch.zeros(1)})):
        with pytest.raises(CheckpointError, match=r'resume\.pt is damaged: \w+Error') as e, restoring(tmp_path):
            load(state)
        assert '\n' not in str(e.value)
    with pytest.raises(LeanError, match='as it is'), restoring(tmp_path):
        raise LeanError('as it is')
