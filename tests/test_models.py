"""Every registered model is a timm model in full: timm's own model tests, and what users do with models besides.

The fast set runs a short member of each family, and what compiles or traces with one of them; the names themselves
are marked slow.
"""
import copy
import math
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomize_batchnorm
from timm.models import create_feature_extractor, get_graph_node_names, group_modules, group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch._inductor import config as inductor_config
from torch.nn.parallel import DistributedDataParallel

from timm_lean import create_regularizer, fold, load_model, save_model
from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d
from timm_lean.models import model_names

SHORT = {  # two blocks a stage: one as it was, one that shares
    'resnet34_s48u1_dual': dict(layers=(2, 2, 2, 2), channels=(16, 32, 64, 128)),
    'resnet50_sharedpp': dict(layers=(2, 2, 2, 2), channels=(16, 32, 64, 128)),
    'mobilenetv2_100_sharedpp': {},
    'resnet32_cifar_s16u1_dual': dict(layers=(3, 3, 3)),
    'densenet121_cifar_s64u4': dict(layers=(2, 2, 2, 2)),
    'resnext50_cifar_s16u1': dict(layers=(2, 2, 2, 2)),
    'mobilenetv2_cifar_sharedpp': {},
}
INTERFACE = {
    'resnet34_s32u1', 'resnet34_s48u1', 'resnet34_s32u1_dual', 'resnet34_s48u1_dual', 'resnet50_shared',
    'resnet50_sharedpp', 'resnet101_shared', 'resnet101_sharedpp', 'mobilenetv2_100_shared', 'mobilenetv2_100_sharedpp',
    'resnet20_cifar', 'resnet32_cifar', 'resnet56_cifar', 'resnet110_cifar', 'resnet18_cifar', 'resnet34_cifar',
    'resnet32_cifar_s8u1', 'resnet32_cifar_s16u1', 'resnet32_cifar_s16u1_dual', 'resnet56_cifar_s8u1',
    'resnet56_cifar_s16u1', 'resnet56_cifar_s16u1_dual', 'resnet34_cifar_s8u1', 'resnet34_cifar_s16u1',
    'resnet34_cifar_s32u1',
    'densenet121_cifar', 'densenet121_cifar_s64u4', 'resnext50_cifar', 'resnext50_cifar_s16u1',
    'mobilenetv2_cifar', 'mobilenetv2_cifar_shared', 'mobilenetv2_cifar_sharedpp',
}
CIFAR_CHANNELS = {
    'densenet': [64, 256, 512, 1024, 1024], 'resnext50': [64, 256, 512, 1024, 2048], 'mobilenetv2': [16, 24, 32, 320]}


# --- one model at a time: the parameter has module scope, so pytest runs all tests of a name together -----------------

LONG = [pytest.param((name, {}), id=name, marks=pytest.mark.slow) for name in model_names() if name != 'lean']


@pytest.fixture(scope='module', params=[
    *(pytest.param((name, kwargs), id=f'{name} short') for name, kwargs in SHORT.items()), *LONG])
def case(request):
    return request.param


# for tests that compile, trace or build a network several times
few_fast = pytest.mark.parametrize('case', [
    *(pytest.param((name, kwargs), id=f'{name} short', marks=[
        pytest.mark.slow] if name != 'resnet32_cifar_s16u1_dual' else [])
      for name, kwargs in SHORT.items()), *LONG], indirect=True)


@pytest.fixture(scope='module')
def name(case):
    return case[0]


@pytest.fixture(scope='module')
def create(case):
    """Builds the network with further arguments."""
    return partial(timm.create_model, case[0], **case[1])


@pytest.fixture(scope='module')
def template(create):
    torch.manual_seed(0)
    return randomize_batchnorm(create()).eval()


@pytest.fixture
def model(template):
    return copy.deepcopy(template)


@pytest.fixture
def x(model):
    return images(model)


def images(model: nn.Module, batch: int = 2, size: int = 64) -> torch.Tensor:
    chs, height, width = model.default_cfg['input_size']
    return torch.randn(batch, chs, min(height, size), min(width, size))


def size_divisor(name: str, x: torch.Tensor, out: torch.Tensor) -> int:
    """How much smaller the map is than the image; the stem of MobileNetV2 for CIFAR pads the image by one pixel."""
    if not name.startswith('mobilenetv2_cifar'):
        return x.shape[-1] // out.shape[-1]
    reduction = 2 ** round(math.log2((x.shape[-1] + 2) / out.shape[-1]))
    assert out.shape[-1] == math.ceil((x.shape[-1] + 2) / reduction)
    return reduction


def loss_and_grads(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(x)
    F.cross_entropy(out, torch.arange(len(x), device=x.device)).backward()
    return out.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}


def assert_close(actual, expected, rtol: float = 1e-4):
    """Equal up to rounding, relative to the largest expected value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * max(expected.abs().max().item(), 1e-6))


def bases(model: nn.Module) -> list[nn.Parameter]:
    """The distinct shared bases that the layers really use."""
    found = {id(m.basis.weight): m.basis.weight for m in model.modules()
             if isinstance(m, SharedBasisConv2d) and m.basis is not None}
    return list(found.values())


# --- registration -----------------------------------------------------------------------------------------------------

def test_registered_names_are_the_interface():
    assert set(model_names()) >= INTERFACE
    assert all(timm.is_model(n) for n in [*INTERFACE, 'lean'])


def test_every_model_has_a_default_cfg_and_is_listed(name):
    assert name in timm.list_models()
    assert timm.get_pretrained_cfg(name).architecture == name
    assert name not in timm.list_models(pretrained=True)


# --- what timm's own tests check --------------------------------------------------------------------------------------

def test_forward(model, x):
    out = model(x)
    assert out.shape == (2, model.default_cfg['num_classes'])
    assert out.isfinite().all()


def test_backward_reaches_every_parameter(create, device):
    model = create(num_classes=42).train()
    out, grads = loss_and_grads(model.to(device), images(model).to(device))
    assert out.shape[-1] == 42
    assert out.isfinite().all()
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() for g in grads.values())
    assert not [k for k, g in grads.items() if g.dim() > 1 and not g.any()]


@few_fast
def test_forward_features_has_the_pool_size_of_the_default_cfg(model):
    cfg = model.default_cfg
    with torch.no_grad():
        features = model.forward_features(images(model, batch=1, size=cfg['input_size'][-1]))
    assert features.shape == (1, model.num_features, *cfg['pool_size'])


def test_default_cfg_names_the_first_conv_and_the_classifier(model):
    first, last = (model.get_submodule(model.default_cfg[k]) for k in ('first_conv', 'classifier'))
    assert first.in_channels == 3
    assert first is next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert last.out_features == model.num_classes == model.default_cfg['num_classes']


def test_num_classes_0_gives_pooled_features(create):
    model = create(num_classes=0).eval()
    assert model.num_classes == 0
    assert not any(k.startswith(model.default_cfg['classifier'] + '.') for k in model.state_dict())
    assert model(images(model)).shape == (2, model.head_hidden_size)


def test_no_classes_and_no_pooling_gives_the_feature_map(create):
    model = create(num_classes=0, global_pool='').eval()
    x = images(model)
    out = model(x)
    assert out.dim() == 4
    torch.testing.assert_close(out, model.forward_head(model.forward_features(x)))


@pytest.mark.parametrize('pool', ['max', 'avgmax', 'catavgmax'])
@few_fast
def test_global_pool_types(create, pool):
    model = create(num_classes=5, global_pool=pool).eval()
    assert model(images(model)).shape == (2, 5)


def test_reset_classifier_to_0_gives_pooled_features(model, x):
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), expected)


def test_reset_classifier_without_pooling_gives_the_feature_map(model, x):
    expected = model.forward_features(x)
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), expected)


def test_reset_classifier_to_another_class_count(model, x):
    model.reset_classifier(7)
    assert model.num_classes == model.get_classifier().out_features == 7
    assert model(x).shape == (2, 7)


def test_in_chans_1(create):
    model = create(in_chans=1).eval()
    assert model.get_submodule(model.default_cfg['first_conv']).in_channels == 1
    assert model(images(model)[:, :1]).isfinite().all()


def test_get_classifier_is_the_module_that_the_cfg_names(model):
    assert model.get_classifier() is model.get_submodule(model.default_cfg['classifier'])


def test_forward_is_features_then_head(model, x):
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))


def test_pre_logits_have_head_hidden_size_and_feed_the_classifier(model, x):
    features = model.forward_features(x)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    assert features.shape[1] == model.num_features
    torch.testing.assert_close(model.get_classifier()(hidden), model(x))


def test_dropout_before_the_classifier(create):
    model = create(drop_rate=0.5).eval()
    x = images(model)
    torch.testing.assert_close(model(x), model(x))
    hidden = model.train().forward_head(torch.ones(2, model.num_features, 1, 1), pre_logits=True)
    assert (hidden == 0).any()


def test_features_only_has_the_channels_and_reductions_it_announces(name, create, x):
    model = create(features_only=True).eval()
    info = model.feature_info
    outs = model(x)
    assert [o.shape[1] for o in outs] == info.channels()
    assert [size_divisor(name, x, o) for o in outs] == info.reduction()
    assert all(o.isfinite().all() for o in outs)


def test_cifar_features_start_at_full_resolution(name):
    if 'cifar' not in name:
        pytest.skip('an ImageNet model')
    with torch.device('meta'):
        info = timm.create_model(name, features_only=True).feature_info
    thin = timm.get_pretrained_cfg_value(name, 'num_classes') == 10
    if channels := next((c for family, c in CIFAR_CHANNELS.items() if name.startswith(family)), None):
        assert info.reduction() == [1, 1, 2, 4, 8][-len(channels):]
        assert info.channels() == channels
        return
    assert info.reduction() == ([1, 1, 2, 4] if thin else [1, 1, 2, 4, 8])
    assert info.channels() == ([16, 16, 32, 64] if thin else [64, 64, 128, 256, 512])


@pytest.mark.parametrize('out_indices', [(1, 3), (0, 2), (-2, -1), 2])
@few_fast
def test_features_only_out_indices_select(create, x, out_indices):
    torch.manual_seed(1)
    all_outs = create(features_only=True).eval()(x)
    torch.manual_seed(1)
    model = create(features_only=True, out_indices=out_indices).eval()
    wanted = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    outs = model(x)
    assert len(outs) == len(model.feature_info.channels()) == len(wanted)
    for out, i, chs in zip(outs, wanted, model.feature_info.channels(), strict=True):
        assert out.shape[1] == chs
        torch.testing.assert_close(out, all_outs[i])


@pytest.mark.parametrize('feature_cls', ['hook', 'dict', 'getter', 'fx'])
@few_fast
def test_features_only_is_the_same_by_every_feature_class(create, x, feature_cls):
    torch.manual_seed(1)
    expected = create(features_only=True, out_indices=(1, 2)).eval()(x)
    torch.manual_seed(1)
    outs = create(features_only=True, out_indices=(1, 2), feature_cls=feature_cls).eval()(x)
    outs = list(outs.values()) if isinstance(outs, dict) else outs
    assert len(outs) == 2
    for out, e in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, e)


def test_features_only_loads_the_classifiers_weights(create, template, x):
    features = create(features_only=True).eval()
    wanted = features.state_dict()
    flat = {re.sub(r'^(blocks)\.', r'\1_', k): v for k, v in template.state_dict().items()}
    features.load_state_dict({k: v for k, v in flat.items() if k in wanted}, strict=True)
    expected = template.forward_intermediates(x, intermediates_only=True)
    for out, e in zip(features(x), expected, strict=True):
        torch.testing.assert_close(out, e)


def test_forward_intermediates_are_the_stages_and_the_final_features(name, model, x):
    final, outs = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [o.shape[1] for o in outs] == [f['num_chs'] for f in model.feature_info]
    assert [size_divisor(name, x, o) for o in outs] == [f['reduction'] for f in model.feature_info]
    assert all(o.isfinite().all() for o in outs)


@pytest.mark.parametrize('indices', [[1, 2], [0], [-1], 2, None])
@few_fast
def test_forward_intermediates_indices_select(model, x, indices):
    everything = model.forward_intermediates(x, intermediates_only=True)
    outs = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    wanted = range(-indices, 0) if isinstance(indices, int) else range(len(everything)) if indices is None else indices
    assert len(outs) == len(wanted)
    for out, i in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, everything[i])


def test_forward_intermediates_stops_early(model, x):
    last_stage = model.get_submodule(model.feature_info[-1]['module'])
    calls = []
    last_stage.register_forward_hook(lambda *args: calls.append(1))
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert calls
    calls.clear()
    outs = model.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True)
    assert not calls
    torch.testing.assert_close(outs, expected)


def test_forward_intermediates_refuses_an_index_out_of_range(model, x):
    with pytest.raises(AssertionError):
        model.forward_intermediates(x, indices=[len(model.feature_info)])


def test_prune_intermediate_layers_keeps_the_outputs_wanted(model, x):
    before = sum(p.numel() for p in model.parameters())
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert sum(p.numel() for p in model.parameters()) < before / 2
    torch.testing.assert_close(model.forward_intermediates(x, indices=[0, 2], intermediates_only=True), expected)


def test_prune_intermediate_layers_can_keep_the_head(model, x):
    expected = model(x)
    model.prune_intermediate_layers(1, prune_head=False)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('coarse', [False, True])
def test_group_matcher_groups_every_parameter_by_depth(model, coarse):
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    first, last = (model.default_cfg[k] + '.weight' for k in ('first_conv', 'classifier'))
    assert groups[first] == 0 == min(groups.values())
    assert groups[last] == max(groups.values())
    assert len(set(groups.values())) >= 5 if coarse else len(set(groups.values())) > 8
    in_last_group = {k.split('.')[0] for k, g in groups.items() if g == groups[last]}
    assert in_last_group <= {'fc', 'classifier', 'conv_head', 'bn2'}, 'unmatched parameters fall into the last group'


def test_group_matcher_groups_every_module_with_parameters(model):
    grouped = [m for names in group_modules(model, model.group_matcher()).values() for m in names]
    with_params = {n for n, m in model.named_modules() if m._parameters and any(True for _ in m.parameters(False))}
    assert with_params <= set(grouped)


def test_layer_decay_scales_each_parameter_once_less_towards_the_stem(model):
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=1e-4, layer_decay=0.7)
    scale = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(scale) == len(list(model.parameters()))
    assert scale[id(model.get_classifier().weight)] == 1
    stem = model.get_submodule(model.default_cfg['first_conv']).weight
    assert scale[id(stem)] == min(scale.values()) < 0.7
    assert all(id(b) in scale for b in bases(model))


@few_fast
def test_grad_checkpointing_gives_the_same_result_and_gradients(model, x):
    plain, checkpointed = model.train(), copy.deepcopy(model).train()
    checkpointed.set_grad_checkpointing()
    out, grads = loss_and_grads(plain, x)
    calls = []
    block_bn = next(m for n, m in checkpointed.named_modules()
                    if isinstance(m, nn.BatchNorm2d) and re.match(r'(layer1|blocks)\.', n))
    block_bn.register_forward_hook(lambda *args: calls.append(1))
    out2, grads2 = loss_and_grads(checkpointed, x)
    assert len(calls) == 2, 'the block should have been computed again in the backward pass'
    torch.testing.assert_close(out2, out)
    for k in grads:
        assert_close(grads2[k], grads[k])
    checkpointed.set_grad_checkpointing(False)
    calls.clear()
    loss_and_grads(checkpointed, x)
    assert len(calls) == 1


@few_fast
def test_fx_trace_forward(model, x):
    expected = model(x)
    nodes = get_graph_node_names(model)[1]
    traced = create_feature_extractor(model, return_nodes={nodes[-1]: 'out'}).eval()
    torch.testing.assert_close(traced(x)['out'], expected)


@few_fast
def test_fx_trace_backward(model, x):
    model.train()
    expected = loss_and_grads(copy.deepcopy(model), x)[1]
    nodes = get_graph_node_names(model)[0]
    traced = create_feature_extractor(model, return_nodes={nodes[-1]: 'out'}).train()
    F.cross_entropy(traced(x)['out'], torch.arange(2)).backward()
    params = {k: p for k, p in traced.named_parameters() if p.grad is not None}
    assert sum(p.numel() for p in params.values()) == sum(g.numel() for g in expected.values())
    for k, p in params.items():
        assert_close(p.grad, expected[k])


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@few_fast
def test_torchscript(create, template, x):
    with timm.layers.set_scriptable(True):
        model = create().eval()
    model.load_state_dict(template.state_dict())
    torch.testing.assert_close(torch.jit.script(model)(x), template(x))


# --- what users do besides --------------------------------------------------------------------------------------------

def test_deepcopy_is_equal_and_independent(model, x):
    twin = copy.deepcopy(model)
    expected = model(x)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert len(bases(twin)) == len(bases(model))


def test_pickle(model, x):
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert len(bases(twin)) == len(bases(model))


def test_ema_averages_every_parameter_and_basis_once(model):
    before = copy.deepcopy(model.state_dict())
    ema = ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(model)
    assert len(bases(ema.module)) == len(bases(model))
    for k, p in ema.module.named_parameters():
        torch.testing.assert_close(p, before[k] + 0.25, rtol=0, atol=1e-5)


def test_channels_last(model, x, device):
    expected = model(x)
    model.to(device, memory_format=torch.channels_last)
    out = model(x.to(device, memory_format=torch.channels_last))
    assert_close(out.cpu(), expected)
    assert len(model.state_dict()) == len(set(model.state_dict()))
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})


@few_fast
def test_bf16_autocast_trains_and_stays_close(model, x, device):
    expected = model(x)
    model, x = model.to(device), x.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = model(x)
    assert out.dtype is torch.bfloat16
    assert F.cosine_similarity(out.cpu().float(), expected).min() > 0.98
    with torch.autocast(device.type, torch.bfloat16):
        loss = F.cross_entropy(model.train()(x), torch.arange(2, device=device))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@few_fast
def test_compile_gives_the_same_result(model, x, device):
    torch._dynamo.reset()
    model, x = model.to(device), x.to(device)
    with torch.no_grad():
        assert_close(torch.compile(model, backend='aot_eager', fullgraph=True)(x), model(x))


@few_fast
def test_export(model, x):
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@few_fast
def test_jit_trace(model, x):
    traced = torch.jit.trace(model, x)
    y = images(model, batch=3)
    torch.testing.assert_close(traced(y), model(y))


def test_meta_device_needs_no_memory(create):
    with torch.device('meta'):
        model = create()
    assert {t.device.type for t in model.state_dict().values()} == {'meta'}


def test_device_and_dtype_arguments(create):
    model = create(dtype=torch.float64, device='cpu').eval()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(images(model).double()).dtype is torch.float64


def test_state_dict_loads_strictly_into_a_fresh_model(create, model, x):
    other = create().eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize('name, kwargs', [
    ('resnet32_cifar_s16u1_dual', dict(layers=(2, 2), channels=(16, 32))),
    *(pytest.param(name, {}, marks=pytest.mark.slow) for name in SHORT)])
def test_compile_gives_the_same_gradients(name, kwargs):
    torch._dynamo.reset()
    model = randomize_batchnorm(timm.create_model(name, **kwargs)).train()
    x = images(model)
    expected, grads = loss_and_grads(copy.deepcopy(model), x)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    F.cross_entropy(out := compiled(x), torch.arange(2)).backward()
    assert_close(out, expected)
    for k, p in model.named_parameters():
        assert_close(p.grad, grads[k], rtol=1e-3)


@pytest.mark.slow  # the first run on a machine compiles torch's headers
@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'c++', 'clang++'))), reason='no C++ compiler')
def test_compile_inductor():
    torch._dynamo.reset()
    model = randomize_batchnorm(timm.create_model(
        'resnet20_cifar', layers=(2,), channels=(16,), shared_rank=4, unique_rank=1, dual=True)).eval()
    x = images(model)
    with torch.no_grad(), inductor_config.patch(compile_threads=1):  # no pool of processes for a handful of kernels
        assert_close(torch.compile(model)(x), model(x))


# --- distributed ------------------------------------------------------------------------------------------------------

def _ddp_model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', layers=(2, 2, 2), shared_rank=4, unique_rank=1, dual=True)
    return randomize_batchnorm(model).double().eval()  # BatchNorm in eval mode: the split over processes is exact


def _ddp_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 16, 16, generator=generator).double(), torch.tensor([0, 1, 2, 3])


def _ddp_worker(rank: int, folder: str, processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=processes)
    model = _ddp_model()
    ddp = DistributedDataParallel(model)
    images, target = _ddp_data()
    size = len(images) // processes
    part = slice(size * rank, size * (rank + 1))
    F.cross_entropy(ddp(images[part]), target[part]).backward()
    torch.save({
        'grads': {k: p.grad for k, p in model.named_parameters()},
        'bases': len(bases(model)),
        'keys': list(ddp.state_dict()),
    }, f'{folder}/rank{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_distributed_processes_give_the_gradients_of_one(processes, tmp_path: Path):
    if processes == 1:
        _ddp_worker(0, str(tmp_path), 1)
    else:
        mp.spawn(_ddp_worker, args=(str(tmp_path), processes), nprocs=processes)
    model = _ddp_model()
    images, target = _ddp_data()
    F.cross_entropy(model(images), target).backward()
    for rank in range(processes):
        result = torch.load(tmp_path / f'rank{rank}.pt')
        assert result['bases'] == len(bases(model)) == 6
        assert sum('basis' in k for k in result['keys']) == 6
        assert result['grads'].keys() == dict(model.named_parameters()).keys()
        for k, p in model.named_parameters():
            torch.testing.assert_close(result['grads'][k], p.grad, rtol=1e-9, atol=1e-12)


# --- sizes: the design's table, and the definition --------------------------------------------------------------------

PARAMS = {
    'resnet34_s48u1_dual': 11_786_968,
    'resnet50_shared': 20_506_664,
    'resnet50_sharedpp': 18_262_056,
    'resnet101_shared': 29_471_784,
    'mobilenetv2_100_shared': 3_243_080,
    'mobilenetv2_100_sharedpp': 2_978_905,
    'resnet32_cifar_s16u1': 197_258,
    'resnet32_cifar_s16u1_dual': 245_642,
    'resnet56_cifar_s16u1_dual': 319_226,
    'resnet34_cifar_s8u1': 5_865_428,
    'resnet20_cifar': 269_722,
    'resnet32_cifar': 464_154,
    'resnet56_cifar': 853_018,
    'resnet110_cifar': 1_727_962,
    'resnet18_cifar': 11_220_132,
    'resnet34_cifar': 21_328_292,
    'resnext50_cifar_s16u1': 19_333_380,
    'densenet121_cifar_s64u4': 5_606_708,
    'mobilenetv2_cifar': 2_428_004,
    'mobilenetv2_cifar_shared': 2_163_812,
    'mobilenetv2_cifar_sharedpp': 1_899_620,
}


def count(name: str, **kwargs) -> int:
    with torch.device('meta'):
        return sum(p.numel() for p in timm.create_model(name, **kwargs).parameters())


@pytest.mark.parametrize('name, params', PARAMS.items())
def test_parameter_count_is_the_papers(name, params):
    assert count(name) == params


def basic_resnet_params(
        layers, widths, stem, classes, conv_shortcut, shared=0, unique=0, dual=False, dense=False) -> int:
    """Parameters of a basic-block ResNet by the paper's definition of SsUu, counted convolution by convolution."""
    total = stem + 2 * widths[0]
    width = widths[0]
    for g, (blocks, w) in enumerate(zip(layers, widths, strict=True)):
        total += 9 * width * w + 2 * w + 9 * w * w + 2 * w  # the first block is never shared
        if conv_shortcut and width != w:
            total += width * w + 2 * w
        s, u = shared * 2 ** g, unique * 2 ** g
        for _ in range(2 * (blocks - 1)):
            total += 9 * w * w if dense else 9 * w * u + 2 * (s + u) + (s + u) * w
            total += 2 * w
        total += s * 9 * w * (2 if dual else 1) if blocks > 1 else 0
        width = w
    return total + width * classes + classes


def resnet34_params(**kwargs) -> int:
    return basic_resnet_params((3, 4, 6, 3), (64, 128, 256, 512), 49 * 3 * 64, 1000, True, **kwargs)


def wide_params(layers=(3, 4, 6, 3), **kwargs) -> int:
    return basic_resnet_params(layers, (64, 128, 256, 512), 27 * 64, 100, True, **kwargs)


def thin_params(depth: int, **kwargs) -> int:
    return basic_resnet_params(((depth - 2) // 6,) * 3, (16, 32, 64), 27 * 16, 10, False, **kwargs)


def bottleneck_params(layers, share3x3: bool, share1x1: bool) -> int:
    total, width = 49 * 3 * 64 + 128, 64
    for blocks, w in zip(layers, (64, 128, 256, 512), strict=True):
        total += width * 4 * w + 8 * w  # shortcut
        for b in range(blocks):
            total += width * w + 2 * w + 2 * w + 8 * w
            total += 9 * w * w if b < 2 or not share3x3 else 0  # the second block's is the shared one
            total += 4 * w * w if b < 2 or not share1x1 else 0
            width = 4 * w
    return total + width * 1000 + 1000


def mobilenetv2_params(share_projection: bool) -> int:
    total, width = 27 * 32 + 32 + 64, 32
    stages = [(1, 16, 1, False), (6, 24, 2, False), (6, 32, 3, True), (6, 64, 4, True), (6, 96, 3, True),
              (6, 160, 3, True), (6, 320, 1, False)]
    for t, w, blocks, shared in stages:
        for b in range(blocks):
            hidden = t * width
            total += 2 * hidden + 9 * hidden + 2 * hidden + 2 * w
            total += width * hidden if b < 2 or not shared else 0
            total += hidden * w if b < 2 or not (shared and share_projection) else 0
            if shared and share_projection and b >= 1:
                total += 1 if w < 96 else 3  # ECA
            width = w
    return total + width * 1280 + 1280 + 2560 + 1280 * 1000 + 1000


def densenet_cifar_params(shared=0, unique=0, dense=False) -> int:
    total, chs = 27 * 64, 64
    for g, layers in enumerate((6, 12, 24, 16)):
        if g:
            total += 2 * chs + chs * chs // 2  # transition
            chs //= 2
        for _ in range(layers):
            rank = shared + unique
            total += 2 * chs + chs * 128 + 2 * 128
            total += 9 * 128 * 32 if dense else 9 * 128 * unique + 2 * rank + rank * 32
            chs += 32
        total += 9 * 128 * shared
    return total + 2 * chs + chs * 100 + 100


def resnext_cifar_params(shared=0, unique=0, dense=False) -> int:
    total, chs = 27 * 64 + 128, 64
    for g, blocks in enumerate((3, 4, 6, 3)):
        out, inner, s, u = 256 * 2 ** g, 128 * 2 ** g, shared * 2 ** g, unique * 2 ** g
        total += chs * out + 2 * out  # shortcut
        for b in range(blocks):
            plain = dense or b == 0
            rank = inner if plain else s + u
            total += chs * inner + 2 * inner + 2 * rank + rank * out + 2 * out
            total += 9 * inner * (inner // 32) if plain else 9 * u * inner // max(u // 4, 1)
            chs = out
        total += 9 * s * (inner // 16)
    return total + chs * 100 + 100


def mobilenetv2_cifar_params(share_expansion: bool, share_projection: bool) -> int:
    total, width = 3 * 32 + 32 + 64, 32
    stages = [(1, 16, 1, 1, 0), (6, 24, 2, 2, 0), (6, 32, 3, 2, 1), (6, 64, 4, 2, 1), (6, 96, 3, 1, 1),
              (6, 160, 3, 1, 1), (6, 320, 1, 1, 0)]
    for t, w, blocks, stride, shared in stages:
        for b in range(blocks):
            hidden = t * width
            total += 2 * hidden + 9 * hidden + 2 * hidden + 2 * w
            total += width * hidden if b < 2 or not (shared and share_expansion) else 0
            total += hidden * w if b < 2 or not (shared and share_projection) else 0
            total += width * w + 2 * w if b == 0 and stride == 1 else 0  # shortcut
            width = w
    return total + width * 1280 + 1280 + 2560 + 1280 * 100 + 100


DEFINITION = {
    'densenet121_cifar': densenet_cifar_params(dense=True),
    'densenet121_cifar_s64u4': densenet_cifar_params(64, 4),
    'resnext50_cifar': resnext_cifar_params(dense=True),
    'resnext50_cifar_s16u1': resnext_cifar_params(64, 4),
    'mobilenetv2_cifar': mobilenetv2_cifar_params(False, False),
    'mobilenetv2_cifar_shared': mobilenetv2_cifar_params(True, False),
    'mobilenetv2_cifar_sharedpp': mobilenetv2_cifar_params(True, True),
    'resnet34_s32u1': resnet34_params(shared=32, unique=1),
    'resnet34_s48u1': resnet34_params(shared=48, unique=1),
    'resnet34_s32u1_dual': resnet34_params(shared=32, unique=1, dual=True),
    'resnet34_s48u1_dual': resnet34_params(shared=48, unique=1, dual=True),
    'resnet50_shared': bottleneck_params((3, 4, 6, 3), True, False),
    'resnet50_sharedpp': bottleneck_params((3, 4, 6, 3), True, True),
    'resnet101_shared': bottleneck_params((3, 4, 23, 3), True, False),
    'resnet101_sharedpp': bottleneck_params((3, 4, 23, 3), True, True),
    'mobilenetv2_100_shared': mobilenetv2_params(False),
    'mobilenetv2_100_sharedpp': mobilenetv2_params(True),
    **{f'resnet{d}_cifar': thin_params(d, dense=True) for d in (20, 32, 56, 110)},
    **{f'resnet{d}_cifar_s{s}u1': thin_params(d, shared=s, unique=1) for d in (32, 56) for s in (8, 16)},
    **{f'resnet{d}_cifar_s16u1_dual': thin_params(d, shared=16, unique=1, dual=True) for d in (32, 56)},
    'resnet18_cifar': wide_params((2, 2, 2, 2), dense=True),
    'resnet34_cifar': wide_params(dense=True),
    **{f'resnet34_cifar_s{s}u1': wide_params(shared=s, unique=1) for s in (8, 16, 32)},
}


@pytest.mark.slow
def test_every_name_has_the_parameters_of_its_definition():
    assert {n: count(n) for n in INTERFACE} == DEFINITION


@pytest.mark.parametrize('kwargs, ranks', [
    (dict(shared_rank=24, unique_rank=2), dict(shared=24, unique=2)),
    (dict(shared_rank=24, unique_rank=2, dual=True), dict(shared=24, unique=2, dual=True)),
    (dict(shared_rank=0, unique_rank=3), dict(shared=0, unique=3)),
    (dict(shared_rank=12, unique_rank=0), dict(shared=12, unique=0)),
    (dict(shared_rank=12, unique_rank=0, dual=True), dict(shared=12, unique=0, dual=True)),
])
@pytest.mark.parametrize('name, definition', [
    pytest.param('resnet34_cifar_s8u1', wide_params, marks=pytest.mark.slow),
    pytest.param('resnet34_s32u1', resnet34_params, marks=pytest.mark.slow),
    pytest.param('resnet32_cifar_s8u1', lambda **ranks: thin_params(32, **ranks), marks=pytest.mark.slow),
    ('resnet20_cifar', lambda **ranks: thin_params(20, **ranks)),
])
def test_other_ranks_follow_from_the_definition(name, definition, kwargs, ranks):
    assert count(name, **kwargs) == definition(**ranks)


@pytest.mark.parametrize('ranks', [(32, 8), *(pytest.param(r, marks=pytest.mark.slow) for r in ((0, 8), (64, 0)))])
@pytest.mark.parametrize('name, definition', [
    ('densenet121_cifar', densenet_cifar_params), ('resnext50_cifar', resnext_cifar_params)])
def test_other_ranks_of_grouped_and_dense_networks_follow_from_the_definition(name, definition, ranks):
    assert count(name, shared_rank=ranks[0], unique_rank=ranks[1]) == definition(*ranks)


@pytest.mark.parametrize('include_unique', [False, True])
def test_basis_ortho_on_banks_of_different_groups(include_unique):
    model = timm.create_model('resnext50_cifar_s16u1', layers=(2, 2, 1, 1))
    reg = create_regularizer('basis_ortho', weight=1., include_unique=include_unique)
    with torch.no_grad():
        value, squares, entries = reg(model).item(), 0., 0
        for conv in (m for m in model.modules() if isinstance(m, SharedBasisConv2d)):
            shared, unique = conv.basis.weight, conv.unique.weight
            squares += (shared.flatten(1) @ shared.flatten(1).T - torch.eye(len(shared))).square().sum().item()
            entries += len(shared) ** 2
            if include_unique:
                squares += (unique.flatten(1) @ unique.flatten(1).T - torch.eye(len(unique))).square().sum().item()
                entries += len(unique) ** 2 + len(unique) * len(shared)
                for i in range(len(shared)):
                    full = torch.zeros(conv.in_channels, 3, 3)
                    start = i // (len(shared) // 16) * shared.shape[1]
                    full[start:start + shared.shape[1]] = shared[i]
                    for j in range(len(unique)):
                        begin = j // (len(unique) // conv.unique.groups) * unique.shape[1]
                        squares += (full[begin:begin + unique.shape[1]] * unique[j]).sum().item() ** 2
    assert value == pytest.approx(squares / entries, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize('name, kwargs', [
    ('densenet121_cifar_s64u4', dict(layers=(2, 2))), ('resnext50_cifar_s16u1', dict(layers=(2, 1), widths=(256, 512))),
    pytest.param('mobilenetv2_cifar_sharedpp', {}, marks=pytest.mark.slow)])
def test_cifar_families_fold_and_reload(name, kwargs, tmp_path):
    model = randomize_batchnorm(timm.create_model(name, num_classes=7, **kwargs)).eval()
    x = images(model, batch=1, size=16)
    save_model(model, tmp_path / 'a.safetensors')
    torch.testing.assert_close(load_model(tmp_path / 'a.safetensors')(x), model(x), rtol=0, atol=0)
    folded = fold(model)
    assert not any(isinstance(m, SharedBasisConv2d) for m in folded.modules())
    save_model(folded, tmp_path / 'b.safetensors')
    assert_close(load_model(tmp_path / 'b.safetensors')(x), model(x))


@pytest.mark.parametrize('kwargs', [
    dict(shared_rank=0, unique_rank=3), dict(shared_rank=12, unique_rank=0, dual=True),
    dict(shared_rank=24, unique_rank=2, dual=True)])
def test_other_ranks_train(kwargs):
    model = timm.create_model('resnet32_cifar_s8u1', **kwargs).train()
    grads = loss_and_grads(model, images(model))[1]
    assert all(g.isfinite().all() and (g.dim() == 1 or g.any()) for g in grads.values())


def test_first_block_of_every_stage_is_the_original(name, template):
    if name.startswith('densenet'):
        pytest.skip('every layer of a dense block uses the basis')
    stages = [getattr(template, f'layer{i}') for i in range(1, 5) if hasattr(template, f'layer{i}')] \
        or list(template.blocks)
    firsts = [m for stage in stages for m in stage[0].modules()]
    assert not any(isinstance(m, SharedBasisConv2d) for m in firsts)


def test_sharing_starts_at_the_second_block(name, template):
    if '_s' not in name:
        pytest.skip('a dense model')
    stages = [getattr(template, f'layer{i}') for i in range(1, 5) if hasattr(template, f'layer{i}')] \
        or [template.blocks[i] for i in (2, 3, 4, 5)]
    for stage in stages:
        for block in list(stage)[1:]:
            assert any(isinstance(m, SharedBasisConv2d) for m in block.modules())


# --- bad requests -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['resnet34_s32u1', 'resnet34_cifar_s8u1', 'resnet32_cifar_s8u1'])
@pytest.mark.parametrize('kwargs, words', [
    (dict(shared_rank=-1), ('shared_rank', '-1')),
    (dict(unique_rank=-2), ('unique_rank', '-2')),
    (dict(shared_rank=0, unique_rank=0), ('shared_rank', 'unique_rank', '0')),
    (dict(shared_rank=5000), ('shared_rank=5000', 'unique_rank=1')),
    (dict(shared_rank=1.5), ('shared_rank', '1.5')),
    (dict(shared_rank='8'), ('shared_rank', "'8'")),
    (dict(shared_rank=True), ('shared_rank', 'True')),
])
def test_unusable_ranks_are_errors_that_name_the_value(name, kwargs, words):
    with torch.device('meta'), pytest.raises(LeanError) as e:
        timm.create_model(name, **kwargs)
    assert all(w in str(e.value) for w in words)


@pytest.mark.parametrize('kwargs', [
    dict(shared_rank=143, unique_rank=1), dict(shared_rank=144, unique_rank=0), dict(shared_rank=0, unique_rank=144),
    dict(shared_rank=72, unique_rank=0, dual=True), dict(shared_rank=71, unique_rank=2, dual=True)])
def test_as_many_filters_as_an_orthonormal_basis_can_have_are_allowed(kwargs):
    assert count('resnet20_cifar', **kwargs)  # 16 channels x 3 x 3 = 144


@pytest.mark.parametrize('kwargs', [
    dict(shared_rank=144, unique_rank=1), dict(shared_rank=145, unique_rank=0), dict(shared_rank=0, unique_rank=145),
    dict(shared_rank=72, unique_rank=1, dual=True)])
def test_one_filter_too_many_is_an_error(kwargs):
    with torch.device('meta'), pytest.raises(LeanError, match=r'145 basis filters.*144'):
        timm.create_model('resnet20_cifar', **kwargs)


def test_output_stride_is_a_clear_error():
    with torch.device('meta'), pytest.raises(LeanError, match='output_stride'):
        timm.create_model('resnet34_s48u1_dual', output_stride=16)


# --- lean -------------------------------------------------------------------------------------------------------------

def test_lean_builds_its_base():
    model = timm.create_model('lean', base='resnet20_cifar', num_classes=7)
    assert sum(p.numel() for p in model.parameters()) == count('resnet20_cifar', num_classes=7)


def test_lean_takes_the_steps_of_its_recipe():
    model = timm.create_model('lean', base='resnet32_cifar_s8u1', recipe=[{'op': 'fold'}])
    assert not any(isinstance(m, SharedBasisConv2d) for m in model.modules())
    assert model.training
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize('base', ['resnet20_cifar', 'resnet50_sharedpp', 'mobilenetv2_100_shared'])
def test_lean_features_only(base):
    model = timm.create_model('lean', base=base, features_only=True).eval()
    plain = timm.create_model(base, features_only=True)
    outs = model(torch.randn(1, 3, 64, 64))
    assert [o.shape[1] for o in outs] == model.feature_info.channels() == plain.feature_info.channels()
    assert model.feature_info.reduction() == plain.feature_info.reduction()


def test_lean_features_only_out_indices():
    model = timm.create_model('lean', base='resnet20_cifar', features_only=True, out_indices=(1, 3)).eval()
    assert [o.shape[1] for o in model(torch.randn(1, 3, 32, 32))] == model.feature_info.channels() == [16, 64]


@pytest.mark.parametrize('kwargs, words', [
    (dict(), 'base=NAME'),
    (dict(base='lean'), 'base=NAME'),
    (dict(base='resnet20_cifar', recipe=[{'op': 'melt'}]), "Unknown recipe step 'melt'"),
    (dict(base='resnet20_cifar', recipe=['fold']), 'must be an object'),
    (dict(base='resnet20_cifar', recipe=[{'op': 'fold', 'how': 1}]), 'does not take'),
    (dict(base='resnet20_cifar', recipe=[{'op': 'fold'}]), 'found no shared convolution'),
])
def test_lean_refuses_a_bad_description(kwargs, words):
    with pytest.raises(LeanError, match=words):
        timm.create_model('lean', **kwargs)
