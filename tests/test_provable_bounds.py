"""Bounds against brute force: never broken on the images they are made from,
and exact where the mathematics says so."""
import copy, math, pytest, torch
import numpy as np
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn
from neuronprune import provable_allocate
from neuronprune.allocate import allocate
from neuronprune.baselines import magnitude
from neuronprune.core import layers
from neuronprune.masks import Mask, Scores
from neuronprune.data import calib_batch, get_dls
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.provable import _sampling_row, pfp, sensitivities, sipp, sipp_cut
from neuronprune.provable_allocate import equalise
from neuronprune.provable_bounds import (bernstein_draws, bernstein_error, bound, bound_report, certificate, failures,
                                         growth, sampled_density, sparsest, verdict)
from neuronprune.sampling import cut, sampling
from neuronprune.surgery import apply

@settings(max_examples=60)
@given(st.floats(.01, 5), st.floats(1, 500), st.floats(1e-12, .5), st.floats(1, 10))
def test_draws_are_the_fewest(eps, total, delta, c):
    m = float(bernstein_draws(eps, total, delta, c))
    assert bernstein_error(m, total, delta, c) <= eps*(1+1e-9)
    if m > 1: assert bernstein_error(m-1, total, delta, c) > eps*(1-1e-9)
    assert m == math.ceil((6+2*eps)*c*total*math.log(2/delta)/(3*eps**2)*(1-1e-12))

def test_edges_and_messages():
    assert bernstein_error(0, 3.) == math.inf and bernstein_error(0, 0.) == 0
    for f in (lambda: bernstein_error(5, 1., delta=0), lambda: bernstein_draws(.5, 1., delta=1.)):
        with pytest.raises(ValueError, match='delta'): f()
    for f in (bernstein_error, bernstein_draws):
        with pytest.raises(ValueError, match='c=-1'): f(.5, 1., c=-1)
    for e in (0, -1, math.nan):
        with pytest.raises(ValueError, match='eps'): bernstein_draws(e, 1.)

def row_errors(w, hat, a):
    "Largest |hat z - z|/z over the points of non-negative halves, per neuron and sign, in float64 loops."
    halves = [a.clamp(min=0), (-a).clamp(min=0)] if (a < 0).any() else [a]
    res = torch.zeros(len(w), 2, dtype=torch.float64)
    for h in halves:
        for j,side in enumerate((1, -1)):
            z, y = (h.double() @ (side*o).clamp(min=0).double().T for o in (w, hat))
            res[:, j] = torch.maximum(res[:, j], torch.where(z > 1.2e-7, (y-z).abs()/z, 0.).amax(0))
    return res

def two_layers(seed=0):
    torch.manual_seed(seed); net = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)); x = torch.randn(40, 12)
    return net, x, sensitivities(net, x)['max']

@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(.05, .95))
def test_any_mask_is_within_its_bound_on_s(seed, p):
    net, x, found = two_layers(seed % 50); g = torch.Generator().manual_seed(seed)
    mask = Mask({k:torch.rand(m.weight.shape, generator=g) > p for k,m in layers(net).items()}, 'weight')
    eps, hat = bound(net, mask, found), apply(copy.deepcopy(net), mask)
    inputs = {'0': x, '2': net[:2](x).detach()}
    for k,a in inputs.items():
        err = row_errors(layers(net)[k].weight.detach(), layers(hat)[k].weight.detach(), a)
        ok = ~eps[k].isnan()
        assert (err[ok] <= eps[k][ok]+1e-5).all()
    cert = certificate(net, mask, found, x, bs=7)
    assert (cert.over == 0).all()
    for (k,neuron,sign),d in cert.groupby(['layer', 'neuron', 'sign']):
        want = row_errors(layers(net)[k].weight.detach(), layers(hat)[k].weight.detach(), inputs[k])[
            neuron, '+-'.index(sign)]
        assert abs(float(d.worst.iloc[0])-float(want)) < 1e-4

def test_the_bound_is_reached():
    "One image: the shares are the sensitivities, so error and bound agree."
    net, x, _ = two_layers(1); x = x[:1].abs(); found = sensitivities(net, x)['max']
    g = torch.Generator().manual_seed(3)
    mask = Mask({k:torch.rand(m.weight.shape, generator=g) > .4 for k,m in layers(net).items()}, 'weight')
    cert = certificate(net, mask, found, x)
    live = cert[(cert.points == 1)]
    np.testing.assert_allclose(live.worst, live.bound, atol=2e-5)

def test_convolutions_and_channels():
    torch.manual_seed(0); net, x = build('lenet5_conv', 1, 10, 20, seed=0), torch.randn(6, 1, 20, 20)
    g, found = trace(net, x), sensitivities(net, x)['max']
    own = layers(net)
    sc = Scores({f'{k}:in':torch.rand(m.weight.shape[1]) for k,m in own.items()}, 'channel', graph=g,
                meta=dict(variant='det', seed=0, c=1., logs=dict.fromkeys(own, 1.)), method='pfp')
    for mask in (equalise(sc, .6), allocate(magnitude(net, unit='channel', graph=g), .4), allocate(magnitude(net), .7)):
        cert = certificate(net, mask, found, x, bs=4)
        assert (cert.over == 0).all() and cert.worst.max() > .05 and set(cert.layer) == set(own)
        if mask.unit == 'channel': # neurons that are gone have no row
            dead = {k:int((~v.flatten(1).any(1)).sum()) for k,v in mask.expand(net).items() if k == 'conv2.weight'}
            assert cert[cert.layer == 'conv2'].neuron.nunique() == 16-dead.get('conv2.weight', 0)
        v = verdict(cert).set_index('layer'); assert list(v.index) == list(own)
        for k,d in cert.groupby('layer'):
            bad = int((~(d.bound < 1)).sum())
            assert (v.bound_max[k] == d.bound.max() and v.bound[k] == d.bound.median()
                    and abs(v.vacuous_pct[k]-100*bad/len(d)) < 1e-9)
            assert v.verdict[k].startswith('vacuous: it' if bad == len(d) else f'vacuous in {bad} of {len(d)} rows'
                                           if bad else 'every row is certified on S')

def test_verdict_in_words():
    net, x, found = two_layers()
    full = Mask({k:torch.ones_like(v, dtype=torch.bool) for k,v in found.items()}, 'weight')
    assert verdict(certificate(net, full, found, x)).verdict.tolist() == ['every row is certified on S']*2
    none = Mask({k:torch.zeros_like(v, dtype=torch.bool) for k,v in found.items()}, 'weight')
    v = verdict(certificate(net, none, found, x))
    assert v.verdict.str.startswith('vacuous').all() and (v.measured > .99).all()

def test_rows_that_were_silent_on_s_are_unseen():
    """A row that never had a sum loses its weights: 0 is the bound on S, but nobody knows elsewhere,
    and the verdict says so; kept whole, it has no error anywhere."""
    torch.manual_seed(0); net = nn.Sequential(nn.Linear(4, 2)); x = torch.rand(9, 4); x[:, :2] = 0
    with torch.no_grad(): net[0].weight.copy_(torch.tensor([[1., 2, -1, -2], [1, -1, 2, -3]]))
    found = sensitivities(net, x)['max']
    mask = lambda *gone: Mask({'0': torch.ones(2, 4).index_put((torch.tensor([0]*len(gone)), torch.tensor(gone)),
                                                               torch.tensor(0.)).bool()}, 'weight')
    b = bound(net, mask(0), found)['0']; assert b[0, 0].isnan() and b[0, 1] == 0 and (b[1] == 0).all()
    cert = certificate(net, mask(0), found, torch.rand(50, 4)); assert len(cert) == 4 and cert.bound.isna().sum() == 1
    assert verdict(cert).verdict[0] == 'vacuous in 0 of 4 rows, 1 unseen' and verdict(cert).vacuous_pct[0] == 25
    assert ((bound(net, mask(2), found)['0'][0] > 0).tolist() == [False, True]
            and not bound(net, mask(2), found)['0'].isnan().any())

def test_drawn_rows_use_bernstein():
    torch.manual_seed(2); net = nn.Sequential(nn.Linear(30, 3)); x = torch.rand(50, 30)
    found = sensitivities(net, x)['max']; w = net[0].weight
    sc = Scores(found, 'weight', labels={'0': (_sampling_row(w), torch.tensor([30.]))},
                meta=dict(variant='rand', c=1., seed=0), method='sipp')
    m = sipp_cut(sc, .4); eps = bound(net, m, found, delta=.05)['0']; n = torch.tensor(m.meta['draws']['0']).view(3, 2)
    for o in range(3):
        for j,side in enumerate((1, -1)):
            total = float(found['0'][o][side*w[o] > 0].double().sum())
            if n[o, j]: assert abs(float(eps[o, j])-float(bernstein_error(int(n[o, j]), total, .05))) < 1e-9
            else: assert eps[o, j] == 0
    bad = Mask(m.units, 'weight', scale=m.scale)
    with pytest.raises(ValueError, match='how they were drawn'): bound(net, bad, found)
    n_rows = int((n > 0).sum())
    a, b = bound(net, m, found, delta=.05, union=True)['0'], bound(net, m, found, delta=.05/n_rows)['0']
    assert n_rows > 1 and torch.equal(a, b) and (a[n > 0] > eps[n > 0]).all()
    cert = certificate(net, m, found, x, delta=.05); assert sorted(cert.delta.unique()) in ([.05], [0, .05])
    assert 'with probability 0.95 each' in verdict(cert).verdict[0] or verdict(cert).vacuous_pct[0] == 100

def rare():
    "A 1x1 convolution with one loud channel that is on in a single place."
    torch.manual_seed(0); net = nn.Sequential(nn.Conv2d(12, 2, 1)); x = torch.rand(3, 12, 6, 6)+.5; x[:, 0] = 0
    x[:, 0, 2, 2] = 60
    with torch.no_grad(): net[0].weight.abs_()
    return net, x

def test_draws_with_other_sensitivities_are_refused():
    net, x = rare(); found = sensitivities(net, x, ('max', 'mean')); w = net[0].weight
    made = lambda s: sipp_cut(Scores({'0': s}, 'weight', labels={'0': (_sampling_row(w), torch.tensor([30.]))},
                                     meta=dict(variant='rand', c=1., seed=0), method='sipp'), .5)
    with pytest.raises(ValueError, match="with other sensitivities; .* reduce='max'"):
        bound(net, made(found['mean']['0']), found['max'])
    with pytest.raises(ValueError, match='with other sensitivities'):
        bound(net, made(found['max']['0']), sensitivities(net, torch.rand(3, 12, 6, 6))['max'])
    assert bound(net, made(found['max']['0']), found['max'])['0'][:, 0].min() > 0

def test_wrong_arguments():
    net, x, found = two_layers()
    full = Mask({k:torch.ones_like(v, dtype=torch.bool) for k,v in found.items()}, 'weight')
    for f in (bound, lambda n, m, o: certificate(n, m, o, x), lambda n, m, o: sparsest(n, o, .5),
              lambda n, m, o: sampled_density(n, o, .5), lambda n, m, o: failures(n, '0', o, x)):
        for bad in ({'max': found}, {}, found['0'], {'0': found['2']}, {'9': found['0']}):
            with pytest.raises((TypeError, ValueError), match="found: "): f(net, full, bad)
    for kw in (dict(c=-1.), dict(c=math.nan), dict(delta=0.), dict(delta=1.)):
        with pytest.raises(ValueError, match=next(iter(kw))): bound(net, full, found, **kw)
        with pytest.raises(ValueError, match=next(iter(kw))): certificate(net, full, found, x, **kw)
    with pytest.raises(ValueError, match="how they were drawn .method 'sampling'"):
        bound(net, cut(sampling(net), .5), found)
    with pytest.raises(TypeError, match='mask'): bound(net, found, found)
    with pytest.raises(ValueError, match='cannot digest'): certificate(net, full, found, torch.rand(3, 5))

def over_delta(fails, n, delta): return fails > stats.binom.ppf(.9999, n, delta)

def test_certificates_of_drawn_weights():
    "Masks as `sample_rows` makes them: no row fails at a point of S more often than delta."
    net, x, found = two_layers(3); x = x[:10]; found = sensitivities(net, x)['max']; n, delta = 200, .3
    sc = Scores(found, 'weight', labels={k:(_sampling_row(m.weight), torch.tensor([30.])) for k,m in layers(
        net).items()}, meta=dict(variant='rand', c=1., seed=0), method='sipp')
    w, over, loose = net[0].weight.detach(), 0, 0
    for i in range(n):
        m = sipp_cut(sc, .4, seed=i); eps, hat = bound(net, m, found, delta=delta)['0'], w*m.scale['0']
        err = point_errors(w, hat, x); over = over + (err > eps+1e-6); loose = loose + (err > .05*eps)
    assert not over_delta(over.max(), n, delta) and over_delta(loose.max(), n, delta)
    cert = certificate(net, m, found, x, delta=delta); assert cert[cert.delta > 0].over.sum() <= delta*cert.points.sum()

def point_errors(w, hat, a):
    "|hat z - z|/z [points, out, 2] in float64, 0 where there is no sum."
    halves = torch.cat([a.clamp(min=0), (-a).clamp(min=0)] if (a < 0).any() else [a]).double(); res = []
    for side in (1, -1):
        z, y = (halves @ (side*o).clamp(min=0).double().T for o in (w, hat))
        res.append(torch.where(z > 1.2e-7, (y-z).abs()/z, 0.))
    return torch.stack(res, 2)

class Fork(nn.Module):
    "A convolution whose channels are read by a flatten, beside a branch of the network's own input."
    def __init__(self):
        super().__init__(); self.conv, self.side, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(36, 5), nn.Linear(6*16+5, 4)
    def forward(self, x): return self.fc(torch.cat([self.conv(x).relu().flatten(1), self.side(x.flatten(1)).relu()], 1))

@pytest.fixture
def one_search(monkeypatch):
    "Masks that differ in the seed only share the search for tau, which does not depend on it."
    found, search = {}, provable_allocate._find_tau
    def once(ch, goal):
        key = ch.s.tobytes(), ch.fixed.tobytes(), goal
        if key not in found: found[key] = search(ch, goal)
        return found[key]
    monkeypatch.setattr(provable_allocate, '_find_tau', once)

@pytest.mark.parametrize('variant', ('rand', 'top'))
@pytest.mark.parametrize('tied', (True, False))
def test_certificates_of_drawn_channels(variant, tied, one_search):
    """Channels are drawn, a channel feeds sixteen columns, and a layer reads two families:
    the bound by hand, and no row fails on S more often than delta."""
    torch.manual_seed(1); net, x = Fork(), torch.rand(6, 1, 6, 6)
    g, found, n, delta = trace(net, x), sensitivities(net, x)['max'], 80, .3
    with torch.no_grad(): a = torch.cat([net.conv(x).relu().flatten(1), net.side(x.flatten(1)).relu()], 1)
    s = {f'{k}:in':v.amax(0).flatten(1).amax(1) if v.ndim > 2 else v.amax(0) for k,v in found.items()}
    sc = Scores(s, 'channel', graph=g, meta=dict(variant=variant, seed=0, c=1., logs=dict.fromkeys(layers(net), 1.)),
                method='pfp')
    w, over, loose, rows = net.fc.weight.detach(), 0, 0, 0
    for i in range(n):
        m = equalise(sc, .5, tied=tied, prune_inputs=False, seed=i); eps = bound(net, m, found, delta=delta)['fc']
        draws = torch.tensor(m.meta['draws']['fc:in'])
        err = point_errors(w, w*m.scale['fc:in'], a); over = over + (err > eps+1e-6); loose = loose + (err > .05*eps)
    assert (draws > 0).any() and not over_delta(over.max(), n, delta) and over_delta(loose.max(), n, delta)
    for o in range(4):
        for j,side in enumerate((1, -1)):
            on, gone = side*w[o] > 0, ~m['fc:in'] & (draws == 0); most = 0.
            for c in range(11):
                cols = [c*16+p for p in range(16)] if c < 6 else [96+c-6]
                for one in [cols] if tied else [[q] for q in cols]:
                    if draws[one[0]] > 0:
                        most = max(most, sum(float(found['fc'][o, q]) for q in one if on[q])/float(draws[one[0]]))
            want = float(found['fc'][o][on & gone].double().sum()) + float(bernstein_error(1, most, delta))
            assert abs(float(eps[o, j])-want) < 1e-5*want
    cert = certificate(net, m, found, x, delta=delta); assert len(cert[(cert.layer == 'fc') & (cert.delta > 0)]) == 8

def test_two_layers_with_one_weight():
    "A mask of the shared weight holds in both layers, and so does its bound."
    torch.manual_seed(0); net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[2].weight = net[0].weight
    x = torch.rand(20, 8); found = sensitivities(net, x)['max']
    mask = Mask({'0': torch.rand(8, 8) > .4, '4': torch.ones(3, 8).bool()}, 'weight')
    cert = certificate(net, mask, found, x)
    assert (cert.over == 0).all() and torch.equal(bound(net, mask, found)['0'].nan_to_num(9),
                                                  bound(net, mask, found)['2'].nan_to_num(9))
    assert (cert[cert.layer == '2'].worst.max() > .05
            and cert[cert.layer == '2'].kept.sum() == cert[cert.layer == '0'].kept.sum())

@pytest.mark.parametrize('eps, delta', ((.5, .1), (.9, .3)))
def test_failures_stay_below_delta(eps, delta):
    "Failures over all rows and images of S, against the upper 99.9 % limit of the binomial at delta."
    net, x, found = two_layers(4); r = failures(net, '0', found, x, eps, delta, n_trials=200, seed=1)
    assert (r['failures'] <= stats.binom.ppf(.999, 200, delta)/200
            and r['worst_pair'] <= stats.binom.ppf(.9999, 200, delta)/200 and r['draws'] > 10)

@pytest.mark.parametrize('groups', (1, 2, 4))
def test_failures_of_grouped_convolutions(groups):
    "Every output meets the points of its own group: the groups one by one give the same counts."
    torch.manual_seed(0); conv = nn.Conv2d(8, 4, 3, groups=groups, bias=False); x = torch.rand(3, 8, 5, 5)
    x[:, :2] *= (torch.rand(3, 2, 5, 5) > .8)*50.
    net = nn.Sequential(conv); found = sensitivities(net, x)['max']; kw = dict(eps=.5, delta=.1, n_trials=100)
    r = failures(net, '0', found, x, **kw); worst = []
    assert not over_delta(r['worst_pair']*100, 100, .1)
    for o in range(4): # literally: one neuron, its own channels, its own patches
        g, per = o*groups//4, 8//groups
        pts = nn.functional.unfold(x[:, g*per:(g+1)*per], 3).transpose(1, 2).flatten(0, 1).double()
        for side in (1, -1):
            w, s = (side*conv.weight[o]).clamp(min=0).flatten().double().detach(), found['0'][o].flatten().double()
            q = torch.where(w > 0, s, 0.); n = int(bernstein_draws(.5, float(q.sum())))
            f = np.random.default_rng(o).multinomial(n, (q/q.sum()).numpy(),
                                                     100)/(n*np.maximum((q/q.sum()).numpy(), 1e-300))
            z = pts @ w
            worst.append(float((((pts*w) @ torch.from_numpy(f.T))/z[:, None]-1).abs().gt(.5).double().mean()))
    assert abs(np.mean(worst)-r['failures']) < .01

def test_failures_do_happen_with_too_few_draws():
    net, x, found = two_layers(4)
    assert failures(net, '0', found, x, eps=8., delta=.9, n_trials=200)['draws'] < 20
    assert failures(net, '0', found, x, eps=.5, delta=.1, c=.02, n_trials=200)['failures'] > .05

@settings(max_examples=20)
@given(st.integers(0, 30), st.floats(.02, .95))
def test_sparsest_is_within_eps_and_maximal(seed, eps):
    net, x, found = two_layers(seed); m = sparsest(net, found, eps); b = bound(net, m, found)
    for k,v in b.items():
        w = layers(net)[k].weight.detach(); ok = ~v.isnan()
        assert (v[ok] <= eps+1e-6).all() or m[k].sum() == 1
        for o in range(len(w)): # one more weight would be too many
            for j,side in enumerate((1, -1)):
                left = m[k][o] & (side*w[o] > 0)
                if left.any(): assert float(v[o, j]) + float(found[k][o][left].min()) > eps-1e-6
    assert sparsest(net, found, eps, c=2).sparsity <= m.sparsity

def test_growth_and_density():
    net, x, found = two_layers()
    more = sensitivities(net, torch.randn(400, 12, generator=torch.Generator().manual_seed(9)))['max']
    g = growth(found, more); assert (g.largest > 1).all() and (g['median'] > 0).all()
    d = [sampled_density(net, found, e) for e in (.1, .5, 2.)]; assert 1 >= d[0] >= d[1] >= d[2] > 0
    with pytest.raises(ValueError, match='eps'): sparsest(net, found, 0)

def test_report_measures_on_images_that_were_not_used():
    dls = get_dls('digits', bs=64); net = build('lenet300', size=8, seed=0)
    sc = sipp(net, dls, reduce='max', n=50, seed=3); mask = sipp_cut(sc, .4)
    r = bound_report(net, sc, mask, dls, n=100); test = calib_batch(dls, n=100, split='test', seed=3)[0]
    seen = calib_batch(dls, n=50, seed=3)[0]; found = sensitivities(net, seen)['max']
    a, b = (verdict(certificate(net, mask, found, x)) for x in (seen, test))
    np.testing.assert_allclose(r.measured_seen, a.measured); np.testing.assert_allclose(r.measured_test, b.measured)
    np.testing.assert_allclose(r.bound, a.bound)
    assert (r.tested == 'test').all() and r.verdict.tolist() == a.verdict.tolist() and (r.bound_max >= r.bound).all()

def test_report_without_a_test_set():
    "The rest of the calibration's own part stands in, none of it in S; with nothing left it says so."
    from fastai.data.core import DataLoaders
    dls = get_dls('digits', bs=64); two = DataLoaders(*dls.loaders[:2], device='cpu'); size = len(dls.valid.dataset)
    net = build('lenet300', size=8, seed=0)
    from neuronprune.provable_bounds import _both_batches
    seen, other, where = _both_batches(dict(n=size-20, split='valid', seed=1), two, 256)
    assert (len(seen) == size-20 and len(other) == 20 and where == 'valid, not in S'
            and torch.equal(seen, calib_batch(two, n=size-20, seed=1)[0]))
    every = calib_batch(two, n=size, seed=0)[0]; rows = lambda x: sorted(map(tuple, x.flatten(1).tolist()))
    assert rows(torch.cat([seen, other])) == rows(every)
    sc = sipp(net, two, n=size-20); r = bound_report(net, sc, sipp_cut(sc, .4), two)
    assert (r.tested == 'valid, not in S').all() and r.measured_test.notna().all()
    with pytest.raises(ValueError, match='no other test set'):
        bound_report(net, sipp(net, two, n=size), sipp_cut(sc, .4), two)
