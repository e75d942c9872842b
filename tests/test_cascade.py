"""Chains of ever smaller networks: budgets, what each mode starts from, interruptions, and the tables made of the rows."""
import json, math, sys, types
from itertools import product
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch, yaml
from hypothesis import given, settings, strategies as st
from scipy import stats
import neuronprune.core as core
from neuronprune import cascade as C, sources as P, surgery
from neuronprune.allocate import allocate
from neuronprune.batch import tuning
from neuronprune.cascade import *
from neuronprune.core import layers, method
from neuronprune.files import DamagedFileError, load_tensors, save_tensors
from neuronprune.masks import Mask, Scores
from neuronprune.data import get_dls
from neuronprune.models import build
from neuronprune.sources import dense
from neuronprune.costs import count_params
from neuronprune.train import Rewind, fit, learner
from neuronprune.evaluation import evaluate
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT/'nbs'/'params'/'provable').glob('*.yml'))
FT = dict(unit='channel', norm='l1', scope='layer', of='network')
KINDS = [('magnitude', {}), ('magnitude', FT)]
kinds = pytest.mark.parametrize('name,args', KINDS, ids=['weights', 'channels'])

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', n_train=320)

@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('runs')

@pytest.fixture
def registered():
    "Methods made for one test."
    before = dict(core._registry)
    yield method
    core._registry.clear(); core._registry.update(before)

def chain(dls, out, name='magnitude', args=None, ds=(.5, .2, .1), **kw):
    kw = {**dict(epochs=2, fine_tune_epochs=1, lr=.05, model='lenet300'), **kw}
    return cascade(dls, kw.pop('model'), name, list(ds), method_args=args, out=out, **kw)

def folder(dls, out, name='magnitude', args=None, ds=(.5, .2, .1), **kw):
    kw = {**dict(epochs=2, fine_tune_epochs=1, lr=.05, model='lenet300'), **kw}
    return cascade_folder(check_cascade(dict(kw, method=name, densities=list(ds), method_args=args, out=out), dls.c_in, dls.n_out, dls.size), dls)

def network(d, i): return load_tensors(d/f'step{i:03d}.safetensors')[0]
def timeless(df): return df.drop(columns=['score_secs', 'train_secs'])

# Sizes

def test_harmonic_densities_of_the_paper():
    assert [round(o, 3) for o in densities('harmonic', lo=.05, count=.8)] == [.442, .274, .195, .150, .121, .101, .086, .075, .066, .059, .053, .049]

@pytest.mark.parametrize('kind,f', [('geometric', lambda hi, lo, n: np.geomspace(hi, lo, n)), ('linear', lambda hi, lo, n: np.linspace(hi, lo, n)),
    ('cubic', lambda hi, lo, n: [lo+(hi-lo)*(1-i/(n-1))**3 for i in range(n)]),
    ('harmonic2', lambda hi, lo, n: [hi*i**(-math.log(hi/lo)/math.log(n)) for i in range(1, n+1)])])
def test_densities_between_two_ends(kind, f):
    for hi,lo,n in [(.85, .15, 58), (.5, .02, 15), (1., .9, 2)]: assert np.allclose(densities(kind, hi, lo, n), f(hi, lo, n), atol=1e-9)

def test_lists_of_the_cifar_networks():
    ds = densities('manual', values=[.99, .855]) + densities('geometric', .85, .15, 58) + densities('linear', .132, .02, 9)
    assert len(check_densities(ds)) == 69 and ds[:3] == [.99, .855, .85] and ds[-1] == .02

@pytest.mark.parametrize('kw,words', [(dict(kind='geometrc', hi=.5, lo=.1, count=3), "did you mean 'geometric'"), (dict(hi=.5, lo=.1), 'count=None'),
    (dict(hi=.1, lo=.5, count=3), 'descending'), (dict(hi=50, lo=.1, count=3), 'did you mean 0.5'), (dict(kind='manual', values=[]), 'empty'),
    (dict(kind='harmonic', lo=.05, count=0), 'count=0'), (dict(kind='manual', values=[.5, .5]), 'descending'), (dict(kind='manual', values=[.5, 0.]), 'keeps nothing'),
    (dict(kind='manual', values=[.5], hi=.9), 'hi=0.9')])
def test_bad_densities(kw, words):
    with pytest.raises(ValueError, match=words): densities(**kw)

@pytest.mark.parametrize('name', ['lenet300', 'lenet5_conv', 'resnet20'])
def test_budget_is_the_specified_number(name):
    net = build(name, 3, 10, 32); size, n = count_params(net), sum(m.weight.numel() for m in layers(net).values())
    for kr in (.97, .5, .25, .125, .0625): assert budget(net, kr) == min(int((kr-1)*size+n), n)
    assert budget(net, 1.) == n
    least = (size-n+len(layers(net)))/size
    assert budget(net, math.ceil(least*1e9)/1e9) == len(layers(net))
    with pytest.raises(ValueError, match=f'expected at least {math.ceil(1e6*least)/1e6:g}'): budget(net, least*.999)

def test_budget_counts_decimals(): assert [budget(torch.nn.Linear(10, 10, bias=False), d) for d in (.29, .57, .58)] == [29, 57, 58] # not 28, 56, 57

@given(st.integers(1, 80), st.data())
def test_pieces_of_the_list(n, data):
    k = data.draw(st.integers(1, n)); got = tuned_steps(n, k)
    sizes = np.diff([-1, *got])
    assert len(got) == k and got[-1] == n-1 and sizes.min() >= sizes.max()-1 >= 0 and list(sizes) == sorted(sizes, reverse=True)

def test_pieces_by_hand():
    assert tuned_steps(69, 23) == list(range(2, 69, 3)) and tuned_steps(3, 0) == [] and tuned_steps(2) == [0, 1]
    with pytest.raises(ValueError, match='only 2 densities'): tuned_steps(2, 3)

# The chain

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['magnitude', 'snip', 'random'])
def test_weight_budgets_are_exact(dls, home, mode, name):
    df, d = chain(dls, home, name, mode=mode), folder(dls, home, name, mode=mode)
    assert df.weights.tolist() == df.budget.tolist() == [budget(build('lenet300', 1, 10, 8), o) for o in (.5, .2, .1)]
    files = [network(d, i) for i in range(3)]
    for f,left in zip(files, df.layers):
        real = {k:int(f[f'{k}.weight'].count_nonzero()) for k in ('fc1', 'fc2', 'fc3')}
        assert real == json.loads(left)
    if mode != 'one_shot':
        for a,b in zip(files, files[1:]): assert all(((a[k] != 0) | (b[k] == 0)).all() for k in a if k.endswith('weight')), 'masks only shrink'

def test_dead_weights_take_no_budget(dls, home, registered):
    @registered('flat', unit='weight')
    def flat(model, dls=None, *, seed=0):
        whole = all(m.weight.all() for m in layers(model).values())
        return Scores({k:m.weight.abs()*whole for k,m in layers(model).items()}, 'weight')
    df = chain(dls, home, 'flat')
    assert df.weights.tolist() == df.budget.tolist(), 'from the second cut on, the living score as low as the dead'

def test_what_is_gone_stays_gone_whatever_the_allocator(dls, tmp_path, registered):
    shift = iter((0, 0, 3, 5)) # the first call is the rehearsal
    def loose(scores, sparsity, **kw):
        m, n = allocate(scores, sparsity), next(shift)
        return Mask({k:v.roll(n, 0) for k,v in m.items()}, 'weight')
    @registered('loose', unit='weight', allocate=loose)
    def loose_scores(model, dls=None, *, seed=0): return Scores({k:m.weight.abs() for k,m in layers(model).items()}, 'weight')
    df, d = chain(dls, tmp_path, 'loose'), folder(dls, tmp_path, 'loose')
    files = [network(d, i) for i in range(3)]
    for a,b in zip(files, files[1:]): assert all(((a[k] != 0) | (b[k] == 0)).all() for k in a if k.endswith('weight'))
    assert df.weights.tolist() == [sum(int(f[k].count_nonzero()) for k in f if k.endswith('weight')) for f in files] and (df.weights[1:] < df.budget[1:]).all()

def test_channel_chains_shrink(dls, home):
    df, d = chain(dls, home, args=FT), folder(dls, home, args=FT)
    assert (df.weights >= df.budget).all() and (np.diff(df.params_small) < 0).all() and (df.macs_small == df.macs).all()
    for i,r in df.iterrows():
        net = surgery.load(d/f'step{i:03d}.safetensors')
        a, b = net.fc1.out_features, net.fc2.out_features
        assert count_params(net) == r.params_small and evaluate(net, dls.test).k == r.tuned_k
        if i: assert r.weights - r.budget < 64+b+a+10, 'within one neuron of each layer'
    assert json.loads(df.layers.iloc[-1]) == {'fc1': 64*a, 'fc2': a*b, 'fc3': 10*b}

@pytest.mark.parametrize('model,size,c', [('lenet5_conv', 32, 1), ('resnet20', 16, 3)])
@pytest.mark.parametrize('mode', ['cascade', 'reinit'])
def test_convolutions_and_residuals(home, model, size, c, mode):
    tiny = get_dls('digits', size=size, n_train=64, c_in=c)
    df = chain(tiny, home, args=FT, ds=(.5, .2), model=model, mode=mode, epochs=1)
    assert (df.weights >= df.budget).all() and df.tuned_k.notna().all() and (np.diff(df.params_small) < 0).all()

def test_density_one_changes_nothing(dls, home):
    for args in (None, FT):
        df = chain(dls, home, args=args, ds=(1.,), fine_tunes=0); net = network(folder(dls, home, args=args, ds=(1.,), fine_tunes=0), 0)
        own = dense(dls, 'lenet300', 2, lr=.05, out=home).model.state_dict()
        assert all(torch.equal(net[k], own[k]) for k in own) and df.pruned_k[0] == df.dense_k[0] and df.params_density[0] == 1

def test_some_are_only_cut(dls, home):
    df = chain(dls, home, ds=(.6, .5, .4, .3, .2), fine_tunes=2)
    assert df.tuned_k.notna().tolist() == [False, False, True, False, True] == df.train_secs.notna().tolist()
    d = folder(dls, home, ds=(.6, .5, .4, .3, .2), fine_tunes=2)
    a, b = network(d, 0), network(d, 1)
    assert all(torch.equal(b[k], torch.where(b[k] != 0, a[k], 0.)) for k in a if k.endswith('weight')), 'no training between the first two'
    curves = results_arrays(df)['curves'][0, :, 0, 0]
    assert np.isnan(curves).all((1, 2)).tolist() == df.curve.isna().tolist() == [True, True, False, True, False] and curves.shape[1] == 3
    none = chain(dls, home, fine_tunes=0)
    assert none.tuned_k.isna().all() and commensurate(none, .5, when='pruned').nets[0] == 1
    with pytest.raises(ValueError, match="when='tuned'"): commensurate(none)

def test_one_shot_cuts_the_dense_network(dls, home, monkeypatch):
    calls, real = [], C.score_with
    monkeypatch.setattr(C, 'score_with', lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    three, one = chain(dls, home, mode='one_shot', seed=3), chain(dls, home, mode='one_shot', ds=(.1,), seed=3)
    assert len(calls) == 3, 'scored once per chain, and once by the rehearsal before the training'
    assert three.pruned_k.iloc[-1] == one.pruned_k.iloc[0] and three.pruned_loss.iloc[-1] == one.pruned_loss.iloc[0]
    again = chain(dls, home, seed=3)
    assert len(calls) == 6 and again.pruned_loss.iloc[0] == three.pruned_loss.iloc[0] and again.pruned_loss.iloc[1] != three.pruned_loss.iloc[1]

def started(dls, out, monkeypatch, name, args, mode, **kw):
    "(networks the fine-tunings start from, their arguments)"
    seen = []
    def spy(learn, mask, epochs, lr=None, **o):
        seen.append(({k:v.clone() for k,v in learn.model.state_dict().items()}, dict(o, epochs=epochs)))
        return real(learn, mask, epochs, lr, **o)
    real = C.fine_tune; monkeypatch.setattr(C, 'fine_tune', spy)
    chain(dls, out, name, args, mode=mode, **kw)
    return seen

@kinds
def test_rewinding_restores_the_kept_epoch(dls, tmp_path, monkeypatch, name, args):
    seen = started(dls, tmp_path, monkeypatch, name, args, 'rewind', epochs=3, fine_tune_epochs=1)
    twin = learner(build('lenet300', 1, 10, 8, seed=0), dls, lr=.05, cbs=[Rewind(epochs=(2,))])
    kept = fit(twin, 3).rewind.states[2]
    assert not torch.equal(kept['fc1.weight'], twin.model.fc1.weight)
    assert [o['start_epoch'] for _,o in seen] == [2]*3 and [o['epochs'] for _,o in seen] == [3]*3
    for state,_ in seen: assert subset(state['fc1.weight'], kept['fc1.weight']) and subset(state['fc3.bias'][None], kept['fc3.bias'][None])
    if args: return
    for state,_ in seen: assert torch.equal(state['fc1.weight'], torch.where(state['fc1.weight'] != 0, kept['fc1.weight'], 0.))

def subset(small, big):
    "Are all non-zero entries of `small` entries of `big`, in its order?"
    rest = iter(big.flatten().tolist())
    return all(any(v == o for o in rest) for v in small.flatten().tolist() if v != 0)

@kinds
def test_drawing_afresh(dls, tmp_path, monkeypatch, name, args):
    seen = [o[0] for o in started(dls, tmp_path, monkeypatch, name, args, 'reinit', seed=2)]
    fresh = [build('lenet300', 1, 10, 8, seed=2000+i).state_dict() for i in (1, 2, 3)]
    for s,f in zip(seen, fresh): assert subset(s['fc1.weight'], f['fc1.weight']) and s['fc1.weight'].count_nonzero() > 0
    first = build('lenet300', 1, 10, 8, seed=2).state_dict()
    assert not subset(seen[0]['fc1.weight'], first['fc1.weight']) and not subset(seen[1]['fc1.weight'], fresh[0]['fc1.weight'])

def test_survivors_stay_in_a_cascade(dls, tmp_path, monkeypatch):
    seen = started(dls, tmp_path, monkeypatch, 'magnitude', None, 'cascade'); d = folder(dls, tmp_path)
    for i in (1, 2):
        now, before = seen[i][0]['fc1.weight'], network(d, i-1)['fc1.weight']
        assert torch.equal(now, torch.where(now != 0, before, 0.)) and seen[i][1].get('start_epoch', 0) == 0
    assert len({o['seed'] for _,o in seen}) == 3

def test_fine_tuning_has_its_own_schedule(dls, tmp_path, monkeypatch):
    lrs, real = [], C.fine_tune
    def spy(learn, mask, epochs, lr=None, **o): lrs.append((lr, learn.opt_func.keywords['weight_decay'], o)); return real(learn, mask, epochs, lr, **o)
    monkeypatch.setattr(C, 'fine_tune', spy)
    chain(dls, tmp_path, ds=(.5,), opt_args=dict(wd=1e-4), fit_args=dict(schedule='step', milestones=[1]), tune_args=dict(lr=.02, wd=5e-4, gamma=.3))
    assert lrs == [(.02, 5e-4, dict(seed=1, schedule='step', milestones=[1], gamma=.3))]

def drawn(registered):
    "A sampling method: keeps what it must, each with a factor of 2."
    def double(scores, sparsity, **kw):
        m = allocate(scores, sparsity)
        return Mask(m.units, 'weight', scale={k:2.*v for k,v in m.items()})
    @registered('doubling', unit='weight', allocate=double)
    def doubling(model, dls=None, *, seed=0): return Scores({k:m.weight.abs() for k,m in layers(model).items()}, 'weight')

@pytest.mark.parametrize('mode', ['one_shot', 'cascade'])
def test_factors_are_multiplied_in_once(dls, tmp_path, registered, monkeypatch, mode):
    drawn(registered)
    seen = [o[0] for o in started(dls, tmp_path, monkeypatch, 'doubling', None, mode)]
    d, own = folder(dls, tmp_path, 'doubling', mode=mode), dense(dls, 'lenet300', 2, lr=.05, out=tmp_path).model.state_dict()
    for i,s in enumerate(seen):
        before = network(d, i-1) if i and mode == 'cascade' else own
        for k in ('fc1.weight', 'fc2.weight', 'fc3.weight'): assert torch.equal(s[k], torch.where(s[k] != 0, 2*before[k], 0.))
        assert all(((network(d, i)[k] == 0) == (s[k] == 0)).all() for k in s if k.endswith('weight')), 'the pattern is kept while training'

def test_factors_of_channels_too(dls, tmp_path, registered, monkeypatch):
    def double(scores, sparsity, *, of='units'):
        m = allocate(scores, sparsity, of=of)
        return Mask(m.units, 'channel', graph=m.graph, scale={k:2.*v for k,v in m.items()})
    @registered('fdoubling', unit='channel', allocate=double)
    def fdoubling(model, dls=None, *, graph=None, seed=0):
        return Scores({k:getattr(model, k).weight.abs().sum(1) for k in ('fc1', 'fc2')}, 'channel', graph=graph)
    seen, own = started(dls, tmp_path, monkeypatch, 'fdoubling', None, 'cascade'), dense(dls, 'lenet300', 2, lr=.05, out=tmp_path).model.state_dict()
    assert subset(seen[0][0]['fc1.weight'], 2*own['fc1.weight'])

def test_pruned_inputs_stay_zero(dls, tmp_path, registered):
    @registered('pixels', unit='channel', allocate=dict(of='network', normalize=None))
    def pixels(model, dls=None, *, graph=None, seed=0):
        w = model.fc1.weight.abs().sum(0); return Scores({'fc1:in': w}, 'channel', graph=graph)
    df, d = chain(dls, tmp_path, 'pixels', ds=(.8, .7)), folder(dls, tmp_path, 'pixels', ds=(.8, .7))
    gone = [(network(d, i)['fc1.weight'] == 0).all(0) for i in (0, 1)]
    assert 0 < gone[0].sum() < gone[1].sum() < 64 and (gone[0] <= gone[1]).all() and (df.weights >= df.budget).all()
    assert [json.loads(o)['fc1'] for o in df.layers] == [300*int((~g).sum()) for g in gone]

# Interruptions, seeds

def interrupted(run, tmp_path, monkeypatch):
    "(rows of a whole chain under a, rows of one under b that was stopped before its third cut)"
    whole, real = run(tmp_path/'a'), C._prune
    with monkeypatch.context() as m:
        m.setattr(C, '_prune', lambda run, i, b: (_ for _ in ()).throw(KeyboardInterrupt) if i == 2 else real(run, i, b))
        with pytest.raises(KeyboardInterrupt): run(tmp_path/'b')
    return whole, run(tmp_path/'b')

@pytest.mark.parametrize('mode', ['cascade', 'rewind'])
def test_resuming_with_random_crops_is_bit_identical(tmp_path, monkeypatch, mode):
    noise = np.random.default_rng(0)
    for part,n in (('train', 12), ('test', 4)):
        for c in 'ab':
            (tmp_path/'pictures'/part/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(noise.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(tmp_path/'pictures'/part/c/f'{i}.png')
    data = lambda: get_dls(str(tmp_path/'pictures'), 8, bs=4, valid_pct=.25, augment='resized_crop', resident=False)
    whole, parts = interrupted(lambda out: chain(data(), out, ds=(.9, .8, .7), mode=mode, epochs=3, fine_tune_epochs=2, lr=.01), tmp_path, monkeypatch)
    pd.testing.assert_frame_equal(timeless(whole), timeless(parts))

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name,args', [*KINDS, ('random', {}), ('svd', {})], ids=['weights', 'channels', 'random', 'ranks'])
def test_resuming_is_bit_identical(dls, tmp_path, monkeypatch, mode, name, args):
    if name == 'svd' and mode not in MODES[:2]: pytest.skip('ranks have no such mode')
    whole, parts = interrupted(lambda out: chain(dls, out, name, args, mode=mode), tmp_path, monkeypatch)
    pd.testing.assert_frame_equal(timeless(whole), timeless(parts))
    a, b = (folder(dls, tmp_path/o, name, args, mode=mode) for o in 'ab')
    for i in range(3): assert (a/f'step{i:03d}.safetensors').read_bytes() == (b/f'step{i:03d}.safetensors').read_bytes()
    assert len(list(b.glob('state*'))) == 1 and not list(b.glob('*.tmp'))

def test_initial_weights_survive_an_interruption(dls, tmp_path, registered, monkeypatch):
    @registered('moved', unit='channel', allocate=dict(of='network'))
    def moved(model, dls=None, *, graph=None, init=None, seed=0):
        return Scores({k:(getattr(model, k).weight-init[f'{k}.weight']).abs().sum(1) for k in ('fc1', 'fc2')}, 'channel', graph=graph)
    whole, parts = interrupted(lambda out: chain(dls, out, 'moved'), tmp_path, monkeypatch)
    pd.testing.assert_frame_equal(timeless(whole), timeless(parts))

def test_rewinding_shares_one_snapshot(dls, tmp_path, monkeypatch):
    a = chain(dls, tmp_path, mode='rewind')
    assert len(list((tmp_path/'dense').iterdir())) == 2 and not list(tmp_path.rglob('rewind.safetensors'))
    fits, real = [], P.fit
    monkeypatch.setattr(P, 'fit', lambda *o, **k: (fits.append(1), real(*o, **k))[1])
    b = chain(dls, tmp_path, 'random', mode='rewind')
    assert not fits and a.dense_loss[0] == b.dense_loss[0]

def test_the_snapshot_of_an_older_chain_is_read(dls, tmp_path):
    want = chain(dls, tmp_path/'a', mode='rewind'); d = folder(dls, tmp_path/'b', mode='rewind')
    state = dense(dls, 'lenet300', 2, lr=.05, stop=1).model.state_dict()
    save_tensors(d/'rewind.safetensors', state, dict(kind='rewind', epoch=1))
    pd.testing.assert_frame_equal(timeless(want), timeless(chain(dls, tmp_path/'b', mode='rewind')))
    assert len(list((tmp_path/'b'/'dense').iterdir())) == 1

def test_names_of_files_do_not_change(dls):
    "Runs of months are found again under these."
    args = dict(model='lenet300', method='magnitude', densities=[.5, .2], epochs=40, lr=.01, fit_args=dict(schedule='step', milestones=[30]), tune_args=dict(gamma=.2))
    assert cascade_folder(check_cascade(args, 1, 10, 8), dls).name == 'magnitude-9ba9a84e2a3f7a99'
    net = learner(build('lenet300', 1, 10, 8, seed=0), dls, lr=.01)
    assert P.dense_path(net, 'x', weights=None, epochs=40, opt='sgd', opt_args={}, seed=0, fit=dict(schedule='step')).stem == '856799e20a2ae79b'
    assert P.dense_path(net, 'x', init='kaiming', weights=None, epochs=40, opt='sgd', opt_args={}, seed=0, fit={}).stem == '497f722ad3462a35'

def test_dying_while_writing(dls, tmp_path, monkeypatch):
    whole = chain(dls, tmp_path/'a')
    with monkeypatch.context() as m:
        real = C.save_json
        def broken(path, d):
            if len(list(Path(path).parent.glob('step*'))) == 2: raise OSError('disk full')
            return real(path, d)
        m.setattr(C, 'save_json', broken)
        with pytest.raises(OSError, match='disk full'): chain(dls, tmp_path/'b')
    pd.testing.assert_frame_equal(timeless(whole), timeless(chain(dls, tmp_path/'b')))

def half_done(out):
    "(data, arguments, the chain's files with their bytes, all its rows): a chain whose last density is still to come."
    data = get_dls('digits', n_train=64); kw = dict(ds=(.5, .3), model='fc_baseline', epochs=1, args=dict(FT))
    whole, d = chain(data, out, **kw), folder(data, out, **kw)
    real = C._prune
    C._prune = lambda run, i, b: (_ for _ in ()).throw(KeyboardInterrupt) if i else real(run, i, b)
    try:
        for f in d.iterdir(): f.unlink()
        with pytest.raises(KeyboardInterrupt): chain(data, out, **kw)
    finally: C._prune = real
    return data, kw, d, {f.name:f.read_bytes() for f in d.iterdir()}, whole

@pytest.fixture(scope='module')
def half(tmp_path_factory): out = tmp_path_factory.mktemp('half'); return out, *half_done(out)

def restored(half):
    out, data, kw, d, kept, whole = half
    for f in d.iterdir(): f.unlink()
    for n,b in kept.items(): (d/n).write_bytes(b)
    return lambda: chain(data, out, **kw)

@settings(max_examples=30)
@given(name=st.sampled_from(['rows.json', 'state000.safetensors', 'step000.safetensors']), at=st.floats(0, .999), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_chains_do_not_go_on(half, name, at, bit, cut):
    go, d, b, whole = restored(half), half[3], bytearray(half[4][name]), half[5]; i = int(at*len(b)); b[i] ^= 1 << bit
    (d/name).write_bytes(b[:i] if cut else b)
    try: df = go()
    except DamagedFileError as e: assert f"path='{d/name}'" in str(e) and 'delete the folder it is in' in str(e)
    else: pd.testing.assert_frame_equal(timeless(df), timeless(whole))

@pytest.mark.parametrize('change', [lambda rows: rows*2, lambda rows: rows*9, lambda rows: [], lambda rows: [dict(rows[0], step=1)], lambda rows: [dict(rows[0], density=.4)], lambda rows: [dict(rows[0], method='random')],
    lambda rows: [dict(rows[0], seed=1)], lambda rows: [{}], lambda rows: [3], lambda rows: {}, lambda rows: 'rows', lambda rows: None])
def test_rows_of_another_chain(half, change):
    go, d, rows = restored(half), half[3], json.loads(half[4]['rows.json'])['rows']
    (d/'rows.json').write_text(json.dumps(dict(arguments={}, rows=change(rows)))) # as written before there were checksums
    if change(rows) == []: return pd.testing.assert_frame_equal(timeless(go()), timeless(half[5]))
    with pytest.raises(DamagedFileError, match='rows.json'): go()

def test_files_of_another_chain(half, tmp_path):
    go, d, kept = restored(half), half[3], half[4]; t, h = load_tensors(d/'state000.safetensors'); k = next(k for k in t if k.startswith('origin/')); s = d/'state000.safetensors'
    for tensors, head in [(t, {**h, 'chain': 'other'}), (t, {**h, 'step': 1}), (t, {**h, 'kind': 'model'}), ({**t, k: t[k]+10**6}, h), ({**t, k: t[k][:1]}, h), ({o:v for o,v in t.items() if o != k}, h), ({**t, 'keep/fc9.weight': t[k] > 0}, h),
                          ({**t, f"keep/{k.removeprefix('origin/')}": t[k]}, h)]:
        save_tensors(s, tensors, head)
        with pytest.raises(DamagedFileError, match='state000'): go()
    for name in ('state000.safetensors', 'step000.safetensors'):
        go = restored(half); (d/name).unlink()
        with pytest.raises(DamagedFileError, match=f'{name}.*delete the folder'): go()
    go = restored(half); surgery.save(build('fc2', 1, 10, 8), d/'step000.safetensors')
    with pytest.raises(DamagedFileError, match='step000'): go()

def test_a_finished_chain_is_not_run_again(dls, home, monkeypatch):
    first = chain(dls, home)
    monkeypatch.setattr(C, 'dense', lambda *a, **k: pytest.fail('trained again'))
    pd.testing.assert_frame_equal(first, chain(dls, home))
    assert chain(dls, home, name='magnitude').equals(first) and set(cascade(dls, 'lenet300', 'magnitude', [.5, .2, .1], epochs=2, fine_tune_epochs=1, lr=.05, out=home, name='WT').name) == {'WT'}

def test_seeds(dls, tmp_path, home):
    a, b, c = chain(dls, home, 'random', seed=1), chain(dls, tmp_path, 'random', seed=1), chain(dls, home, 'random', seed=2)
    pd.testing.assert_frame_equal(timeless(a), timeless(b))
    assert a.tuned_loss.tolist() != c.tuned_loss.tolist() and a.dense_loss[0] != c.dense_loss[0]

def test_the_folder_is_a_function_of_what_matters(dls, tmp_path):
    base = folder(dls, tmp_path)
    assert base == folder(dls, tmp_path, tensorboard='x', progress=True)
    assert len({folder(dls, tmp_path, **{k:v}) for k,v in dict(seed=1, mode='rewind', fine_tunes=1, tune_args={'lr': .1}, args={'norm': 'l2'}, ds=[.5], epochs=3).items()} | {base}) == 8

# Bad arguments, before anything is trained

@pytest.mark.parametrize('kw,err,words', [
    (dict(name='magnitud'), ValueError, "did you mean 'magnitude'"), (dict(model='lenet3000'), ValueError, "did you mean 'lenet300'"),
    (dict(mode='oneshot'), ValueError, "did you mean 'one_shot'"), (dict(args=dict(sparsity=.5)), ValueError, 'argument of magnitude'),
    (dict(args=dict(unit='group')), ValueError, "unit of magnitude='group'"), (dict(args=dict(threshold=1.)), ValueError, 'goes by densities'),
    (dict(ds=(.5, .001)), ValueError, 'expected at least'), (dict(ds=(.2, .5)), ValueError, 'descending'), (dict(ds=()), ValueError, 'empty'),
    (dict(fine_tunes=4), ValueError, 'only 3'), (dict(fine_tune_epochs=-1), ValueError, 'fine_tune_epochs=-1'), (dict(epochs=.5), TypeError, 'epochs=0.5'),
    (dict(mode='rewind', fine_tune_epochs=3), ValueError, 'goes back so many'), (dict(opt='sdg'), ValueError, "did you mean 'sgd'"),
    (dict(fit_args=dict(shedule='flat')), ValueError, "did you mean 'schedule'"), (dict(fit_args=dict(schedule='step')), ValueError, 'milestones'),
    (dict(tune_args=dict(weight_decay=0)), ValueError, 'tune_args'), (dict(lr=-1.), ValueError, 'lr=-1'), (dict(method_args=3), TypeError, 'method_args'),
    (dict(init='zeros'), ValueError, "init='zeros'"), (dict(seed=1.5), TypeError, 'seed=1.5'), (dict(seed=-1), ValueError, 'seed=-1'),
    (dict(tune_args=dict(seed=3)), ValueError, "tune_args='seed'"), (dict(fit_args=dict(start_epoch=1)), ValueError, "fit_args='start_epoch'"),
    (dict(name='snip', args=dict(rounds=3)), ValueError, 'rounds=3'), (dict(name='pfp', args=dict(unit='weight')), ValueError, "unit of pfp='weight'"),
    (dict(name='sipp', args=dict(unit='channel')), ValueError, 'sipp_cut would not count'), (dict(args=dict(FT, of='units')), ValueError, "of='units'"),
    (dict(args=dict(of='macs')), ValueError, "of='macs'"), (dict(weights='IMAGENET1K_V1'), ValueError, 'weights='),
    (dict(model='resnet18', weights='IMAGENET1K_V9'), ValueError, "expected one of 'IMAGENET1K_V1'"), (dict(opt_args=dict(nesterof=True)), ValueError, "did you mean 'nesterov'"),
    (dict(opt='adam', opt_args=dict(momentum=.9)), ValueError, "opt_args='momentum'"), (dict(name='svd', args=dict(unit='channel')), ValueError, 'unit of svd'),
    (dict(name='svd', mode='rewind'), ValueError, 'factors have no'),
    (dict(name='pfp', args=dict(variant='dett')), ValueError, "pfp: .*did you mean 'det'"), (dict(name='pfp', args=dict(n=10**6)), ValueError, 'pfp: n=1000000')])
def test_bad_arguments(dls, tmp_path, monkeypatch, kw, err, words):
    monkeypatch.setattr(C, 'dense', lambda *a, **k: pytest.fail('trained before the arguments were checked'))
    if 'method_args' in kw:
        with pytest.raises(err, match=words): cascade(dls, 'lenet300', 'magnitude', [.5], out=tmp_path, **kw)
    else:
        with pytest.raises(err, match=words): chain(dls, tmp_path, **kw)

def test_what_fails_only_untrained_is_no_reason_to_stop(dls, tmp_path, registered):
    @registered('shy', unit='weight')
    def shy(model, dls=None, *, init=None, seed=0):
        if torch.equal(model.fc1.weight.cpu(), init['fc1.weight']): raise RuntimeError('has not learned anything')
        return Scores({k:m.weight.abs() for k,m in layers(model).items()}, 'weight')
    assert len(chain(dls, tmp_path, 'shy')) == 3

def test_no_rehearsal_where_the_network_is_there(dls, tmp_path, monkeypatch):
    chain(dls, tmp_path, ds=(.5,))
    monkeypatch.setattr(C, '_prune', lambda run, i, b: pytest.fail('rehearsed') if not run.whole else 0.)
    chain(dls, tmp_path, ds=(.4,))
    with pytest.raises(pytest.fail.Exception, match='rehearsed'): chain(dls, tmp_path, ds=(.4,), seed=5)

# Ranks

@pytest.mark.parametrize('mode', MODES[:2])
@pytest.mark.parametrize('name', ['svd', 'alds', 'pca'])
def test_chains_of_ranks(dls, tmp_path, mode, name):
    df, d = chain(dls, tmp_path, name, mode=mode), folder(dls, tmp_path, name, mode=mode)
    assert (df.weights >= df.budget).all() and (df.weights-df.budget < 64+300+10*64).all(), 'met from above, within one rank of the widest form'
    assert json.loads(df.layers[0]).keys() == json.loads(df.dense_layers[0]).keys() and (df.macs_small == df.weights).all() and (np.diff(df.weights) < 0).all()
    for i,r in df.iterrows():
        net = surgery.load(d/f'step{i:03d}.safetensors')
        assert count_params(net) == r.params_small == r.params == r.weights+410 and evaluate(net, dls.test).k == r.tuned_k
        assert sum(m.weight.numel() for m in layers(net).values()) == r.weights == sum(json.loads(r.layers).values())

def test_ranks_of_convolutions(home):
    tiny = get_dls('digits', size=32, n_train=64)
    df = chain(tiny, home, 'svd', ds=(.5, .2), model='lenet5_conv', epochs=1)
    assert (df.weights >= df.budget).all() and (df.weights < 1.1*df.budget).all() and (df.macs_small < df.dense_macs).all()

def test_factors_hold_what_the_dense_network_did(dls, tmp_path, monkeypatch):
    seen = [o[0] for o in started(dls, tmp_path, monkeypatch, 'svd', None, 'one_shot')]
    own = dense(dls, 'lenet300', 2, lr=.05, out=tmp_path).model.state_dict()
    for s in seen:
        left, right = s['fc1.1.weight'], s['fc1.0.weight']
        u, v, w = torch.linalg.svd(own['fc1.weight'], full_matrices=False); j = len(right)
        assert torch.allclose(left @ right, (u[:, :j]*v[:j]) @ w[:j], atol=1e-5) and torch.equal(s['fc1.1.bias'], own['fc1.bias'])

def test_other_loaders(tmp_path):
    with pytest.raises(TypeError, match='dls: expected fastai DataLoaders .*, got list'): cascade([], 'lenet300', 'magnitude', [.5], out=tmp_path)

def test_layers_a_method_skips(dls, tmp_path, registered):
    @registered('first', unit='weight')
    def first(model, dls=None, *, seed=0): return Scores({'fc1': model.fc1.weight.abs()}, 'weight', skipped={'fc2': 'no theory', 'fc3': 'no theory'})
    df = chain(dls, tmp_path, 'first', ds=(.8,))
    assert df.weights[0] == df.budget[0] and json.loads(df.layers[0])['fc2'] == 30000
    with pytest.raises(ValueError, match='31,000 weights are in layers the method skips .fc2, fc3'): chain(dls, tmp_path, 'first', ds=(.3,))

def test_without_training(dls, tmp_path):
    df = chain(dls, tmp_path, ds=(.5,), epochs=0, fine_tune_epochs=0)
    assert df.tuned_k.isna().all() and df.weights[0] == df.budget[0]

# Many chains

def grid_of(out, **kw):
    base = dict(data=dict(name='digits', n_train=200), model='lenet300', densities=[.5, .2], epochs=1, lr=.05, out=str(out), **kw)
    return [dict(base, method=m, name=n, seed=s, **o) for s in (0, 1) for n,m,o in [('WT', 'magnitude', {}), ('boom', 'random', dict(tune_args=dict(lr=1e30)))]]

def test_failures_stay_where_they_happen(tmp_path):
    df = cascades(grid_of(tmp_path), progress=False)
    assert df[df.name == 'WT'].groupby('seed').size().tolist() == [2, 2] and set(df[df.name == 'WT'].error) == {''}
    bad = df[df.name == 'boom']
    assert len(bad) == 2 and bad.error.str.contains('loss is').all() and bad.step.isna().all()
    assert len(list((tmp_path/'dense').iterdir())) == 2
    with pytest.warns(UserWarning, match='stopped early: boom .seed 0., boom .seed 1.'): assert set(commensurate(df, .5).name) == {'WT'}
    assert results_arrays(df)['error'].shape == (2, 2, 1, 1)
    with pytest.raises(RuntimeError, match='all 1 chains failed.*loss is'): cascades(grid_of(tmp_path)[1:2], progress=False)

def test_two_labels_of_one_chain_run_it_once(tmp_path, monkeypatch):
    g, calls, real = grid_of(tmp_path)[0], [], C._chain
    monkeypatch.setattr(C, '_chain', lambda *a: (calls.append(1), real(*a))[1])
    df = cascades([g, dict(g, name='again')], progress=False)
    assert len(calls) == 1 and df.name.tolist() == ['WT', 'WT', 'again', 'again'] and df.tuned_k[:2].tolist() == df.tuned_k[2:].tolist()

@pytest.mark.slow
def test_two_processes_do_the_same(tmp_path):
    g = [o for d in 'ab' for o in grid_of(tmp_path/d)[::2]]
    pd.testing.assert_frame_equal(timeless(cascades(g[:2], progress=False)), timeless(cascades(g[2:], 2, progress=False)))

def test_bad_grids_are_found_first(tmp_path, monkeypatch):
    monkeypatch.setattr(C, 'dense', lambda *a, **k: pytest.fail('trained first'))
    g = grid_of(tmp_path)
    for bad,err,words in [([*g, dict(g[0], metod='x')], ValueError, "did you mean 'method'"), ([*g, 'x'], TypeError, 'grid'), ('x', TypeError, 'grid'),
                          ([{k:v for k,v in g[0].items() if k != 'data'}], TypeError, 'data'), ([dict(g[0], densities=[.001])], ValueError, 'expected at least'),
                          ([*g, dict(g[0], name='S', method='sipp', method_args=dict(variant='dett'))], ValueError, "S: .*did you mean 'det'")]:
        with pytest.raises(err, match=words): cascades(bad)

# Tables

def curve(seed, points, dense_k=900, n=1000, name='x'):
    return pd.DataFrame([dict(dataset='d', model='m', mode='cascade', name=name, seed=seed, step=i, density=d, dense_k=dense_k, dense_n=n, dense_accuracy=dense_k/n,
                              tuned_k=k, tuned_accuracy=k/n, pruned_k=0, params_density=d, macs_density=d/2) for i,(d,k) in enumerate(points)])

@pytest.mark.filterwarnings('ignore:df. chains that stopped')
@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(st.integers(1, 99), st.integers(850, 950)), min_size=1, max_size=6, unique_by=lambda o: o[0]), min_size=1, max_size=4),
       st.sampled_from(LEVELS))
def test_commensurate_by_brute_force(nets, level):
    df = pd.concat([curve(s, [(d/100, k) for d,k in ps]) for s,ps in enumerate(nets)])
    best = []
    for ps in nets:
        ok = [d for d,k in ps if 1000-k <= 100 + 10*level]
        best.append(1-min(ok)/100 if ok else 0.)
    r = commensurate(df, level).iloc[0]
    assert r.PR == pytest.approx(np.mean(best), abs=1e-12) and r.reached == sum(b > 0 for b in best) and r.nets == len(nets)
    assert r.complete == sum(len(ps) == max(map(len, nets)) for ps in nets)
    assert r.FR == pytest.approx(np.mean([(1+b)/2 if b else 0 for b in best]), abs=1e-12)
    if len(best) > 1 and np.std(best):
        assert (r.PR_lo, r.PR_hi) == pytest.approx(stats.t.interval(.95, len(best)-1, np.mean(best), stats.sem(best)))

def test_commensurate_by_hand():
    df = curve(0, [(.5, 899), (.3, 890), (.2, 895), (.1, 880)])
    t = commensurate(df, (0, .1, .5, 1, 2, 5)); fallback = t.iloc[0]
    assert t.PR.tolist() == pytest.approx([0, .5, .8, .8, .9, .9]) and t.error.tolist() == pytest.approx([.1, .101, .105, .105, .12, .12])
    assert fallback.reached == 0 and (fallback.PR, fallback.FR) == (0, 0) and t.PR_lo.isna().all()
    assert commensurate(curve(0, [(.5, 9949)], 9999, 10000), .5).PR[0] == .5, 'exactly on the level'
    assert commensurate(curve(0, [(.5, 9948)], 9999, 10000), .5).PR[0] == 0
    assert commensurate(curve(0, [(.5, 9942)], 9999, 10000), .57).PR[0] == .5, 'in decimals: .57 of 10,000 is less than 5,700 in binary'
    two = commensurate(pd.concat([df, curve(0, [(.4, 900)], name='y')]), 0)
    assert two.name.tolist() == ['x', 'y'] and two.PR.tolist() == pytest.approx([0, .6])
    assert commensurate(df).level.tolist() == list(LEVELS)

def test_rows_may_carry_any_index():
    df = pd.concat([curve(0, [(.5, 899), (.3, 898)]), curve(0, [(.15, 897), (.1, 896)]).assign(step=[2, 3])]) # every label twice
    assert commensurate(df, .5).PR[0] == pytest.approx(.9) and commensurate(df, .35).PR[0] == pytest.approx(.85)

def test_chains_that_stopped_are_named():
    whole, short = curve(0, [(.5, 900), (.3, 895), (.1, 890)]), curve(1, [(.5, 900), (.3, 900)])
    failed = pd.DataFrame([dict(dataset='d', model='m', mode='cascade', name='x', seed=1, error='RuntimeError: full')])
    for df in (pd.concat([whole, short]), pd.concat([whole, short, failed]), pd.concat([whole, curve(1, [(.5, 900), (.3, 900), (.1, 900)]), failed])):
        with pytest.warns(UserWarning, match='stopped early: x .seed 1.;'): t = commensurate(df, 1)
        assert (t.nets[0], t.complete[0], t.reached[0]) == (2, 1, 2)
    with pytest.warns(UserWarning, match='stopped early'): ax = plot_tradeoff(pd.concat([whole, short])).axes[0]
    line, = [o for o in ax.lines if o.get_label() == 'x, stopped early']
    assert list(line.get_xdata()) == [.5, .3] and list(line.get_ydata()) == pytest.approx([0, -.25])

def test_tables_refuse_what_they_cannot_use():
    with pytest.raises(TypeError, match='df'): commensurate([1])
    with pytest.raises(ValueError, match='no column'): commensurate(pd.DataFrame(dict(name=['x'])))
    with pytest.raises(ValueError, match='when'): commensurate(curve(0, [(.5, 900)]), when='before')
    with pytest.raises(ValueError, match="'x', seed 0 has a step twice"): commensurate(pd.concat([curve(0, [(.5, 900)]), curve(0, [(.4, 900)])]))
    with pytest.raises(ValueError, match="y='los'"): plot_tradeoff(curve(0, [(.5, 900)]), y='los')
    with pytest.raises(ValueError, match='no column dense_top5, tuned_top5'): plot_tradeoff(curve(0, [(.5, 900)]), y='top5')
    with pytest.raises(ValueError, match="did you mean 'macs'"): plot_tradeoff(curve(0, [(.5, 900)]), 'mac')

@pytest.fixture(scope='module')
def study_rows(dls, home):
    runs = [('WT', 'magnitude', None), ('FT', 'magnitude', FT)]
    return pd.concat([chain(dls, home, m, a, seed=s).assign(name=n, error='') for s in (0, 1) for n,m,a in runs], ignore_index=True)

def test_results_on_disk(study_rows, tmp_path):
    df = study_rows; files = {f.name: f for f in save_results(df, tmp_path/'res')}
    assert set(files) == {o.name for o in (tmp_path/'res').iterdir()} == {'rows.csv', 'commensurate.csv', 'results.npz', 'tradeoff_params.pdf', 'tradeoff_macs.pdf',
                                                                              'loss_params.pdf', 'loss_macs.pdf', 'top5_params.pdf', 'top5_macs.pdf', 'budget.pdf'}
    with np.load(files['results.npz']) as z: a = dict(z)
    assert a['names'].tolist() == ['WT', 'FT'] and a['nets'].tolist() == [0, 1] and a['error'].shape == (2, 3, 1, 2) and a['samples_per_layer'].shape == (2, 3, 1, 2, 3)
    for s,i,(j,n) in product((0, 1), range(3), enumerate(['WT', 'FT'])):
        r = df[(df.seed == s) & (df.step == i) & (df.name == n)].iloc[0]
        assert (a['error'][s, i, 0, j], a['sizes'][s, i, 0, j], a['flops'][s, i, 0, j]) == (1-r.tuned_accuracy, r.params, r.macs)
        assert a['samples_per_layer'][s, i, 0, j].tolist() == list(json.loads(r.layers).values())
        assert a['error5'][s, i, 0, j] == 1-r.tuned_top5 and a['error5_dense'][s, i, 0, j] == 1-r.dense_top5 and r.tuned_k5 >= r.tuned_k
        assert a['curves'][s, i, 0, j].tolist() == list(json.loads(r.curve).values())
    table = commensurate(df)
    for k in table: assert a[f'commensurate_{k}'].tolist() == pytest.approx(table[k].tolist(), nan_ok=True) if k not in ('dataset', 'model', 'mode', 'name') else a[f'commensurate_{k}'].tolist() == table[k].tolist()
    back = pd.read_csv(files['rows.csv'])
    pd.testing.assert_frame_equal(commensurate(back), table)
    assert back.tuned_k.tolist() == df.tuned_k.tolist() and back.layers.tolist() == df.layers.tolist()
    assert all(files[f].read_bytes().startswith(b'%PDF') for f in files if f.endswith('pdf'))
    with pytest.raises(ValueError, match='2 values of mode'): results_arrays(pd.concat([df, df.assign(mode='reinit')]))

def test_plots_show_the_rows(study_rows):
    df = study_rows; ax = plot_tradeoff(df).axes[0]; line = next(o for o in ax.lines if o.get_label() == 'FT')
    ft = df[df.name == 'FT'].groupby('step')
    assert np.allclose(line.get_xdata(), ft.params_density.mean())
    assert np.allclose(line.get_ydata(), 100*(ft.tuned_accuracy.mean() - ft.dense_accuracy.mean()))
    assert ax.get_xlim()[0] > ax.get_xlim()[1] and ax.get_xscale() == 'log'
    loss = next(o for o in plot_tradeoff(df, y='loss').axes[0].lines if o.get_label() == 'FT')
    assert np.allclose(loss.get_ydata(), ft.tuned_loss.mean() - ft.dense_loss.mean())
    top5 = next(o for o in plot_tradeoff(df, y='top5').axes[0].lines if o.get_label() == 'FT')
    assert np.allclose(top5.get_ydata(), 100*(ft.tuned_top5.mean() - ft.dense_top5.mean()))
    near, table, names = C._layer_table(df, .21)
    assert near == .2 and names == ['fc1', 'fc2', 'fc3']
    row = df[(df.name == 'WT') & (df.step == 1)]; left = np.mean([list(json.loads(o).values()) for o in row.layers], 0)
    assert np.allclose(table['WT'][:, 0], left/row.weights.mean()) and np.allclose(table['WT'][:, 1], left/np.array([19200, 30000, 1000])/(row.weights.mean()/50200))
    assert len(plot_budget(df, .2).axes) == 2

# TensorBoard

def test_tensorboard_is_optional(dls, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    monkeypatch.setattr(C, 'dense', lambda *a, **k: pytest.fail('trained first'))
    with pytest.raises(ImportError, match='pip install tensorboard'): chain(dls, tmp_path, tensorboard=tmp_path/'tb')

def test_tensorboard_gets_every_density(dls, tmp_path, monkeypatch):
    seen, closed = [], []
    class Writer:
        def __init__(self, folder): pass
        def add_scalar(self, tag, v, step): seen.append((tag, v, step))
        def flush(self): pass
        def close(self): closed.append(1)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
    real = C._prune
    with monkeypatch.context() as m:
        m.setattr(C, '_prune', lambda run, i, b: (_ for _ in ()).throw(KeyboardInterrupt) if i == 2 else real(run, i, b))
        with pytest.raises(KeyboardInterrupt): chain(dls, tmp_path, tensorboard=tmp_path/'tb')
    assert len(closed) == 1, 'closed whatever happens'
    seen.clear(); df = chain(dls, tmp_path, tensorboard=tmp_path/'tb')
    for k in ('tuned_accuracy', 'pruned_loss', 'tuned_loss', 'score_secs', 'train_secs'):
        assert [(v, s) for t,v,s in seen if t == f'lenet300/cascade/magnitude/seed0/{k}'] == [*zip(df[k], range(3))], 'the rows before the interruption too'
    assert sum(v for t,v,s in seen if '/share/' in t and s == 1) == pytest.approx(1) and len(closed) == 2

def test_a_real_tensorboard_reads_it(dls, tmp_path):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    df = chain(dls, tmp_path, tensorboard=tmp_path/'tb')
    events = reader.EventAccumulator(str(tmp_path/'tb')).Reload()
    assert [o.value for o in events.Scalars('lenet300/cascade/magnitude/seed0/tuned_loss')] == pytest.approx(df.tuned_loss.tolist(), rel=1e-6)

# The page and its parameter files

def page(): return json.loads((ROOT/'nbs'/'comparison.ipynb').read_text(encoding='utf-8'))

def test_defaults_of_page_and_package_agree():
    cell = next(c for c in page()['cells'] if 'parameters' in c['metadata'].get('tags', []))
    ns = {}; exec(''.join(cell['source']), ns); ns.pop('__builtins__')
    assert ns == STUDY

@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_parameter_files(path):
    d = yaml.safe_load(path.read_text(encoding='utf-8')); p = check_study(d); g = study(p)
    assert len(g) == len(p['seeds'])*len(p['methods']) and {'PFP', 'PFP, inputs kept', 'filter magnitude'} <= {o['name'] for o in g}
    assert all(o['method_args']['c'] == 10 for o in g if o['method'] in ('sipp', 'pfp'))
    assert path.stem.startswith(d['dataset']) and next(iter(path.read_text().splitlines())).startswith('# ')

# data set and network: epochs of training and fine-tuning, batch, learning rate, weight decay, Nesterov, milestones, factor, warm-up of training and fine-tuning,
# first and last density, how many, how many of them fine-tuned, networks, delta
PAPERS = {
    'mnist_lenet300':     (40, 40, 64, .01, 1e-4, False, [30, 45], .1, 0, 0, .442, .049, 12, 12, 3, 1e-12),
    'mnist_lenet5':       (40, 40, 64, .01, 1e-4, False, [25, 35], .1, 0, 0, .5, .02, 15, 15, 3, 1e-9),
    'cifar10_lenet5':     (40, 40, 64, .01, 1e-4, False, [25, 35], .1, 0, 0, .5, .05, 8, 8, 3, 1e-9),
    'cifar10_resnet20':   (182, 182, 128, .1, 1e-4, False, [91, 136], .1, 5, 5, .99, .02, 69, 23, 3, 1e-16),
    'cifar10_resnet56':   (182, 182, 128, .1, 1e-4, False, [91, 136], .1, 5, 5, .99, .02, 60, 20, 3, 1e-16),
    'cifar10_resnet110':  (182, 182, 128, .1, 1e-4, False, [91, 136], .1, 5, 5, .99, .02, 60, 20, 3, 1e-16),
    'cifar10_vgg16':      (300, 150, 256, .05, 5e-4, False, [*range(30, 300, 30)], .5, 10, 5, .99, .02, 60, 20, 3, 1e-16),
    'cifar10_densenet22': (300, 300, 64, .1, 1e-4, True, [150, 225], .1, 10, 10, .99, .0469, 66, 22, 3, 1e-16),
    'cifar10_wrn16_8':    (200, 200, 128, .1, 5e-4, True, [60, 120, 160], .2, 5, 5, .99, .02, 69, 23, 3, 1e-16),
    'imagenet_resnet18':  (0, 90, 256, .1, 1e-4, False, [30, 60, 80], .1, 0, 5, .9, .1, 18, 18, 1, 1e-16),
    'imagenet_resnet50':  (0, 90, 256, .1, 1e-4, False, [30, 60, 80], .1, 0, 5, .8, .1, 10, 10, 1, 1e-16),
    'imagenet_resnet101': (0, 90, 256, .1, 1e-4, False, [30, 60, 80], .1, 0, 5, .9, .184, 16, 16, 1, 1e-16)}

def published(name): return {**STUDY, **yaml.safe_load((ROOT/'nbs'/'params'/'provable'/f'{name}.yml').read_text())}

@pytest.mark.parametrize('name', PAPERS)
def test_the_papers_configurations_are_there(name):
    epochs, tune_epochs, bs, lr, wd, nesterov, milestones, gamma, warm, tune_warm, first, last, count, tuned, nets, delta = PAPERS[name]
    p = published(name); g = study(p)[0]
    tune_lr, tune_wd, tune = tuning(g); milestone = tune['milestones'] if name == 'mnist_lenet300' else milestones
    assert (p['epochs'], p['fine_tune_epochs'] or p['epochs'], p['batch_size'], p['opt'], p['lr'], tune_lr, tune_wd) == (epochs, tune_epochs, bs, 'sgd', lr, lr, None)
    assert p['opt_args'] == dict(wd=wd, **(dict(nesterov=True) if nesterov else {})) # momentum .9 is the learner's default
    assert (tune['schedule'], tune['milestones'], tune['gamma'], tune.get('warmup', 0)) == ('step', milestone, gamma, tune_warm)
    if epochs: assert (p['fit_args']['schedule'], p['fit_args']['milestones'], p['fit_args']['gamma'], p['fit_args'].get('warmup', 0)) == ('step', milestones, gamma, warm)
    if name == 'mnist_lenet300': assert tune['milestones'] == [25, 35]
    ds = g['densities']; assert (round(ds[0], 3), round(ds[-1], 4) if last < .1 and name != 'mnist_lenet300' else round(ds[-1], 3), len(ds), len(tuned_steps(len(ds), p['fine_tunes']))) == (first, last, count, tuned)
    assert (p['mode'], len(p['seeds'])) == ('cascade', nets)
    assert {o[k] for o in p['methods'].values() if o['method'] in ('sipp', 'pfp') for k in ('delta', 'c')} == {delta, 10}

def test_the_middle_of_the_longer_lists():
    plans = {n:study(published(n))[0]['densities'] for n in PAPERS}
    assert plans['cifar10_resnet20'][:3] == [.99, .855, .85] and plans['cifar10_resnet20'][59:61] == [.15, .132]
    assert plans['cifar10_densenet22'][59:61] == [.1, .0918] and [round(o, 4) for o in plans['cifar10_wrn16_8'][59:61]] == [.1, .0918]
    assert plans['imagenet_resnet18'][11:13] == plans['imagenet_resnet101'][11:13] == [.35, .31]

def test_bad_studies():
    for kw,err,words in [(dict(epoch=3), ValueError, "did you mean 'epochs'"), (dict(methods={}), ValueError, 'methods: empty'), (dict(seeds=3), TypeError, 'seeds'),
                         (dict(methods={'WT': 'magnitude'}), TypeError, "methods\\['WT'\\]"), (dict(dataset='digit'), ValueError, "did you mean 'digits'"),
                         (dict(spacing=[dict(kind='linear', hi=.5, lo=.1)]), ValueError, 'count=None'), (dict(mode='x'), ValueError, "mode='x'"),
                         (dict(level='x'), ValueError, "level='x'"), (dict(level=math.nan), ValueError, 'level=nan'), (dict(n_jobs=0), ValueError, 'n_jobs=0'),
                         (dict(batch_size=0), ValueError, 'batch_size=0'), (dict(valid_pct=2), ValueError, 'valid_pct=2'), (dict(augment='cropp'), ValueError, "did you mean 'crop'"),
                         (dict(normalize='unity'), ValueError, "did you mean 'unit'"), (dict(n_train=0), ValueError, 'n_train=0'), (dict(seeds=[-1]), ValueError, r'seeds\[0\]=-1')]:
        with pytest.raises(err, match=words): check_study(kw)

def test_the_page_runs_twice_in_one_kernel(tmp_path, pages):
    same = dict(epochs=1, seeds=[0], n_train=200, out=str(tmp_path))
    pages(ROOT/'nbs'/'comparison.ipynb', [dict(same, methods={'FT': dict(FT, method='magnitude')}), dict(same, methods={'WT': {'method': 'magnitude'}})])
    done = list((tmp_path/'comparison').glob('digits-lenet300-cascade-*/rows.csv'))
    assert sorted(set(pd.read_csv(f).name) == {'FT'} for f in done) == [False, True]

def test_names_on_a_page_that_ran_before():
    with pytest.raises(ValueError, match="parameter='when'"): check_study(dict(when='tuned'))
    assert 'when' not in check_study(dict(when='tuned', files=[], show=['name']), again=True)
    with pytest.raises(ValueError, match="did you mean 'epochs'"): check_study(dict(epoch=3), again=True)
