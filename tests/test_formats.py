"""Files written by earlier versions load, and give the outputs they gave then.

`tests/formats/1` was written by the first version (commit 8a6ea47) with networks of random values: `resnet20_cifar` of
4, 8 and 16 channels and 3 classes, batch norm statistics and weights of a trained one.
"""
import json
from pathlib import Path

import pytest
import torch

from timm_lean import load_model, save_model
from timm_lean.checkpoint.format import read_header

FOLDER = Path(__file__).parent / 'formats' / '1'
OUTPUTS = json.loads((FOLDER / 'outputs.json').read_text())
STEPS = {'plain': [], 'shared': [], 'fold': ['fold'], 'share': ['share'], 'prune_kernels': ['prune_kernels'],
         'resize': ['resize']}


@pytest.mark.parametrize('kind', STEPS)
def test_a_file_of_format_1_gives_the_outputs_it_gave(kind, tmp_path):
    path = FOLDER / f'{kind}.safetensors'
    assert [step['op'] for step in read_header(path)['steps']] == STEPS[kind]
    model = load_model(path)
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()
    expected = torch.tensor(OUTPUTS[kind]).view(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        save_model(model, tmp_path / 'm.safetensors')
        assert torch.equal(load_model(tmp_path / 'm.safetensors')(x), model(x))


def test_the_files_cover_what_can_be_in_a_file():
    assert sorted(p.stem for p in FOLDER.glob('*.safetensors')) == sorted(STEPS)
    assert read_header(FOLDER / 'prune_kernels.safetensors')['packed']
    assert load_model(FOLDER / 'plain.safetensors').pretrained_cfg['label_names'] == ['cat', 'dog', 'eel']
