"""What a hostile file can cost: it is refused (or loaded) in seconds and little memory, and no real network is."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from fuzz.safetensors_file import entry_of, join, with_entry
from timm.models._registry import _model_default_cfgs

from timm_lean import CheckpointError, load_model, save_model
from timm_lean.checkpoint.limits import allowance, limited
from timm_lean.checkpoint.pretrained_cfg import clean_pretrained_cfg

HOSTILE_ARGS = {
    'many million blocks': ('convnext_atto', dict(depths=[1_000_000] * 1000)),
    'blocks in every stage': ('convnext_atto', dict(depths=[12_000] * 4)),
    'pairs of window positions': ('tiny_vit_5m_224', dict(window_sizes=[500, 500, 500, 500])),
    'a window that loops': ('tiny_vit_5m_224', dict(window_sizes=[7, 7, 60, 7])),
    'a large image': ('maxvit_tiny_tf_224', dict(img_size=20_000)),
    'a larger image': ('maxvit_tiny_tf_224', dict(img_size=[40_000, 40_000])),
    'levit': ('levit_128', dict(img_size=16_000)),
    'classes of another file': ('resnet20_cifar', dict(num_classes=49_000)),
    'nan': ('resnet20_cifar', dict(drop_rate=float('nan'))),
    'zeros': ('resnet20_cifar', dict(layers=[0] * 500_000)),
    'a million blocks': ('resnet20_cifar', dict(layers=[1_000_000, 1, 1])),
    'a quintillion blocks': ('resnet20_cifar', dict(layers=[10 ** 18, 1, 1])),
    'many stages': ('resnet20_cifar', dict(layers=[1] * 100_000, channels=[4] * 100_000)),
    'huge rank': ('resnet20_cifar', dict(shared_rank=10 ** 9)),
    'rank beyond int64': ('resnet20_cifar', dict(shared_rank=10 ** 30)),
    'huge rank and width': ('resnet20_cifar', dict(channels=[10 ** 6] * 3, shared_rank=10 ** 6)),
    'wide': ('resnet20_cifar', dict(channels=[10 ** 6] * 3)),
    'wider': ('resnet20_cifar', dict(channels=[10 ** 12] * 3)),
    'classes': ('resnet20_cifar', dict(num_classes=10 ** 12)),
    'classes beyond int64': ('resnet20_cifar', dict(num_classes=10 ** 30)),
    'input channels': ('resnet20_cifar', dict(in_chans=10 ** 15)),
    'wide, on the real device': ('resnet20_cifar', dict(channels=[2 ** 12] * 3, device='cpu')),
    'classes, on the real device': ('resnet20_cifar', dict(num_classes=10 ** 7, device='cpu')),
    'stock blocks': ('resnet18', dict(layers=[10 ** 8, 1, 1, 1])),
    'stock width': ('resnet18', dict(base_width=10 ** 9)),
    'stock features': ('efficientnet_lite0', dict(num_features=10 ** 9)),
    'stock widths': ('convnext_atto', dict(dims=[10 ** 7] * 4)),
    'stock depths': ('convnext_atto', dict(depths=[5 * 10 ** 7, 2, 6, 2])),
    'stock depth': ('vit_tiny_patch16_224', dict(depth=5 * 10 ** 7)),
    'stock image': ('vit_tiny_patch16_224', dict(img_size=10 ** 7)),
}
LOAD_ALL = """
import resource, sys, time
import timm_lean
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
timm_lean.load_model(sys.argv[1])
for path in sys.argv[2:]:
    before, start = peak(), time.process_time()
    try:
        timm_lean.load_model(path)
        outcome = 'loaded'
    except timm_lean.CheckpointError as e:
        outcome = 'refused' if len(str(e)) < 2000 and chr(10) not in str(e) else 'refused at length'
    except BaseException as e:
        outcome = type(e).__name__
    megabytes, seconds = peak() - before, time.process_time() - start
    print(outcome, megabytes, f'{seconds:.2f}', flush=True)
"""


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp('good') / 'good.safetensors'
    save_model(timm.create_model('resnet20_cifar'), path)
    return path


def entry(**changes):
    return json.dumps({
        'format': 1, 'architecture': 'resnet20_cifar', 'model_args': {}, 'steps': [], 'pretrained_cfg': {}, **changes})


@pytest.mark.timeout(300)
def test_hostile_files_are_refused_in_two_seconds_and_200_mb(good, tmp_path):
    """Processor seconds, measured in a process of its own whose peak memory is that of these files."""
    files = {}
    for name, (architecture, args) in HOSTILE_ARGS.items():
        files[name] = with_entry(good.read_bytes(), architecture=architecture, model_args={'num_classes': 10, **args})
    files['a long header'] = with_entry(good.read_bytes(), '[' + '[],' * 6_000_000 + '[]]')
    files['a header of lists'] = with_entry(good.read_bytes(), entry(steps=[[]] * 1_000_000))
    files['a hundred thousand steps'] = with_entry(
        good.read_bytes(), steps=[{'op': 'prune_kernels', 'criterion': 'weight', 'amount': 0.5}] * 100_000)
    files['as many steps as allowed'] = with_entry(
        good.read_bytes(), steps=[{'op': 'resize', 'modules': {}}] * 256, architecture='resnet110_cifar')
    files['a network much larger than its tensors'] = with_entry(
        good.read_bytes(), architecture='convnext_xxlarge', steps=[{'op': 'resize', 'modules': {}}])
    for name, shape in (('empty tensors', (0,)), ('small tensors', (1,))):
        size = 4 * sum(shape)
        header = {f't{i}': dict(dtype='F32', shape=shape, data_offsets=[i * size, (i + 1) * size])
                  for i in range(100_000)}
        files[name] = join({'__metadata__': {'timm_lean': entry()}, **header}, bytes(100_000 * size))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, '-c', LOAD_ALL, good, *(tmp_path / name for name in files)],
        capture_output=True, text=True, timeout=280, check=False)
    outcomes = dict(zip(files, (line.split() for line in done.stdout.splitlines()), strict=False))
    assert len(outcomes) == len(files), f'ended at {list(files)[len(outcomes)]}: {done.stderr[-2000:]}'
    for name, (outcome, megabytes, seconds) in outcomes.items():
        assert outcome == 'refused', name
        assert int(megabytes) < 200 + 2 * len(files[name]) / 1e6 and float(seconds) < 5, (name, megabytes, seconds)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['focalnet_huge_fl4', 'mvitv2_huge_cls'])
def test_the_largest_networks_are_within_the_limits(name):
    with torch.device('meta'):
        shapes = {k: tuple(v.shape) for k, v in timm.create_model(name).state_dict().items()}
    few_values = dict.fromkeys(shapes, (0,))
    with limited(few_values) as work, torch.device('meta'):
        timm.create_model(name)
    assert work.bytes >= 4 * sum(map(math.prod, shapes.values()))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('module', timm.list_modules())
def test_every_network_of_timm_is_within_the_limits(module):
    """With a tenth to spare, for other versions of timm and torch."""
    anything = {str(i): (10 ** 6,) for i in range(10_000)}
    for name in timm.list_models(module=module):
        if name == 'lean':
            continue
        with limited(anything, 'tiny_vit') as work, torch.device('meta'):
            model = timm.create_model(name)
        modules, calls = allowance({k: tuple(v.shape) for k, v in model.state_dict().items()}, name)
        assert 1.1 * work.modules < modules and 1.1 * work.calls < calls, (name, work)


@pytest.mark.slow
def test_a_network_that_goes_through_pairs_of_positions_is_within_the_limits(tmp_path):
    model = timm.create_model('tiny_vit_21m_512')
    save_model(model, tmp_path / 'm.safetensors')
    load_model(tmp_path / 'm.safetensors')


def test_the_limits_say_what_is_too_much():
    with pytest.raises(CheckpointError, match=r'more than 305 modules, which the 1 tensors'), limited({'a': (1,)}):
        for _ in range(1000):
            torch.nn.Sequential(torch.nn.Identity())
    with pytest.raises(CheckpointError, match=r'more than 300,000 calls'), limited({}):
        for _ in range(10 ** 6):
            abs(-1)


def test_operations_on_tensors_count_for_more_than_calls():
    """A table filled entry by entry takes as long as one that is computed by many calls."""
    with pytest.raises(CheckpointError, match=r'more than 300,000 calls'), limited({}) as work, torch.device('meta'):
        table = torch.zeros(10)
        for i in range(10 ** 6):
            table[i % 10] = 1
    assert i < 15_000 and work.cpu_bytes == 0


def test_tables_on_the_cpu_are_refused_before_they_are_made():
    """Constructors that say `torch.Tensor(...)` get memory on whatever device the network is built."""
    with limited({}, cpu_memory=True) as work, torch.device('meta'):
        row = torch.Tensor([1.] * 1000)
        assert (row[:, None] * row).sum() == 10 ** 6
    assert 4 * 10 ** 6 < work.cpu_bytes < 5 * 10 ** 6
    for make in (lambda row: row[:, None] * row, lambda row: torch.cat([row.repeat(100)] * 100),
                 lambda row: torch.zeros(10 ** 10, device='cpu'), lambda row: row.repeat(10 ** 5),
                 lambda row: [row.repeat(100) for _ in range(100)]):
        with (pytest.raises(CheckpointError, match='tables of more than 64 MB'), limited({}, cpu_memory=True),
              torch.device('meta')):
            make(torch.Tensor([1.] * 10_000))


def test_a_profiler_of_the_caller_survives():
    calls = []

    def profiler(*args):
        calls.append(args)
    sys.setprofile(profiler)
    try:
        with limited({}):
            pass
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


# --- a network cut from a large one -----------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [
    'resnet50', pytest.param('resnetaa50', marks=pytest.mark.slow), 'swin_tiny_patch4_window7_224'])
def test_a_network_cut_from_a_large_one_loads_without_it(name, tmp_path, monkeypatch):
    """The skeleton gets memory, in place of the whole network; what it computes is equal."""
    model = timm.create_model(name, num_classes=2).eval()
    save_model(model, tmp_path / 'm.safetensors')
    monkeypatch.setattr('timm_lean.checkpoint.allocate._MAX_CUT_OFF', -10 ** 9)
    monkeypatch.setattr('timm_lean.checkpoint.allocate.build', built := BuildOnMeta())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'm.safetensors')(x), model(x))
    assert built.devices == ['meta']


def test_computed_tables_beside_the_tensors_are_limited(good, monkeypatch):
    monkeypatch.setattr('timm_lean.checkpoint.allocate._MAX_COMPUTED', -10 ** 9)
    with pytest.raises(CheckpointError, match=r'asks for tables of 0 MB beside 1 MB of tensors'):
        load_model(good)


class BuildOnMeta:
    def __init__(self):
        from timm_lean.checkpoint.recipe import build
        self.build, self.devices = build, []

    def __call__(self, recipe):
        self.devices.append(torch.empty(0).device.type)
        return self.build(recipe)


# --- timm's pretrained_cfg --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change', [
    dict(mean='abc'), dict(mean=[0.5]), dict(mean=[0.5, float('nan'), 0.5]), dict(mean=[True] * 3), dict(mean=5),
    dict(std=[0, 0, 0]), dict(std=0), dict(std=[1, 1]), dict(std=[-1, 1, 1]), dict(mean=[1] * 5, std=[1] * 5),
    dict(input_size=[3, 0, 32]), dict(input_size=[3, 32]), dict(input_size='3x32x32'),
    dict(input_size=[3, 32, 10 ** 6]), dict(input_size=[3, 32., 32]), dict(crop_pct=0), dict(crop_pct='1'),
    dict(interpolation='best'), dict(interpolation=3), dict(crop_mode='x'), dict(label_names='abc'),
    dict(label_names=[1] * 10), dict(label_descriptions=[[]]), dict(label_descriptions={'a': 1}),
    dict(fixed_input_size=3), dict(classifier=3), dict(pool_size=[1, 2, 3]), dict(pool_size=[0, 0])], ids=str)
def test_a_pretrained_cfg_of_nonsense_is_refused(good, tmp_path, change):
    cfg = {'mean': [0.5] * 3, 'std': [0.5] * 3, 'input_size': [3, 32, 32], **change}
    path = tmp_path / 'm.safetensors'
    path.write_bytes(with_entry(good.read_bytes(), pretrained_cfg=cfg))
    with pytest.raises(CheckpointError, match=r"pretrained_cfg: '") as e:
        load_model(path)
    assert str(path) in str(e.value)


def test_a_file_cannot_point_to_other_weights_or_another_network(good, tmp_path):
    cfg = dict(url='http://x', file='/x', hf_hub_id='a/b', custom_load=True, architecture='vgg11', num_classes=3, y=1)
    (tmp_path / 'm.safetensors').write_bytes(with_entry(good.read_bytes(), pretrained_cfg=cfg))
    expected = load_model(good).pretrained_cfg
    assert load_model(tmp_path / 'm.safetensors').pretrained_cfg == {
        **expected, 'label_names': None, 'label_descriptions': None}


def test_the_names_of_another_head_are_left_out(good, tmp_path):
    cfg = dict(label_names=['a', 'b'])
    (tmp_path / 'm.safetensors').write_bytes(with_entry(good.read_bytes(), pretrained_cfg=cfg))
    assert load_model(tmp_path / 'm.safetensors').pretrained_cfg['label_names'] is None


def test_every_pretrained_cfg_of_timm_passes():
    count = 0
    for default in _model_default_cfgs.values():
        for cfg in default.cfgs.values():
            data = json.loads(json.dumps(cfg.to_dict(remove_source=True)))
            kept = clean_pretrained_cfg(data)
            assert {'input_size', 'mean', 'std', 'interpolation'} <= kept.keys()
            count += 1
    assert count > 1500


# --- what the step `resize` sets --------------------------------------------------------------------------------------

RESIZED = Path(__file__).parent / 'formats' / '1' / 'resize.safetensors'


@pytest.mark.parametrize('change', [
    dict(stride=[0, 0]), dict(stride=[1, 1]), dict(padding=[30_000, 30_000]), dict(padding=[0, 0]),
    dict(kernel_size=[1, 1]), dict(dilation=[1, 1]), dict(groups=0), dict(groups=3), dict(groups=10 ** 9),
    dict(out_channels=0), dict(out_channels=-1), dict(out_channels=7), dict(out_channels=10 ** 30),
    dict(out_channels=True), dict(out_channels=[8]), dict(in_channels=1), dict(in_channels=8.)], ids=str)
def test_sizes_that_make_no_sense_are_refused(change, tmp_path):
    data = RESIZED.read_bytes()
    steps = entry_of(data)['steps']
    steps[0]['modules']['layer3.0.conv1'].update(change)
    (tmp_path / 'm.safetensors').write_bytes(with_entry(data, steps=steps))
    with pytest.raises(CheckpointError, match=r"The step 'resize'.*layer3\.0\.conv1"):
        load_model(tmp_path / 'm.safetensors')
