"""TimmBackbone: which networks, their levels, freezing, weights, the neck's channels."""
import re

import pytest
import timm
import torch
from fuzz.safetensors_file import with_entry
from mmdet_support import SHARED, batch, losses_of, open_config, predictions_of
from mmengine.runner import load_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

from timm_lean import CheckpointError, LeanError, fold, load_model, prune_channels, prune_kernels, save_model
from timm_lean.checkpoint.format import save_hf_dir
from timm_lean.mmdet import TimmBackbone, lean_detector, load_detector, resolve_channels
from timm_lean.mmdet.detector import build_detector, describe, load_strictly, save_detector, write_detector
from timm_lean.mmdet.network import feature_channels

from conftest import randomize_batchnorm  # isort: skip

NARROW = dict(channels=(8, 16, 24, 32), layers=(2, 2, 2, 2))
SHARED_ARGS = dict(NARROW, shared_rank=4)
SLOW = pytest.mark.slow


@pytest.mark.parametrize('name, channels', [
    ('resnet18', [64, 128, 256, 512]),
    ('resnet34_s48u1_dual', [64, 128, 256, 512]),
    ('mobilenetv2_100_shared', [24, 32, 96, 320]),
    ('convnext_atto', [40, 80, 160, 320]),
    pytest.param('resnet50_shared', [256, 512, 1024, 2048], marks=SLOW),
    pytest.param('resnet50_sharedpp', [256, 512, 1024, 2048], marks=SLOW),
    pytest.param('mobilenetv2_100', [24, 32, 96, 320], marks=SLOW),
    pytest.param('efficientnet_b0', [24, 40, 112, 320], marks=SLOW),
    pytest.param('regnetx_002', [24, 56, 152, 368], marks=SLOW),
    pytest.param('densenet121', [256, 512, 1024, 1024], marks=SLOW),
])
def test_features_have_the_channels_and_strides_promised(name, channels):
    backbone = TimmBackbone(name).eval()
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert backbone.out_channels == channels == [m.shape[1] for m in maps]
    assert backbone.out_strides == [4, 8, 16, 32] == [64 // m.shape[2] for m in maps]


def test_small_image_networks_and_model_args():
    backbone = TimmBackbone('resnet32_cifar_s16u1_dual', out_indices=(1, 3))
    assert backbone.out_channels == [16, 64] and backbone.out_strides == [1, 4]
    backbone = TimmBackbone('resnet34_s32u1', out_indices=[4], model_args=SHARED_ARGS)
    assert backbone.out_channels == [32]


@pytest.mark.parametrize('name, frozen, first_trained', [
    ('resnet18', 0, 'net.layer1.0.conv1.weight'),
    ('resnet18', 2, 'net.layer3.0.conv1.weight'),
    ('convnext_atto', 0, 'net.stages_0.blocks.0.gamma'),
    ('convnext_atto', 1, 'net.stages_1.downsample.0.weight'),
    ('mobilenetv2_100_shared', 1, 'net.blocks_2.0.conv_pw.weight'),
    ('resnet20_cifar', 1, 'net.layer2.0.conv1.weight'),
])
def test_frozen_stages(name, frozen, first_trained):
    kwargs = dict(out_indices=(1, 2, 3)) if 'cifar' in name else {}
    backbone = TimmBackbone(name, frozen_stages=frozen, **kwargs).train()
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
    names = [n for n, _ in backbone.named_parameters()]
    assert trained[0] == first_trained
    assert trained == names[names.index(first_trained):]
    frozen_names = set(names) - set(trained)
    for module_name, module in backbone.named_modules():
        own = [f'{module_name}.{n}' for n, _ in module.named_parameters(recurse=False)]
        if own:
            assert module.training == (own[0] not in frozen_names), module_name
    assert backbone.training and backbone.net.training


def test_shared_basis_of_a_frozen_stage_is_frozen():
    backbone = TimmBackbone('resnet34_s32u1', frozen_stages=1, model_args=NARROW | dict(shared_rank=4))
    bases = {m.basis for m in backbone.modules() if getattr(m, 'basis', None) is not None}
    assert sorted((b.stage, b.weight.requires_grad) for b in bases) == [(0, False), (1, True), (2, True), (3, True)]
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.train()(torch.randn(2, 3, 64, 64))
    changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not any(k.startswith(('net.bn1', 'net.layer1')) for k in changed)


def test_norm_eval_survives_train():
    backbone = TimmBackbone('resnet18', norm_eval=True).train()
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and backbone.net.layer1[0].training


@pytest.mark.parametrize('kwargs, message', [
    (dict(model_name='resnet18', out_indices=(1, 5)), r'feature levels 0 to 4 \(0: stride 2, 64 channels'),
    (dict(model_name='resnet18', out_indices=(2, 1)), 'increase'),
    (dict(model_name='resnet18', out_indices=()), 'feature levels 0 to 4'),
    (dict(model_name='resnet18', out_indices=3), 'feature levels 0 to 4'),
    (dict(model_name='resnet18', frozen_stages=5), r'-1 \(nothing\) to 4'),
    (dict(model_name='resnet_nope'), "Unknown architecture 'resnet_nope'"),
    (dict(), 'needs model_name'),
    (dict(model_name='resnet18', checkpoint='missing.pth'), 'does not exist'),
    (dict(checkpoint='missing.safetensors'), 'does not exist'),
    (dict(model_name='resnet18', pretrained=True, checkpoint='a.pth'), 'give one of them'),
    (dict(model_name='resnet34_s32u1', model_args=dict(shared_rank=1000)), 'room for'),
    (dict(model_name='resnet18', model_args=dict(nonsense=1)), 'nonsense'),
])
def test_bad_arguments_are_clear_errors(kwargs, message):
    with pytest.raises(LeanError, match=message):
        TimmBackbone(**kwargs)


@pytest.mark.parametrize('name', [
    *(pytest.param(name, marks=pytest.mark.slow) for name in ('resnet34_s32u1', 'mobilenetv2_100_shared')),
    'resnet20_cifar_shared'])
def test_weights_of_every_kind_of_file(name, tmp_path):
    """The features with the file's weights are those of the network it was written from."""
    args = SHARED_ARGS if name.startswith('resnet34') else {}
    if name == 'resnet20_cifar_shared':
        name, args = 'resnet20_cifar', dict(shared_rank=8, unique_rank=1)
    model = randomize_batchnorm(timm.create_model(name, num_classes=7, **args)).eval()
    indices = (1, 2, 3)
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=list(indices), intermediates_only=True)

    save_model(model, tmp_path / 'model.safetensors')
    save_hf_dir(model, tmp_path / 'hf')
    save_file(model.state_dict(), tmp_path / 'plain.safetensors')
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    first = TimmBackbone(checkpoint=str(tmp_path / 'model.safetensors'), out_indices=indices)
    torch.save({f'backbone.{k}': v for k, v in first.state_dict().items()}, tmp_path / 'detector.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'model.safetensors'))
    prefixed = dict(type='Pretrained', checkpoint=str(tmp_path / 'detector.pth'), prefix='backbone.')
    for kwargs in (
            dict(checkpoint=str(tmp_path / 'model.safetensors')),
            dict(checkpoint=str(tmp_path / 'model.safetensors'), model_name=name),
            dict(model_name=f'local-dir:{tmp_path / "hf"}'),
            dict(checkpoint=str(tmp_path / 'plain.safetensors'), model_name=name, model_args=args),
            dict(checkpoint=str(tmp_path / 'model.pth'), model_name=name, model_args=args),
            dict(checkpoint=str(tmp_path / 'detector.pth'), model_name=name, model_args=args),
            dict(model_name=name, model_args=args, init_cfg=init_cfg),
            dict(model_name=name, model_args=args, init_cfg=prefixed)):
        backbone = TimmBackbone(out_indices=indices, **kwargs)
        backbone.init_weights()
        for found, wanted in zip(backbone.eval()(x), expected, strict=True):
            torch.testing.assert_close(found, wanted, msg=str(kwargs))


def test_restructured_checkpoint(tmp_path):
    """A folded network goes through the `lean` entry; its features are the unfolded one's."""
    model = randomize_batchnorm(timm.create_model('resnet34_s32u1', **SHARED_ARGS)).eval()
    save_model(fold(model), tmp_path / 'folded.safetensors')
    backbone = TimmBackbone(checkpoint=str(tmp_path / 'folded.safetensors'), out_indices=(2, 4)).eval()
    assert backbone.recipe.steps == [{'op': 'fold'}] and backbone.out_channels == [16, 32]
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[2, 4], intermediates_only=True)
    for found, wanted in zip(backbone(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert load_model(tmp_path / 'folded.safetensors') is not None


def test_checkpoint_for_another_architecture(tmp_path):
    path = str(tmp_path / 'model.safetensors')
    save_model(timm.create_model('resnet34_s32u1', **SHARED_ARGS), path)
    with pytest.raises(CheckpointError, match="holds a 'resnet34_s32u1', but model_name is 'resnet50'"):
        TimmBackbone('resnet50', checkpoint=path)
    with pytest.raises(CheckpointError, match=r'other shape.*instead of'):
        TimmBackbone(checkpoint=path, model_args=dict(shared_rank=5))
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'r18.pth')
    with pytest.raises(CheckpointError, match=r"does not fit 'resnet34': missing layer1\.2\.conv1\.weight"):
        TimmBackbone('resnet34', checkpoint=str(tmp_path / 'r18.pth'))
    backbone = TimmBackbone('resnet34', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'r18.pth')))
    with pytest.raises(CheckpointError, match="does not fit 'resnet34'"):
        backbone.init_weights()
    (tmp_path / 'bad.safetensors').write_bytes(b'nonsense')
    with pytest.raises(CheckpointError, match='not a whole safetensors file'):
        TimmBackbone('resnet18', checkpoint=str(tmp_path / 'bad.safetensors'))


@pytest.mark.parametrize('kind', ['TimmBackbone', 'timm_lean.TimmBackbone', TimmBackbone])
def test_channels_are_resolved_wherever_a_detector_is_built(kind):
    from mmdet.registry import MODELS
    from mmengine.registry import MODELS as ROOT
    for registry in (MODELS, ROOT):
        cfg = open_config(SHARED).model
        cfg.backbone.type = kind
        model = registry.build(cfg)
        assert model.neck.in_channels == [32, 64, 128] == model.backbone.out_channels
        assert losses_of(model, batch(64))


def test_wrong_channels_print_the_right_list():
    from mmdet.registry import MODELS
    cfg = open_config(SHARED).model
    cfg.neck.in_channels = [64, 128, 256]
    with pytest.raises(LeanError, match=re.escape("must be [32, 64, 128], or 'auto'")):
        MODELS.build(cfg)


def test_channels_of_other_necks_and_configs():
    backbone = dict(type='TimmBackbone', model_name='resnet18', out_indices=(2, 3, 4))
    for neck, right in (('YOLOV3Neck', [512, 256, 128]), ('CTResNetNeck', 512), ('ChannelMapper', [128, 256, 512])):
        cfg = dict(backbone=dict(backbone), neck=dict(type=neck, in_channels='auto'))
        resolve_channels(cfg)
        assert cfg['neck']['in_channels'] == right
        resolve_channels(cfg)  # the right channels pass
    cfg = dict(backbone=dict(backbone), neck=[dict(type='FPN', in_channels='auto'), dict(type='DyHead')])
    resolve_channels(cfg)
    assert cfg['neck'][0]['in_channels'] == [128, 256, 512]
    for other in (None, [], dict(type='ResNet'), dict(backbone=dict(type='ResNet'), neck=dict(in_channels='auto')),
                  dict(backbone=backbone), dict(backbone=backbone, neck=dict(type='SSDNeck'))):
        resolve_channels(other)


@pytest.fixture
def dense_file(tmp_path):
    torch.manual_seed(0)
    model = randomize_batchnorm(timm.create_model('resnet34', num_classes=7, **NARROW)).eval()
    save_model(model, tmp_path / 'dense.safetensors')
    return str(tmp_path / 'dense.safetensors')


def test_share_keeps_the_features_at_full_rank(dense_file):
    dense = TimmBackbone(checkpoint=dense_file).eval()
    shared = TimmBackbone(checkpoint=dense_file, share=dict(energy=1.0, dual=True)).eval()
    assert dense.lean_report is None and shared.lean_report.layers
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(dense(x), shared(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_share_meets_a_budget_and_the_recipe_rebuilds_it(dense_file, tmp_path):
    def count(backbone):
        return sum(p.numel() for p in backbone.parameters())

    shared = TimmBackbone(checkpoint=dense_file, share=dict(params=0.6, unique_rank=1)).eval()
    assert abs(count(shared) / count(TimmBackbone(checkpoint=dense_file)) - 0.6) < 0.03
    name, args = shared.recipe.create_args()
    save_file(shared.net.state_dict(), tmp_path / 'shared.safetensors')
    again = TimmBackbone(name, checkpoint=str(tmp_path / 'shared.safetensors'), model_args=args).eval()
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(shared(x), again(x), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(LeanError, match=r'shared already. Take share out of the config'):
        TimmBackbone(name, checkpoint=str(tmp_path / 'shared.safetensors'), model_args=args, share=dict(params=0.5))


@pytest.mark.parametrize('share, message', [
    (dict(params=0.5), 'only random ones. Give pretrained=True or checkpoint=FILE, or shared_rank instead of params'),
    (dict(shared_rank=4, rank=2), r"has no argument 'rank'\. It takes shared_rank, energy, params"),
    (dict(shared_rank=0), 'whole number of at least 1, got 0'),
    (dict(), 'exactly one of shared_rank, energy and params'),
    (0.5, r'must be a dict .* like dict\(params=0.5\), got 0.5'),
])
def test_bad_share_options_are_clear_errors(share, message):
    with pytest.raises(LeanError, match=message):
        TimmBackbone('resnet18', model_args=dict(channels=(8, 16, 24, 32)), share=share)


def test_packed_checkpoints_bring_their_zeros(tmp_path):
    """Of pruned kernels the file has the live ones alone."""
    model = prune_kernels(timm.create_model('resnet20_cifar'), criterion='weight', amount=0.7)
    save_model(model, path := str(tmp_path / 'm.safetensors'))
    backbone = TimmBackbone(checkpoint=path)
    assert sum(int((m.weight == 0).sum()) for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)) == sum(
        int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert feature_channels(checkpoint=path) == backbone.out_channels


def test_a_checkpoint_asks_for_no_more_than_its_tensors_justify(tmp_path):
    path = tmp_path / 'm.safetensors'
    save_model(timm.create_model('resnet20_cifar'), path)
    path.write_bytes(with_entry(path.read_bytes(), model_args=dict(layers=[9000, 1, 1])))
    for build in (TimmBackbone, feature_channels):
        with pytest.raises(CheckpointError, match=r'm\.safetensors cannot be rebuilt: .* modules'):
            build(checkpoint=str(path))


@pytest.mark.slow
def test_detector_with_share_reloads_without_it(dense_file, tmp_path):
    cfg = open_config(SHARED)
    cfg.model.backbone = dict(
        type='timm_lean.TimmBackbone', checkpoint=dense_file, share=dict(shared_rank=4), out_indices=(2, 3, 4))
    model = build_detector(cfg).eval()
    assert model.backbone.lean_report.layers
    save_detector(model, tmp_path / 'det.safetensors', describe(cfg, model, {'classes': [str(i) for i in range(10)]}))
    loaded = load_detector(tmp_path / 'det.safetensors')
    assert 'share' not in loaded.cfg.model.backbone
    for a, b in zip(predictions_of(model, batch(64)), predictions_of(loaded, batch(64)), strict=True):
        assert torch.equal(a.pred_instances.scores, b.pred_instances.scores)
    pruned = lean_detector(loaded, prune_channels, pruning_ratio=0.25)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in loaded.parameters())
    write_detector(pruned, tmp_path / 'pruned.safetensors')
    again = load_detector(tmp_path / 'pruned.safetensors')
    assert [step['op'] for step in (*again.backbone.recipe.steps, *again.lean_steps)] == ['share', 'resize']


@pytest.mark.parametrize('depth', [18, 50])
def test_native_checkpoints_of_mmdetections_resnets(depth, tmp_path):
    """MMDetection's ResNet has timm's names; its detectors' files give the same features, to the last bit."""
    from mmdet.models.backbones import ResNet
    torch.manual_seed(0)
    native = randomize_batchnorm(ResNet(depth, norm_eval=False)).eval()
    state = {f'backbone.{name}': value for name, value in native.state_dict().items()}
    path = str(tmp_path / 'native.pth')
    torch.save(dict(state_dict={**state, 'bbox_head.fc.weight': torch.zeros(2)}, meta=dict(epoch=1)), path)
    x = torch.randn(1, 3, 64, 64)
    detector = torch.nn.Module()
    detector.backbone = TimmBackbone(f'resnet{depth}')
    load_checkpoint(detector, path)
    for backbone in (TimmBackbone(f'resnet{depth}', checkpoint=path), detector.backbone):
        for found, wanted in zip(backbone.eval()(x), native(x), strict=True):
            assert torch.equal(found, wanted)


def test_detectors_with_a_native_backbone_initialize_ours(tmp_path):
    cfg = open_config(SHARED)
    cfg.model.backbone = dict(type='mmdet.ResNet', depth=18, out_indices=(1, 2, 3), init_cfg=None)
    cfg.model.neck.in_channels = [128, 256, 512]
    native = build_detector(cfg)
    torch.save(dict(state_dict=native.state_dict()), tmp_path / 'native.pth')
    cfg.model.backbone = dict(type='TimmBackbone', model_name='resnet18', out_indices=(2, 3, 4))
    ours = build_detector(cfg)
    load_strictly(ours, tmp_path / 'native.pth')
    data = batch(64, classes=10)
    for found, wanted in zip(predictions_of(ours, data), predictions_of(native, data), strict=True):
        assert torch.equal(found.pred_instances.bboxes, wanted.pred_instances.bboxes)


def test_unknown_arguments_of_registered_classes():
    from mmengine.registry import HOOKS, MODELS
    with pytest.raises(LeanError, match=r"TimmBackbone has no argument 'depth'\. It takes model_name, pretrained"):
        MODELS.build(dict(type='TimmBackbone', model_name='resnet18', depth=18))
    with pytest.raises(LeanError, match="SafetensorsHook has no argument 'every'"):
        HOOKS.build(dict(type='SafetensorsHook', every=2))
    with pytest.raises(LeanError, match="KernelPruningHook has no argument 'sparsity'"):
        HOOKS.build(dict(type='KernelPruningHook', amount=0.5, sparsity=1))
    with pytest.raises(LeanError, match=r"share=.* has no argument 'parms'"):
        TimmBackbone('resnet18', share=dict(parms=0.5, shared_rank=4))


def test_the_channels_of_a_file_are_known_without_reading_its_tensors(tmp_path, monkeypatch):
    save_model(timm.create_model('resnet20_cifar', channels=[8, 16, 24]), tmp_path / 'm.safetensors')
    read = []

    class Opened:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            self.file.__exit__(*args)

        def __getattr__(self, name):
            read.append(name)
            return getattr(self.file, name)
    monkeypatch.setattr('timm_lean.mmdet.weights.safe_open', Opened)
    assert feature_channels(checkpoint=str(tmp_path / 'm.safetensors')) == [24]
    assert 'metadata' in read and 'get_tensor' not in read
