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

import mmengine
import numpy as np
import pytest
import torch
from mmdet_support import (
    CONFIGS,
    DENSE,
    ROOT,
    SHARED,
    TOOLS,
    batch,
    open_config,
    option_list,
    predictions_of,
    scenes_config,
)
from mmengine.config import Config
from mmengine.visualization import Visualizer
from PIL import Image

from timm_lean import CheckpointError, LeanError, prune_channels
from timm_lean.mmdet import (
    TimmBackbone,
    export_detector,
    lean_detector,
    load_detector,
    predict_images,
    write_scenes,
)
from timm_lean.mmdet.data import check_data
from timm_lean.mmdet.detector import build_detector, describe, save_detector, write_detector
from timm_lean.mmdet.own_data import set_classes, settle_data
from timm_lean.mmdet.settings import dump_config, parse_config
from timm_lean.mmdet.weights import detector_header
from timm_lean.pruning import kernel_report
from timm_lean_cli import detectors

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
    assert detectors.train_main([str(SHARED), *option_list(folder)]) == 0
    return folder


def test_train_writes_checkpoints_and_log(trained):
    names = {p.name for p in (trained / 'run').iterdir()}
    assert {'best.safetensors', 'last.safetensors', 'epoch_1.pth', 'last_checkpoint'} <= names


@pytest.mark.parametrize('name', ['best.safetensors', 'epoch_1.pth'])
def test_test_det(trained, name, tmp_path):
    options = option_list(trained)
    options[1] = str(tmp_path)
    assert detectors.test_main([str(SHARED), str(trained / 'run' / name), *options]) == 0
    logs = list(tmp_path.glob('*/*.json'))
    assert 'coco/bbox_mAP' in json.loads(logs[0].read_text())


def test_a_file_is_evaluated_without_a_config(trained, tmp_path, capsys):
    """By the config it carries: the same metrics as with it; and what it can write."""
    def scores(folder):
        return json.loads(next(folder.glob('*/*.json')).read_text())

    best = trained / 'run' / 'best.safetensors'
    options = option_list(trained)[2:]
    assert detectors.test_main([str(SHARED), str(best), '--work-dir', str(tmp_path / 'a'), *options]) == 0
    arguments = ['--out', str(tmp_path / 'found.pkl'), '--show-dir', str(tmp_path / 'pictures')]
    Visualizer.get_instance('visualizer')
    Visualizer.get_instance('another run')  # the last one made in this process
    assert detectors.main(['test', str(best), '--work-dir', str(tmp_path / 'b'), *arguments]) == 0
    assert scores(tmp_path / 'a')['coco/bbox_mAP'] == scores(tmp_path / 'b')['coco/bbox_mAP']
    found = mmengine.load(tmp_path / 'found.pkl')
    assert len(found) == 4 and found[0]['pred_instances']['bboxes'].shape[1] == 4
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 4
    for bad, message in ((['--out', 'found.json'], 'must end in .pkl'), (['--wait-time', 'nan'], 'at least 0')):
        assert detectors.test_main([str(best), *bad]) == 2
        assert message in capsys.readouterr().err
    assert detectors.test_main([str(trained / 'run' / 'epoch_1.pth')]) == 2
    assert 'does not say which detector it holds' in capsys.readouterr().err


@pytest.mark.slow
def test_a_pruned_file_and_a_folder_are_evaluated_without_a_config(trained, tmp_path):
    best, pruned = trained / 'run' / 'best.safetensors', tmp_path / 'pruned.safetensors'
    write_detector(lean_detector(load_detector(best), prune_channels), pruned)
    folder = export_detector(None, best, tmp_path / 'folder')
    for source, options in ((pruned, ['--tta']), (folder, [])):
        work_dir = tmp_path / f'run of {source.stem}'
        assert detectors.test_main([str(source), '--work-dir', str(work_dir), *options]) == 0
        assert 'coco/bbox_mAP' in json.loads(next(work_dir.glob('*/*.json')).read_text())


def test_show_needs_a_display(monkeypatch, capsys):
    monkeypatch.setattr('matplotlib.get_backend', lambda: 'agg')
    assert detectors.test_main([str(SHARED), 'no.safetensors', '--show']) == 2
    assert capsys.readouterr().err.strip().endswith('by --show-dir DIR.')


def test_resume_continues(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'copy')
    folder = tmp_path / 'copy'
    (folder / 'run' / 'last_checkpoint').write_text(str(folder / 'run' / 'epoch_1.pth'))
    assert detectors.train_main([str(SHARED), '--resume', *option_list(folder, epochs=2)]) == 0
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
    (directory / 'config.py').write_text(text.replace('max_per_img=10', 'max_per_img=3'))
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


@pytest.mark.slow
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


@pytest.mark.parametrize('source', ['backbone of timm', 'backbone of MMDetection'])
def test_pictures_in_the_colors_of_a_palette(source, tmp_path):
    """JSON has lists for a palette's tuples, and matplotlib's colors are made of tuples."""
    cfg = scenes_config(tmp_path)
    if 'MMDetection' in source:
        cfg.model.backbone = dict(type='mmdet.ResNet', depth=18, out_indices=(1, 2, 3), init_cfg=None)
        cfg.model.neck.in_channels = [128, 256, 512]
    model = build_detector(cfg)
    colors = [(20 * i, 255 - 20 * i, 7) for i in range(10)]
    header = describe(cfg, model, dict(classes=tuple('0123456789'), palette=colors))
    save_detector(model, tmp_path / 'a.safetensors', header)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / 'i.png')
    result, = predict_images(tmp_path / 'a.safetensors', [tmp_path / 'i.png'], tmp_path / 'o.jpg', score_thr=0.)
    assert result['boxes'] and Image.open(tmp_path / 'o.jpg').size == (64, 64)
    from mmengine.runner.checkpoint import CheckpointLoader
    loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.safetensors'))
    assert loaded['meta']['dataset_meta']['palette'] == colors


def test_checkpoint_of_another_detector(trained, tmp_path, capsys):
    best = str(trained / 'run' / 'best.safetensors')
    with pytest.raises(CheckpointError, match='another detector than the config describes'):
        export_detector(open_config(SHARED), best, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()
    where = ['--work-dir', str(tmp_path), '--data-root', str(tmp_path / 'data')]
    assert detectors.test_main([str(SHARED), best, *where]) == 2
    message = capsys.readouterr().err
    assert 'another detector' in message and 'Traceback' not in message and message.count('\n') == 1
    options = [*option_list(tmp_path), f'load_from={best}', 'model.backbone.model_args.shared_rank=5']
    assert detectors.train_main([str(SHARED), *options]) == 2
    assert 'another detector' in capsys.readouterr().err
    # another head is what fine-tuning is about
    options = [*option_list(trained), f'load_from={best}', 'model.bbox_head.stacked_convs=1']
    assert detectors.train_main([str(SHARED), *options]) == 0


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


def test_own_data_in_one_line(coco, tmp_path, capsys):
    """A folder with ten classes and a config for three: the names are read from the annotations, or said."""
    cfg = open_config(BCCD)
    settle_data(cfg, coco, [])
    names = tuple('0123456789')
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.metainfo == dict(classes=names) and dataset.data_root == f'{coco}/'
    assert cfg.model.bbox_head.num_classes == 10 and cfg.val_evaluator.ann_file == f'{coco}/annotations/test.json'
    check_data(cfg, ('train', 'val', 'test'))
    options = ['train_cfg.max_epochs=1', 'model.backbone.model_args.layers=(1,1,1,1)', 'log_level=ERROR',
               'train_pipeline.2.scale=(64,64)', 'model.neck.out_channels=16', 'model.bbox_head.in_channels=16',
               'model.bbox_head.feat_channels=16']
    arguments = ['--work-dir', str(tmp_path / 'run'), '--data-root', str(coco), '--cfg-options', *options]
    assert detectors.train_main([str(BCCD), '--classes', *arguments]) == 0
    assert detector_header(tmp_path / 'run' / 'last.safetensors')['metainfo']['classes'] == list(names)
    assert detectors.train_main([str(BCCD), '--classes', '0', 'cat', *arguments]) == 2
    assert 'has the categories 0, 1, 2' in capsys.readouterr().err
    assert detectors.train_main([str(BCCD), '--classes', '--data-root', str(tmp_path / 'none')]) == 2
    assert '--classes reads the names in the annotation file' in capsys.readouterr().err


def test_own_data_by_a_config_that_inherits(coco, tmp_path):
    """What a config says once counts for the datasets and heads of the base it inherits from."""
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = 'timm_lean::bccd/retinanet_resnet34_s8u1_bccd.py'\n"
                    f"data_root = {str(coco)!r}\nclasses = {tuple('0123456789')!r}\n")
    cfg = open_config(path)
    assert cfg.model.bbox_head.num_classes == 3 and 'timm_lean' not in cfg.model.get('_scope_', '')
    settle_data(cfg)
    assert cfg.model.bbox_head.num_classes == 10
    assert cfg.test_dataloader.dataset.data_root == f'{coco}/'
    assert cfg.test_evaluator.ann_file == f'{coco}/annotations/test.json'
    check_data(cfg, ('train', 'val', 'test'))
    assert open_config('timm_lean::bccd/retinanet_resnet34_bccd.py').model == open_config(BCCD).model
    with pytest.raises(LeanError, match=r'no config timm_lean::nope\.py.*bccd/retinanet_resnet34_bccd\.py'):
        open_config('timm_lean::nope.py')


def test_heads_in_lists_and_other_datasets():
    cfg = open_config(CONFIGS / 'mask_rcnn' / 'mask-rcnn_resnet34_1x_coco.py')
    cfg.model.roi_head.bbox_head = [cfg.model.roi_head.bbox_head] * 2  # as in a cascade
    set_classes(cfg, ('cat', 'dog'))
    assert [h.num_classes for h in cfg.model.roi_head.bbox_head] == [2, 2]
    assert cfg.model.roi_head.mask_head.num_classes == 2 and 'num_classes' not in cfg.model.rpn_head
    cfg.train_dataloader.dataset.metainfo = dict(classes=('cat', 'dog', 'cow'))
    with pytest.raises(LeanError, match='num_classes=2, but the metainfo of the train dataset has 3 classes'):
        check_data(cfg, ('train',))


@pytest.mark.parametrize('value', ["[dict(type='SafetensorsHook')]", "[dict(type='SafetensorsHook',interval=2)]"])
def test_a_dict_in_cfg_options_is_refused(capsys, value):
    with pytest.raises(SystemExit):
        detectors.train_main([str(SHARED), '--cfg-options', f'custom_hooks={value}'])
    assert 'Put a dict into a config file' in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path, coco, capsys):
    def message(*args):
        assert detectors.train_main([*map(str, args), '--work-dir', str(tmp_path / 'run')]) == 2
        text = capsys.readouterr().err
        assert text.startswith('train_det.py: ') and text.count('\n') == 1, text
        return text
    assert 'does not exist' in message(tmp_path / 'none.py')
    (tmp_path / 'bad.py').write_text('model = dict(')
    assert 'cannot be read' in message(tmp_path / 'bad.py')
    (tmp_path / 'empty.py').write_text('x = 1')
    assert 'has no model' in message(tmp_path / 'empty.py')
    assert 'none.pth does not exist' in message(SHARED, '--data-root', coco, '--resume', tmp_path / 'none.pth')
    assert not (tmp_path / 'run').exists()  # said before a run is set up
    assert 'annotation file' in message(BCCD, '--data-root', tmp_path / 'nowhere')
    text = message(BCCD, '--data-root', coco)
    assert 'has the categories 0, 1, 2' in text and 'RBC, WBC, Platelets' in text
    (coco / 'annotations' / 'train.json').write_text('{"images": []}')
    assert 'no list of categories' in message(BCCD, '--data-root', coco)
    small = [option for option in option_list(tmp_path / 's')[2:] if 'shared_rank' not in option]
    assert 'num_classes=7, but the metainfo of the train dataset has 10 classes' in message(
        SHARED, *small, 'model.bbox_head.num_classes=7')
    assert "feature levels 0 to 4" in message(SHARED, *small, 'model.backbone.out_indices=(2,3,9)')
    assert "must be [16, 24, 32], or 'auto'" in message(SHARED, *small, 'model.neck.in_channels=(1,2,3)')
    regularizer = "custom_hooks=[dict(type='timm_lean.RegularizerHook',regularizers=[dict(type='basis_ortho')])]"
    path = tmp_path / 'reg.py'
    path.write_text(f"_base_ = '{DENSE}'\n{regularizer}\n")
    assert 'no shared filter basis' in message(path, *small)
    path.write_text(path.read_text().replace('basis_ortho', 'nope'))
    assert "Unknown regularizer 'nope'" in message(path, *small)


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert detectors.train_main([str(tmp_path / 'none.py'), '--debug']) == 2
    assert 'Traceback' in capsys.readouterr().err


def test_data_checks_look_into_wrappers(tmp_path):
    cfg = open_config(BCCD)
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(
        type='ConcatDataset', datasets=[cfg.train_dataloader.dataset]))
    with pytest.raises(LeanError, match=r'train\.json of the train dataset does not exist'):
        check_data(cfg, ['train'])
    assert detectors._message(ValueError('class LeanError: what it is')) == 'what it is'


def test_config_text_holds_what_mmengines_own_does():
    cfg = Config(open_config(BCCD).to_dict())
    cfg.odd = {'c d': (1, None, True), 'e': float('inf'), 3: {'b', 'a'}, 'long': ['x' * 30] * 9, 'text': 'a\nb"\'' * 40}
    ours = parse_config(dump_config(cfg))
    assert ours.to_dict() == cfg.to_dict() and dump_config(ours) == dump_config(cfg)
    cfg.pop('odd')
    assert parse_config(dump_config(cfg)).to_dict() == parse_config(cfg.pretty_text).to_dict()


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
