"""The studies of the MIP score: equal counts, masks that hold, sizes by hand, callbacks that only look."""
import copy, math
from functools import partial
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.analysis import fine_tuned, one_shot, plot_study, summary
from neuronprune.masks import Mask, Scores
from neuronprune.data import calib_batch, get_dls
from neuronprune.graph import trace
from neuronprune.mip import cut, dead_on_batch, score
from neuronprune.mip_program import problem
from neuronprune.mip_studies import (CONTROLS, ScoreCallback, compare_variants, controls, lambda_sweep, paper_pct,
                                     peaks, sizes, snip_comparison, threshold_sweep, transfer, verification)
from neuronprune.models import build
from neuronprune.sources import dense
from neuronprune.surgery import apply, difference, shrink
from neuronprune.train import fit, learner
from neuronprune.evaluation import evaluate, wilson
from neuronprune.retrain import MaskCallback

pytestmark = pytest.mark.filterwarnings('ignore:mip. ')
one_shot, fine_tuned = (partial(f, sizes=sizes) for f in (one_shot, fine_tuned))
COLUMNS = {'k', 'n', 'accuracy', 'lo', 'hi', 'loss', 'units_pruned', 'paper_pct', 'params_pct'}

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64, valid_pct=.2)

@pytest.fixture(scope='module')
def learn(dls): return dense(dls, 'fc_baseline', 8, opt='adam', lr=5e-3)

@pytest.fixture(scope='module')
def found(learn, dls):
    b = calib_batch(dls, n_per_class=1)
    return b, score(learn.model, batch=b), problem(learn.model, *b)

def dropped(m): return {k:int((~v).sum()) for k,v in m.items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in b)

@pytest.fixture
def untouched(learn):
    "The study leaves weights, mode, optimiser and histories of the learner alone."
    noted = lambda: (learn.model.training, learn.opt, learn.n_fits, len(learn.history))
    state, old, rng = copy.deepcopy(learn.model.state_dict()), noted(), torch.get_rng_state()
    yield
    assert same(learn.model.state_dict(), state) and noted() == old and torch.equal(torch.get_rng_state(), rng)

# Controls

CONV = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 7),
                     nn.ReLU(), nn.Linear(7, 3))
FC = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3))

@settings(max_examples=60)
@given(st.sampled_from([CONV, FC]), st.integers(0, 10**6), st.sampled_from([.05, .3, .7, 1.]), st.booleans())
def test_counts_are_equal(net, seed, t, ties):
    g = torch.Generator().manual_seed(seed); net = copy.deepcopy(net).eval()
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g))
    xb, yb = torch.rand(3, 1, 8, 8, generator=g), torch.arange(3)
    p = problem(net, xb, yb); units = {k:torch.rand(n, generator=g) for k,(n,_) in p.layers.items()}
    if ties: units = {k:(v*3).round()/3 for k,v in units.items()}
    sc = Scores(units, 'channel', graph=trace(net, xb)); ms = controls(net, sc, p, threshold=t, seed=seed)
    want, dead = dropped(ms['mip']), dead_on_batch(p)
    assert set(ms) == {'mip', *CONTROLS} and same(cut(sc, threshold=t), ms['mip'])
    for k,m in ms.items():
        # no unit twice, none invented, none emptied
        assert set(m) == set(sc) and all(len(m[o]) == len(sc[o]) and m[o].any() for o in sc)
        if k != 'dead': assert dropped(m) == want
    for k,v in sc.items():
        gone, n = ~ms['critical'][k], want[k]
        assert not n or n == len(v) or v[gone].min() >= v[~gone].max()
        assert dropped(ms['dead'])[k] == min(int(dead[k].sum()), len(v)-1) and not (~ms['dead'][k] & ~dead[k]).any()
        assert (~ms['dead+random'][k] & dead[k]).sum() == min(n, int(dead[k].sum()))
        assert torch.equal(peaks(p)[k] <= 0, dead[k])
        up, w = peaks(p)[k], dict(net.named_modules())[k].weight.detach().flatten(1).norm(dim=1)
        for rank,o in ((up, 'activity'), (w, 'magnitude')):
            assert not n or rank[~ms[o][k]].max() <= rank[ms[o][k]].min()
    again = controls(net, sc, p, threshold=t, seed=seed)
    assert all(same(again[k], ms[k]) for k in ms)

def test_random_depends_on_the_seed_alone(learn, found):
    (b, sc, p), state = found, torch.get_rng_state()
    a, c = (controls(learn.model, sc, p, threshold=.5, seed=s) for s in (0, 1))
    assert not same(a['random'], c['random'])
    assert all(same(a[k], c[k]) for k in ('mip', 'critical', 'magnitude', 'activity', 'dead'))
    assert torch.equal(state, torch.get_rng_state())

def test_critical_breaks_ties_by_index(learn, found):
    _, sc, p = found
    flat = Scores({k:torch.ones_like(v) for k,v in sc.items()}, 'channel', graph=sc.graph); flat['fc1'][5] = 0.
    flat['fc1'][7] = 0.
    assert (~controls(learn.model, flat, p, threshold=.5)['critical']['fc1']).nonzero().flatten().tolist() == [0, 1]

def test_controls_refuse_another_problem(learn, found):
    (xb, yb), sc, p = found; net = build('fc3', 1, 10, 8, seed=0)
    with pytest.raises(ValueError, match="no 50 scores for layer 'fc1'"):
        controls(learn.model, sc, problem(net, xb, yb), threshold=.5)
    with pytest.raises(ValueError, match='sound bounds'):
        controls(learn.model, sc, problem(learn.model, xb, yb, bounds='sound'), threshold=.5)
    with pytest.raises(ValueError, match='exactly one'): controls(learn.model, sc, p)

# Masks and sizes

def test_masks_zero_weights_and_biases(learn, found):
    _, sc, p = found
    for name,m in controls(learn.model, sc, p, threshold=.5).items():
        net = apply(copy.deepcopy(learn.model), m)
        for k,v in m.items():
            o = net.get_submodule(k)
            assert not o.weight[~v].any() and not o.bias[~v].any() and o.bias[v].all()
        xb = torch.rand(16, 1, 8, 8)
        assert difference(net, shrink(learn.model, m, xb), xb) <= 1e-6

@pytest.mark.parametrize('opt, kw', [('sgd', dict(momentum=.9)), ('adam', {}), ('rmsprop', {})])
def test_zeros_survive_fifty_steps(dls, found, opt, kw):
    net = build('fc_baseline', 1, 10, 8, seed=3); m = cut(found[1], threshold=.5)
    new = learner(net, dls, opt=opt, lr=1e-2, wd=1e-2, **kw)
    fit(new, 1); before = copy.deepcopy(net.state_dict())  # the momentum of dense training is there
    steps = math.ceil(50/len(dls.train)); fit(new, steps, cbs=MaskCallback(m))
    assert steps*len(dls.train) >= 50
    for k,v in m.items():
        o = net.get_submodule(k)
        assert not o.weight[~v].any() and not o.bias[~v].any()
        assert not torch.equal(o.weight[v], before[f'{k}.weight'][v])
    xb = torch.rand(16, 1, 8, 8); assert difference(net, shrink(net, m, xb), xb) <= 1e-6

def test_sizes_by_hand():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(),
                        nn.Linear(5, 2))
    xb = torch.rand(4, 2, 4, 4)
    n = 3*18+3 + 48*5+5 + 5*2+2
    m = Mask({'0': torch.tensor([True, False, True]), '3': torch.tensor([False, True, True, False, True])}, 'channel',
             graph=trace(net, xb))
    s = sizes(net, m, xb)
    assert s['units_pruned'] == 3
    assert s['paper_pct'] == pytest.approx(100*(18 + 2*48)/n) == pytest.approx(paper_pct(m, net))
    left = 2*18+2 + 32*3+3 + 3*2+2
    assert s['params_pct'] == pytest.approx(100*(1-left/n))
    assert sizes(net, None, xb) == dict(units_pruned=0, paper_pct=0., params_pct=0.)
    w = Mask({'5': torch.rand(2, 5) < .5}, 'weight')
    assert paper_pct(w, net) == pytest.approx(100*int((~w['5']).sum())/n)
    with pytest.raises(ValueError, match='mask.unit'):
        paper_pct(Mask({'5': torch.ones(1, 1, dtype=bool)}, 'group',
                       labels={'5': (torch.zeros(2).long(), torch.zeros(5).long())}), net)

# Studies

def check_rows(df):
    assert COLUMNS <= set(df)
    for r in df.itertuples(): assert (r.lo, r.hi) == wilson(r.k, r.n) and r.accuracy == r.k/r.n
    assert (df.paper_pct <= df.params_pct+1e-9).all()

def test_rows_count_as_the_paper_does(learn, dls, found, untouched):
    _, sc, p = found; ms = controls(learn.model, sc, p, threshold=.5)
    for df in (one_shot(learn, ms), fine_tuned(learn, ms, 1, lr=1e-3)):
        check_rows(df); assert list(df.rule) == ['dense', *ms] and (df.n == 359).all()
        assert df.paper_pct.tolist()[1:] == [paper_pct(m, learn.model) for m in ms.values()] and df.paper_pct[0] == 0
        assert df.params_pct.tolist() == [sizes(learn.model, m, dls.one_batch()[0])['params_pct']
                                          for m in (None, *ms.values())]

def test_threshold_sweep(learn, found, untouched):
    _, sc, p = found; df = threshold_sweep(learn, sc, (.1, .5, 1.)); check_rows(df)
    assert df.threshold.tolist() == [0, .1, .5, 1.] and df.units_pruned.is_monotonic_increasing
    assert df.rule.tolist() == ['dense']+['mip']*3
    full = threshold_sweep(learn, sc, (.5,), p); assert full.rule.tolist() == ['dense', 'mip', *CONTROLS]
    assert plot_study(df, 'threshold').axes[0].get_xlabel() == 'threshold'
    with pytest.raises(ValueError, match='threshold=1.5'): threshold_sweep(learn, sc, (1.5,))

@pytest.mark.parametrize('loss', ['ce', 'margin'])
def test_lambda_sweep_is_monotone(learn, found, untouched, loss):
    lams = (24, .5, 1, 2, 5, 11); df = lambda_sweep(learn, found[0], lams, .3, loss=loss); check_rows(df)
    assert df.lam.tolist() == sorted(lams)
    assert (df.batch_loss.diff().dropna() <= 1e-5).all() and (df.sparsity_term.diff().dropna() >= -1e-5).all()
    np.testing.assert_allclose(df.objective, df.sparsity_term + df.lam*df.batch_loss, atol=1e-9)
    sc = score(learn.model, batch=found[0], lam=5., loss=loss); m = cut(sc, threshold=.3)
    r = df[df.lam == 5].iloc[0]; assert r.objective == pytest.approx(sc.meta['objective'], abs=2e-5)
    if loss == 'ce': assert abs(r.units_pruned - sum(dropped(m).values())) <= 1 # a margin optimum need not be unique
    for bad in ((0,), (), (math.nan,)):
        with pytest.raises(ValueError, match='lams'): lambda_sweep(learn, found[0], bad)

def test_verification(learn, dls, untouched):
    df = verification(learn, 3, .3, with_controls=True); check_rows(df)
    assert len(df) == 3*3*(2+len(CONTROLS))
    assert df.groupby('part').n.first().to_dict() == dict(batch=10, train=1150, test=359)
    one = df[(df.rule == 'mip') & (df.part == 'test')]
    for i in range(3):
        b = calib_batch(dls, n_per_class=1, seed=i); m = cut(score(learn.model, batch=b), threshold=.3)
        assert one.k.iloc[i] == evaluate(apply(copy.deepcopy(learn.model), m), dls.test).k
    assert df[df.rule == 'dense'].query("part == 'train'").k.nunique() == 1
    assert summary(one).repeats.tolist() == [3]

def test_compare_variants(learn, untouched):
    df = compare_variants(learn, 2, .3); check_rows(df)
    want = ['joint', 'sequential', 'random counts', 'confident', 'confusing']
    assert df.groupby('repeat').variant.apply(list).tolist() == [want]*2

def test_transfer(learn, found, untouched):
    _, sc, p = found; ms = {'mip': cut(sc, threshold=.5)}; other = get_dls('digits', bs=64, valid_pct=.2)
    for o in other.loaders: o.dataset.x = o.dataset.x.flip(-1)
    df = transfer(learn, other, ms, 4); check_rows(df)
    assert df.rule.tolist() == ['dense', 'mip'] and (df.accuracy > .3).all()
    new = learner(copy.deepcopy(learn.model), other, opt='adam', lr=5e-3); new.model.load_state_dict(learn.rewind.init)
    # the dense network, trained on B from A's start
    fit(new, 4, seed=learn.n_fits); assert evaluate(new, other.test).k == df.k[0]
    with pytest.raises(ValueError, match='size=16.*size=8'): transfer(learn, get_dls('digits', size=16), ms, 1)
    with pytest.raises(ValueError, match='c_in=3'): transfer(learn, get_dls('digits', c_in=3), ms, 1)
    bad = Mask({'fc1': torch.ones(300, dtype=bool)}, 'channel')
    with pytest.raises(ValueError, match=r"masks\['x'\]: mask\['fc1'\]: shape \(300,\)"):
        transfer(learn, other, {'x': bad}, 1)

def test_snip_comparison(learn, untouched):
    df = snip_comparison(learn, .45, lr=1e-3); check_rows(df[df.rule != 'snip weight'])
    assert df.rule.tolist() == ['dense', 'mip', 'snip channel', 'snip weight']*2 and df.epochs.tolist() == [0]*4+[1]*4
    assert df.units_pruned.tolist()[:4] == [0, 38, 38, 2420] and df.secs.notna().tolist() == [False, True, True, True]*2
    df = snip_comparison(learn, .45, start='init', same_images=False, epochs=2); assert df.epochs.tolist() == [2]*4
    with pytest.raises(ValueError, match='density'): snip_comparison(learn, 45)

# The callback

def trained(dls, cb, model='fc_baseline', epochs=4):
    new = learner(build(model, 1, 10, 8, seed=1), dls, opt='sgd', lr=.05, wd=1e-4); fit(new, epochs, cbs=cb); return new

@pytest.mark.parametrize('model', ['fc_baseline', 'mlp']) # the second one has dropout
def test_watching_changes_nothing(dls, model):
    watch = ScoreCallback(2, .3); a, b = trained(dls, [], model), trained(dls, [watch], model)
    assert same(a.model.state_dict(), b.model.state_dict()) and a.history == b.history
    assert a.model.training == b.model.training
    assert all(torch.equal(p.grad, q.grad) if p.grad is not None else q.grad is None
               for p,q in zip(a.model.parameters(), b.model.parameters()))
    assert watch.frame().epoch.tolist() == [2, 2, 4, 4] and list(watch.scores) == [2, 4]; check_rows(watch.frame())

@pytest.mark.parametrize('every, want', [(1, [1, 2, 3, 4]), (3, [3]), (5, [])])
def test_callback_fires(dls, every, want):
    cb = ScoreCallback(every); trained(dls, [cb]); assert list(cb.masks) == want

def test_incremental_narrows(dls):
    cb = ScoreCallback(1, .5, incremental=True); new = trained(dls, [cb]); ms = list(cb.masks.values())
    assert all((b[k] <= a[k]).all() for a,b in zip(ms, ms[1:]) for k in a) and ms[-1].sparsity > 0
    for k,v in ms[-1].items():
        assert not new.model.get_submodule(k).weight[~v].any() and not new.model.get_submodule(k).bias[~v].any()
    df = cb.frame(); a, b = (df[df.rule == o] for o in ('dense', 'mip'))
    assert (a.units_pruned == 0).all() and b.units_pruned.is_monotonic_increasing

def test_callback_refuses_nonsense():
    with pytest.raises(ValueError, match='every=0'): ScoreCallback(0)

@pytest.mark.parametrize('study', [verification, compare_variants])
def test_ctrl_c_ends_a_study(learn, study, monkeypatch):
    "The interrupted search may have scores: no further one is begun."
    import neuronprune.mip_studies as ms
    calls, own = [], ms.score
    def interrupted(*a, **kw): s = own(*a, **kw); s.meta['status'] = 'interrupted'; calls.append(1); return s
    monkeypatch.setattr(ms, 'score', interrupted)
    with pytest.raises(KeyboardInterrupt): study(learn, 3)
    assert len(calls) == 1
