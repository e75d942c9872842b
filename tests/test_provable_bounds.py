"""Bounds against brute force: never broken on the images they are made from, and exact where the mathematics says so."""
import copy, math, pytest, torch
import numpy as np
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn
from neuronprune.allocate import allocate
from neuronprune.baselines import magnitude
from neuronprune.core import Mask, Scores, layers
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.provable import _sampling_row, sensitivities, sipp_cut
from neuronprune.provable_allocate import equalise
from neuronprune.provable_bounds import bernstein_draws, bernstein_error, bound, certificate, failures, growth, sampled_density, sparsest, verdict
from neuronprune.surgery import apply

@settings(max_examples=60, deadline=None)
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

@settings(max_examples=25, deadline=None)
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
        want = row_errors(layers(net)[k].weight.detach(), layers(hat)[k].weight.detach(), inputs[k])[neuron, '+-'.index(sign)]
        assert abs(float(d.worst.iloc[0])-float(want)) < 1e-4

def test_the_bound_is_reached():
    "One image: the shares are the sensitivities, so error and bound agree."
    net, x, _ = two_layers(1); x = x[:1].abs(); found = sensitivities(net, x)['max']; g = torch.Generator().manual_seed(3)
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
        v = verdict(cert); assert len(v) == len(own) and v.verdict.str.contains('vacuous|certified').all()

def test_verdict_in_words():
    net, x, found = two_layers(); full = Mask({k:torch.ones_like(v, dtype=torch.bool) for k,v in found.items()}, 'weight')
    assert verdict(certificate(net, full, found, x)).verdict.tolist() == ['every row is certified']*2
    none = Mask({k:torch.zeros_like(v, dtype=torch.bool) for k,v in found.items()}, 'weight')
    v = verdict(certificate(net, none, found, x))
    assert v.verdict.str.startswith('vacuous').all() and (v.measured > .99).all()

def test_drawn_rows_use_bernstein():
    torch.manual_seed(2); net = nn.Sequential(nn.Linear(30, 3)); x = torch.rand(50, 30); found = sensitivities(net, x)['max']; w = net[0].weight
    sc = Scores(found, 'weight', labels={'0': (_sampling_row(w), torch.tensor([30.]))}, meta=dict(variant='rand', c=1., seed=0), method='sipp')
    m = sipp_cut(sc, .4); eps = bound(net, m, found, delta=.05)['0']; n = torch.tensor(m.meta['draws']['0']).view(3, 2)
    for o in range(3):
        for j,side in enumerate((1, -1)):
            total = float(found['0'][o][side*w[o] > 0].double().sum())
            if n[o, j]: assert abs(float(eps[o, j])-float(bernstein_error(int(n[o, j]), total, .05))) < 1e-9
            else: assert eps[o, j] == 0
    bad = Mask(m.units, 'weight', scale=m.scale)
    with pytest.raises(ValueError, match='how they were drawn'): bound(net, bad, found)

@pytest.mark.parametrize('eps, delta', ((.5, .1), (.9, .3)))
def test_failures_stay_below_delta(eps, delta):
    "Failures over all rows and images of S, against the upper 99.9 % limit of the binomial at delta."
    net, x, found = two_layers(4); r = failures(net, '0', found, x, eps, delta, n_trials=200, seed=1)
    assert r['failures'] <= stats.binom.ppf(.999, 200, delta)/200 and r['worst_pair'] <= stats.binom.ppf(.9999, 200, delta)/200 and r['draws'] > 10

def test_failures_do_happen_with_too_few_draws():
    net, x, found = two_layers(4)
    assert failures(net, '0', found, x, eps=8., delta=.9, n_trials=200)['draws'] < 20
    assert failures(net, '0', found, x, eps=.5, delta=.1, c=.02, n_trials=200)['failures'] > .05

@settings(max_examples=20, deadline=None)
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
    net, x, found = two_layers(); more = sensitivities(net, torch.randn(400, 12, generator=torch.Generator().manual_seed(9)))['max']
    g = growth(found, more); assert (g.largest > 1).all() and (g['median'] > 0).all()
    d = [sampled_density(net, found, e) for e in (.1, .5, 2.)]; assert 1 >= d[0] >= d[1] >= d[2] > 0
    with pytest.raises(ValueError, match='eps'): sparsest(net, found, 0)
