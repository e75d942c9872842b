"""Evaluators of masked networks: equal to the plain network, whatever is cached; ties, NaN, ends before the end."""
import math, warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune import anneal_weights, models
from neuronprune.anneal import anneal
from neuronprune.anneal_filters import FilterEvaluator
from neuronprune.anneal_evaluators import Layout, ModuleEvaluator, WeightEvaluator, evaluator
from neuronprune.anneal_weights import _n_right, _n_right_np
from neuronprune.chain_search import candidates
from neuronprune.core import UnsupportedLayerError, copied, generator, seed_everything
from neuronprune.graph import trace
from neuronprune.masks import Scores
from neuronprune.surgery import apply

def data(n=120, size=8, seed=0):
    x = torch.rand(n, 1, size, size, generator=generator(seed)); w = torch.randn(size*size, 10, generator=generator(9))
    return x, ((x.flatten(1)-.5) @ w).argmax(1)
X, Y = data()

def mlp(widths=(30, 20), bias=False, dropout=0., soft=False):
    with seed_everything(0):
        net = models.mlp(widths, size=8, bias=bias, dropout=dropout)
        if bias: [nn.init.normal_(m.bias, std=.3) for m in net if isinstance(m, nn.Linear)]
    return nn.Sequential(*net, nn.LogSoftmax(-1)) if soft else net

class Sum(nn.Module):
    "Convolutions with norms and a sum; the shortcut ties two layers."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.d, self.e, self.out = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.Linear(4, 10)
        for m in (self.b, self.d): nn.init.uniform_(m.weight, .5, 2); nn.init.normal_(m.bias); m.running_mean.normal_()
    def forward(self, x):
        x = self.b(self.a(x)).relu(); x = (x + self.d(self.c(x))).relu()
        return self.out(self.e(x).relu().mean((2, 3)))

def right(model, lay, mask, x=X, y=Y):
    "The score of a masked copy, by the book."
    m = apply(copied(model), lay.mask(mask)).eval()
    with torch.no_grad(): return float((m(x).argmax(1) == y).sum())/len(y)

def moved(rng, mask, h):
    off, on = (rng.choice(np.flatnonzero(o), h, replace=False) for o in (mask, ~mask))
    new = mask.copy(); new[off], new[on] = False, True
    return off, on, new

@pytest.mark.parametrize('kw', [{}, dict(bias=True), dict(bias=True, dropout=.5, soft=True), dict(widths=()),
                                dict(widths=(30,), bias=True), dict(widths=(20, 30, 10, 12))], ids=str)
@pytest.mark.parametrize('chunk', [None, 50])
def test_neighbours_score_as_the_masked_network_does(kw, chunk, monkeypatch):
    monkeypatch.setattr(anneal_weights, 'DENSE', 150)
    net = mlp(**kw).train(); ev, rng = WeightEvaluator(net, X, Y, chunk=chunk), np.random.default_rng(0)
    for density in (.05, .3, .8):
        mask = rng.random(ev.n) < density; assert ev.reset(mask) == ev.score(mask) == right(net, ev.layout, mask)
        for h in (1, 1, 1, 3, 50, 200, 1, 3):
            off, on, new = moved(rng, mask, min(h, mask.sum(), (~mask).sum()))
            assert ev.propose(off, on) == right(net, ev.layout, new), (density, h)
            if rng.random() < .6: ev.commit(); mask = new
    assert net.training and all(p.grad is None for p in net.parameters())

def test_flips_in_all_layers_at_once_and_drift():
    net = mlp(); ev, rng = WeightEvaluator(net, X, Y), np.random.default_rng(1)
    mask = rng.random(ev.n) < .2; ev.reset(mask)
    for i in range(2000):
        on = np.array([rng.choice(np.arange(s.start, s.stop)[~mask[s]]) for s in ev.groups])
        off = np.array([rng.choice(np.arange(s.start, s.stop)[mask[s]]) for s in ev.groups])
        got = ev.propose(off, on); ev.commit(); mask[off], mask[on] = False, True
        if i % 100 == 0: assert got == ev.score(mask)
    fresh = WeightEvaluator(net, X, Y); fresh.reset(mask)
    assert max(float((a-b).abs().max()) for a,b in zip(ev.z, fresh.z)) < 1e-5
    for a,b in zip(ev.M, fresh.M): assert torch.equal(a, b)

def test_a_proposal_that_is_not_committed_leaves_no_trace():
    net = mlp(bias=True); ev, rng = WeightEvaluator(net, X, Y), np.random.default_rng(2); mask = rng.random(ev.n) < .3
    base = ev.reset(mask); before = [o.clone() for o in (*ev.z, *ev.h, *ev.M)]
    for h in (1, 5, 200): ev.propose(*moved(rng, mask, h)[:2])
    ev._undo(); assert all(torch.equal(a, b) for a,b in zip(before, (*ev.z, *ev.h, *ev.M)))
    empty = np.zeros(0, dtype=np.int64); assert ev.propose(empty, empty) == base

def test_the_walk_is_the_same_whatever_the_chunk():
    net = mlp(); args = dict(budget=250, min_keep=1, seed=3)
    walks = [anneal(WeightEvaluator(net, X, Y, chunk=c), 600, **args) for c in (None, 17, 60)]
    whole = anneal(ModuleEvaluator(net, X, Y, chunk=50), 600, **args)
    for w in (*walks[1:], whole): assert w.log == walks[0].log and (w.mask == walks[0].mask).all()

@pytest.mark.parametrize('cls', [WeightEvaluator, ModuleEvaluator])
@pytest.mark.parametrize('objective', ['accuracy', 'ce'])
def test_an_early_end_is_certain(cls, objective):
    net = mlp(); ev, rng = cls(net, X, Y, chunk=10, objective=objective), np.random.default_rng(4); ended = 0
    mask = rng.random(ev.n) < .3; base = ev.reset(mask)
    for _ in range(15):
        off, on, new = moved(rng, mask, 300); full = ev.score(new)
        for t in (full-.01, *([full, full+1e-9] if objective == 'accuracy' else []), full+.1, full+.5): # a sum rounds
            got = ev.propose(off, on, t)
            assert math.isclose(got, full, abs_tol=1e-6) if t <= full else got < t or math.isclose(got, full)
            ended += not ev.full
    assert ended
    with pytest.raises(ValueError, match='commit'): ev.propose(off, on, 2.); ev.commit()

# What is right

@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 30))
@settings(max_examples=80)
def test_ties_go_to_the_first_and_nan_is_wrong(seed, classes, n):
    rng = np.random.default_rng(seed); z = rng.integers(0, 3, (classes, n)).astype(np.float32)
    z[rng.random(z.shape) < .05] = np.nan; y = rng.integers(0, classes, n)
    want = sum(not np.isnan(c).any() and int(np.argmax(c)) == t for c,t in zip(z.T, y))
    assert _n_right_np(z, y)[0] == want and _n_right(torch.from_numpy(z), torch.from_numpy(y))[0] == want
    both = torch.stack([torch.from_numpy(z)]*2); assert _n_right(both, torch.from_numpy(y))[0].tolist() == [want, want]

@pytest.mark.parametrize('cls', [WeightEvaluator, ModuleEvaluator])
def test_a_network_of_zeros_is_not_always_right(cls):
    net = mlp(); ev = cls(net, X, Y); nothing = np.zeros(ev.n, dtype=bool)
    zero = float((Y == 0).sum())/len(Y)
    assert ev.reset(nothing) == ev.score(nothing) == ev.batch(nothing[None])[0] == zero
    one = np.array([ev.n-1]); assert ev.propose(np.zeros(0, np.int64), one) == zero < .5

@pytest.mark.parametrize('cls', [WeightEvaluator, ModuleEvaluator])
def test_outputs_that_are_no_number_are_wrong_and_said_once(cls):
    net = mlp((6,)); net.fc1.weight.data[0, :2] = 3e38 # infinite where the two pixels are bright,
    net.fc2.weight.data[3, 0] = 0; ev = cls(net, X, Y); full = np.ones(ev.n, dtype=bool) # and NaN behind the zero
    with torch.no_grad(): bad = net(X).isnan().any(1)
    assert bad.any() and not bad.all()
    with pytest.warns(UserWarning, match='no number') as w: got = [ev.score(full), ev.score(full)]
    assert len(w) == 1 and got[0] == got[1] <= 1-float(bad.float().mean())+1e-9

# Slopes, many at once, held out, drawn anew

@pytest.mark.parametrize('cls', [WeightEvaluator, ModuleEvaluator])
def test_slopes_are_those_of_the_masks(cls):
    net = mlp(bias=True).double() if cls is ModuleEvaluator else mlp(bias=True)
    x = X.double() if cls is ModuleEvaluator else X; ev, rng = cls(net, x, Y), np.random.default_rng(5)
    mask = rng.random(ev.n) < .5; ev.reset(mask); ev.propose(*moved(rng, mask, 3)[:2]); S = ev.sensitivity()
    net = copied(net).double(); ws = [net.get_submodule(k).weight for k in ev.names]
    own = [w.detach().clone() for w in ws]
    def loss(m):
        for w,o,s in zip(ws, own, ev.groups): w.data = o*torch.from_numpy(m[s]).view(o.shape)
        with torch.no_grad(): return float(F.cross_entropy(net(X.double()), Y))
    for i in rng.choice(ev.n, 40, replace=False): # a finite difference in m, at zero as well as at one
        a, b = (mask.astype(float) for _ in range(2)); a[i] += 1e-5; b[i] -= 1e-5
        assert abs((loss(a)-loss(b))/2e-5 - S[i]) < 1e-5

class Streams(Sum):
    "`Sum` with a depthwise convolution, groups, and a factor on every unit's map, wherever it is read."
    def __init__(self):
        super().__init__()
        self.wise, self.e = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 3, groups=2)
        self.gates = None
    def factor(self, i, n): return 1. if self.gates is None else self.gates[i:i+n][:,None,None]
    def forward(self, x):
        x = self.b(self.a(x)).relu()
        x = (x + self.d(self.c(x*self.factor(0, 6)))).relu()
        return self.out((self.e(self.wise(x)*self.factor(0, 6)).relu()*self.factor(6, 4)).mean((2, 3)))

def test_slopes_of_channels_are_those_of_factors_on_their_maps():
    "Against differences of the loss, of channels that are on and of channels that are off."
    with seed_everything(0): net = Streams().double().eval()
    x = X.double()
    c = candidates(net, 'channel', trace(net, x[:4]))
    ev = ModuleEvaluator(net, x, Y, c, chunk=50)
    ids = ev.layout.ids; at = np.concatenate([ids['a'], ids['e']])
    assert ev.n == 5 and (ids['a'] == ids['c']).all(), 'two groups: their channels go in pairs'
    mask = np.arange(5) % 3 != 0; ev.reset(mask); found, eps = ev.sensitivity(), 1e-4
    def loss(i, by):
        net.gates = torch.from_numpy((mask + by*(np.arange(5) == i))[at])
        with torch.no_grad(): return float(F.cross_entropy(net(x), Y))
    diff = np.array([(loss(i, eps)-loss(i, -eps))/(2*eps) for i in range(5)]); net.gates = None
    assert np.allclose(found, diff, atol=1e-4*abs(diff).max()) and (found[~mask] != 0).all()
    assert all(p.grad is None for p in net.parameters())

def test_slopes_of_channels_in_a_chain_are_those_of_the_filter_evaluator():
    net = models.build('basiccnn', 1, 10, 20, seed=0)
    with seed_everything(0):
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, .5, 2); m.running_mean.normal_(std=.1)
    x = F.interpolate(X[:20], size=20); a = FilterEvaluator(net, x, Y[:20])
    b = ModuleEvaluator(net, x, Y[:20], a.candidates)
    mask = np.random.default_rng(0).random(a.n) < .5; a.reset(mask); b.reset(mask)
    p, q = a.sensitivity(), b.sensitivity(); assert np.allclose(p, q, atol=1e-4*abs(p).max()) and p.any()

def test_channels_without_slopes_are_refused(monkeypatch):
    net = Sum().eval(); ev = ModuleEvaluator(net, X, Y, units(net, 'channel')); ev.reset(np.arange(ev.n) % 2 == 0)
    whole = ev._readers()
    for some in ({}, {'out.weight': whole['out.weight']}): # factors there are not what the mask is
        monkeypatch.setattr(ev, '_readers', lambda: some)
        with pytest.raises(ValueError, match="no slopes; expected 'uniform'"): ev.sensitivity()

@pytest.mark.parametrize('objective', ['accuracy', 'ce'])
def test_many_at_once(objective):
    net = mlp(bias=True); ev, rng = WeightEvaluator(net, X, Y, objective=objective), np.random.default_rng(6)
    masks = rng.random((9, ev.n)) < .3; one = [ev.score(m) for m in masks]
    for room in (1, 10_000, 2**28): assert np.allclose(ev.batch(masks, room=room), one, atol=1e-6)
    assert ev.batch(masks[:0]).shape == (0,)

def test_held_out_and_drawn_anew():
    net, (hx, hy) = mlp(), data(40, seed=1); rng = np.random.default_rng(7)
    for cls in (WeightEvaluator, ModuleEvaluator):
        ev = cls(net, X, Y, n_valid=50, held=(hx, hy)); mask = rng.random(ev.n) < .4
        assert ev.quantum == 1/50 and ev.reset(mask) == right(net, ev.layout, mask, X[:50], Y[:50])
        assert ev.held_out(mask) == right(net, ev.layout, mask, hx, hy)
        ev.redraw(1); x1 = ev.y.clone(); ev.redraw(2); assert not torch.equal(ev.y, x1); ev.redraw(1)
        assert torch.equal(ev.y, x1) and len(ev.y) == 50 and ev.reset(mask) == ev.score(mask)
        ev.redraw(0); assert torch.equal(ev.y, Y[:50])

# Any network

def units(net, unit, gone=None):
    c = candidates(net, unit, trace(net, X[:4]))
    return Scores(c.units, unit, graph=c.graph, gone=gone) if gone else c

@pytest.mark.parametrize('unit', ['weight', 'channel'])
def test_any_network(unit):
    with seed_everything(0): net = Sum().train()
    ev, rng = ModuleEvaluator(net, X, Y, units(net, unit), chunk=50), np.random.default_rng(8)
    before = {k:v.clone() for k,v in net.state_dict().items()}
    mask = rng.random(ev.n) < .6; assert ev.reset(mask) == right(net, ev.layout, mask)
    for h in (1, 2, 3, 1):
        off, on, new = moved(rng, mask, h); assert ev.propose(off, on) == right(net, ev.layout, new)
        if h != 2: ev.commit(); mask = new
    assert ev.propose(*moved(rng, mask, 1)[:2]) <= 1 and ev.score(mask) == right(net, ev.layout, mask)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and net.training
    assert np.isfinite(ev.sensitivity()).all()
    if unit == 'channel': assert ev.n == 6+4, 'the two layers of the sum go together'

@pytest.mark.parametrize('unit', ['weight', 'channel'])
def test_what_has_gone_before_does_not_come_back(unit):
    net = mlp() if unit == 'weight' else Sum(); rng = np.random.default_rng(9)
    gone = {k:(torch.arange(v.numel()) % 3 == 0).view(v.shape) for k,v in units(net, unit).items()}
    if unit == 'channel': gone['c'] = gone['a']
    c = units(net, unit, gone); ev = evaluator(net, X, Y, c); lay = Layout(c)
    mask = rng.permutation(ev.n) < ev.n//2
    assert ev.n == lay.n and ev.reset(mask) == right(net, lay, mask)
    off, on, new = moved(rng, mask, 2); assert ev.propose(off, on) == right(net, lay, new); ev.commit()
    assert (lay.units(lay.mask(new)) == new).all() and not any((lay.mask(new)[k] & g).any() for k,g in gone.items())
    assert len(ev.sensitivity()) == ev.n == sum(int((~g).sum()) for k,g in gone.items() if unit == 'weight' or k != 'c')

def test_the_fastest_that_fits():
    assert type(evaluator(mlp(bias=True, dropout=.2, soft=True), X, Y)) is WeightEvaluator
    for net in (Sum(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)), nn.Sequential(mlp(), nn.Tanh())):
        assert type(evaluator(net, X, Y)) is ModuleEvaluator
    net = Sum(); assert type(evaluator(net, X, Y, graph=trace(net, X[:4]))) is ModuleEvaluator

# Calls that cannot be meant

def broken(v): net = mlp(); net.fc1.weight.data[0, 0] = v; return net

@pytest.mark.parametrize('call,said', [
    (lambda: evaluator(mlp(), X[:0], Y[:0]), 'empty'), (lambda: evaluator(mlp(), X, Y+3), 'labels from'),
    (lambda: evaluator(Sum(), X, Y+3), 'labels from'), (lambda: evaluator(mlp(), X, Y[:9]), '9 labels for'),
    (lambda: evaluator(broken(math.nan), X, Y), 'fc1.weight'),
    (lambda: evaluator(broken(math.inf), X, Y), 'fc1.weight'),
    (lambda: evaluator(mlp(), X*math.nan, Y), 'NaN'), (lambda: evaluator(mlp(), X, Y, n_valid=121), 'n_valid=121'),
    (lambda: evaluator(mlp(), X, Y, chunk=0), 'chunk=0'),
    (lambda: evaluator(mlp(), X, Y, objective='loss'), 'objective'),
    (lambda: evaluator(mlp(), X.flatten(1)[:, :9], Y), 'xb'),
    (lambda: WeightEvaluator(Sum(), X, Y), 'chain of Linear and ReLU'),
    (lambda: WeightEvaluator(mlp(), X, Y, units(mlp(), 'channel')), "unit='channel'"),
    (lambda: WeightEvaluator(mlp(), X, Y).commit(), 'commit')])
def test_wrong_calls(call, said):
    with pytest.raises((ValueError, TypeError, AttributeError)) as e: call()
    assert said in str(e.value)
