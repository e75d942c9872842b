"""Baselines: closed forms, finite differences, brute force, and the promises every method makes."""
import copy
from contextlib import nullcontext
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropy
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.allocate import allocate, ratios
from neuronprune.baselines import (SlimmingCallback, _gate_gradients, fpgm, loss_name, lth, magnitude,
                                   magsign, random, slimming, snip, taylor)
from neuronprune.core import kappa, layers, methods
from neuronprune.masks import Scores
from neuronprune.saliency import gradients
from neuronprune.data import calib_batch, get_dls
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.pipeline import prune
from neuronprune.surgery import apply
from neuronprune.train import fit, learner

def gen(seed=0): return torch.Generator().manual_seed(seed)

class Net(nn.Module):
    "Convolutions with and without batch norm, a residual sum, an in-place ReLU, dropout, a frozen layer."
    def __init__(self, seed=0):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 3)
        self.bn, self.fc1, self.drop, self.fc2, self.act = (nn.BatchNorm2d(4), nn.Linear(20, 6), nn.Dropout(.5),
                                                            nn.Linear(6, 3), nn.ReLU(inplace=True))
        g = gen(seed)
        for n,p in self.named_parameters():
            p.data = torch.randn(p.shape, generator=g)*(.4 if p.ndim > 1 else .3) + (n == 'bn.weight')
        self.bn.running_mean, self.bn.running_var = torch.randn(4, generator=g)*.3, .5+torch.rand(4, generator=g)
        self.c.requires_grad_(False)
    def forward(self, x):
        h = self.act(self.a(x)); h = F.relu(self.bn(self.b(h)) + h)
        return self.fc2(self.drop(self.act(self.fc1(self.act(self.c(h)).flatten(1)))))

def data(n=40, c=3, shape=(1, 4, 4), seed=0):
    x = torch.randn(n, *shape, generator=gen(seed)); y = torch.arange(n) % c
    return DataLoaders(*[DataLoader(list(zip(x, y)), bs=16, shuffle=i == 0) for i in range(2)],
                       device=torch.device('cpu'))

X = torch.randn(2, 1, 4, 4, generator=gen(9))
def init_of(model, seed=5):
    g = gen(seed)
    return {k:torch.randn(v.shape, generator=g) if v.is_floating_point() else v for k,v in model.state_dict().items()}
def bits(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

CASES = [('random', {}), ('random', dict(unit='channel')), ('magnitude', {}), ('magnitude', dict(unit='channel')),
         ('magnitude', dict(unit='channel', norm='l2')),
         ('magnitude', dict(at='init')), ('snip', {}), ('snip', dict(unit='channel')),
         ('snip', dict(rounds=3, sparsity=.8)), ('snip', dict(unit='channel', rounds=3, sparsity=.5)),
         ('random', dict(unit='group', n_groups=(2, 2))), ('magnitude', dict(unit='group', n_groups=(2, 2))),
         ('magnitude', dict(unit='group', norm='l2', grouping='random')),
         ('magnitude', dict(unit='group', at='init')), ('lth', {}), ('lth', dict(unit='channel')), ('magsign', {}),
         ('magsign', dict(unit='channel')), ('taylor', {}), ('taylor', dict(variant='norm')),
         ('taylor', dict(variant='activations')), ('slimming', {}), ('fpgm', {})]
ids = lambda v: v if isinstance(v, str) else '-'.join(map(str, v.values())) or 'default'

# What all of them promise

@pytest.mark.parametrize('name,kw', CASES, ids=ids)
def test_promises(name, kw, tmp_path):
    model, dls, m = Net(), data(), methods()[name]
    if name == 'magsign' or kw.get('at') == 'init': kw = {**kw, 'init': init_of(model)}
    before, modes, flags, state = (bits(model), [o.training for o in model.modules()],
                                   [p.requires_grad for p in model.parameters()], torch.get_rng_state())
    model.drop.eval(); modes = [o.training for o in model.modules()]
    model.a.weight.grad = marker = torch.ones_like(model.a.weight)
    g = trace(model, X); sc = m(model, dls, graph=g, **kw); again = m(model, dls, graph=g, **kw)
    assert same(dict(sc), dict(again)) and same(before, bits(model))
    if 'data' not in m.needs:
        assert torch.equal(state, torch.get_rng_state())   # torch's own loaders draw a seed when they are read
    assert modes == [o.training for o in model.modules()] and flags == [p.requires_grad for p in model.parameters()]
    assert (model.a.weight.grad is marker and torch.equal(marker, torch.ones_like(marker))
            and model.b.weight.grad is None)
    assert not any(o._forward_hooks for o in model.modules())
    assert (sc.method, sc.unit, sc.graph) == (name, kw.get('unit', m.unit), g) and sc.secs > 0
    if sc.unit == 'channel':
        assert (set(sc) | set(sc.skipped) == set(layers(model)) and not set(sc) & set(sc.skipped)
                and 'output' in sc.skipped['fc2'])
        assert all(v.shape == (len(layers(model)[k].weight),) for k,v in sc.items())
        assert set(m(model, dls, **kw)) == set(sc), 'traced with an image of dls'
    elif sc.unit == 'group':
        assert (list(sc) == ['b', 'c', 'fc1', 'fc2'] and list(sc.skipped) == ['a']
                and list(m(model, dls, **kw)) == list(sc))
        assert all(int(sc.cost[k].sum()) == layers(model)[k].weight.numel() and v.shape == sc.cost[k].shape
                   for k,v in sc.items())
    else: assert {k:v.shape for k,v in sc.items()} == {k:o.weight.shape for k,o in layers(model).items()}
    mask = allocate(sc, .5, **m.allocate); kept, n = mask.counts()
    assert mask.meta['of'] == ('params' if sc.unit == 'group' else 'units') and .4 < mask.meta['achieved'] <= .5
    assert sc.unit == 'group' or kept == kappa(n, .5) or m.allocate.get('scope') == 'layer'
    assert all(v.any() for v in mask.values())
    sc.save(tmp_path/'s.safetensors'); assert same(dict(Scores.load(tmp_path/'s.safetensors')), dict(sc))

@pytest.mark.parametrize('name,kw', [c for c in CASES if c[0] != 'random'], ids=ids)
def test_nan_is_refused(name, kw):
    model = Net(); init = init_of(model)
    if name == 'magsign' or kw.get('at') == 'init': kw = {**kw, 'init': init}
    model.b.weight.data[0,0,0,0] = init['b.weight'][0,0,0,0] = model.bn.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match='NaN'): methods()[name](model, data(), graph=trace(Net(), X), **kw)

@pytest.mark.parametrize('name,kw', CASES, ids=ids)
def test_what_is_missing_is_named(name, kw):
    model, m, init = Net(), methods()[name], init_of(Net())
    if name == 'magsign' or kw.get('at') == 'init':
        with pytest.raises(ValueError, match=r'learner\('): m(model, data(), graph=trace(model, X), **kw)
        with pytest.raises(ValueError, match='has shape'):
            m(model, data(), graph=trace(model, X), init={k:v[None] for k,v in init.items()}, **kw)
        kw = {**kw, 'init': init}
    if 'data' in m.needs:
        with pytest.raises(ValueError, match=f'{name} needs images'): m(model, graph=trace(model, X), **kw)
    if kw.get('unit', m.unit) != 'weight':
        with pytest.raises(ValueError, match=r'graph=trace\(model, xb\)'): m(model, **kw)
        other = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        with pytest.raises(ValueError, match='does not fit the model'):
            m(model, data(), graph=trace(other, torch.rand(1, 2)), **kw)

def shared():
    "Two layers that hold one weight, and a third."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    m[3].weight = m[1].weight
    return m

@pytest.mark.parametrize('name,kw', [c for c in CASES if c[1].get('unit', 'weight') == 'weight'
                                     and methods()[c[0]].unit == 'weight'], ids=ids)
def test_a_shared_weight_is_scored_once_and_masked_once(name, kw):
    model, m = shared(), methods()[name]
    if name == 'magsign' or kw.get('at') == 'init': kw = {**kw, 'init': init_of(model)}
    sc = m(model, data(), **kw); assert list(sc) == ['1', '5'] and sc.skipped == {'3': "it shares its weight with '1'"}
    mask = allocate(sc, .5, **m.allocate); assert mask.counts() == (152, 304)
    cut = apply(copy.deepcopy(model), mask)
    assert cut[3].weight is cut[1].weight and torch.equal(cut[3].weight, model[1].weight*mask['1'])

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('name,kw', [c for c in CASES if 'rounds' not in c[1]], ids=ids)
def test_other_dtypes(name, kw, dtype):
    model, m, g = Net().to(dtype), methods()[name], trace(Net(), X)
    if name == 'magsign' or kw.get('at') == 'init':
        kw = {**kw, 'init': {k:v.to(dtype) for k,v in init_of(Net()).items()}}
    got, want = (m(o, data(), graph=g, **kw) for o in (model, copy.deepcopy(model).float()))
    assert {p.dtype for p in model.parameters()} == {dtype}
    for k,v in want.items():
        assert (got[k].double()-v.double()).abs().max() <= (1e-5 if dtype == torch.float64 else .05)*v.abs().max()

def test_half_precision_neither_overflows_nor_underflows():
    pair = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).half()
    pair[0].weight.data[:, 0], pair[1].weight.data[0] = torch.tensor([1., 3]), torch.tensor([2., 1])
    dls = DataLoaders(*[DataLoader([(torch.ones(1), 0)], bs=1)]*2, device=torch.device('cpu'))
    g = trace(copy.deepcopy(pair).float(), torch.ones(1, 1))
    for f,p in ((lambda **kw: taylor(pair, dls, **kw), 2), (lambda **kw: snip(pair, dls, unit='channel', **kw), 1)):
        assert np.allclose(f(n=1, graph=g, loss_func=lambda out, y: (out*1e-4).mean())['0'], [2e-4**p, 3e-4**p],
                           rtol=.01, atol=0)
    pair[0].weight.data *= 1e-4; pair[1].weight.data *= 1e-3
    assert np.allclose(snip(pair, dls, n=1, loss_func=lambda out, y: out.mean())['0'][:, 0], [2e-7, 3e-7], rtol=.01,
                       atol=0)
    big = nn.Sequential(nn.Linear(100, 2), nn.Linear(2, 1)).half(); big[0].weight.data.fill_(1000)
    big[1].weight.data.fill_(1e-4)
    assert (magnitude(big, unit='channel', graph=trace(copy.deepcopy(big).float(), torch.ones(1, 100)))['0'].tolist()
            == [1e5, 1e5])
    whole = {'1': (torch.zeros(1).long(), torch.zeros(2).long())}
    assert magnitude(big, unit='group', norm='l2', labels=whole)['1'].item() == pytest.approx(1e-4, rel=1e-3)

def test_global_random_state_is_left_alone():
    dls, model = get_dls('digits', device='cpu'), build('mlp', size=8, seed=0); state = torch.get_rng_state()
    for name in ('snip', 'taylor'): methods()[name](model, dls, n_per_class=2)
    assert torch.equal(state, torch.get_rng_state())

def test_other_slips():
    model, dls = Net(), data()
    for kw,text in ((dict(rounds=0), 'rounds=0'), (dict(sparsity=80, rounds=2), r'did you mean 0.8'),
                    (dict(n=10**4), 'n=10000'), (dict(unit='filter'), 'unit='), (dict(split='tset'), 'split=')):
        with pytest.raises(ValueError, match=text): snip(model, dls, **kw)
    with pytest.raises(ValueError, match="variant='first'"): taylor(model, dls, variant='first')
    with pytest.raises(ValueError, match='labels from 0 to 4'): snip(model, data(c=5))
    with pytest.raises(ValueError, match='no channel of this model'):
        fpgm(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), dls)
    with pytest.raises(TypeError, match='nn.Module'): magnitude('mlp')
    for init,text in (([1], 'init: expected a dict'),
                      ({**init_of(model), 'b.weight': 3}, r'init\[b.weight\]: expected a Tensor, got int')):
        for f in (lambda: magnitude(model, at='init', init=init), lambda: magsign(model, init=init)):
            with pytest.raises(TypeError, match=text): f()

def test_what_the_model_does_with_the_batch_is_named():
    g = trace(Net(), X)
    for f in (snip, taylor, lambda *o, **kw: taylor(*o, variant='norm', **kw)):
        model = Net()
        with pytest.raises(ValueError, match=r'xb: the model cannot digest a batch of shape \(40, 1, 5, 5\)'):
            f(model, data(shape=(1, 5, 5)), graph=g, n=40)
        assert not any(o._forward_hooks for o in model.modules())
        model.fc2.weight.data[0, 0] = torch.inf
        with pytest.raises(ValueError, match='outputs of the model: .* NaN or infinite'): f(model, data(), graph=g)

def test_tags():
    m = methods()
    assert {k:(m[k].unit, m[k].at, m[k].rewind) for k in ('snip', 'lth', 'magsign', 'taylor')} == dict(
        snip=('weight', 'init', 'init'), lth=('weight', 'trained', 'init'), magsign=('weight', 'trained', 'init'),
        taylor=('channel', 'trained', 'none'))
    assert m['fpgm'].allocate == dict(scope='layer') and m['slimming'].allocate == dict(normalize=None)

# Blocks

@pytest.mark.parametrize('grouping', ['contiguous', 'random'])
@pytest.mark.parametrize('norm', ['l1', 'l2'])
def test_block_magnitude_is_the_mean_over_the_block(norm, grouping):
    model = Net()
    sc = magnitude(model, graph=trace(model, X), unit='group', norm=norm, n_groups=(2, 3), layers=['b', 'fc1'],
                   grouping=grouping, seed=4)
    assert list(sc) == ['b', 'fc1'] and sc.skipped['c'] == 'not chosen'
    for k,v in sc.items():
        w, (child, parent) = layers(model)[k].weight.detach().double().numpy(), sc.labels[k]
        for i in range(3):
            for j in range(2):
                block = w[child.numpy() == i][:, parent.numpy() == j]
                want = np.abs(block).mean() if norm == 'l1' else (block**2).mean()**.5
                assert block.size == sc.cost[k][i, j] and abs(float(v[i, j]) - want) < 1e-6

def test_the_same_blocks_as_those_of_other_scores():
    model, dls = Net(), data()
    first = methods()['mint'](model, dls, n_per_class=8, n_groups=(2, 2), grouping='random', seed=3)
    for f in (random, magnitude):
        sc = f(model, unit='group', labels=first.labels)
        assert (list(sc) == list(first)
                and all(torch.equal(a, b) for k in sc for a,b in zip(sc.labels[k], first.labels[k])))
        assert (all(sc[k].shape == first[k].shape and torch.equal(sc.cost[k], first.cost[k]) for k in sc)
                and sc.skipped['a'] == 'not among the given blocks')
        fresh = f(model, unit='group', graph=first.graph, n_groups=(2, 2), grouping='random', seed=3)
        assert all(torch.equal(a, b) for k in sc for a,b in zip(fresh.labels[k], first.labels[k])), (
            'the same cut by the same rule')

def test_random_blocks_draw_from_one_range():
    model = build('mlp', size=8, seed=0)
    sc = random(model, get_dls('digits', device='cpu'), unit='group', seed=1, n_groups=(100, 100), layers=['fc2'])
    v = sc['fc2'].flatten().sort().values
    assert ((v - torch.linspace(0, 1, len(v))).abs().max() < .02
            and torch.rand(100, 100, generator=gen(1)).equal(sc['fc2']))

@pytest.mark.parametrize('f', [random, magnitude])
@pytest.mark.parametrize('kw,err,said', [
    (dict(grouping='kmeans'), ValueError, 'pass labels='),
    (dict(n_groups=(2, 50)), ValueError, "layer 'b' has only 4 units"), (dict(n_groups=3), TypeError, 'n_groups=3'),
    (dict(layers=['a']), ValueError, "layers: 'a' has no blocks"), (dict(layers=['d']), ValueError, "layers='d'"),
    (dict(grouping='contigous'), ValueError, "did you mean 'contiguous'?"),
    (dict(labels={'d': (T0 := torch.zeros(4).long(), T0)}), ValueError, "labels='d'"),
    (dict(labels={'b': (T0, T0)}, layers=['b']), ValueError, 'leave out'),
    (dict(labels={'b': (T0, torch.zeros(5).long())}), ValueError, "labels['b']: (outputs, inputs) = (4, 5)"),
    (dict(labels=[1]), TypeError, 'labels: expected a dict'),
    (dict(labels={'b': None}), TypeError, "labels['b']: expected a pair"),
    (dict(labels={'b': (T0,)}), TypeError, 'a pair'), (dict(labels={'b': (T0, T0.float())}), TypeError, 'a pair'),
    (dict(labels={'b': ([0]*4, [0]*4)}), TypeError, 'a pair'),
    (dict(labels={'b': (T0, T0-1)}), ValueError, "labels['b']: group -1")])
def test_block_arguments_are_checked(f, kw, err, said):
    model = Net()
    with pytest.raises(err) as e: f(model, graph=trace(model, X), unit='group', **kw)
    assert said in str(e.value)

def test_only_two_methods_score_blocks():
    model, init = Net(), init_of(Net()); g = trace(model, X)
    for name in ('snip', 'lth', 'magsign'):
        with pytest.raises(ValueError, match="unit='group': expected one of 'weight', 'channel'"):
            methods()[name](model, data(), graph=g, unit='group', **(dict(init=init) if name == 'magsign' else {}))

@pytest.mark.parametrize('name', ['random', 'magnitude'])
def test_blocks_through_the_whole_flow(name):
    learn = fit(learner(build('mlp', c_in=1, n_out=10, size=8, seed=0), get_dls('digits', device='cpu')), 1)
    res = prune(learn, name, .9, unit='group', n_groups=(20, 20), layers=['fc2'], fine_tune_epochs=1)
    w = learn.model.get_parameter('fc2.weight'); gone = float((w == 0).float().mean())
    assert (list(res.mask) == ['fc2'] and .9-1/400 < gone <= .9 and res.mask.meta['of'] == 'params'
            and abs(res.report.weights_removed-.9) < .003)
    assert all((learn.model.get_parameter(f'{k}.weight') != 0).all() for k in ('fc1', 'fc3'))

# Random

def test_random_is_uniform_in_every_layer():
    model = nn.Sequential(nn.Linear(500, 4), nn.ReLU(), nn.Linear(4, 500), nn.ReLU(), nn.Linear(500, 40))
    for v in random(model, seed=3).values():
        u = v.flatten().sort().values.double(); n = len(u)
        # Kolmogorov-Smirnov, 0.1 %
        assert 0 <= u[0] and u[-1] < 1 and (u - (torch.arange(n)+.5)/n).abs().max() < 1.95/n**.5 + 1/n

class Tied(nn.Module):
    "Eight channels shared by three layers, and 24 of their own."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(i, o) for i,o in ((3, 8), (8, 8), (8, 8), (8, 24), (24, 2)))
    def forward(self, x):
        h = self.a(x).relu(); h = h + self.b(h).relu(); return self.e(self.d(h + self.c(h).relu()).relu())

def test_random_ties_share_their_draw():
    model = Tied(); g = trace(model, torch.rand(1, 3)); lost, n = {'a': 0, 'd': 0}, 300
    for s in range(n):
        sc = random(model, unit='channel', graph=g, seed=s); mask = allocate(sc, .25, normalize=None)
        assert (torch.equal(sc['a'], sc['b']) and torch.equal(sc['a'], sc['c'])
                and len(set(sc['a'].tolist() + sc['d'].tolist())) == 32)
        for k in lost: lost[k] += int((~mask[k]).sum())
    assert abs(lost['a']/(8*n) - .25) < .04 and abs(lost['d']/(24*n) - .25) < .04

# Magnitude, lottery tickets, signs

def test_magnitude_by_numpy():
    model = Net(); g = trace(model, X); w = model.c.weight.detach().numpy().reshape(5, -1)
    assert (np.array_equal(magnitude(model)['c'].numpy(), np.abs(model.c.weight.detach().numpy()))
            and same(dict(magnitude(model, norm='l2')), dict(lth(model))))
    assert (np.allclose(magnitude(model, unit='channel', graph=g)['c'], np.abs(w).sum(1))
            and np.allclose(magnitude(model, unit='channel', norm='l2', graph=g)['c'], np.sqrt((w**2).sum(1))))
    init = init_of(model); assert torch.equal(magnitude(model, at='init', init=init)['c'], init['c.weight'].abs())

@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), s=st.floats(.05, .95))
def test_magsign_without_sign_changes_is_lth(seed, s):
    model = Net(seed); g = gen(seed)
    init = {k:v*(.1+torch.rand(v.shape, generator=g)) for k,v in model.state_dict().items()}
    sc = magsign(model, init=init)
    assert sc.meta['flipped'] == 0 and same(dict(allocate(sc, s)), dict(allocate(lth(model), s)))

@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), s=st.floats(.05, .95))
def test_magsign_keeps_turned_weights_last(seed, s):
    model = Net(seed); init = init_of(model, seed+1); sc = magsign(model, init=init); mask = allocate(sc, s)
    turned = {k:init[f'{k}.weight']*m.weight.detach() < 0 for k,m in layers(model).items()}
    assert all(torch.equal(v < 0, turned[k]) for k,v in sc.items())
    free = {k:mask[k].flatten() if mask[k].sum() > 1 else None for k in mask}        # layers not held by min_keep
    if any((f & turned[k].flatten()).any() for k,f in free.items() if f is not None):
        assert all((mask[k] | turned[k]).all() for k in mask)
    kept = torch.cat([mask[k][turned[k]] for k in mask if mask[k].sum() > 1])
    w = torch.cat([layers(model)[k].weight.detach()[turned[k]].abs() for k in mask if mask[k].sum() > 1])
    if kept.any() and (~kept).any(): assert w[kept].min() >= w[~kept].max()

def test_magsign_channels_go_by_signed_means():
    model = Net(); init = init_of(model); sc = magsign(model, unit='channel', init=init, graph=trace(model, X))
    w, w0 = (o.detach().double().numpy().reshape(6, -1).mean(1) for o in (model.fc1.weight, init['fc1.weight']))
    assert np.allclose(sc['fc1'], np.sign(w0)*w, atol=1e-6) and (sc['fc1'] < 0).any()

# SNIP

def test_snip_softmax_closed_form():
    model, dls = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), data()
    xb, yb = calib_batch(dls, n_per_class=8, split='train'); x = xb.flatten(1)
    with torch.no_grad(): grad = (model(xb).softmax(1)-F.one_hot(yb, 3)).T @ x / len(x)
    assert torch.allclose(snip(model, dls, n_per_class=8)['1'], (model[1].weight*grad).abs().detach(), atol=1e-6)

def loss64(model, xb, yb): return F.cross_entropy(model(xb), yb).item()

def test_snip_is_the_derivative_of_a_mask():
    model, dls = Net().double().eval(), data(); x, y = calib_batch(dls, n=20, split='train'); x = x.double()
    g = gradients(model, ['a.weight', 'c.weight'], x, y, bs=7)
    for k in ('a', 'c'):
        w = model.get_parameter(f'{k}.weight').data; flat = w.view(-1); h = 1e-5
        for i in range(0, len(flat), 19):
            o = flat[i].item(); ls = []
            for f in (1+h, 1-h): flat[i] = o*f; ls.append(loss64(model, x, y))
            flat[i] = o; v, gr = g[f'{k}.weight']
            assert (v*gr).view(-1)[i].item() == pytest.approx((ls[0]-ls[1])/(2*h), abs=1e-7)

def test_snip_does_not_depend_on_chunks():
    model, dls = Net(), data(n=39); x, y = calib_batch(dls, n=39, split='train')
    names = [f'{k}.weight' for k in layers(model)]
    a, b = (gradients(model, names, x, y, bs=bs) for bs in (256, 5))
    assert all(torch.allclose(a[k][1], b[k][1], atol=1e-6) for k in names)

def test_snip_channel_is_the_signed_row_sum():
    model, dls = Net(), data(); x, y = calib_batch(dls, split='train'); sc = snip(model, dls, unit='channel')
    for k,v in sc.items():
        w, g = gradients(model, [f'{k}.weight'], x, y)[f'{k}.weight']
        assert torch.allclose(v, (w*g).flatten(1).sum(1).abs(), atol=1e-6)

@pytest.mark.parametrize('unit', ['weight', 'channel'])
def test_iterative_snip_by_hand(unit):
    model, dls, s, R = Net(), data(), .7, 4; g = trace(model, X)
    sc, alive = snip(model, dls, unit=unit, graph=g, rounds=R, sparsity=s), None
    for r,si in enumerate(ratios(s, R)):
        work = copy.deepcopy(model)
        if alive is not None:
            for k,m in alive.expand(work).items(): dict(work.named_parameters())[k].data.mul_(m)
        now = snip(work, dls, unit=unit, graph=g)
        if alive is not None:
            now = Scores({k:torch.where(alive[k], v, torch.tensor(-1.)) for k,v in now.items()}, unit, graph=g)
        new = allocate(now, si, normalize=None)
        if alive is not None: assert not any((new[k] & ~alive[k]).any() for k in new)
        for k in new if r < R-1 else ():
            gone = ~new[k] if alive is None else alive[k] & ~new[k]
            assert ((sc[k][gone] >= r-R) & (sc[k][gone] <= r-R+1)).all()
        alive = new
    assert same(dict(alive), dict(allocate(sc, s, normalize=None)))

def test_snip_skips_what_is_not_used():
    model = Net(); model.spare = nn.Linear(2, 2); model.twin = nn.Linear(20, 6); model.twin.weight = model.fc1.weight
    sc = snip(model, data())
    assert set(sc.skipped) == {'spare', 'twin'} and 'fc1' in sc

# Taylor

def test_gates_are_weights_and_biases():
    model, dls = Net(), data(); x, y = calib_batch(dls, split='train')
    mods = {k:m for k,m in layers(model).items() if k != 'fc2'}
    gates = _gate_gradients(model, mods, x, y, bs=7)
    for k in mods:
        parts = gradients(model, [f'{k}.weight', f'{k}.bias'], x, y)
        assert torch.allclose(gates[k].mean(0),
                              sum((w*g).flatten(1).sum(1) if w.ndim > 1 else w*g for w,g in parts.values()), atol=1e-6)
    assert torch.allclose(taylor(model, dls)['c'], gates['c'].mean(0)**2)

def scaled(model, names, c, f):
    o = copy.deepcopy(model)
    for n in names: o.get_parameter(n).data[c] *= f
    return o

@pytest.mark.parametrize('variant,layer,names',
                         [('weights', 'c', ('c.weight', 'c.bias')), ('weights', 'fc1', ('fc1.weight', 'fc1.bias')),
                          ('norm', 'b', ('bn.weight', 'bn.bias'))])
def test_taylor_is_a_finite_difference(variant, layer, names):
    model, dls = Net().double().eval(), data(); x, y = calib_batch(dls, split='train'); x = x.double(); h = 1e-5
    dls64 = DataLoaders(*[DataLoader(list(zip(x, y)), bs=16)]*2, device=torch.device('cpu'))
    sc = taylor(model, dls64, variant=variant, graph=trace(model, X.double()))
    for c in range(len(sc[layer])):
        d = (loss64(scaled(model, names, c, 1+h), x, y)-loss64(scaled(model, names, c, 1-h), x, y))/(2*h)
        assert sc[layer][c].item() == pytest.approx(d*d, rel=1e-3, abs=1e-9)
    if variant == 'norm': assert set(sc) == {'b'} and 'batch norm' in sc.skipped['c']

def test_taylor_activations_by_hand():
    model, dls = Net().eval(), data(); x, y = calib_batch(dls, split='train'); total = 0
    for xi,yi in zip(x.split(1), y.split(1)):
        h = F.relu(model.bn(model.b(F.relu(model.a(xi)))) + F.relu(model.a(xi)))
        z = model.c(h).detach().requires_grad_()
        F.cross_entropy(model.fc2(F.relu(model.fc1(F.relu(z).flatten(1)))), yi).backward()
        total = total + (z*z.grad).mean((0, 2, 3)).abs().detach()
    assert torch.allclose(taylor(model, dls, variant='activations')['c'], (total/len(x))/(total/len(x)).norm(),
                          atol=1e-5)

# Slimming

def test_slimming_reads_densenet_at_its_offsets():
    model = build('densenet22', 3, 10, 32, seed=0); g = gen(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.weight.data = torch.randn(m.weight.shape, generator=g)
    sc = slimming(model, graph=trace(model, torch.rand(1, 3, 32, 32, generator=g))); f = model.features
    block, readers = f.denseblock1, lambda i: [getattr(f.denseblock1, f'denselayer{j}').norm1
                                               for j in range(i+1, 4)] + [f.transition1.norm]
    expect = lambda norms, a, n: torch.stack([m.weight.detach().abs()[a:a+n] for m in norms]).amax(0)
    assert torch.equal(sc['features.conv0'], expect(readers(0), 0, 24))
    for i in (1, 2, 3):
        assert torch.equal(sc[f'features.denseblock1.denselayer{i}.conv2'], expect(readers(i), 24+12*(i-1), 12))
    assert torch.equal(sc['features.denseblock1.denselayer2.conv1'], block.denselayer2.norm2.weight.detach().abs())
    assert set(sc) == set(layers(model)) - {'classifier'}

def test_slimming_reads_the_norm_behind():
    model = build('resnet20', 3, 10, 32, seed=0)
    for i,m in enumerate(o for o in model.modules() if isinstance(o, nn.BatchNorm2d)): m.weight.data.fill_(-i-1.)
    sc = slimming(model, graph=trace(model, torch.rand(1, 3, 32, 32)))
    assert [v.unique().item() for v in sc.values()] == [i+1. for i in range(len(sc))]

def test_slimming_needs_norms():
    with pytest.raises(ValueError, match='expected a network with batch norms'):
        slimming(build('mlp', size=8), graph=trace(build('mlp', size=8), torch.rand(1, 1, 8, 8)))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match='expected a network with batch norms'): slimming(plain, data())
    with pytest.raises(ValueError, match='no batch norm'): fit(learner(plain, data()), 1, cbs=[SlimmingCallback()])
    for lam in (-1, float('nan'), float('inf'), True, '1'):
        with pytest.raises(ValueError, match='lam='): SlimmingCallback(lam)
    assert SlimmingCallback.order > MixedPrecision.order

def bn_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

def test_slimming_callback_is_the_penalty():
    a, b, lam = bn_net(), bn_net(), .05
    la = fit(learner(a, data(), lr=.1), 3, schedule='flat', cbs=[SlimmingCallback(lam)])
    penal = lambda out, y: F.cross_entropy(out, y) + lam*b[2].weight.abs().sum()
    lb = fit(learner(b, data(), lr=.1, loss_func=penal), 3, schedule='flat')
    assert all(torch.allclose(p, q, atol=1e-5) for p,q in zip(la.model.parameters(), lb.model.parameters()))
    assert not torch.allclose(a[2].weight, fit(learner(bn_net(), data(), lr=.1), 3, schedule='flat').model[2].weight,
                              atol=1e-3)
    frozen = bn_net(); frozen[2].weight.requires_grad_(False)
    fit(learner(frozen, data()), 1, cbs=[SlimmingCallback(lam)])
    assert torch.equal(frozen[2].weight, torch.ones(8))

# FPGM

def test_fpgm_by_brute_force():
    model = Net(); sc = fpgm(model, graph=trace(model, X))
    for k,v in sc.items():
        w = layers(model)[k].weight.detach().double().flatten(1).numpy()
        assert np.allclose(v, [sum(np.linalg.norm(a-b) for b in w) for a in w])

def test_fpgm_twins_and_wide_layers():
    w = torch.randn(60, 200, generator=gen()); w[1] = w[0]
    model = nn.Sequential(nn.Linear(200, 60), nn.ReLU(), nn.Linear(60, 2)); model[0].weight.data = w
    v = fpgm(model, graph=trace(model, torch.rand(1, 200)))['0']; a = w.double().numpy()
    assert np.allclose(v, np.sqrt(((a[:,None]-a[None])**2).sum(-1)).sum(1)) and v[0] == pytest.approx(v[1])

# The loss, the labels, the form of a batch

HEAVY = torch.tensor([50., 1, .1])
LOSSES = {'plain': (None, F.cross_entropy), 'weighted': (nn.CrossEntropyLoss(weight=HEAVY), None),
          'smooth': (nn.CrossEntropyLoss(label_smoothing=.3), None),
          'fastai': (CrossEntropyLossFlat(weight=HEAVY), nn.CrossEntropyLoss(weight=HEAVY)),
          'fastai smooth': (LabelSmoothingCrossEntropy(eps=.2), None),
          'partial': (partial(F.cross_entropy, label_smoothing=.2), None),
          'function': (lambda out, y: (out[:, 0]-y).pow(2).mean(), None)}

@pytest.mark.parametrize('which', LOSSES)
@pytest.mark.parametrize('method,kw', [(snip, dict(unit='channel')), (taylor, {})], ids=['snip', 'taylor'])
def test_any_loss_is_the_one_that_is_differentiated(method, kw, which):
    model, dls, (own, ref) = Net().eval().requires_grad_(), data(), LOSSES[which]
    x, y = calib_batch(dls, n=20, split='train')
    loss = (ref or own)(model(x), y); got = method(model, dls, n=20, loss_func=own, **kw)
    w, b = torch.autograd.grad(loss, [model.fc1.weight, model.fc1.bias]); f = model.fc1
    signed = (f.weight*w).sum(1) + (f.bias*b if method is taylor else 0)
    assert torch.allclose(got['fc1'], (signed**2 if method is taylor else signed.abs()).detach(), rtol=1e-4)
    if which != 'plain': assert not torch.allclose(got['fc1'], method(model, dls, n=20, **kw)['fc1'], rtol=1e-2)

def test_the_loss_is_named():
    names = {k:loss_name(o) for k,(o,_) in LOSSES.items()}
    assert (names['plain'] == 'CrossEntropyLoss' and names['weighted'] == names['fastai'] == 'CrossEntropyLoss(weight)'
            and names['smooth'] == 'CrossEntropyLoss(label_smoothing=0.3)')
    assert (names['partial'] == 'cross_entropy' and 'lambda' in names['function']
            and names['fastai smooth'] == 'LabelSmoothingCrossEntropy(eps=0.2)')
    for m in (snip, taylor):
        assert (m(Net(), data(), n=5).meta['loss'] == 'CrossEntropyLoss'
                and m(Net(), data(), n=5, loss_func=LOSSES['smooth'][0]).meta['loss'] == names['smooth'])

@pytest.mark.parametrize('bad,says', [(5, 'expected a function'), (lambda o, y: (o, y), 'returned a tuple of shapes'),
                                      (nn.CrossEntropyLoss(reduction='none'), 'returned a tensor of shape'),
                                      (lambda o, y: 1., 'returned a float'),
                                      (lambda o, y: o.detach().mean(), 'with a gradient'),
                                      (lambda o: o.mean(), 'cannot take a tensor of shape'),
                                      (lambda o, y: o.logits.mean(), 'cannot take'),
                                      (lambda o, y: o.mean()*float('nan'), 'NaN'), (nn.MSELoss(), 'cannot take')])
@pytest.mark.parametrize('method', [snip, taylor], ids=['snip', 'taylor'])
def test_a_loss_that_is_none(method, bad, says):
    with pytest.warns(UserWarning) if isinstance(bad, nn.MSELoss) else nullcontext(), pytest.raises(
        (ValueError, TypeError), match=f'loss_func.*{says}'):
        method(Net(), data(), n=5, loss_func=bad)

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    model, dls = Net(), data(); x, y = (torch.stack(o) for o in zip(*dls.train.dataset))
    odd = DataLoaders(*[DataLoader(list(zip(x, y.to(dtype))), bs=16)]*2, device=torch.device('cpu'))
    g = trace(model, X)
    for m in (snip, taylor):
        a, b = (m(model, o, n=20, graph=g, loss_func=f) for o,f in ((dls, None), (odd, CrossEntropyLossFlat())))
        assert all(torch.allclose(a[k], b[k], rtol=1e-5) and torch.allclose(a[k], v, rtol=1e-5)
                   for k,v in m(model, odd, n=20, graph=g).items())

class Forms(nn.Module):
    "Two inputs; the outputs as a tuple, a dictionary or plain."
    def __init__(self, out): super().__init__(); self.net, self.out = Net(), out
    def forward(self, image, shift):
        o = self.net(image)+shift; return {None: o, tuple: (o, image), dict: dict(logits=o, other=None)}[self.out]

@pytest.mark.parametrize('form', [tuple, dict])
def test_batches_and_outputs_of_several_tensors(form):
    x, y = calib_batch(data(), n=20, split='train'); shift = torch.randn(20, 3, generator=gen(3))
    loss = lambda o, y: F.cross_entropy(o['logits'] if form is dict else o[0], y)
    model, plain = Forms(form), Forms(None); xb = (x, shift) if form is tuple else dict(shift=shift, image=x)
    names = [f'net.{k}.weight' for k in layers(model.net)]
    want = torch.autograd.grad(F.cross_entropy(plain.eval().requires_grad_()(x, shift), y),
                               [plain.get_parameter(k) for k in names])
    for k,g in zip(names, want):
        assert torch.allclose(gradients(model, names, xb, y, loss_func=loss, bs=7)[k][1], g, atol=1e-6)
    gates, f = _gate_gradients(model, {'fc1': model.net.fc1}, xb, y, loss, bs=7)['fc1'].mean(0), plain.net.fc1
    bias, = torch.autograd.grad(F.cross_entropy(plain(x, shift), y), [f.bias])
    assert torch.allclose(gates, ((f.weight*want[names.index('net.fc1.weight')]).sum(1) + f.bias*bias).detach(),
                          atol=1e-6)
    with pytest.raises(ValueError, match='loss_func=None: cross-entropy needs outputs'): gradients(model, names, xb, y)

def test_a_synchronised_batch_norm_is_a_batch_norm():
    m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SyncBatchNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(4*36, 10))
    assert list(methods()['slimming'](m, graph=trace(m, torch.rand(2, 1, 8, 8)))) == ['0']


@pytest.mark.parametrize('name', ['sa_mlp', 'lenet300'])
def test_random_owes_nothing_to_the_initial_weights_of_the_same_seed(name):
    "One seed for network and mask, as in a study: a plain generator would draw the weights over again."
    from neuronprune.masks import Scores
    from neuronprune.search import _drawn
    from types import SimpleNamespace
    model = build(name, 1, 10, 28, seed=0)
    w = model.fc1.weight.detach().flatten()
    zero = Scores({'fc1': torch.zeros(model.fc1.weight.shape)}, 'weight')
    task = SimpleNamespace(candidates=zero, graph=None, allocate=lambda s: s)
    for scores in (random(model, seed=0), _drawn(task, 0, 0)):
        r = torch.corrcoef(torch.stack([w, scores['fc1'].flatten()]))[0, 1]
        assert abs(r) < 4/len(w)**.5
