"""RegularizerHook and SafetensorsHook in real training runs of a tiny detector."""
import json

import pytest
import torch
from mmdet_support import DENSE, batch, losses_of, predictions_of, scenes_config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from safetensors import safe_open

from timm_lean import CheckpointError, LeanError, create_regularizer
from timm_lean.mmdet import RegularizerHook, load_detector
from timm_lean.mmdet.detector import save_detector
from timm_lean.mmdet.weights import DETECTOR_KEY, detector_header


def regularizer_hook(*regularizers, **kwargs):
    return dict(type='timm_lean.RegularizerHook', regularizers=list(regularizers), **kwargs)


def test_terms_are_logged_weighted_and_trained(tmp_path):
    cfg = scenes_config(tmp_path)
    cfg.custom_hooks = [regularizer_hook(
        dict(type='basis_ortho', weight=3.), dict(type='conv_similarity', weight=1e-3, schedule='linear'))]
    cfg.default_hooks.logger.interval = 1
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    runner = Runner.from_cfg(cfg)
    hook = next(h for h in runner.hooks if isinstance(h, RegularizerHook))
    runner.train()
    scalars = runner.message_hub.log_scalars
    for name, weight in (('basis_ortho', 3.), ('conv_similarity', None)):
        raw, loss = scalars[f'train/{name}'].data[0], scalars[f'train/loss_{name}'].data[0]
        assert len(raw) == 2
        if weight is not None:
            assert loss == pytest.approx(weight * raw)
        else:  # the schedule's progress is 0 in the first and 1/2 in the second of two iterations
            assert loss == pytest.approx([1e-3 * raw[0], 0.5e-3 * raw[1]])
    total = scalars['train/loss'].data[0]
    parts = sum(scalars[f'train/{k}'].data[0] for k in (
        'loss_cls', 'loss_bbox', 'loss_basis_ortho', 'loss_conv_similarity'))
    assert total == pytest.approx(parts)
    assert hook._handle is None and not runner.model._forward_hooks


def test_term_has_the_gradient_of_its_regularizer(tmp_path):
    """The detector's gradient with the hook minus the one without is the regularizer's, also under autocast."""
    from mmdet.registry import MODELS
    torch.manual_seed(0)
    model = MODELS.build(scenes_config(tmp_path).model)
    regularizer = create_regularizer('basis_ortho', weight=10.)
    basis = model.backbone.net.layer2[1].conv1.basis.weight
    data = batch(64, classes=10)

    class FakeRunner:
        hooks: list = []  # noqa: RUF012
        iter, max_iters = 0, 10

    FakeRunner.model = model
    hook = RegularizerHook([dict(type='basis_ortho', weight=10.)])

    def gradient(dtype):
        model.zero_grad()
        # the batch norms' statistics move, their outputs in training mode do not depend on them
        with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
            losses = losses_of(model, data)
            loss, log = model.parse_losses(losses)
        loss.backward()
        return basis.grad.clone(), losses, log

    with torch.no_grad():
        basis.add_(0.3 * torch.randn_like(basis))
    expected = torch.autograd.grad(regularizer(model), basis)[0]
    for dtype in (None, torch.bfloat16):
        plain, _, _ = gradient(dtype)
        hook.before_train(FakeRunner)
        with_hook, losses, log = gradient(dtype)
        hook.after_train(FakeRunner)
        assert losses['loss_basis_ortho'].dtype == torch.float32 == losses['basis_ortho'].dtype
        assert not losses['basis_ortho'].requires_grad
        assert log['loss_basis_ortho'].item() == pytest.approx(10 * log['basis_ortho'].item())
        torch.testing.assert_close(with_hook - plain, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    hook.before_train(FakeRunner)
    assert len(predictions_of(model, data)) == 2  # other modes are left alone


@pytest.mark.parametrize('hooks, message', [
    ([regularizer_hook(dict(type='basis_ortho')), regularizer_hook(dict(type='l1', weight=1e-5))], 'twice'),
    ([regularizer_hook(dict(type='basis_ortho'), target='spine')], "has no 'spine'.*backbone"),
    ([regularizer_hook(dict(type='basis_ortho', weight=-1))], 'at least 0'),
    ([regularizer_hook(dict(type='nonsense'))], "Unknown regularizer 'nonsense'"),
    ([regularizer_hook()], 'needs regularizers'),
    ([regularizer_hook(dict(weight=1))], 'type=NAME'),
])
def test_bad_hooks_are_clear_errors(tmp_path, hooks, message):
    cfg = scenes_config(tmp_path)
    cfg.custom_hooks = hooks
    with pytest.raises(LeanError, match=message):
        Runner.from_cfg(cfg).train()


def test_regularizer_on_a_model_without_bases(tmp_path):
    cfg = scenes_config(tmp_path, DENSE)
    cfg.custom_hooks = [regularizer_hook(dict(type='basis_ortho')), dict(type='timm_lean.SafetensorsHook')]
    with pytest.raises(LeanError, match='no shared filter basis'):
        Runner.from_cfg(cfg).train()
    assert not list(tmp_path.glob('run/*.pth')) and not list(tmp_path.glob('run/*.safetensors'))


def test_whole_detector_as_target(tmp_path):
    cfg = scenes_config(tmp_path, DENSE)
    cfg.custom_hooks = [regularizer_hook(dict(type='l1', weight=1e-5), target='')]
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    convs = [m.weight for m in runner.model.modules() if isinstance(m, torch.nn.Conv2d)]
    logged = runner.message_hub.log_scalars['train/l1'].data[0][-1]
    assert logged == pytest.approx(sum(w.abs().sum().item() for w in convs), rel=0.1)


def test_a_term_replaces_no_loss_of_the_detector(tmp_path):
    """A detector that computes `loss_l1` and `l1` itself, as YOLOX does `loss_l1`."""
    model = torch.nn.Module()
    model.conv = torch.nn.Conv2d(1, 1, 1, bias=False)
    model.forward = lambda inputs, data_samples=None, mode='tensor': {'loss_l1': torch.tensor(5.), 'loss_cls': inputs}

    class FakeRunner:
        hooks: list = []  # noqa: RUF012
        iter, max_iters = 0, 10

    FakeRunner.model = model
    hook = RegularizerHook([dict(type='l1', weight=2.), dict(type='kernel_ortho', weight=1.)], target='')
    hook.before_train(FakeRunner)
    losses = model(torch.tensor(7.), mode='loss')
    size = model.conv.weight.abs().item()
    assert losses['loss_l1'] == 5 and losses['loss_cls'] == 7 and 'l1' not in losses
    assert losses['loss_l1_reg'].item() == pytest.approx(2 * size) and losses['l1_reg'].item() == pytest.approx(size)
    assert {'loss_kernel_ortho', 'kernel_ortho'} < set(losses)


def test_checkpoints_hold_the_evaluated_detector(tmp_path):
    cfg = scenes_config(tmp_path, epochs=2)
    runner = Runner.from_cfg(cfg)
    runner.train()
    last, best = (tmp_path / 'run' / f'{name}.safetensors' for name in ('last', 'best'))
    assert detector_header(last)['epoch'] == 2 and 'score' not in detector_header(last)
    header = detector_header(best)
    assert header['metric'] == 'coco/bbox_mAP' and header['metainfo']['classes'] == [str(i) for i in range(10)]
    assert header['backbone']['architecture'] == 'resnet34_s32u1'
    assert header['backbone']['model_args']['shared_rank'] == 4
    model = load_detector(last)
    data = batch(64, classes=10)
    for found, wanted in zip(predictions_of(model, data), predictions_of(runner.model, data), strict=True):
        torch.testing.assert_close(found.pred_instances.bboxes, wanted.pred_instances.bboxes, rtol=0, atol=0)
        torch.testing.assert_close(found.pred_instances.scores, wanted.pred_instances.scores, rtol=0, atol=0)
    with safe_open(last, 'pt') as f:
        assert sum(k.endswith('basis.weight') for k in f.keys()) == 4  # noqa: SIM118
    assert not [p for p in (tmp_path / 'run').iterdir() if p.suffix == '.tmp']


def test_averaged_weights_are_what_is_saved(tmp_path):
    cfg = scenes_config(tmp_path)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5, update_buffers=True), dict(type='timm_lean.SafetensorsHook')]
    runner = Runner.from_cfg(cfg)
    runner.train()
    averaged = next(h for h in runner.hooks if isinstance(h, EMAHook)).ema_model.module.state_dict()
    plain = runner.model.state_dict()
    name = 'bbox_head.retina_cls.weight'
    for file in ('best', 'last'):
        with safe_open(tmp_path / 'run' / f'{file}.safetensors', 'pt') as f:
            torch.testing.assert_close(f.get_tensor(name), averaged[name], rtol=0, atol=0)
            assert not torch.equal(f.get_tensor(name), plain[name])


@pytest.mark.slow
def test_best_is_kept_over_a_resume(tmp_path):
    cfg = scenes_config(tmp_path)
    Runner.from_cfg(cfg).train()
    best = tmp_path / 'run' / 'best.safetensors'
    header = detector_header(best)
    save_detector(load_detector(best), best, {**header, 'score': 0.99})
    cfg = scenes_config(tmp_path, epochs=2)
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    assert detector_header(best)['score'] == 0.99
    assert detector_header(tmp_path / 'run' / 'last.safetensors')['epoch'] == 2


def test_tied_modules_are_stored_once(tmp_path):
    """RTMDet's head shares convolutions between levels; safetensors refuses shared memory, the aliases restore it."""
    model = torch.nn.Module()
    model.a = torch.nn.Linear(2, 3)
    model.b = torch.nn.ModuleList([model.a, torch.nn.Linear(2, 3)])
    header = dict(format=1, config='', backbone=None, metainfo={})
    save_detector(model, tmp_path / 'tied.safetensors', header)
    with safe_open(tmp_path / 'tied.safetensors', 'pt') as f:
        assert sorted(f.keys()) == ['a.bias', 'a.weight', 'b.1.bias', 'b.1.weight']
    from timm_lean.mmdet.weights import load_from_safetensors
    state = load_from_safetensors(str(tmp_path / 'tied.safetensors'))['state_dict']
    assert sorted(state) == sorted(model.state_dict())
    model.load_state_dict(state)


@pytest.mark.parametrize('damage, message', [
    (lambda h: h.pop('config'), 'damaged header: config'),
    (lambda h: h.update(format=99), 'format 99'),
    (lambda h: h.update(backbone={'x': 1}), 'damaged header: backbone'),
    (lambda h: h.update(config='import os\nos.system("touch harm")'), 'plain values'),
    (lambda h: h.update(config='model = dict(type=open("/etc/passwd"))'), 'plain values'),
    (lambda h: h.update(config='log_level = "INFO"'), 'model must be a dict'),
])
def test_damaged_headers(tmp_path, damage, message):
    header = dict(format=1, config='x = 1', backbone=None, metainfo={}, aliases={})
    damage(header)
    from safetensors.torch import save_file
    path = tmp_path / 'damaged.safetensors'
    save_file({'a': torch.zeros(1)}, path, metadata={DETECTOR_KEY: json.dumps(header)})
    with pytest.raises(LeanError, match=message):
        load_detector(path)


def test_foreign_and_truncated_files(tmp_path):
    from safetensors.torch import save_file
    save_file({'a': torch.zeros(1)}, tmp_path / 'foreign.safetensors')
    with pytest.raises(CheckpointError, match='does not say which detector'):
        load_detector(tmp_path / 'foreign.safetensors')
    (tmp_path / 'short.safetensors').write_bytes((tmp_path / 'foreign.safetensors').read_bytes()[:-2])
    with pytest.raises(CheckpointError, match='not a whole safetensors file'):
        load_detector(tmp_path / 'short.safetensors')
    with pytest.raises(CheckpointError, match='does not exist'):
        load_detector(tmp_path / 'none.safetensors')
