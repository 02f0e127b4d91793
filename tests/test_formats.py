"""Files written by earlier versions load, and give the outputs they gave then.

`tests/formats/1` was written by the first version (commit 8a6ea47) with networks of random values: `resnet20_cifar` of
4, 8 and 16 channels and 3 classes, batch norm statistics and weights of a trained one. `tests/formats/2` holds its
pruned network with int8 weights, as it was first written on 2026-11-26.
"""
import json
from pathlib import Path

import pytest
import torch

from timm_lean import load_model, save_model
from timm_lean.checkpoint.format import read_header

FOLDER = Path(__file__).parent / 'formats' / '1'
OUTPUTS = {version: json.loads((FOLDER.parent / version / 'outputs.json').read_text()) for version in '12'}
STEPS = {'plain': [], 'shared': [], 'fold': ['fold'], 'share': ['share'], 'prune_kernels': ['prune_kernels'],
         'resize': ['resize']}


@pytest.mark.parametrize('version, kind, steps', [
    *(('1', kind, steps) for kind, steps in STEPS.items()), ('2', 'int8', ['prune_kernels'])])
def test_a_file_gives_the_outputs_it_gave(version, kind, steps, tmp_path):
    path = FOLDER.parent / version / f'{kind}.safetensors'
    header = read_header(path)
    assert [step['op'] for step in header['steps']] == steps and str(header['format']) == version
    model = load_model(path)
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()
    expected = torch.tensor(OUTPUTS[version][kind]).view(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        save_model(model, tmp_path / 'm.safetensors')
        assert torch.equal(load_model(tmp_path / 'm.safetensors')(x), model(x))


def test_a_detector_of_format_1_gives_the_outputs_it_gave():
    """Written by commit cf830d5: a tiny RetinaNet whose timm backbone lost channels and kernels by its own recipe."""
    mmdet = pytest.importorskip('timm_lean.mmdet')
    model = mmdet.load_detector(FOLDER / 'detector.safetensors')
    assert [step['op'] for step in model.backbone.recipe.steps] == ['resize']
    assert not hasattr(model, 'lean_steps')
    x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64).sin()
    with torch.no_grad():
        outputs = model.bbox_head(model.extract_feat(x))
    found = torch.cat([level.flatten() for kind in outputs for level in kind])[::37]
    expected = torch.tensor(json.loads((FOLDER / 'detector.json').read_text()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_files_cover_what_can_be_in_a_file():
    assert sorted(p.stem for p in FOLDER.glob('*.safetensors')) == sorted([*STEPS, 'detector'])
    assert read_header(FOLDER / 'prune_kernels.safetensors')['packed']
    assert {'packed', 'int8'} <= read_header(FOLDER.parent / '2' / 'int8.safetensors').keys()
    assert load_model(FOLDER / 'plain.safetensors').pretrained_cfg['label_names'] == ['cat', 'dog', 'eel']
