"""Techniques on whole detectors of MMDetection's own parts: one recipe, which every way of building one follows."""
import copy
import json

import pytest
import torch
import torch.nn as nn
from mmdet_support import batch, losses_of, predictions_of, write_native
from mmengine.config import Config
from mmengine.runner import Runner

from timm_lean import CheckpointError, LeanError, prune_channels, prune_kernels, share
from timm_lean.mmdet import calibration_images, export_detector, lean_detector, load_detector, open_detector
from timm_lean.mmdet.detector import save_detector, write_detector
from timm_lean.mmdet.on_images import on_images
from timm_lean.mmdet.structure import steps_of
from timm_lean.mmdet.weights import detector_header
from timm_lean.pruning import kernel_report, remove_blocks
from timm_lean_cli import detectors, main


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp('lean'))


@pytest.fixture(scope='module')
def detector(folder):
    return open_detector(folder / 'zoo.pth', folder / 'config.py')


@pytest.fixture(scope='module')
def pruned(detector, folder):
    """Channels of the whole, then kernels, and its file."""
    model = lean_detector(detector, prune_channels, pruning_ratio=0.5, round_to=4)
    model = lean_detector(model, prune_kernels, amount=0.3, scope='layer', target=['backbone', 'neck'])
    write_detector(model, folder / 'pruned.safetensors')
    return model


def scores(model):
    return [found.pred_instances.scores for found in predictions_of(model, batch(64, classes=10))]


def test_channels_of_the_whole_detector_go_but_predictions_stay(detector, pruned):
    assert pruned.bbox_head.retina_cls.out_channels == 10 and pruned.bbox_head.retina_reg.out_channels == 4
    assert pruned.bbox_head.retina_cls.in_channels == 8  # half of 16
    assert [c.conv.out_channels for c in pruned.neck.lateral_convs] == [8] * 3
    assert pruned.backbone.layer4[1].conv2.out_channels == 64 == pruned.neck.lateral_convs[2].conv.in_channels
    assert sum(p.numel() for p in pruned.parameters()) < 0.35 * sum(p.numel() for p in detector.parameters())
    assert all(bool(torch.isfinite(sum(map(torch.as_tensor, v)) if isinstance(v, list) else v))
               for v in losses_of(copy.deepcopy(pruned), batch(64, classes=10)).values())
    assert 'forward' not in vars(pruned) and 'forward' not in vars(detector)
    assert detector.bbox_head.retina_cls.in_channels == 16  # the given one is untouched


def test_what_is_left_is_what_was_there(detector, pruned):
    """The pruned backbone is the given one at the channels the report names: a convolution by hand says so."""
    small = lean_detector(detector, prune_channels, pruning_ratio=0.5, round_to=4, target='backbone')
    kept, kept_inputs = small.lean_report.kept, small.lean_report.kept_inputs
    name = 'backbone.layer3.0.conv2'
    old, new = detector.get_submodule(name).weight, small.get_submodule(name).weight
    assert torch.equal(new, old[kept[name]][:, kept_inputs[name]])
    assert not any(n.startswith(('bbox_head', 'neck.fpn')) for n in kept)
    assert small.neck.lateral_convs[0].conv.out_channels == 16
    assert torch.equal(small.neck.lateral_convs[1].conv.weight, detector.neck.lateral_convs[1].conv.weight[
        :, kept['backbone.layer3.1.conv2']])


def test_every_way_to_build_it_follows_the_config(pruned, folder, tmp_path):
    from mmdet.apis import init_detector
    file = folder / 'pruned.safetensors'
    header = detector_header(file)
    assert header['format'] == 2 and header['packed'] and header['metainfo']['classes'] == list('0123456789')
    assert [step['op'] for step in pruned.lean_steps] == ['resize', 'prune_kernels']
    expected = scores(pruned)
    exported = export_detector(None, file, tmp_path / 'folder')
    again = open_detector(file, folder / 'config.py')  # the config of the whole takes over what the file says
    ways = [load_detector(file), load_detector(exported), again,
            init_detector(str(exported / 'config.py'), str(exported / 'model.safetensors'), device='cpu')]
    for model in ways:
        assert model.lean_steps == pruned.lean_steps
        for a, b in zip(scores(model), expected, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(LeanError, match='pruned before'):
        lean_detector(ways[0], prune_kernels, amount=0.5)


@pytest.mark.parametrize('meta', [
    {'CLASSES': tuple('0123456789'), 'epoch': 12}, {'dataset_meta': {'CLASSES': tuple('0123456789')}}])
def test_class_names_of_old_and_new_model_zoo_files(folder, tmp_path, meta):
    state = torch.load(folder / 'zoo.pth', weights_only=True)['state_dict']
    torch.save({'state_dict': state, 'meta': meta}, tmp_path / 'zoo.pth')
    assert open_detector(tmp_path / 'zoo.pth', folder / 'config.py').dataset_meta['classes'] == tuple('0123456789')


@pytest.mark.slow
def test_the_tools_train_on_and_test_from_the_config_of_the_whole(pruned, folder, tmp_path):
    options = ['--work-dir', str(tmp_path), '--cfg-options']
    file = str(folder / 'pruned.safetensors')
    assert detectors.train_main([str(folder / 'config.py'), *options, f'load_from={file}']) == 0
    tuned = load_detector(tmp_path / 'last.safetensors')
    assert tuned.lean_steps == pruned.lean_steps
    assert not torch.equal(tuned.bbox_head.retina_cls.weight, pruned.bbox_head.retina_cls.weight)
    assert detectors.train_main(
        [str(folder / 'config.py'), '--resume', *options, f'load_from={file}', 'train_cfg.max_epochs=2']) == 0
    assert detector_header(tmp_path / 'last.safetensors')['epoch'] == 2
    last = str(tmp_path / 'last.safetensors')
    assert detectors.test_main([str(folder / 'config.py'), last, '--work-dir', str(tmp_path)]) == 0


def test_shared_bases_stay_within_a_part_of_the_target(detector):
    small = lean_detector(detector, share, shared_rank=4, target=['neck', 'bbox_head'])
    groups = [group['layers'] for group in small.lean_steps[0]['groups']]
    assert all(len({name.rpartition('.')[0].rpartition('.')[0] for name in group}) == 1 for group in groups)
    assert {name.split('.')[0] for group in groups for name in group} == {'neck', 'bbox_head'}
    assert small.lean_report.output_error > 0


def test_layers_that_predict_are_left_alone_unless_asked_for(detector):
    predict = ('bbox_head.retina_cls', 'bbox_head.retina_reg')
    small = lean_detector(detector, share, shared_rank=2, alone=True, target='bbox_head')
    assert {name for name, why in small.lean_report.left.items() if why == 'classifier'} == set(predict)
    assert not hasattr(small, 'get_classifier') and not hasattr(detector, 'get_classifier')
    asked = lean_detector(detector, share, shared_rank=2, classifier=True, alone=True, target='bbox_head')
    assert set(predict) <= {layer.name for layer in asked.lean_report.layers}


@pytest.mark.slow
def test_shared_bases_of_the_whole_meet_a_budget(detector, tmp_path):
    small = lean_detector(detector, share, params=0.7)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (detector, small))
    assert after / before == pytest.approx(0.7, abs=0.03)
    write_detector(small, tmp_path / 's.safetensors')
    for a, b in zip(scores(load_detector(tmp_path / 's.safetensors')), scores(small), strict=True):
        assert torch.equal(a, b)


def outputs_of(model, x):
    with torch.no_grad(), on_images(model):
        return torch.cat([t.flatten() for t in model(x)])


def test_it_computes_what_the_whole_does_with_those_channels_at_zero(detector):
    """Backbone, neck and head together: each filter that went gives 0 in a copy of the given detector."""
    small = lean_detector(detector, prune_channels, pruning_ratio=0.5, round_to=4)
    zeroed = copy.deepcopy(detector)
    for name, kept in small.lean_report.kept.items():
        module = zeroed.get_submodule(name)
        gone = sorted(set(range(len(module.weight))) - set(kept))
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                parameter.data[gone] = 0
    x = torch.randn(2, 3, 64, 64)
    expected = outputs_of(zeroed, x)
    torch.testing.assert_close(outputs_of(small, x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(outputs_of(detector, x), expected, rtol=1e-2)


@pytest.mark.slow
def test_calibration_images_are_kept_as_bytes_and_prepared_when_asked_for(detector):
    batches = calibration_images(detector)
    assert [len(x) for x in batches] == [4, 4] and len(batches[:1]) == 1
    kept = [image for batch in batches._batches for image in batch]
    assert {image.dtype for image in kept} == {torch.uint8} and len({image.sum().item() for image in kept}) == 8
    expected = detector.data_preprocessor(dict(inputs=kept[:4]))['inputs']
    assert torch.equal(batches[0], expected) and torch.equal(batches[0], batches[0])


def test_calibration_brings_the_outputs_back(detector):
    images = [torch.randn(8, 3, 64, 64) for _ in range(4)]
    x = torch.randn(2, 3, 64, 64)
    truth = outputs_of(detector, x)

    def error(**options):
        pruned = lean_detector(detector, prune_kernels, amount=0.5, scope='layer', target='backbone', **options)
        return float((outputs_of(pruned, x) - truth).norm())

    assert error(calibration=images) < error()


@pytest.mark.slow
def test_blocks_of_a_detector(detector, tmp_path):
    images = [torch.randn(4, 3, 64, 64)]
    new = lean_detector(detector, remove_blocks, count=1, calibration=images)
    (name, error, _), = new.lean_report.removed
    assert name.startswith('backbone.layer') and error > 0
    assert isinstance(new.get_submodule(name), nn.Identity)
    write_detector(new, tmp_path / 'b.safetensors')
    assert isinstance(load_detector(tmp_path / 'b.safetensors').get_submodule(name), nn.Identity)
    named = lean_detector(detector, remove_blocks, blocks=['backbone.layer1.1'])
    assert named.lean_report.removed == (('backbone.layer1.1', None, None),)


def test_a_head_that_cannot_be_traced_is_left_and_the_report_says_so(detector, monkeypatch):
    monkeypatch.setattr(type(detector), '_forward', lambda self, images, samples: 1 / 0)
    small = lean_detector(detector, prune_channels, pruning_ratio=0.5, round_to=4)
    assert small.lean_report.unchanged[-1][0] == 'all behind the features'
    assert 'ZeroDivisionError' in str(small.lean_report)
    assert [c.conv.out_channels for c in small.neck.fpn_convs] == [16] * 3
    assert small.backbone.layer4[1].conv2.out_channels == 64
    assert not any(name.startswith('bbox_head') for name, *_ in small.lean_report.layers)


@pytest.mark.parametrize('options, message', [
    (dict(target='spine'), "has no 'spine'. It has data_preprocessor, backbone, neck, bbox_head"),
    (dict(target='neck', include='neck.*'), 'both choose layers'),
])
def test_bad_targets(detector, options, message):
    with pytest.raises(LeanError, match=message):
        lean_detector(detector, prune_kernels, amount=0.5, **options)


def test_steps_of_another_detector_are_told(pruned, folder, tmp_path, detector):
    from mmdet.registry import MODELS
    cfg = Config.fromfile(str(folder / 'config.py'))
    cfg.model.backbone.depth = 34
    with pytest.raises(LeanError, match=r'the checkpoint of another detector|not for this'):
        open_detector(folder / 'pruned.safetensors', cfg)
    cfg.model.lean_steps = [dict(op='resize', modules={'backbone.layer9': dict(num_features=3)})]
    with pytest.raises(LeanError, match=r"not for this RetinaNet: .*'backbone.layer9'"):
        MODELS.build(cfg.model)
    cfg.model.lean_steps = 'resize'
    with pytest.raises(LeanError, match='list of structural steps'):
        MODELS.build(cfg.model)
    with pytest.raises(LeanError, match='does not say which detector it holds'):
        open_detector(folder / 'zoo.pth')
    with pytest.raises(CheckpointError, match=r'another detector than the config describes: .*layer1.2'):
        open_detector(folder / 'zoo.pth', Config(dict(model={**cfg.model, 'lean_steps': []})))


@pytest.mark.slow
def test_commands(folder, pruned, tmp_path, capsys):
    out = tmp_path / 'c.safetensors'
    common = [str(folder / 'zoo.pth'), '-o', str(out), '--det-config', str(folder / 'config.py')]
    assert main(['prune', *common, '--granularity', 'channel', '--ratio', '0.5', '--calibrate', '8', '--evaluate',
                 '--finetune-epochs', '1', '--json', '--device', 'cpu']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['fine-tuned']['params'] == result['pruned']['params'] < result['before']['params']
    assert all(result[key]['ap'] is not None for key in ('before', 'pruned', 'fine-tuned'))
    assert steps_of(load_detector(out).cfg)[0]['op'] == 'resize' and 'calibration' in result
    assert main(['share', *common, '--params', '0.8', '--target', 'backbone', '--calibrate', '0']) == 0
    assert 'relative error of the output' in capsys.readouterr().out
    out.unlink()
    for wrong, message in (
            (['prune', *common, '--amount', '0.5', '--data', 'digits'], '--data is for classification'),
            (['prune', *common, '--amount', '0.5', '--target', 'spine'], "has no 'spine'"),
            (['share', *common, '--params', '0.8', '--calibrate', '-1'], 'at least 0, got -1'),
            (['share', str(folder / 'zoo.pth'), '-o', str(out), '--params', '0.8', '--evaluate'], 'Give --det-config'),
            (['prune', str(folder / 'pruned.safetensors'), '-o', str(out), '--granularity', 'channel'], '--again')):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error and 'Traceback' not in error
        assert not out.exists()


@pytest.mark.slow
def test_kernels_pruned_in_training_are_in_the_recipe(folder, tmp_path):
    cfg = Config.fromfile(str(folder / 'config.py'))
    cfg.work_dir = str(tmp_path)
    cfg.custom_hooks.insert(0, dict(type='timm_lean.KernelPruningHook', amount=0.5, target='backbone'))
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    Runner.from_cfg(cfg).train()
    model = load_detector(tmp_path / 'last.safetensors')
    assert kernel_report(model.backbone).share == pytest.approx(0.5, abs=0.02)
    step, = model.lean_steps
    assert (step['op'], step['amount']) == ('prune_kernels', 0.5)


@pytest.mark.parametrize('steps, message', [
    ([dict(op='system', command='x')], "Unknown recipe step 'system'"),
    ([dict(op='fold')] * 300, '300 steps; expected at most 256'),
    ([dict(op='resize', modules={'': dict(num_classes=1_000_001)})], 'more than 1,000,000'),
    ([dict(op='remove_blocks', blocks=['backbone/../x'])], 'no path, URL or expression is followed'),
    ([dict(op='remove_blocks', blocks=['backbone.layer9'])], "no such block|'backbone.layer9'"),
    ([dict(op='resize', modules={'backbone.conv1': dict(out_channels=1)})], 'the layer says'),
    (7, 'must be a list of structural steps, got 7'),
])
def test_a_strangers_steps_are_data_within_bounds(pruned, folder, tmp_path, steps, message):
    cfg = Config.fromfile(str(folder / 'config.py'))
    cfg.model.lean_steps = steps
    header = {**detector_header(folder / 'pruned.safetensors'), 'config': cfg.pretty_text}
    save_detector(pruned, tmp_path / 'bad.safetensors', header)
    with pytest.raises(CheckpointError, match=message):
        load_detector(tmp_path / 'bad.safetensors')
