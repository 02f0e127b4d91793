"""ONNX, torch.export, half precision and measured folding: each form computes what the model computes."""
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import randomize_batchnorm
from safetensors import safe_open

import timm_lean_cli
from timm_lean import LeanError, fold, load_model, save_model, share
from timm_lean.export import auto, forms
from timm_lean.layers import SharedBasisConv2d
from timm_lean.measure.timing import Timing
from timm_lean.pruning import KernelPruner, kernel_report, prune_kernels
from timm_lean.training.data import digits_split


def small(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', layers=(2, 2, 2), **{'shared_rank': 8, 'unique_rank': 1, **kwargs})
    return randomize_batchnorm(model).eval()


@pytest.fixture(scope='module')
def digits():
    images = torch.from_numpy(digits_split('eval')[0][:5] / 16).float()[:, None].expand(-1, 3, -1, -1)
    return torch.nn.functional.interpolate(images, size=32)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('export') / 'model.safetensors'
    save_model(small(), path)
    return path


def run(capsys, *args):
    code = timm_lean_cli.main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def onnx_output(path, images):
    """The file's output by onnxruntime itself, not by this package."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


@pytest.mark.slow
def test_prune_fold_save_load_onnx_is_one_function(tmp_path, digits):
    pruned = small()
    pruned = prune_kernels(pruned, criterion='spectral_norm', amount=0.3)
    folded = fold(pruned.eval())
    save_model(folded, tmp_path / 'a.safetensors')
    loaded = load_model(tmp_path / 'a.safetensors')
    forms.save_onnx(loaded, digits, tmp_path / 'a.onnx')
    with torch.no_grad():
        expected = pruned(digits).numpy()
    for batch in (1, 3, 5):
        np.testing.assert_allclose(onnx_output(tmp_path / 'a.onnx', digits[:batch]), expected[:batch],
                                   atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(expected, small()(digits).detach().numpy(), atol=1e-3), 'pruning should have changed it'


@pytest.mark.slow
def test_shared_model_exports_unfolded_and_each_basis_once(tmp_path, digits):
    import onnx
    model = small()
    assert forms.save_onnx(model, digits, tmp_path / 'a.onnx') < 1e-4
    with torch.no_grad():
        np.testing.assert_allclose(onnx_output(tmp_path / 'a.onnx', digits), model(digits).numpy(), atol=1e-4)
    graph = onnx.load(tmp_path / 'a.onnx')
    onnx.checker.check_model(graph)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param, 'the batch size is dynamic'


@pytest.mark.parametrize('name', [
    'resnet20_cifar', *(pytest.param(n, marks=pytest.mark.slow) for n in (
        'resnet18', 'vgg11_bn', 'densenet121', 'repvgg_a0', 'cspdarknet53', 'efficientnet_es', 'inception_v3'))])
def test_share_prune_finetune_fold_save_load_onnx(name, tmp_path):
    torch.manual_seed(0)
    model = share(randomize_batchnorm(timm.create_model(name, num_classes=5)), energy=0.8, unique_rank=1)
    pruner = KernelPruner(model, criterion='spectral_norm', amount=0.3)
    pruner.prune()
    size = {'resnet20_cifar': 32, 'inception_v3': 96}.get(name, 64)
    x = torch.randn(4, 3, size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(2):
        output = model.train()(x)
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert kernel_report(model).share >= 0.29
    folded = fold(model.eval())
    save_model(folded, tmp_path / 'a.safetensors')
    loaded = load_model(tmp_path / 'a.safetensors').eval()
    forms.save_onnx(loaded, x, tmp_path / 'a.onnx')
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(loaded(x), folded(x))
    np.testing.assert_allclose(onnx_output(tmp_path / 'a.onnx', x), expected, atol=1e-3 * float(expected.abs().max()))


def test_torch_export_reloads_with_another_batch_size(tmp_path, digits):
    model = small()
    forms.save_torch_export(model, digits, tmp_path / 'a.pt2')
    loaded = torch.export.load(tmp_path / 'a.pt2').module()
    with torch.no_grad():
        for batch in (1, 4):
            torch.testing.assert_close(loaded(digits[:batch]), model(digits[:batch]))


def test_half_file_is_half_and_loads_back(tmp_path, digits):
    model = small()
    save_model(model, tmp_path / 'full.safetensors')
    save_model(forms.half(model), tmp_path / 'half.safetensors')
    with safe_open(tmp_path / 'half.safetensors', framework='pt') as f:
        dtypes = {f.get_tensor(k).dtype for k in f.keys()}  # noqa: SIM118
    assert torch.float32 not in dtypes and torch.float16 in dtypes
    loaded = load_model(tmp_path / 'half.safetensors')
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = model(digits)
        assert (loaded(digits) - expected).abs().max() < 1e-2 * expected.abs().max()
    assert next(model.parameters()).dtype == torch.float32, 'the model itself is unchanged'


def test_half_refuses_what_float16_cannot_hold():
    model = small()
    model.bn1.running_var[0] = 1e6
    with pytest.raises(LeanError, match=r'bn1\.running_var'):
        forms.half(model)


def test_fold_auto_folds_the_layers_that_are_faster(monkeypatch, tmp_path, digits):
    model, calls = small(), []

    def measured(models, shapes, device, repeats):
        calls.append(shapes[0])
        dense = 0.001 if models[0].in_channels == 16 else 0.003
        return [Timing([0.002]), Timing([dense])]

    monkeypatch.setattr(auto, 'measure_latency', measured)
    folded, times = auto.fold_faster(model, (1, 3, 32, 32))
    assert calls == [(1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)], 'layers of equal shape are measured once'
    assert len(times) == 6
    left = {n.split('.')[0] for n, m in folded.named_modules() if isinstance(m, SharedBasisConv2d)}
    assert left == {'layer2', 'layer3'}
    save_model(folded, tmp_path / 'a.safetensors')
    with torch.no_grad():
        expected = model(digits)
        assert (load_model(tmp_path / 'a.safetensors')(digits) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_fold_auto_really_measures(digits):
    folded, times = auto.fold_faster(small(), (1, 3, 32, 32), repeats=3)
    assert all(shared > 0 and dense > 0 for shared, dense in times.values())
    left = sum(isinstance(m, SharedBasisConv2d) for m in folded.modules())
    assert left == sum(dense >= shared for shared, dense in times.values())


def test_fold_of_an_unknown_layer_names_it():
    with pytest.raises(LeanError, match='layer9'):
        fold(small(), include=['layer9.0.conv1'])


def test_a_file_that_differs_is_not_written(monkeypatch, tmp_path, digits):
    monkeypatch.setattr(forms, 'onnx_form', lambda data: forms.RunnableForm(lambda x: torch.zeros(len(x), 10)))
    with pytest.raises(LeanError, match='differs'):
        forms.save_onnx(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)), digits, tmp_path / 'a.onnx')
    assert not list(tmp_path.iterdir())


def test_command_writes_every_form_and_a_table(capsys, checkpoint, tmp_path):
    code, out, err = run(
        capsys, 'export', checkpoint, '--fold', '-o', tmp_path / 'f.safetensors', '--half', '--onnx',
        tmp_path / 'f.onnx', '--torch-export', tmp_path / 'f.pt2', '--device', 'cpu')
    assert code == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['f.onnx', 'f.pt2', 'f.safetensors']
    table = out[out.index('\nform ') + 1:].splitlines()
    assert table[0].split() == ['form', 'file', 'latency', 'device']
    assert [line.split()[0].rsplit('/')[-1].rstrip(',') for line in table[1:5]] == [
        'model.safetensors', 'f.safetensors', 'f.onnx', 'f.pt2']
    assert all(' ms ' in line for line in table[1:5])


@pytest.mark.parametrize('args, words', [
    (['--onnx', 'a.pb'], ['a.pb', '.onnx']),
    (['--torch-export', 'a.pt'], ['a.pt', '.pt2']),
    (['--onnx', '/dev/null/a.onnx'], ['/dev/null']),
    (['--half', '--onnx', 'a.onnx'], ['--half', '-o']),
])
def test_bad_requests_are_one_line(capsys, checkpoint, args, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, 'export', checkpoint, *args)
    assert code == 2
    assert err.count('\n') == 1
    assert all(w in err for w in words), err
    assert not list(tmp_path.iterdir())


def test_an_unloadable_file_is_one_line(capsys, tmp_path):
    (tmp_path / 'bad.safetensors').write_bytes(b'nothing')
    code, _, err = run(capsys, 'export', tmp_path / 'bad.safetensors', '--onnx', tmp_path / 'a.onnx')
    assert code == 2 and err.count('\n') == 1 and 'bad.safetensors' in err


def test_without_the_extra_the_error_names_it(capsys, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(forms.importlib.util, 'find_spec', lambda name: None)
    code, _, err = run(capsys, 'export', checkpoint, '--onnx', tmp_path / 'a.onnx')
    assert code == 2 and "timm-lean[onnx]" in err and err.count('\n') == 1


@pytest.mark.parametrize('args', [['--help'], ['export', '--help'], ['export'], ['nonsense']])
def test_help_and_argument_errors_do_not_import_torch(args):
    code = ('import sys, timm_lean_cli\n'
            'try:\n    timm_lean_cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n'
            'assert not {"torch", "timm", "timm_lean"} & set(sys.modules)')
    done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'timm-lean' in done.stdout + done.stderr
