"""The contract of the one loop: sizes, starts, rewinds, interruptions, searches;
whatever the unit, the same answers."""
import copy, json, multiprocessing, os, signal, sys, time, warnings
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from neuronprune import chain as C, core, pipeline as P, search, surgery
from neuronprune.allocate import allocate
from neuronprune.budget import budget, layer_weights
from neuronprune.chain import ANEW
from neuronprune.chain_search import candidates, tried
from neuronprune.core import Found, layers, method
from neuronprune.files import DamagedFileError, load_tensors
from neuronprune.masks import Mask, Scores
from neuronprune.data import calib_batch, get_dls
from neuronprune.models import build
from neuronprune.pipeline import prune
from neuronprune.report import Report
from neuronprune.costs import count_params
from neuronprune.train import Rewind, fit, learner
from neuronprune.evaluation import evaluate

FT = dict(unit='channel', norm='l1', scope='layer')
WAYS = {'one_shot': dict(start='dense'), 'cascade': {},
        'rewind': dict(rewind=1, fine_tune_epochs=2, tune_args=dict(start_epoch=1)), 'redraw': dict(rewind='redraw')}
KINDS = {'weights': ('magnitude', {}), 'channels': ('magnitude', FT)}
SIZES = [.5, .2, .1]
ways, kinds = pytest.mark.parametrize('way', WAYS), pytest.mark.parametrize('kind', KINDS)

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', n_train=320)

@pytest.fixture(scope='module')
def conv(): return get_dls('digits', size=16, n_train=64)

@pytest.fixture
def registered():
    "Methods made for one test."
    before = dict(core._registry)
    yield method
    core._registry.clear(); core._registry.update(before)

def start(dls, model='lenet300', epochs=2, **kw):
    net = build(model, dls.c_in, dls.n_out, dls.size, seed=0)
    return fit(learner(net, dls, lr=.05, cbs=[Rewind(epochs=(1,))], **kw), epochs)

def sized(dls, name='magnitude', args=None, way='cascade', sizes=SIZES, model='lenet300', **kw):
    kw = {**dict(fine_tune_epochs=1, latency=False), **WAYS[way], **(args or {}), **kw}
    return prune(start(dls, model), name, sizes=list(sizes), **kw)

def network(d, i): return load_tensors(d/f'size{i:03d}.safetensors')[0]
def timeless(df): return df.drop(columns=['secs', 'train_secs', 'peak_mib', 'latency_before', 'latency_after'])
def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}

# 1. n sizes give the mask of one

FIXED = [dict(unit='weight', scope=s, of=o) for s in ('global', 'layer') for o in ('units', 'params', 'macs')] + \
        [dict(unit='channel', scope=s, of=o, normalize=n) for s in ('global', 'layer')
         for o in ('units', 'params', 'macs', 'network')
         for n in ('auto', None, 'max')]

def fixed(learn, unit, ties):
    "Scores that never change, given from outside."
    graph, g = C.trace(learn.model, C.first_inputs(learn)), torch.Generator().manual_seed(3)
    shapes = {k:v.shape for k,v in candidates(learn.model, unit, graph).items()}
    draw = {k:torch.rand(s, generator=g) for k,s in shapes.items()}
    return Scores({k:(v*8).round()/8 if ties else v for k,v in draw.items()}, unit, graph=graph, method='fixed')

def masks_of(dls, model, kw, ties, **how):
    learn = start(dls, model, epochs=0)
    scores = fixed(learn, kw['unit'], ties)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return prune(learn, 'magnitude', scores=scores, fine_tune_epochs=0, latency=False, **{**kw, **how}).mask

@pytest.mark.parametrize('kw', FIXED, ids=lambda k: '-'.join(map(str, k.values())))
@pytest.mark.parametrize('ties', [False, True], ids=['distinct', 'ties'])
def test_rounds_of_fixed_scores_end_where_one_does(dls, conv, kw, ties):
    small = ties or kw['scope'] == 'layer' or kw.get('normalize') != 'auto'
    for d,model in ((dls, 'lenet300'), (conv, 'resnet20'))[:1 if small else 2]:
        one, three = (masks_of(d, model, kw, ties, sparsity=.8, rounds=n) for n in (1, 3))
        if kw['of'] == 'network': # rounds pass over other channels: none comes back, and the budget is met
            assert abs(one.meta['achieved']-three.meta['achieved']) < .05
        else:
            assert all(torch.equal(one[k], three[k])
                       for k in one), {k:(int(one[k].sum()), int(three[k].sum())) for k in one}

@pytest.mark.parametrize('kw', [k for k in FIXED if k['of'] != 'network'], ids=lambda k: '-'.join(map(str, k.values())))
def test_sizes_of_fixed_scores_end_where_one_does(dls, conv, kw):
    "Channels leave at every cut; the scores are still those of the dense network's positions."
    small = kw['scope'] == 'layer' or kw.get('normalize') != 'auto'
    for d,model in ((dls, 'lenet300'), (conv, 'resnet20'))[:1 if small else 2]:
        one, three = (masks_of(d, model, kw, False, sizes=s) for s in ([.3], [.8, .5, .3]))
        assert all(torch.equal(one[k], three[k]) for k in one)

def test_the_collapse_that_was(dls):
    "LeNet-300-100, magnitude of channels, .8: three rounds once left one channel of fc2."
    one, three = (prune(start(dls, epochs=5), 'magnitude', .8, unit='channel', rounds=n, latency=False) for n in (1, 3))
    assert all(abs(int(one.mask[k].sum())-int(three.mask[k].sum())) <= .15*len(one.mask[k]) for k in one.mask)

# 2. budgets, shapes and rows

@ways
@pytest.mark.parametrize('name', ['magnitude', 'snip', 'random'])
def test_weight_budgets_are_exact(dls, tmp_path, way, name):
    res = sized(dls, name, way=way, folder=tmp_path, at='trained')
    assert res.rows.weights.tolist() == [budget(build('lenet300', 1, 10, 8), o) for o in SIZES]
    assert np.allclose(res.rows.params_density, SIZES, atol=1e-4) # what nothing reads any more counts as well
    files = [network(tmp_path, i) for i in range(3)]
    for f,left in zip(files, res.rows.layers):
        assert {k:int(f[f'{k}.weight'].count_nonzero()) for k in ('fc1', 'fc2', 'fc3')} == json.loads(left)
    if way != 'one_shot':
        for a,b in zip(files, files[1:]):
            assert all(((a[k] != 0) | (b[k] == 0)).all() for k in a if k.endswith('weight'))

def test_channels_leave_at_every_cut(dls, tmp_path):
    res, want = sized(dls, args=FT, folder=tmp_path), [budget(build('lenet300', 1, 10, 8), o) for o in SIZES]
    df = res.rows
    assert ((df.weights >= want).all() and (np.diff(df.params_stored) < 0).all()
            and (df.macs_stored == df.macs_nonzero).all())
    for i,r in df.iterrows():
        net = surgery.load(tmp_path/f'size{i:03d}.safetensors')
        assert count_params(net) == r.params_stored and evaluate(net, dls.test).k == r.tuned_k
        assert r.weights-want[i] < 64+net.fc1.out_features+net.fc2.out_features+10 or not i, (
            'within one neuron of each layer')
    assert (res.model.fc1.out_features < 300 and res.mask['fc1'].sum() == res.model.fc1.out_features
            and len(res.mask['fc1']) == 300)

def test_zeros_that_stay_and_channels_that_leave_are_the_same_network(dls):
    "Nothing is trained in between, and the scores are given: the masks are equal, and so is what the networks answer."
    def run(shrink):
        learn = start(dls)
        return prune(learn, 'magnitude', sizes=SIZES, scores=fixed(learn, 'channel', False), unit='channel', of='units',
                     fine_tune_epochs=0, latency=False, shrink=shrink)
    a, b = map(run, (False, 'each'))
    assert all(torch.equal(a.mask[k], b.mask[k]) for k in a.mask)
    assert (a.rows.pruned_k.tolist() == b.rows.pruned_k.tolist()
            and a.model.fc1.out_features == 300 > b.model.fc1.out_features)
    assert a.rows.params_stored.tolist() == b.rows.params_stored.tolist()

@pytest.mark.parametrize('way', ['cascade', 'redraw', 'rewind'])
@pytest.mark.parametrize('model', ['lenet5_conv', 'resnet20'])
def test_convolutions_and_residuals(conv, way, model):
    d = get_dls('digits', size=32, n_train=64) if model == 'lenet5_conv' else conv
    df = sized(d, args=FT, sizes=(.5, .2), model=model, way=way).rows
    assert df.tuned_k.notna().all() and (np.diff(df.params_stored) < 0).all() and (df.weights > 0).all()

@kinds
def test_size_one_changes_nothing(dls, kind):
    learn = start(dls); before = state(learn); k = evaluate(learn, dls.test).k
    res = prune(learn, KINDS[kind][0], sizes=[1.], fine_tune_epochs=0, latency=False, **KINDS[kind][1])
    assert all(torch.equal(v, before[n]) for n,v in res.model.state_dict().items())
    assert res.rows.pruned_k[0] == k and res.rows.params_density[0] == 1

def test_some_sizes_are_only_cut(dls, tmp_path):
    res = sized(dls, sizes=(.6, .5, .4, .3, .2), fine_tunes=2, folder=tmp_path)
    assert (res.rows.tuned_k.notna().tolist() == [False, False, True, False, True]
            == res.rows.train_secs.notna().tolist())
    a, b = network(tmp_path, 0), network(tmp_path, 1)
    assert all(torch.equal(b[k], torch.where(b[k] != 0, a[k], 0.)) for k in a if k.endswith('weight'))

def test_of_says_what_a_size_counts(dls):
    res = sized(dls, args=dict(unit='channel', of='units'), sizes=[.5, .25], fine_tune_epochs=0)
    kept, n = res.mask.counts()
    assert kept == n-int(.75*n)

def test_rows_and_reports_are_each_other(dls):
    res = sized(dls)
    assert [Report.from_row(r) for r in res.rows.to_dict('records')] == res.reports and res.report is res.reports[-1]
    assert ([json.loads(json.dumps(Report.from_plain(r.plain()).plain())) for r in res.reports]
            == [r.plain() for r in res.reports])

# 3. where cuts and trainings start

def test_every_cut_from_the_dense_network(dls, monkeypatch):
    calls, real = [], C.score_with
    monkeypatch.setattr(C, 'score_with', lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    three, one = sized(dls, way='one_shot'), sized(dls, way='one_shot', sizes=[.1])
    assert len(calls) == 2, 'scored once'
    for k in ('pruned_k', 'pruned_loss', 'tuned_k', 'tuned_loss'): assert three.rows[k].iloc[-1] == one.rows[k].iloc[0]

def trained_from(dls, monkeypatch, *args, **kw):
    "(networks the trainings start from, their arguments)"
    seen, real = [], C.fit
    def spy(learn, *a, **o): seen.append((state(learn), dict(o, epochs=a[0]))); return real(learn, *a, **o)
    monkeypatch.setattr(C, 'fit', spy)
    return seen, sized(dls, *args, **kw)

def subset(small, big):
    "Are all non-zero entries of `small` entries of `big`, in its order?"
    rest = iter(big.flatten().tolist())
    return all(any(v == o for o in rest) for v in small.flatten().tolist() if v != 0)

@kinds
def test_rewinding_restores_the_kept_epoch(dls, monkeypatch, kind):
    kept = start(dls).rewind.states[1]
    seen, _ = trained_from(dls, monkeypatch, *KINDS[kind], way='rewind')
    assert [(o['start_epoch'], o['epochs']) for _,o in seen] == [(1, 2)]*3
    for s,_ in seen:
        assert subset(s['fc1.weight'], kept['fc1.weight']) and subset(s['fc3.bias'][None], kept['fc3.bias'][None])
    assert kind == 'channels' or torch.equal(seen[2][0]['fc2.weight'],
                                             torch.where(seen[2][0]['fc2.weight'] != 0, kept['fc2.weight'], 0.))

@kinds
def test_drawing_afresh(dls, monkeypatch, kind):
    seen = [o[0] for o in trained_from(dls, monkeypatch, *KINDS[kind], way='redraw', seed=2)[0]]
    fresh = [build('lenet300', 1, 10, 8, seed=2000+i+1).state_dict() for i in range(3)]
    for s,f in zip(seen, fresh): assert subset(s['fc1.weight'], f['fc1.weight']) and s['fc1.weight'].count_nonzero() > 0
    assert not subset(seen[0]['fc1.weight'], start(dls).rewind.init['fc1.weight'])

def test_a_users_network_is_drawn_afresh(dls):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__(); self.fc, self.w = torch.nn.Linear(64, 10), torch.nn.Parameter(torch.ones(10))
        def forward(self, x): return self.fc(x.flatten(1))*self.w
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 20), torch.nn.ReLU(), torch.nn.Linear(20, 10))
    learn = fit(learner(net, dls, lr=.05), 1); before = state(learn)
    prune(learn, 'magnitude', .5, rewind='redraw', fine_tune_epochs=0, latency=False)
    assert not subset(learn.model[1].weight, before['1.weight'])
    with pytest.raises(ValueError, match='w belongs to no module with reset_parameters'):
        prune(learner(Own(), dls), 'magnitude', .5, rewind='redraw', fine_tune_epochs=0)

def test_survivors_stay(dls, tmp_path, monkeypatch):
    seen, _ = trained_from(dls, monkeypatch, folder=tmp_path)
    for i in (1, 2):
        now, before = seen[i][0]['fc1.weight'], network(tmp_path, i-1)['fc1.weight']
        assert torch.equal(now, torch.where(now != 0, before, 0.))

def test_fine_tuning_has_its_own_rate_decay_and_schedule(dls, monkeypatch):
    seen, real = [], C.fit
    def spy(learn, epochs, lr=None, **o): seen.append((lr, learn.wd, o)); return real(learn, epochs, lr, **o)
    monkeypatch.setattr(C, 'fit', spy)
    learn = start(dls); own = learn.wd
    prune(learn, 'magnitude', .5, fine_tune_epochs=1, latency=False, fit_args=dict(schedule='step', milestones=[1]),
          tune_args=dict(lr=.02, wd=5e-4, gamma=.3))
    assert seen == [(.02, 5e-4, dict(progress=False, schedule='step', milestones=[1], gamma=.3))] and learn.wd == own

@pytest.mark.parametrize('unit', ['weight', 'channel'])
@pytest.mark.parametrize('way', ['one_shot', 'cascade'])
def test_factors_are_multiplied_in_once(dls, tmp_path, registered, monkeypatch, way, unit):
    def double(scores, sparsity, *, of=None):
        m = allocate(scores, sparsity, of=of)
        return Mask(m.units, m.unit, graph=m.graph, scale={k:2.*v for k,v in m.items()}, meta=m.meta)
    @registered('doubling', unit=unit, allocate=double)
    def doubling(model, dls=None, *, graph=None, seed=0):
        w = {k:layers(model)[k].weight.abs() for k in ('fc1', 'fc2')}
        return Scores({k:v if unit == 'weight' else v.sum(1) for k,v in w.items()}, unit, graph=graph)
    first = state(start(dls))
    seen = [o[0] for o in trained_from(dls, monkeypatch, 'doubling', way=way, folder=tmp_path)[0]]
    for i,s in enumerate(seen):
        before = network(tmp_path, i-1) if i and way == 'cascade' else first
        if unit == 'weight':
            assert torch.equal(s['fc1.weight'], torch.where(s['fc1.weight'] != 0, 2*before['fc1.weight'], 0.))
        else: assert subset(s['fc1.weight'], 2*before['fc1.weight'])

def test_pruned_inputs_stay_zero(dls, tmp_path, registered):
    @registered('pixels', unit='channel', allocate=dict(of='network', normalize=None))
    def pixels(model, dls=None, *, graph=None, seed=0):
        return Scores({'fc1:in': model.fc1.weight.abs().sum(0)}, 'channel', graph=graph)
    res = sized(dls, 'pixels', sizes=(.8, .7), folder=tmp_path)
    gone = [(network(tmp_path, i)['fc1.weight'] == 0).all(0) for i in (0, 1)]
    assert 0 < gone[0].sum() < gone[1].sum() < 64 and (gone[0] <= gone[1]).all()
    assert [json.loads(o)['fc1'] for o in res.rows.layers] == [300*int((~g).sum()) for g in gone]

# 4. interruptions

class Stop(BaseException): pass

def stopped_at(monkeypatch, where, count):
    "Let the `count`-th call of a method of the chain raise."
    n, real = [0], getattr(C.Chain, where)
    def f(self, *a, **k):
        n[0] += 1
        if n[0] == count: raise Stop
        return real(self, *a, **k)
    monkeypatch.setattr(C.Chain, where, f)

ALL = {**KINDS, 'random': ('random', {}), 'ranks': ('svd', {}), 'pfp': ('pfp', {}),
       'masked channels': ('magnitude', dict(FT, shrink=False)), 'sipp': ('sipp', dict(variant='rand'))}

MOMENTS = [('cut', 3), ('train', 2), ('save', 2)]
CASES = [pytest.param(what, way, *MOMENTS[k], marks=[] if k == (i+j) % 3 else pytest.mark.slow) # one moment of each
         for i,what in enumerate(ALL) for j,way in enumerate(WAYS) for k in range(3)]

@pytest.mark.parametrize('what,way,where,count', CASES)
def test_resumed_equals_uninterrupted(dls, tmp_path, monkeypatch, what, way, where, count):
    name, args = ALL[what]
    if name == 'svd' and way in ('rewind', 'redraw'): pytest.skip('ranks have nothing to go back to')
    run = lambda d: sized(dls, name, args, way=way, folder=d)
    whole = run(tmp_path/'a')
    with monkeypatch.context() as m:
        stopped_at(m, where, count)
        with pytest.raises(Stop): run(tmp_path/'b')
    parts = run(tmp_path/'b'); again = run(tmp_path/'b')
    for other in (parts, again):
        pd.testing.assert_frame_equal(timeless(whole.rows), timeless(other.rows))
        assert all(torch.equal(a, b)
                   for a,b in zip(whole.model.state_dict().values(), other.model.state_dict().values()))
        assert all(torch.equal(whole.mask[k], other.mask[k]) for k in whole.mask)
    for i in range(3):
        assert ((tmp_path/'a'/f'size{i:03d}.safetensors').read_bytes()
                == (tmp_path/'b'/f'size{i:03d}.safetensors').read_bytes())
    assert len(list((tmp_path/'b').glob('state*'))) == 1 and not list(tmp_path.rglob('*.tmp'))

def test_rounds_and_one_size_resume_too(dls, tmp_path, monkeypatch):
    run = lambda d: prune(start(dls), 'magnitude', .8, rounds=3, fine_tune_epochs=1, latency=False, folder=d)
    whole = run(tmp_path/'a')
    with monkeypatch.context() as m:
        stopped_at(m, 'train', 3)
        with pytest.raises(Stop): run(tmp_path/'b')
    parts = run(tmp_path/'b')
    assert parts.report.tuned == whole.report.tuned and len(parts.rows) == len(whole.rows) == 1
    assert all(torch.equal(a, b) for a,b in zip(whole.model.state_dict().values(), parts.model.state_dict().values()))

def six_sizes(folder, ready):
    "A run of six sizes, in a process of its own; it says by the event `ready` where it begins."
    torch.set_num_threads(1); warnings.simplefilter('ignore')
    learn = fit(learner(build('lenet300', 1, 10, 8, seed=0), get_dls('digits', n_train=320), lr=.05), 2)
    ready.set()
    prune(learn, 'magnitude', sizes=[.8, .6, .4, .3, .2, .1], unit='channel', fine_tune_epochs=2, latency=False,
          folder=folder)

@pytest.fixture(scope='module')
def begun():
    "A function that begins `six_sizes` on a folder, in a process forked from one that has imported everything."
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload([__name__, 'matplotlib.pyplot'])
    def start(folder):
        ready = server.Event(); p = server.Process(target=six_sizes, args=(folder, ready)); p.start()
        assert ready.wait(120); return p
    return start

@pytest.mark.parametrize('secs', [.05, pytest.param(.6, marks=pytest.mark.slow)])
def test_killed_and_run_again(begun, tmp_path, secs):
    "SIGKILL, twice, at moments nobody chose; then to the end."
    for _ in range(2):
        p = begun(tmp_path/'b'); time.sleep(secs); p.kill(); p.join(); assert p.exitcode == -signal.SIGKILL
    for d in 'ab': p = begun(tmp_path/d); p.join(); assert p.exitcode == 0
    a, b = (json.loads((tmp_path/d/'rows.json').read_text())['rows'] for d in 'ab')
    strip = lambda r: {k:v for k,v in r.items() if k not in ('secs', 'peak_mib', 'train_secs')}
    assert list(map(strip, a)) == list(map(strip, b)) and len(a) == 6

def test_what_a_folder_is_known_by(dls, tmp_path):
    sized(dls, folder=tmp_path, sizes=[.5])
    for kw,words in [(dict(sizes=[.4]), 'sizes'), (dict(fine_tune_epochs=2), 'epochs'),
                     (dict(args=dict(norm='l2')), 'args')]:
        with pytest.raises(ValueError, match=f'was begun with {words}'):
            sized(dls, **{**dict(sizes=[.5]), **kw}, folder=tmp_path)
    with pytest.raises(ValueError, match='other weights'):
        prune(start(dls, epochs=1), 'magnitude', sizes=[.5], fine_tune_epochs=1, latency=False, folder=tmp_path)
    with pytest.raises(ValueError, match='other shapes'):
        prune(start(dls, 'mlp'), 'magnitude', sizes=[.5], fine_tune_epochs=1, latency=False, folder=tmp_path)
    other = get_dls('digits', n_train=320, seed=5); learn = start(dls); learn.dls = other
    with pytest.raises(ValueError, match='other validation data'):
        prune(learn, 'magnitude', sizes=[.5], fine_tune_epochs=1, latency=False, folder=tmp_path)

@pytest.mark.parametrize('name', ['size001', 'mask001', 'state001', 'rows'])
@pytest.mark.parametrize('how', ['cut', 'gone'])
def test_damaged_files_are_named(dls, tmp_path, monkeypatch, name, how):
    with monkeypatch.context() as m:
        stopped_at(m, 'train', 3)
        with pytest.raises(Stop): sized(dls, folder=tmp_path)
    f = next(tmp_path.glob(f'{name}.*'))
    if how == 'cut': f.write_bytes(f.read_bytes()[:-40])
    elif name == 'rows': return
    else: f.unlink()
    with pytest.raises(DamagedFileError, match=f.name): sized(dls, folder=tmp_path)

def test_a_folder_that_cannot_be_written_is_found_out_before_anything(dls, tmp_path):
    f = tmp_path/'file'; f.write_text('x')
    learn = start(dls); before = state(learn)
    with pytest.raises((ValueError, OSError)): prune(learn, 'magnitude', .5, folder=f/'sub')
    assert all(torch.equal(v, before[k]) for k,v in state(learn).items())

# 5. what is refused before anything changes

@pytest.mark.parametrize('kw,words', [
    (dict(sizes=[.2, .5]), 'descending'), (dict(sizes=[.5], sparsity=.5), 'exactly one'), (dict(sizes=[]), 'empty'),
    (dict(sizes=[.5], rounds=2), 'rounds=2'), (dict(sizes=[.5], start='dens'), "start='dens'"),
    (dict(sizes=[.5], rewind='redrawn'), 'redraw'),
    (dict(sizes=[.5], shrink='some'), 'shrink'), (dict(sizes=[.5], fine_tunes=2), 'only 1 sizes'),
    (dict(sizes=[50]), 'did you mean 0.5'), (dict(sizes=[.5], tune_args=dict(lr=.1), lr=.2), 'one of the two'),
    (dict(sizes=[.5], tune_args=dict(epochs=2)), 'tune_args'),
    (dict(sizes=[dict(kind='geometrc', hi=.5, lo=.1, count=2)]), 'geometric'), (dict(sizes=[.5], rewind=7), 'epoch 7'),
    (dict(method='svd', sizes=[.5], rewind='init'), 'factors')])
def test_refused_at_once(dls, kw, words):
    learn = start(dls, epochs=1); before = state(learn)
    with pytest.raises((ValueError, TypeError)) as e: prune(learn, **{**dict(method='magnitude'), **kw})
    assert words in str(e.value), str(e.value)
    assert all(torch.equal(v, before[k]) for k,v in state(learn).items())

# 6. searches

def test_bestof_is_the_best_of_n(dls):
    "Against drawing, testing and choosing by hand."
    learn = start(dls); res = prune(learn, 'bestof', .5, n=8, fine_tune_epochs=0, latency=False)
    assert res.found.evaluations == 8 and res.scores is None and res.mask.counts()[0] == budget_of(res.mask)
    twin = start(dls); graph = C.trace(twin.model, C.first_inputs(twin)); tries = []
    for i in range(8):
        g = core.generator(i, stream='bestof')
        m = allocate(Scores({k:torch.rand(v.shape, generator=g)
                             for k,v in candidates(twin.model, 'weight', graph).items()}, 'weight'), .5)
        net = copy.deepcopy(twin.model); surgery.apply(net, m); e = evaluate(net, dls.valid)
        tries.append((e.accuracy, -e.loss, m))
    best = max(tries, key=lambda o: o[:2])[2]
    assert all(torch.equal(best[k], res.mask[k]) for k in best)

def test_bestof_on_some_of_the_images(dls):
    "Against choosing by hand on the images that `calib_batch` draws; the same ones for every mask."
    res = prune(start(dls), 'bestof', .5, n=6, n_valid=20, seed=3, fine_tune_epochs=0, latency=False)
    net = start(dls).model; xb, yb = calib_batch(dls, n=20, seed=3); graph, tries = C.trace(net, xb[:2]), []
    for i in range(6):
        g = core.generator(3*1_000_003 + i, stream='bestof')
        m = allocate(Scores({k:torch.rand(v.shape, generator=g)
                             for k,v in candidates(net, 'weight', graph).items()}, 'weight'), .5)
        one = copy.deepcopy(net).eval(); surgery.apply(one, m); z = one(xb).detach()
        tries.append((int((z.argmax(1) == yb).sum())/20, -float(F.cross_entropy(z, yb))))
    assert [o['score'] for o in res.found.curve] == [o[0] for o in tries]
    assert res.found.curve[-1]['best'] == max(tries)[0] and res.found.state['first'] == tries.index(max(tries))

@pytest.mark.parametrize('n_valid,words', [(0, 'n_valid=0'), (2.5, 'n_valid=2.5'), (10_000, 'n=10000: the valid part')])
def test_bestof_on_images_that_are_not_there(dls, n_valid, words):
    with pytest.raises((ValueError, TypeError), match=words):
        prune(start(dls, epochs=1), 'bestof', .5, n=2, n_valid=n_valid)

def test_bestof_does_not_stop_to_write_after_every_mask(monkeypatch):
    "Each of the first hundred, then after one more in a hundred: what is written grows with the number of masks."
    monkeypatch.setattr(search, '_drawn', lambda task, seed, i: i); kept = []
    task = core.Task(None, None, None, .5, None, lambda m, batches: (0., float(m)))
    search.bestof(task, n=1000, keep=lambda f: kept.append(f.evaluations))
    assert kept[:102] == [*range(1, 102), 103] and kept[-1] > 990 and len(kept) < 350
    assert all(b <= 1.01*a+1 for a,b in zip(kept[100:], kept[101:]))

def budget_of(mask):
    n = sum(v.numel() for v in mask.values()); return core.kappa(n, .5)

@pytest.mark.parametrize('unit,shrink', [('weight', None), ('channel', False), ('channel', None)])
def test_a_search_in_sizes(dls, tmp_path, monkeypatch, unit, shrink):
    run = lambda d: prune(start(dls), 'bestof', sizes=[.5, .2], unit=unit, n=4, fine_tune_epochs=1, latency=False,
                          folder=d, shrink=shrink)
    whole = run(tmp_path/'a'); masks = [Mask.load(tmp_path/'a'/f'mask{i:03d}.safetensors') for i in (0, 1)]
    assert all((masks[1][k] <= masks[0][k]).all() for k in masks[1]) and len(whole.rows) == 2
    assert all(torch.equal(whole.found.mask[k], masks[1][k]) for k in masks[1]), 'in the dense shapes'
    left = (masks[1] if shrink is None and unit == 'channel' else {}).get('fc1', torch.ones(300)).sum()
    assert whole.model.fc1.out_features == left
    import neuronprune.search as S
    with monkeypatch.context() as m:
        real, n = S._drawn, [0]
        def drawn(*a):
            n[0] += 1
            if n[0] == 7: raise Stop
            return real(*a)
        m.setattr(S, '_drawn', drawn)
        with pytest.raises(Stop): run(tmp_path/'b')
    assert (tmp_path/'b'/'search.safetensors').exists()
    pd.testing.assert_frame_equal(timeless(whole.rows), timeless(run(tmp_path/'b').rows))
    assert not (tmp_path/'b'/'search.safetensors').exists()

SEARCHES = {'bestof': dict(n=6), 'anneal': dict(budget=30, at=1), 'edropout': dict(epochs=1, n_pop=4)}

@pytest.mark.parametrize('rewind', ['none', 'init'])
@pytest.mark.parametrize('name', SEARCHES)
def test_what_a_search_drops_leaves_before_the_training_or_is_held(conv, name, rewind):
    def run(shrink, epochs):
        learn = start(conv, 'resnet20', epochs=1)
        return prune(learn, name, .5, unit='channel', rewind=rewind, fine_tune_epochs=epochs, latency=False,
                     shrink=shrink, **SEARCHES[name]), learn
    (a, la), (b, lb) = run(False, 0), run('each', 0)
    assert all(torch.equal(a.mask[k], b.mask[k]) for k in a.mask) and a.found.curve == b.found.curve
    assert a.report.row()['pruned_k'] == b.report.row()['pruned_k']
    for k in ('params_stored', 'macs_stored', 'params_nonzero', 'macs_nonzero'):
        assert a.report.row()[k] == b.report.row()[k], k
    x = C.first_inputs(la); out = [l.model.eval()(x).detach() for l in (la, lb)]
    assert (out[0]-out[1]).abs().max() <= 1e-5*out[0].abs().max() and count_params(b.model) < count_params(a.model)
    if rewind == 'init': # the initial weights of the channels that are kept, and no others
        chosen = surgery.plan(a.model, a.mask, x)
        for k,(out_, in_) in chosen.items():
            w, own = lb.model.get_submodule(k).weight, start(conv, 'resnet20', epochs=0).rewind.init[f'{k}.weight']
            own = own if out_ is None else own[out_]
            assert torch.equal(w, own if in_ is None or own.ndim < 2 else own[:, in_]), k
        tuned = run('each', 1)[0]
        assert tuned.report.row()['tuned_k'] is not None and count_params(tuned.model) == count_params(b.model)

def test_an_interrupted_search_keeps_the_best_so_far(dls, registered):
    @registered('halfway', unit='weight', kind='search')
    def halfway(task, *, state=None, keep=None, seed=0):
        m = task.allocate(Scores({k:torch.rand(v.shape) for k,v in task.candidates.items()}, 'weight'))
        keep(Found(m, [], 1, {}, 'running')); raise KeyboardInterrupt
    with pytest.warns(UserWarning, match="status 'interrupted'"):
        res = prune(start(dls), 'halfway', .5, fine_tune_epochs=0, latency=False)
    assert res.report.status == 'interrupted' and res.mask.sparsity == .5
    @registered('nothing', unit='weight', kind='search')
    def nothing(task, *, state=None, keep=None): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): prune(start(dls), 'nothing', .5)

def test_a_try_leaves_the_network_as_it_was(dls):
    learn = start(dls); before = state(learn)
    tried(learn, Mask({'fc1': torch.rand(300, 64) > .5}, 'weight'))
    assert all(torch.equal(v, before[k]) for k,v in state(learn).items())
