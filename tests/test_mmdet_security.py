"""A detector's file is data from a stranger: it runs no code, follows no path, and is refused in one line."""
import json
import sys
from contextlib import contextmanager

import pytest
import torch
from mmdet_support import CONFIGS, SHARED, batch, predictions_of, scenes_config
from mmengine.config import Config
from safetensors import safe_open
from safetensors.torch import save_file

from timm_lean import CheckpointError, LeanError
from timm_lean.checkpoint.limits import limited
from timm_lean.mmdet import export_detector, load_detector
from timm_lean.mmdet.detector import build_detector, describe, save_detector
from timm_lean.mmdet.settings import open_config, parse_config
from timm_lean.mmdet.trust import check_config
from timm_lean.mmdet.weights import DETECTOR_KEY
from timm_lean_cli import main


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """A tiny detector's file, with this package's hooks in its config."""
    cfg = scenes_config(tmp_path_factory.mktemp('security'), SHARED)
    model = build_detector(cfg)
    path = tmp_path_factory.mktemp('file') / 'det.safetensors'
    save_detector(model, path, describe(cfg, model, {'classes': [str(i) for i in range(10)]}))
    return path


def rewritten(source, target, change):
    """A copy of a detector's file whose header has been changed by `change(header, config)`."""
    with safe_open(source, 'pt') as f:
        metadata = f.metadata()
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    header = json.loads(metadata[DETECTOR_KEY])
    text, cfg = header['config'], parse_config(header['config'])
    change(header, cfg)
    if header['config'] == text:
        header['config'] = cfg.pretty_text
    save_file(tensors, target, metadata={**metadata, DETECTOR_KEY: json.dumps(header)})
    return target


def one_line_each(config):
    """The text of a config, which MMEngine takes seconds to make pretty where lists are long."""
    return '\n'.join(f'{key} = {value!r}' for key, value in config.items())


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """Commands and modules that leave a mark when they run, and the mark."""
    mark = tmp_path / 'mark'
    (tmp_path / 'trap_module.py').write_text(f'open({str(mark)!r}, "w").close()\n')
    (tmp_path / 'nms.py').write_text(f'open({str(mark)!r}, "w").close()\n')
    (tmp_path / 'PointGenerator.py').write_text(f'open({str(mark)!r}, "w").close()\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    for name in ('trap_module', 'nms', 'PointGenerator'):
        sys.modules.pop(name, None)


def write(mark):
    return f'open({str(mark)!r}, "w").close()'


VECTORS = {
    'os.system': lambda c, m: c.update(model=dict(type='os.system', command=f'touch {m}')),
    'subprocess.run': lambda c, m: c.update(model=dict(type='subprocess.run', args=['touch', str(m)])),
    'timeit.timeit': lambda c, m: c.update(model=dict(type='timeit.timeit', stmt=write(m))),
    'builtins.eval': lambda c, m: c.model.backbone.update(type='builtins.eval', source=write(m)),
    'in the backbone': lambda c, m: c.model.update(backbone=dict(type='os.system', command=f'touch {m}')),
    'in a list': lambda c, m: c.model.update(neck=[c.model.neck, dict(type='os.system', command=f'touch {m}')]),
    'deep': lambda c, m: c.model.bbox_head.loss_cls.update(x=[[(dict(type='os.system', command=f'touch {m}'),)]]),
    'preprocessor': lambda c, m: c.model.data_preprocessor.update(
        batch_augments=[dict(type='subprocess.run', args=['touch', str(m)])]),
    'test_cfg': lambda c, m: c.model.test_cfg.update(nms=dict(type=f'__import__("os").system("touch {m}")')),
    'test_pipeline': lambda c, m: c.test_dataloader.dataset.pipeline.insert(
        1, dict(type='os.system', command=f'touch {m}')),
    'nested pipeline': lambda c, m: c.test_dataloader.dataset.pipeline.insert(1, dict(
        type='RandomApply', transforms=[dict(type='timeit.timeit', stmt=write(m))])),
    'visualizer': lambda c, m: c.update(visualizer=dict(type='subprocess.run', args=['touch', str(m)])),
    'hook': lambda c, m: c.update(custom_hooks=[dict(type='subprocess.run', args=['touch', str(m)])]),
    'constructor': lambda c, m: c.optim_wrapper.update(constructor='os.system'),
    '_scope_': lambda c, m: c.model.neck.update(_scope_='trap_module'),
    'scope in the type': lambda c, m: c.model.neck.update(type='trap_module.FPN'),
    'default_scope': lambda c, m: c.update(default_scope='trap_module'),
    'custom_imports': lambda c, m: c.update(custom_imports=dict(imports=['trap_module'])),
    'custom_imports, plain': lambda c, m: c.update(custom_imports='trap_module'),
    'custom_imports, standard library': lambda c, m: c.update(custom_imports=dict(imports=['os'])),
    'module in a type': lambda c, m: c.model.neck.update(type='trap_module'),
    'word in another place': lambda c, m: c.model.neck.update(type='nms'),
    'name of another registry': lambda c, m: c.model.update(neck=dict(type='PointGenerator')),
    'evaluated argument': lambda c, m: c.model.train_cfg.assigner.update(
        type='CameraMotionCompensation', warp_mode=write(m)),
    'teacher config': lambda c, m: c.model.update(
        type='KnowledgeDistillationSingleStageDetector', teacher_config='trap_module.py'),
    'runner': lambda c, m: c.model.update(neck=dict(type='mmengine.runner.runner.Runner', work_dir=str(m))),
    'visualization backend': lambda c, m: c.model.update(
        neck=dict(type='mmengine.visualization.vis_backend.LocalVisBackend', save_dir=str(m))),
    'language model': lambda c, m: c.model.update(backbone=dict(type='BertModel', name='trap_module')),
    'type is a list': lambda c, m: c.model.neck.update(type=['os', 'system']),
    'type is a dict': lambda c, m: c.model.neck.update(type=dict(type='os.system', command=f'touch {m}')),
    'URL': lambda c, m: c.model.bbox_head.update(weights='https://localhost/x.pth'),
    'modelzoo': lambda c, m: c.model.bbox_head.update(weights='modelzoo://resnet50'),
    'checkpoint': lambda c, m: c.model.backbone.update(checkpoint=str(m)),
    'local-dir': lambda c, m: c.model.backbone.update(model_name=f'local-dir:{m.parent}'),
    'hf-hub': lambda c, m: c.model.backbone.update(model_name='hf-hub:timm/resnet18.a1_in1k'),
    'base from the hub': lambda c, m: c.model.backbone.update(
        model_name='lean', model_args=dict(base='hf-hub:timm/resnet18.a1_in1k')),
    'runtime arguments': lambda c, m: c.model.backbone.model_args.update(checkpoint_path=str(m)),
    'pretrained argument': lambda c, m: c.model.backbone.model_args.update(pretrained=True),
    '_base_': lambda c, m: c.update(_base_='trap_module.py'),
    '_delete_': lambda c, m: c.model.neck.update(_delete_=True),
    'environment': lambda c, m: c.update(experiment_name='{{$HOME:x}}'),
}


@pytest.mark.parametrize('name', VECTORS)
def test_vectors(detector, tmp_path, trap, name):
    """Each of these ran, downloaded, opened or imported something, or would have in MMDetection."""
    path = rewritten(detector, tmp_path / 'x.safetensors', lambda header, cfg: VECTORS[name](cfg, trap))
    with pytest.raises(CheckpointError) as error:
        load_detector(path)
    assert '\n' not in str(error.value) and 'x.safetensors' in str(error.value)
    assert not trap.exists() and 'trap_module' not in sys.modules and 'nms' not in sys.modules


def test_equal_detectors_give_equal_files(detector, tmp_path):
    model = load_detector(detector)
    headers = [describe(Config({**model.cfg.to_dict(), 'work_dir': name}), model, model.dataset_meta) for name in 'ab']
    for i in range(8):
        save_detector(model, tmp_path / str(i), headers[i % 2])
    assert len({(tmp_path / str(i)).read_bytes() for i in range(8)}) == 1


def test_keys_do_not_become_code_of_an_exported_config(detector, tmp_path, trap):
    """MMEngine writes keys without quoting them, and runs the file when MMDetection opens it."""
    key = f"x': {write(trap)}, 'y"
    path = rewritten(detector, tmp_path / 'x.safetensors', lambda header, cfg: header.update(
        config=header['config'] + f'\nextra = dict({{{key!r}: 1}})\n'))
    with pytest.raises(CheckpointError, match='has the key'):
        export_detector(None, path, tmp_path / 'out')
    assert not trap.exists() and not (tmp_path / 'out').exists()


def test_folder(detector, tmp_path, trap):
    """The folder's config.py is read, never run."""
    folder = export_detector(None, detector, tmp_path / 'd')
    data = batch(64, classes=10)
    for a, b in zip(predictions_of(load_detector(folder), data), predictions_of(load_detector(detector), data),
                    strict=True):
        assert a.pred_instances.scores.equal(b.pred_instances.scores)
    text = (folder / 'config.py').read_text()
    for bad in (f'import os\nos.system("touch {trap}")\n' + text, text + f'\nx = {write(trap)}\n', text + '\nx = y = 1',
                text.replace("type='FPN'", "type='trap_module.FPN'")):
        (folder / 'config.py').write_text(bad)
        with pytest.raises(CheckpointError):
            load_detector(folder)
    (folder / 'config.py').write_bytes(b'\xff\xfe' + text.encode())
    with pytest.raises(CheckpointError, match='cannot be read'):
        load_detector(folder)
    assert not trap.exists()


def test_what_leads_elsewhere_is_taken_out(detector, tmp_path):
    """init_cfg and pretrained are never followed, and the pipelines read local files only."""
    def change(header, cfg):
        cfg.model.update(init_cfg=dict(type='Pretrained', checkpoint='https://localhost/x.pth'))
        cfg.model.backbone.update(init_cfg=dict(type='os.system'), pretrained=True)
        cfg.test_dataloader.dataset.pipeline[0].update(backend_args=dict(backend='memcached', sys_path='/tmp'))
        cfg.update(load_from='/etc/passwd', work_dir='/')

    model = load_detector(rewritten(detector, tmp_path / 'x.safetensors', change))
    text = model.cfg.pretty_text
    assert not any(word in text for word in ('init_cfg', 'pretrained', 'backend_args', 'load_from', 'work_dir'))


def test_a_package_of_the_users(detector, tmp_path, monkeypatch):
    (tmp_path / 'my_necks.py').write_text(
        'from mmdet.models.necks import FPN\nfrom mmdet.registry import MODELS\n\n'
        '@MODELS.register_module(force=True)\nclass MyFPN(FPN):\n    pass\n')
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(header, cfg):
        cfg.model.neck.type = 'MyFPN'
        cfg.custom_imports = dict(imports=['timm_lean.mmdet', 'my_necks'])
    path = rewritten(detector, tmp_path / 'x.safetensors', change)
    with pytest.raises(CheckpointError, match=r"trust_imports=\['my_necks'\]"):
        load_detector(path)
    assert 'my_necks' not in sys.modules
    assert type(load_detector(path, trust_imports=['my_necks']).neck).__name__ == 'MyFPN'
    sys.modules.pop('my_necks')


COSTLY = {
    'convolutions of the head': lambda c: c.model.bbox_head.update(stacked_convs=40_000),
    'levels': lambda c: c.model.neck.update(num_outs=1_000_000),
    'strides': lambda c: c.model.bbox_head.anchor_generator.update(strides=[8] * 4_000),
    'anchors': lambda c: c.model.bbox_head.anchor_generator.update(
        scales_per_octave=6_000, ratios=[1.] * 6_000, strides=[8] * 50),
    'classes': lambda c: c.model.bbox_head.update(num_classes=40_000),
    'blocks': lambda c: c.model.update(neck=[c.model.neck, dict(
        type='DyHead', in_channels=64, out_channels=64, num_blocks=40_000)]),
}


@pytest.mark.parametrize('name', COSTLY)
def test_costly_configs_are_refused_on_the_way(detector, tmp_path, monkeypatch, name):
    """Within the work that the file's tensors justify, without memory, and before the detector is built."""
    works, devices = [], []

    @contextmanager
    def watched(*args, **kwargs):
        with limited(*args, **kwargs) as work:
            works.append(work)
            yield work

    def build(cfg):
        devices.append(torch.empty(0).device.type)
        return build_detector(cfg)
    monkeypatch.setattr('timm_lean.mmdet.skeleton.limited', watched)
    monkeypatch.setattr('timm_lean.mmdet.detector.build_detector', build)
    path = rewritten(detector, tmp_path / 'x.safetensors', lambda header, cfg: (
        COSTLY[name](cfg), header.update(config=one_line_each(cfg.to_dict()))))
    with pytest.raises(CheckpointError, match=r'x\.safetensors'):
        load_detector(path)
    assert devices in ([], ['meta'])
    for work in works:
        assert work.modules < 2_000 and work.calls < 2_000_000 and work.cpu_bytes < 2 * 10 ** 8, work


def test_trusted_packages_on_the_command_line(detector, tmp_path, monkeypatch, capsys):
    (tmp_path / 'my_fpn.py').write_text(
        'from mmdet.models.necks import FPN\nfrom mmdet.registry import MODELS\n\n'
        '@MODELS.register_module(force=True)\nclass NamedFPN(FPN):\n    pass\n')
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(header, cfg):
        cfg.model.neck.type = 'NamedFPN'
        cfg.custom_imports = dict(imports=['timm_lean.mmdet', 'my_fpn'])
        header['config'] = one_line_each(cfg.to_dict())
    path = str(rewritten(detector, tmp_path / 'x.safetensors', change))
    command = ['export', path, '--det-dir', str(tmp_path / 'd')]
    assert main(command) == 2
    assert '--trust-imports my_fpn' in capsys.readouterr().err and 'my_fpn' not in sys.modules
    assert main([*command, '--trust-imports', 'my_fpn']) == 0
    assert main(['info', 'resnet20_cifar', '--trust-imports', 'my_fpn']) == 2 and 'is none' in capsys.readouterr().err
    sys.modules.pop('my_fpn')


@pytest.mark.parametrize('command, function', [
    (['info'], 'report.detector_report'), (['predict', 'x.jpg'], 'predict_images'),
    (['prune', '--granularity', 'channel', '-o', 'p.safetensors'], 'open_detector'),
    (['export', '--onnx', 'x.onnx'], 'export.export_forms')])
def test_every_command_hands_on_what_is_trusted(detector, tmp_path, monkeypatch, capsys, command, function):
    def stub(*args, trust_imports=(), **kwargs):
        raise LeanError(f'trusted: {trust_imports}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f'timm_lean.mmdet.{function}', stub)
    name, *options = command
    assert main([name, str(detector), *options, '--trust-imports', 'a', '--trust-imports', 'b.c']) == 2
    assert "trusted: ['a', 'b.c']" in capsys.readouterr().err


def test_classes_by_their_path(detector, tmp_path):
    """What MMEngine writes for configs of the lazy kind."""
    def change(header, cfg):
        cfg.model.type = 'mmdet.models.detectors.retinanet.RetinaNet'
        cfg.model.bbox_head.type = 'mmdet.models.RetinaHead'
        cfg.model.neck.type = 'mmdet.FPN'
        cfg.optim_wrapper.optimizer.type = 'torch.optim.adamw.AdamW'
    assert type(load_detector(rewritten(detector, tmp_path / 'x.safetensors', change)).neck).__name__ == 'FPN'


@pytest.mark.parametrize(
    'path', sorted(p for p in CONFIGS.rglob('*.py') if '_base_' not in p.parts), ids=lambda p: p.stem)
def test_configs_of_this_project_pass(path):
    cfg = open_config(path)
    for key in ('checkpoint', 'share'):  # which a file's config never has
        cfg.model.backbone.pop(key, None)
    check_config(cfg, 'x')


DAMAGE = {
    'unhashable key': lambda h: h.update(config='x = {[]: 1}'),
    'minus text': lambda h: h.update(config="x = -'a'"),
    'reserved key': lambda h: h.update(config=h['config'] + '\nfilename = 1'),
    'model is a number': lambda h: h.update(config='model = 5'),
    'model is missing': lambda h: h.update(config='x = 5'),
    'attribute': lambda h: h.update(config=h['config'] + '\nmodel.x = 5'),
    'bytes': lambda h: h.update(config=h['config'].replace("'RetinaNet'", "b'RetinaNet'")),
    'ellipsis': lambda h: h.update(config=h['config'] + '\nx = ...'),
    'null': lambda h: h.update(config='\x00'),
    'star': lambda h: h.update(config='x = dict(**5)'),
    'deep': lambda h: h.update(config='x = ' + '-' * 5000 + '1'),
    'long': lambda h: h.update(config='x = ' + ' ' * 2_000_000),
    'aliases': lambda h: h.update(aliases={'a': ['b']}),
    'alias of nothing': lambda h: h.update(aliases={'a': 'b'}),
    'backbone is a list': lambda h: h.update(backbone=['architecture', 'model_args', 'steps']),
    'steps': lambda h: h['backbone'].update(steps=5),
    'runtime': lambda h: h['backbone'].update(model_args={'checkpoint_path': 'x'}),
    'architecture': lambda h: h['backbone'].update(architecture='hf-hub:x'),
    'classes': lambda h: h.update(metainfo={'classes': 5}),
    'palette': lambda h: h.update(metainfo={'palette': 'nonsense'}),
    'palette of text': lambda h: h.update(metainfo={'palette': [['a', 0, 0]]}),
    'format': lambda h: h.update(format=['x'] * 1000),
    'strides': lambda h: h.update(config=h['config'].replace("'strides': [", "'strides': ['x',")),
    'channels': lambda h: h.update(config=h['config'].replace("'out_channels': 64", "'out_channels': 0")),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damaged_headers(detector, tmp_path, name):
    before = json.loads(safe_open(detector, 'pt').metadata()[DETECTOR_KEY])
    path = rewritten(detector, tmp_path / 'x.safetensors', lambda header, cfg: DAMAGE[name](header))
    assert json.loads(safe_open(path, 'pt').metadata()[DETECTOR_KEY]) != before
    with pytest.raises(CheckpointError) as error:
        load_detector(path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 1000
