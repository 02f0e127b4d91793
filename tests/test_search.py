"""`compress`: targets, curves, the journal, and searches whose best network is known."""
import csv
import json

import pytest
import timm
import torch
import torch.nn as nn

import timm_lean
from timm_lean import LeanError, compress, load_model, save_model
from timm_lean.calibration import output_scores
from timm_lean.search import TargetError, reachable
from timm_lean.search.curves import Curve, all_mixes, neighbours, predict_factor, predict_loss
from timm_lean.search.journal import Journal
from timm_lean.search.judge import Judge, split_images
from timm_lean.search.plan import Plan
from timm_lean.search.report import Candidate, CompressReport
from timm_lean.search.sizes import Sizes, measure_sizes
from timm_lean.search.space import Space
from timm_lean.search.subject import Network
from timm_lean.search.target import parse_targets

from conftest import by_params, shorten_searches  # isort: skip


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('lean_resnet', layers=(2, 2), widths=(16, 32), num_classes=10).eval()


@pytest.fixture(scope='module')
def images():
    return list(torch.randn(4, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


# targets -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('text', 'limit'), [
    ('params=0.5', 500), ('params=0.3k', 300), ('macs=2M', 2e6), ('file=0.25', 2500), ('file=1.5kB', 1500),
    ('file=2KiB', 2048), ('latency=0.5', 4), ('latency=500us', 0.5), ('latency=0.01s', 10), ('latency=3 ms', 3)])
def test_targets_in_the_unit_of_the_quantity(text, limit):
    (target,) = parse_targets(text)
    assert target.limit(Sizes(1000, 10**7, 10**4, 8.)) == pytest.approx(limit)


def test_a_mapping_is_the_same_as_texts():
    assert parse_targets({'params': 0.5, 'file': '500kB'}) == parse_targets(['params=0.5', 'file=500kB'])


@pytest.mark.parametrize(('wanted', 'told'), [
    ('size=0.5', "'size'"), ('params', 'QUANTITY=VALUE'), ('params=2', 'needs a unit'), ('params=0', 'params=0'),
    ('params=-1', 'params=-1'), ('latency=5kB', 'us, ms, s'), ('file=nan', 'file=nan'), ('params=1..2', '1..2'),
    (['params=0.5', 'params=0.4'], '2 times'), ([], 'needs a target'), ({'macs': None}, 'None')])
def test_bad_targets_are_named(wanted, told):
    with pytest.raises(LeanError) as e:
        parse_targets(wanted)
    assert told in str(e.value)


# curves --------------------------------------------------------------------------------------------------------------

def test_curves_are_straight_between_points_and_grow_beyond():
    curve = Curve({0.: 0., 0.5: 1., 1.: 4.})
    assert [curve(x) for x in (0., 0.25, 0.5, 0.75, 1., 2.)] == [0., 0.5, 1., 2.5, 4., 4.]
    assert Curve({0.: 0., 0.5: 1.}, quadratic=True)(1.) == 4.


def test_a_mix_goes_as_far_as_the_product_of_its_shares_needs():
    shares = {name: [Curve({0.: 1., 1.: 0.})] for name in 'ab'}
    factor = predict_factor((('a', 1.), ('b', 1.)), shares, [0.25])
    assert factor == pytest.approx(0.5, abs=2e-3)  # (1 - f)^2 = 1/4
    assert predict_factor((('a', 0.5),), shares, [0.4]) is None
    losses = {'a': Curve({0.: 0., 1.: 8.}), 'b': Curve({0.: 0., 1.: 2.})}
    assert predict_loss((('a', 1.), ('b', 1.)), 0.5, losses) == 5.


def test_mixes_are_directions():
    mixes = list(all_mixes('ab', 2))
    assert mixes == [(('a', 0.5), ('b', 1.)), (('a', 1.), ('b', 0.5)), (('a', 1.), ('b', 1.))]
    assert (('a', 1.), ('b', 0.25)) in set(neighbours((('a', 1.), ('b', 0.5)), 'ab', 0.25))
    for mix in neighbours((('a', 1.), ('b', 0.5)), 'abc', 0.25):
        assert max(amount for _, amount in mix) == 1.


# judging -------------------------------------------------------------------------------------------------------------

class Shift(nn.Module):
    """A classifier whose choice is the first pixel, rounded, plus a constant."""

    def __init__(self, by=0):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(float(by)))

    def forward(self, x):
        return nn.functional.one_hot((x[:, 0, 0, 0] + self.by).long() % 4, 4).float()


def test_agreement_is_the_share_of_equal_choices():
    images = [torch.arange(4.).view(4, 1, 1, 1), torch.arange(4.).view(4, 1, 1, 1)]
    judge = Judge(Network(Shift(), images), None, images)
    assert (judge.name, judge.reference, judge(Shift()), judge(Shift(1))) == ('agreement', 100., 100., 0.)


def test_outputs_that_are_no_classes_are_compared():
    images = [torch.ones(2, 1, 2, 2)]
    judge = Judge(Network(nn.Conv2d(1, 1, 1, bias=False), images), None, images)
    double = nn.Conv2d(1, 1, 1, bias=False)
    assert judge.name == 'likeness of the output' and judge.reference == pytest.approx(100.)
    with torch.no_grad():
        double.weight.zero_()
    assert judge(double) == pytest.approx(0.)


def test_a_quarter_of_the_images_judges_and_is_not_fitted_to(images):
    fitted, held = split_images([(x, None) for x in images], judging=True)
    assert [len(fitted), len(held)] == [3, 1] and held[0] is images[3]
    fitted, held = split_images([torch.cat(images)], judging=True)
    assert sum(map(len, fitted)) == 12 and sum(map(len, held)) == 4
    assert not any(torch.equal(a, b) for x in fitted for a in x for y in held for b in y)


@pytest.mark.parametrize('batches', [[], torch.zeros(4, 3, 8, 8), [torch.zeros(4, 3, 8, 8, dtype=torch.uint8)], ['x']])
def test_what_is_no_image_batch_is_told(model, batches):
    with pytest.raises(LeanError, match='image'):
        compress(model, 'params=0.5', batches)


def test_too_few_images_to_judge_by_are_told(model, images):
    with pytest.raises(LeanError, match=r'at least 4 images .*, got 3'):
        compress(model, 'params=0.5', [images[0][:3]])


# sizes ---------------------------------------------------------------------------------------------------------------

def test_sizes_are_those_of_the_file_and_of_the_cheaper_form(model, images, tmp_path):
    small = timm_lean.share(model, params=0.6)
    sizes, dense = (measure_sizes(m, Network(m, images), ('params', 'macs', 'file')) for m in (small, model))
    save_model(small, tmp_path / 'small.safetensors')
    assert sizes.file == (tmp_path / 'small.safetensors').stat().st_size
    assert sizes.params == sum(p.numel() for p in small.parameters()) and sizes.latency is None
    assert sizes.macs <= dense.macs


# the search ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
    shorten_searches(monkeypatch, mixes=2, steps=4)


def test_the_best_network_that_meets_the_target(model, images, quick, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new = compress(model, 'params=0.6', images, evaluate=by_params, folder=tmp_path)
    report, whole = new.lean_report, sum(p.numel() for p in model.parameters())
    assert 0.5 * whole < sum(p.numel() for p in new.parameters()) <= 0.6 * whole
    met = [c for c in report.candidates if c.sizes.params <= 0.6 * whole]
    assert report.chosen.score == max(c.score for c in met) and report.met and len(met) >= 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    save_model(new, tmp_path / 'new.safetensors')
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'new.safetensors')(images[0]), new(images[0]))


def test_int8_counts_as_it_is_stored(model, images, quick, tmp_path):
    new = compress(model, 'file=0.4', images, evaluate=by_params, techniques=['int8', 'share'])
    report = new.lean_report
    assert report.weights == 'int8' and report.chosen.plan.share == 1  # nothing else need go
    save_model(new, tmp_path / 'new.safetensors', weights=report.weights)
    assert (tmp_path / 'new.safetensors').stat().st_size == report.chosen.sizes.file
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'new.safetensors')(images[0]), new(images[0]))
        assert not torch.equal(model(images[0]), new(images[0]))


@pytest.mark.slow
def test_two_targets_hold_together(model, images, quick):
    new = compress(model, {'params': 0.7, 'macs': 0.6}, images, evaluate=by_params, techniques=['blocks', 'channels'])
    sizes = new.lean_report.chosen.sizes
    original = measure_sizes(model, Network(model, images), ('params', 'macs'))
    assert sizes.params <= 0.7 * original.params and sizes.macs <= 0.6 * original.macs


def test_a_search_goes_on_where_it_was(model, images, quick, tmp_path):
    calls = []

    def evaluate(network):
        calls.append(network)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return by_params(network)

    options = dict(techniques=['share'], folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compress(model, 'params=0.6', images, evaluate=evaluate, **options)
    rows = (tmp_path / 'candidates.jsonl').read_text().splitlines()
    assert len(rows) == 1 + 1 and json.loads(rows[0])['finished'] is False
    with pytest.raises(LeanError, match='unfinished'):
        compress(model, 'params=0.6', images, evaluate=by_params, **options)
    ended = compress(model, 'params=0.6', images, evaluate=evaluate, resume=True, **options).lean_report
    whole = compress(model, 'params=0.6', images, evaluate=by_params, techniques=['share']).lean_report
    assert ended.candidates == whole.candidates and ended.chosen == whole.chosen
    assert len(calls) == 3 + 1 + len(whole.candidates) - 1  # one candidate was not made again


def test_a_search_of_another_network_is_not_gone_on_with(model, images, quick, tmp_path):
    compress(model, 'params=0.9', images, evaluate=by_params, techniques=['share'], folder=tmp_path)
    with pytest.raises(LeanError, match='another network'):
        compress(model, 'params=0.9', images[:2], evaluate=by_params, techniques=['share'], folder=tmp_path,
                 resume=True)
    (tmp_path / 'candidates.jsonl').write_text('{"search"')
    with pytest.raises(LeanError, match='damaged'):
        Journal(tmp_path, '', resume=True)


def test_what_costs_too_much_is_not_written_unless_the_nearest_will_do(model, images, quick):
    whole = by_params(model)
    with pytest.raises(TargetError, match='max_drop') as e:
        compress(model, 'params=0.5', images, evaluate=by_params, max_drop=0.3 * whole, techniques=['share'])
    assert 'shared bases' in e.value.nearest
    near = compress(model, 'params=0.5', images, evaluate=by_params, max_drop=0.3 * whole, techniques=['share'],
                    nearest=True).lean_report
    assert not near.met and 0.7 * whole <= near.chosen.score < whole


def test_out_of_reach_is_told_with_what_is_in_reach(model, images, quick):
    with pytest.raises(TargetError, match=r'out of reach.*share: params 0') as e:
        compress(model, 'params=0.01', images, evaluate=by_params, techniques=['share'])
    outlook = reachable(model, 'params=0.01', images, techniques=['share', 'kernels'])
    assert f'params {outlook.smallest["share"]["params"]:.3g}' in str(e.value)
    assert 'does not change params' in outlook.refused['kernels']
    assert not outlook.in_reach and 'That is out of reach' in str(outlook)
    with pytest.raises(TargetError, match='kernels: it does not change latency'):
        compress(model, 'latency=0.5', images, evaluate=by_params, techniques=['kernels'])


@pytest.mark.parametrize('target', ['file=0.5', 'file=0.08', 'file=1GB'], ids=['reached alone', 'together', 'met'])
def test_the_outlook_names_the_networks_that_a_search_starts_with(model, images, monkeypatch, target):
    shorten_searches(monkeypatch, mixes=0, steps=1)
    options = dict(evaluate=by_params, techniques=['share', 'int8'])
    outlook = reachable(model, target, images, minutes=1, finetune=lambda network: network, **options)
    report = compress(model, target, images, **options).lean_report
    assert [c.plan for c in report.candidates] == list(outlook.networks)
    assert outlook.in_reach and (not outlook.networks) == (target == 'file=1GB')
    assert (outlook.calibration_images, outlook.held_out_images, outlook.judged_by) == (16, 0, 'accuracy')
    assert json.loads(json.dumps(outlook.to_dict()))['networks'] == [plan.to_dict() for plan in outlook.networks]
    assert all(f'. {plan}\n' in str(outlook) for plan in outlook.networks) and 'kernels' not in str(outlook)


def test_the_outlook_says_how_networks_are_judged_and_what_is_taken(model, images):
    text = str(reachable(model, 'file=0.5', images, techniques=['int8'], minutes=3, nearest=True))
    assert 'until 3 minutes' in text and 'the one that comes nearest' in text and 'mixes' not in text
    assert 'calibrated by 12 images and judged by its agreement with the original on 4 others' in text
    with pytest.raises(LeanError, match='minutes'):
        reachable(model, 'file=0.5', images, minutes=-1)


def test_progress_without_a_terminal_is_a_line_now_and_then(model, images, quick, capsys, monkeypatch):
    options = dict(evaluate=by_params, techniques=['int8'], progress=True)
    compress(model, 'file=0.5', images, **options)
    assert capsys.readouterr() == ('', '')
    monkeypatch.setattr('timm_lean.search.progress._LINE_SECONDS', 0)
    compress(model, 'file=0.5', images, **options)
    out, err = capsys.readouterr()
    assert not out and '\r' not in err
    assert 'compress: each technique alone, network 1 after 0.' in err and ' of 20 minutes, accuracy ' in err
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    compress(model, 'file=0.5', images, **options)
    assert 'compress, each technique alone: 1 networks [' in capsys.readouterr().err


def test_out_of_reach_gives_the_nearest_where_that_will_do(model, images, quick):
    options = dict(evaluate=by_params, techniques=['share', 'channels'], nearest=True)
    new = compress(model, 'params=0.001', images, **options)
    report = new.lean_report
    assert not report.met and report.chosen.sizes.params == min(c.sizes.params for c in report.candidates)
    whole = by_params(model)
    within = compress(model, 'params=0.001', images, max_drop=0.3 * whole, **options).lean_report
    assert not within.met and 0.7 * whole <= within.chosen.score < whole


def test_a_resumed_search_for_another_quantity_measures_it(model, images, quick, tmp_path):
    options = dict(evaluate=by_params, techniques=['channels'], folder=tmp_path)
    compress(model, 'params=0.6', images, **options)
    sizes = compress(model, {'params': 0.6, 'latency': '9s'}, images, resume=True, **options).lean_report.chosen.sizes
    assert sizes.latency > 0


def test_scores_of_another_measure_are_not_gone_on_with(model, images, quick, tmp_path):
    options = dict(techniques=['share'], folder=tmp_path)
    compress(model, 'params=0.6', images, evaluate=by_params, **options)
    with pytest.raises(LeanError, match='another measure'):
        compress(model, 'params=0.6', images, evaluate=lambda model: by_params(model) / 2, resume=True, **options)


@pytest.mark.parametrize('name, of_use', [('mobilenetv2_035', True), ('resnet20_cifar', False)])
def test_sharing_is_used_for_macs_where_it_changes_them(name, of_use, images, monkeypatch):
    """1 x 1 convolutions get cheaper, 3 x 3 ones are computed from the composed filters."""
    shorten_searches(monkeypatch, mixes=0, steps=0)
    network = timm.create_model(name, num_classes=10).eval()
    outlook = reachable(network, 'macs=0.5', images, techniques=['share'])
    assert ('share' in outlook.smallest) == of_use == ('share' not in outlook.refused)
    if of_use:
        assert outlook.smallest['share']['macs'] < 0.9
    else:
        assert outlook.refused['share'] == 'it hardly changes macs of this network'


def test_channels_go_by_all_images(model):
    """Not by those few that rank blocks."""
    batches = list(torch.randn(2, 64, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    network = Network(model, batches)
    Space(network, batches[0], ['channels'], parse_targets('params=0.7'))
    by_all, by_some = (
        timm_lean.prune_channels(model, network.x, criterion='output', scores=output_scores(model, None, some),
                                 global_pruning=True, pruning_ratio=0.3, round_to=1).lean_report.kept
        for some in (batches, batches[:1]))
    assert network.apply(timm_lean.prune_channels, model, pruning_ratio=0.3, round_to=1).lean_report.kept == by_all
    assert by_all != by_some


@pytest.mark.parametrize('share', [0.5, 0.6, 0.7, 0.8])
def test_little_of_what_a_target_allows_is_left_unused(model, images, share):
    space = Space(Network(model, images), images[0], ['kernels'], parse_targets(f'file={share}'))
    sizes = space.sizes(space.plan({'kernels': space.reach({'kernels': 1.})}))
    assert 0.98 * share <= sizes.file / space.original.file <= 0.995 * share


def test_fine_tuning_decides_between_the_best(model, images, quick):
    tuned = []

    def finetune(network):
        tuned.append(sum(p.numel() for p in network.parameters()))
        network.good = len(tuned) == 2
        return network

    def evaluate(network):
        return 100. if getattr(network, 'good', False) else by_params(network)

    report = compress(model, 'file=0.7', images, evaluate=evaluate, finetune=finetune,
                      techniques=['kernels', 'share']).lean_report
    assert len(tuned) == 2 and report.chosen.tuned and report.chosen.score == 100.
    assert report.chosen.sizes.params == tuned[1]


def test_a_fine_tuning_that_harms_is_not_taken(model, images, quick):
    def finetune(network):
        with torch.no_grad():
            for p in network.parameters():
                p.zero_()
        return network

    def evaluate(network):
        return by_params(network) if any(p.any() for p in network.parameters()) else 0.

    new = compress(model, 'params=0.7', images, evaluate=evaluate, finetune=finetune, techniques=['share'])
    assert not new.lean_report.chosen.tuned and evaluate(new) == new.lean_report.chosen.score > 0


@pytest.mark.parametrize(('options', 'told'), [
    (dict(techniques=['magic']), "'magic'"), (dict(techniques=[]), 'needs a technique'), (dict(minutes=0), 'minutes'),
    (dict(minutes=float('nan')), 'minutes'), (dict(max_drop=-1, evaluate=by_params), 'max_drop'),
    (dict(max_drop=1), 'evaluate'), (dict(evaluate=lambda model: None), 'number')])
def test_bad_arguments_are_named(model, images, options, told):
    with pytest.raises(LeanError, match=told):
        compress(model, 'params=0.5', images, **options)


def test_too_little_time_is_told_and_is_no_search_to_go_on_with(model, images, quick, tmp_path):
    options = dict(evaluate=by_params, techniques=['share'], folder=tmp_path)
    with pytest.raises(LeanError, match='too short'):
        compress(model, 'params=0.5', images, minutes=1e-6, **options)
    assert compress(model, 'params=0.5', images, **options).lean_report.met


@pytest.mark.parametrize('file', [0.3, 0.09])
def test_a_search_cut_short_has_an_answer(model, images, quick, monkeypatch, file):
    """The first network meets the targets: by channels alone as far as these go, else by all techniques together."""
    monkeypatch.setattr('timm_lean.search.search._Search._late', property(lambda self: len(self.found) > 0))
    target = {'macs': 0.6, 'file': file}  # int8 leaves the MACs
    report = compress(model, target, images, evaluate=by_params, techniques=['channels', 'int8']).lean_report
    assert len(report.candidates) == 1 and report.met and report.chosen.plan.int8 == (file < 0.2)


def test_table_and_picture_hold_all_candidates(model, images, quick, tmp_path):
    report = compress(model, 'params=0.7', images, evaluate=by_params, techniques=['share']).lean_report
    report.write_csv(tmp_path / 'f.csv')
    report.plot(tmp_path / 'f.png')
    with open(tmp_path / 'f.csv') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 1 + len(report.candidates) and [row['chosen'] for row in rows].count('True') == 1
    assert (tmp_path / 'f.png').read_bytes()[:4] == b'\x89PNG'
    assert report.summary in str(report) and json.dumps(report.to_dict())
    front = report.frontier('params')
    assert [c.score for c in front] == sorted(c.score for c in front)


@pytest.mark.parametrize(
    'target, share, told', [('macs=0.9', 0.5, True), ('file=0.9', 0.5, False), ('macs=0.9', 1., False)])
def test_the_report_says_which_form_the_costs_are_of(target, share, told):
    chosen = Candidate(Plan(share=share), Sizes(params=5, macs=5, file=5), 50.)
    original = Candidate(Plan(), Sizes(params=9, macs=9, file=9), 60.)
    report = CompressReport(params=(9, 5), targets=(target,), chosen=chosen, original=original, candidates=(chosen,),
                            judged_by='accuracy')
    assert ('folded: timm-lean export --fold' in str(report)) == told


def test_calibrated_candidates_agree_better(model, images):
    """One whole search without replacing anything."""
    report = compress(model, 'params=0.7', images, techniques=['share']).lean_report
    assert report.judged_by == 'agreement' and report.original.score == 100. and report.met
