"""The command line tools, MMDetection's own scripts, resume, export and prediction."""
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet_support import DENSE, ROOT, SHARED, TOOLS, batch, open_config, option_list, predictions_of, scenes_config
from PIL import Image

from timm_lean import CheckpointError, LeanError
from timm_lean.mmdet import TimmBackbone, export_detector, launch, load_detector, predict_images, write_scenes
from timm_lean.mmdet.data import check_data
from timm_lean.mmdet.detector import build_detector, describe, save_detector
from timm_lean.mmdet.settings import parse_config
from timm_lean.pruning import kernel_report

MMDET_TOOLS = Path(importlib.util.find_spec('mmdet').origin).parent / '.mim' / 'tools'
BCCD = SHARED.parents[1] / 'bccd' / 'retinanet_resnet34_bccd.py'


def run(*args, cwd=None, **env):
    """A python command in a process of its own; returns code and all output."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **env}
    result = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, env=environment, cwd=cwd, timeout=500)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A detector trained for an epoch by the tool."""
    folder = tmp_path_factory.mktemp('trained')
    assert launch.train_main([str(SHARED), *option_list(folder)]) == 0
    return folder


def test_train_writes_checkpoints_and_log(trained):
    names = {p.name for p in (trained / 'run').iterdir()}
    assert {'best.safetensors', 'last.safetensors', 'epoch_1.pth', 'last_checkpoint'} <= names


@pytest.mark.parametrize('name', ['best.safetensors', 'epoch_1.pth'])
def test_test_det(trained, name, tmp_path):
    options = option_list(trained)
    options[1] = str(tmp_path)
    assert launch.test_main([str(SHARED), str(trained / 'run' / name), *options]) == 0
    logs = list(tmp_path.glob('*/*.json'))
    assert 'coco/bbox_mAP' in json.loads(logs[0].read_text())


def test_resume_continues(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'copy')
    folder = tmp_path / 'copy'
    (folder / 'run' / 'last_checkpoint').write_text(str(folder / 'run' / 'epoch_1.pth'))
    assert launch.train_main([str(SHARED), '--resume', *option_list(folder, epochs=2)]) == 0
    state = torch.load(folder / 'run' / 'epoch_2.pth', weights_only=False)
    assert state['meta']['epoch'] == 2 and state['meta']['iter'] == 4


def test_export_and_load(trained, tmp_path):
    best = trained / 'run' / 'best.safetensors'
    directory = export_detector(None, best, tmp_path / 'a')
    assert sorted(p.name for p in directory.iterdir()) == ['config.py', 'model.safetensors']
    other = export_detector(narrow_config(trained), trained / 'run' / 'epoch_1.pth', tmp_path / 'b')
    data = batch(64, classes=10)
    expected = predictions_of(load_detector(best), data)[0].pred_instances
    for source in (directory, other):
        model = load_detector(source)
        found = predictions_of(model, data)[0].pred_instances
        torch.testing.assert_close(found.bboxes, expected.bboxes, rtol=0, atol=0)
        assert list(model.dataset_meta['classes']) == [str(i) for i in range(10)]
        assert model.cfg.model.neck.in_channels == [16, 24, 32]
    # the folder's config may be edited
    text = (directory / 'config.py').read_text()
    (directory / 'config.py').write_text(text.replace('max_per_img=50', 'max_per_img=3'))
    assert len(predictions_of(load_detector(directory), data)[0].pred_instances) == 3


def narrow_config(folder):
    cfg = scenes_config(folder)
    cfg.work_dir = None
    return cfg


def test_backbone_of_a_detector_as_backbone(trained):
    best = trained / 'run' / 'best.safetensors'
    backbone = TimmBackbone(checkpoint=str(best), out_indices=(2, 3, 4)).eval()
    x = torch.randn(1, 3, 64, 64)
    for found, wanted in zip(backbone(x), load_detector(best).backbone(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_init_detector_takes_the_export(trained, tmp_path):
    directory = export_detector(None, trained / 'run' / 'best.safetensors', tmp_path / 'det')
    from mmdet.apis import inference_detector, init_detector
    model = init_detector(str(directory / 'config.py'), str(directory / 'model.safetensors'), device='cpu')
    image = next((trained / 'data' / 'val').glob('*.png'))
    ours = inference_detector(load_detector(directory), str(image)).pred_instances
    theirs = inference_detector(model, str(image)).pred_instances
    torch.testing.assert_close(ours.bboxes, theirs.bboxes, rtol=0, atol=0)
    assert list(model.dataset_meta['classes']) == [str(i) for i in range(10)]


def test_predict_images(trained, tmp_path):
    directory = export_detector(None, trained / 'run' / 'best.safetensors', tmp_path / 'det')
    images = sorted((trained / 'data' / 'val').glob('*.png'))[:2]
    results = predict_images(directory, images, tmp_path / 'pictures', score_thr=0.)
    assert [Path(r['picture']).name for r in results] == ['0000.jpg', '0001.jpg']
    assert Image.open(results[0]['picture']).size == (64, 64)
    boxes = results[0]['boxes']
    assert boxes and boxes == sorted(boxes, key=lambda b: -b['score']) and boxes[0]['class'] in '0123456789'
    one = predict_images(directory, images[:1], tmp_path / 'one.png', score_thr=0.)
    assert Image.open(one[0]['picture']).format == 'PNG' and one[0]['boxes'] == boxes
    assert predict_images(directory, images[:1])[0]['picture'] is None
    for kwargs, message in (
            (dict(images=images, out=tmp_path / 'x.jpg'), 'folder'),
            (dict(images=images[:1], out=tmp_path / 'x.gif'), 'jpg or .png'),
            (dict(images=[tmp_path / 'none.png']), 'cannot be read'),
            (dict(images=images, score_thr=2), 'between 0 and 1')):
        with pytest.raises(LeanError, match=message):
            predict_images(directory, **kwargs)


def test_checkpoint_of_another_detector(trained, tmp_path, capsys):
    best = str(trained / 'run' / 'best.safetensors')
    with pytest.raises(CheckpointError, match='another detector than the config describes'):
        export_detector(open_config(SHARED), best, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()
    where = ['--work-dir', str(tmp_path), '--data-root', str(tmp_path / 'data')]
    assert launch.test_main([str(SHARED), best, *where]) == 2
    message = capsys.readouterr().err
    assert 'another detector' in message and 'Traceback' not in message and message.count('\n') == 1
    options = [*option_list(tmp_path), f'load_from={best}', 'model.backbone.model_args.shared_rank=5']
    assert launch.train_main([str(SHARED), *options]) == 2
    assert 'another detector' in capsys.readouterr().err
    # another head is what fine-tuning is about
    options = [*option_list(trained), f'load_from={best}', 'model.bbox_head.stacked_convs=1']
    assert launch.train_main([str(SHARED), *options]) == 0


@pytest.fixture
def coco(tmp_path):
    """A folder like BCCD's with other category names."""
    write_scenes(tmp_path / 'digits', 64, dict(train=4, val=4))
    root = tmp_path / 'cells'
    shutil.copytree(tmp_path / 'digits' / 'train', root / 'images')
    (root / 'annotations').mkdir()
    for split in ('train', 'test'):
        shutil.copy(tmp_path / 'digits' / 'annotations' / 'train.json', root / 'annotations' / f'{split}.json')
    return root


@pytest.mark.parametrize('value', ["[dict(type='SafetensorsHook')]", "[dict(type='SafetensorsHook',interval=2)]"])
def test_a_dict_in_cfg_options_is_refused(capsys, value):
    with pytest.raises(SystemExit):
        launch.train_main([str(SHARED), '--cfg-options', f'custom_hooks={value}'])
    assert 'Put a dict into a config file' in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path, coco, capsys):
    def message(*args):
        assert launch.train_main([*map(str, args), '--work-dir', str(tmp_path / 'run')]) == 2
        text = capsys.readouterr().err
        assert text.startswith('train_det.py: ') and text.count('\n') == 1, text
        return text
    assert 'does not exist' in message(tmp_path / 'none.py')
    (tmp_path / 'bad.py').write_text('model = dict(')
    assert 'cannot be read' in message(tmp_path / 'bad.py')
    (tmp_path / 'empty.py').write_text('x = 1')
    assert 'has no model' in message(tmp_path / 'empty.py')
    assert 'annotation file' in message(BCCD, '--data-root', tmp_path / 'nowhere')
    text = message(BCCD, '--data-root', coco)
    assert 'has the categories 0, 1, 2' in text and 'RBC, WBC, Platelets' in text
    (coco / 'annotations' / 'train.json').write_text('{"images": []}')
    assert 'no list of categories' in message(BCCD, '--data-root', coco)
    assert 'num_classes=7, but the data has 10 classes' in message(
        SHARED, '--data-root', tmp_path / 's', '--cfg-options', 'model.bbox_head.num_classes=7')
    assert "feature levels 0 to 4" in message(
        SHARED, '--data-root', tmp_path / 's', '--cfg-options', 'model.backbone.out_indices=(2,3,9)')
    assert "must be [32, 64, 128], or 'auto'" in message(
        SHARED, '--data-root', tmp_path / 's', '--cfg-options', 'model.neck.in_channels=(1,2,3)')
    regularizer = "custom_hooks=[dict(type='timm_lean.RegularizerHook',regularizers=[dict(type='basis_ortho')])]"
    path = tmp_path / 'reg.py'
    path.write_text(f"_base_ = '{DENSE}'\n{regularizer}\n")
    assert 'no shared filter basis' in message(path, '--data-root', tmp_path / 's')
    path.write_text(path.read_text().replace('basis_ortho', 'nope'))
    assert "Unknown regularizer 'nope'" in message(path, '--data-root', tmp_path / 's')


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert launch.train_main([str(tmp_path / 'none.py'), '--debug']) == 2
    assert 'Traceback' in capsys.readouterr().err


def test_data_checks_look_into_wrappers(tmp_path):
    cfg = open_config(BCCD)
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(
        type='ConcatDataset', datasets=[cfg.train_dataloader.dataset]))
    with pytest.raises(LeanError, match=r'train\.json of the train dataset does not exist'):
        check_data(cfg, ['train'])
    assert launch.main_message(ValueError('class LeanError: what it is')) == 'what it is'


def test_config_text_keeps_tuples_and_refuses_code(tmp_path):
    cfg = scenes_config(tmp_path)
    model = build_detector(cfg)
    header = describe(cfg, model, dict(classes=('a',)))
    again = parse_config(header['config'])
    assert again.test_pipeline[1]['scale'] == cfg.test_pipeline[1]['scale']
    assert again.model.bbox_head == cfg.model.bbox_head
    assert parse_config('a = dict(b=-1.5, **{"c d": (1, None, True)}, e=inf)').a == {
        'b': -1.5, 'c d': (1, None, True), 'e': float('inf')}
    for text in ('import os', 'a = __import__("os")', 'a = [x for x in (1,)]', 'a = b', 'a = (', 'a = dict([(1, 2)])'):
        with pytest.raises(CheckpointError, match='plain values'):
            parse_config(text)
    save_detector(model, tmp_path / 'a.safetensors', header)
    assert load_detector(tmp_path / 'a.safetensors').cfg.model.backbone.type == 'timm_lean.TimmBackbone'


@pytest.mark.slow
def test_mmdetections_own_scripts(trained, tmp_path):
    """tools/train.py works by custom_imports; tools/test.py needs the plugin first, which `python -m` does."""
    cfg = scenes_config(trained)
    cfg.dump(tmp_path / 'dumped.py')
    code, output = run(MMDET_TOOLS / 'train.py', tmp_path / 'dumped.py', '--work-dir', tmp_path / 'train', cwd=tmp_path)
    assert code == 0, output[-3000:]
    best = tmp_path / 'train' / 'best.safetensors'
    assert best.is_file()
    code, output = run('-m', 'timm_lean.mmdet', MMDET_TOOLS / 'test.py', tmp_path / 'dumped.py', best,
                       '--work-dir', tmp_path / 'test', cwd=tmp_path)
    assert code == 0, output[-3000:]


@pytest.mark.slow
def test_module_runner_needs_a_script():
    assert run('-m', 'timm_lean.mmdet')[0] == 2
    code, output = run('-m', 'timm_lean.mmdet', 'none.py')
    assert code == 2 and 'does not exist' in output and 'Traceback' not in output


@pytest.mark.slow
def test_spawned_loader_workers(trained):
    options = [*option_list(trained), 'env_cfg.mp_cfg.mp_start_method=spawn', 'train_dataloader.num_workers=1']
    code, output = run(TOOLS / 'train_det.py', SHARED, *options)
    assert code == 0, output[-3000:]


@pytest.mark.slow
def test_resume_after_a_kill(tmp_path):
    """Killed in the second epoch, the run ends where an undisturbed one does."""
    options = option_list(tmp_path, epochs=40)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(
        [sys.executable, str(TOOLS / 'train_det.py'), str(SHARED), *options], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pointer = tmp_path / 'run' / 'last_checkpoint'
    deadline = time.monotonic() + 300
    while not pointer.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert pointer.is_file()
    done = int(Path(pointer.read_text()).stem.split('_')[1])
    assert done < 40
    code, output = run(TOOLS / 'train_det.py', SHARED, '--resume', *option_list(tmp_path, epochs=done + 2))
    assert code == 0, output[-3000:]
    state = torch.load(tmp_path / 'run' / f'epoch_{done + 2}.pth', weights_only=False)
    assert state['meta']['iter'] == 2 * (done + 2)


@pytest.mark.slow
def test_two_processes(tmp_path):
    write_scenes(tmp_path / 'data', 64, dict(train=8, val=4))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    config = tmp_path / 'pruned.py'
    config.write_text(f"""_base_ = {str(SHARED)!r}
custom_hooks = [
    dict(type='timm_lean.RegularizerHook', regularizers=[dict(type='basis_ortho', weight=10)]),
    dict(type='timm_lean.KernelPruningHook', amount=0.5),
    dict(type='timm_lean.SafetensorsHook')]
""")
    code, output = run(
        '-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}', TOOLS / 'train_det.py', config,
        '--launcher', 'pytorch', *option_list(tmp_path), 'train_dataloader.batch_size=2')
    assert code == 0, output[-3000:]
    state = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)
    assert state['meta']['iter'] == 2  # 8 images, 2 processes with 2 each
    assert np.isfinite(state['message_hub']['log_scalars']['train/loss_basis_ortho'].data[0]).all()
    pruned = load_detector(tmp_path / 'run' / 'best.safetensors')
    zeros = kernel_report(pruned.backbone).share
    assert zeros == pytest.approx(0.5, abs=0.01)
