"""Criteria of early pruning: Hessians written out, paths counted, finite differences, and networks of others."""
import copy, pytest, torch, torch.nn.functional as F
import numpy as np
from fastai.callback.core import Callback
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.allocate import allocate
from neuronprune.core import UnsupportedLayerError, kappa, layers, methods, seed_everything
from neuronprune.criteria import _flows, _sizes, grasp, hessian_gradient, mag_increase, movement, synflow
from neuronprune.data import get_dls
from neuronprune.earlybird import _Drawing, distance, settled
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.pipeline import prune
from neuronprune.saliency import gradients, state_of
from neuronprune.train import as_learner, fit, learner

def gen(seed=0): return torch.Generator().manual_seed(seed)
def mlp(*widths, bias=False, seed=0):
    with seed_everything(seed):
        ms = [o for a,b in zip(widths, widths[1:]) for o in (nn.Linear(a, b, bias=bias), nn.ReLU())]
    return nn.Sequential(*ms[:-1])

class Conv(nn.Module):
    "Convolutions, batch norm in an odd state, a residual sum, in-place ReLUs, a tied pair, dropout, a frozen layer."
    def __init__(self, seed=0, tied=True):
        super().__init__()
        with seed_everything(seed):
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.bn, self.act, self.drop = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout()
            self.u, self.v, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)
            nn.init.uniform_(self.bn.weight, -1.5, 1.5); nn.init.normal_(self.bn.bias)
            nn.init.normal_(self.bn.running_mean); nn.init.uniform_(self.bn.running_var, .5, 2)
        if tied: self.v.weight = self.u.weight
        self.b.weight.requires_grad_(False)
    def forward(self, x):
        h = self.act(self.a(x)); h = self.act(self.bn(self.b(h)) + h)
        h = F.max_pool2d(h, 2).flatten(1)
        return self.out(self.drop(self.v(self.u(h).relu_()).relu_()))

X, Y = torch.randn(24, 1, 8, 8, generator=gen()), torch.arange(24) % 3
BATCH = dict(batch=(X, Y))
def squared(out, y): return ((out-F.one_hot(y.long(), out.shape[1]))**2).sum(1).mean()

# ---- GraSP

def test_hg_of_a_quadratic_loss_is_known():
    """One linear layer W, loss mean |W x - t|^2, C = E[x x^T]: a row has the Hessian 2 C, Hg = 4 (W C - E[t x^T]) C."""
    m, x, y = mlp(5, 3).double(), torch.randn(40, 5, generator=gen(1)).double(), torch.arange(40) % 3
    W, T, C = m[0].weight.detach(), F.one_hot(y, 3).double().T @ x/40, x.T @ x/40
    for bs in (40, 7):
        w, Hg = hessian_gradient(m, ['0.weight'], x, y, squared, bs=bs)['0.weight']
        assert torch.allclose(Hg, 4*(W @ C - T) @ C, atol=1e-12) and torch.equal(w, W)
    s = methods()['grasp'](m, batch=(x, y), loss_func=squared)
    assert torch.allclose(s['0'], W*Hg, atol=1e-12) and s.meta['temperature'] == 1.

@pytest.mark.parametrize('temperature', [1., 200.])
def test_hg_by_finite_differences(temperature):
    "(g(w + e g) - g(w - e g))/2e for all layers at once, outputs divided by the temperature."
    m = Conv().double(); x = X.double(); names = [f'{k}.weight' for k in ('a', 'b', 'u', 'out')]
    loss = lambda out, y: F.cross_entropy(out/temperature, y)
    g = {k:o for k,(_,o) in gradients(m, names, x, Y, loss_func=loss).items()}
    e = 1e-7/max(float(o.abs().max()) for o in g.values()) # small: no ReLU changes sides
    def moved(sign):
        n = copy.deepcopy(m)
        with torch.no_grad():
            for k,o in g.items(): dict(n.named_parameters())[k] += sign*e*o
        return {k:o for k,(_,o) in gradients(n, names, x, Y, loss_func=loss).items()}
    up, down = moved(1), moved(-1)
    for k,(w,Hg) in hessian_gradient(m, names, x, Y, None, temperature).items():
        want = (up[k]-down[k])/(2*e)
        assert (Hg-want).norm() < 1e-3*want.norm() and want.norm() > 0

def test_grasp_is_what_removal_takes_from_the_gradient():
    "To first order: |g|^2 after taking the part e of a weight away falls by 2 e score."
    m, e = mlp(4, 6, 3, seed=2).double(), 1e-6
    x, y = torch.randn(30, 4, generator=gen(3)).double(), torch.arange(30) % 3
    s = methods()['grasp'](m, batch=(x, y), temperature=1.)
    square = lambda n: sum(float((g*g).sum()) for _,g in gradients(n, ['0.weight', '2.weight'], x, y).values())
    for k,at in (('0', (0, 1)), ('0', (5, 3)), ('2', (2, 4))):
        n = copy.deepcopy(m); n.get_submodule(k).weight.data[at] *= 1-e
        assert abs((square(m)-square(n))/e - 2*float(s[k][at])) < 1e-4*max(1, abs(2*float(s[k][at])))

def test_a_channel_of_grasp_is_the_sum_over_its_weights():
    m, g = Conv(tied=False), trace(Conv(tied=False), X)
    w, c = (methods()['grasp'](m, **BATCH, unit=u, graph=g) for u in ('weight', 'channel'))
    for k,v in c.items(): assert torch.allclose(v, w[k].flatten(1).sum(1), rtol=1e-4, atol=1e-9)

def test_a_loss_without_curvature_scores_nothing():
    m = mlp(4, 2); s = methods()['grasp'](m, batch=(torch.rand(6, 4), torch.zeros(6).long()),
                                          loss_func=lambda o, y: o.sum())
    assert not s['0'].any() and allocate(s, .5, normalize=None).counts() == (4, 8)

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x**2
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return 2*g*ctx.saved_tensors[0]

def test_what_cannot_be_differentiated_twice_is_said():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        def forward(self, x): return self.b(Once.apply(self.a(x)))
    m = Net()
    with pytest.raises(UnsupportedLayerError, match='second '):
        methods()['grasp'](m, batch=(torch.rand(6, 4), torch.arange(6) % 3))

def test_bad_calls_of_grasp():
    for kw,said in ((dict(temperature=0.), 'temperature=0'), (dict(temperature=-1.), 'temperature=-1'),
                    (dict(unit='rank'), "unit='rank'")):
        with pytest.raises(ValueError, match=said): methods()['grasp'](Conv(), **BATCH, **kw)
    with pytest.raises(ValueError, match='grasp needs images'): grasp(Conv())

# ---- SynFlow

@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(0, 1000))
@settings(max_examples=25)
def test_synflow_counts_paths(widths, seed):
    "R and the flow through a weight, by products of |W| from both ends; the layers' sums are all R."
    m = mlp(*widths, seed=seed); ws = [o.weight.detach().abs().double() for o in layers(m).values()]
    got = _flows(m, layers(m), 'weight', _sizes(m), torch.ones(1, widths[0]).double())
    left, right = [torch.ones(widths[0]).double()], [torch.ones(widths[-1]).double()]
    for w in ws[:-1]: left.append(w @ left[-1])
    for w in ws[:0:-1]: right.insert(0, w.T @ right[0])
    for w,a,b,s in zip(ws, left, right, got.values()): assert torch.allclose(s, w*a[None]*b[:, None], rtol=1e-10)
    R = float((ws[-1] @ left[-1]).sum()); assert all(abs(float(s.sum())-R) < 1e-9*R for s in got.values())

def test_the_flow_through_a_unit_is_conserved():
    "What comes into a hidden unit goes out of it, in a network with batch norm in odd states, too."
    m = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        m[1].weight.copy_(torch.tensor([1., -2, .5, 3, 1])); m[1].running_var.fill_(2); m[1].running_mean.fill_(9)
    s = _flows(m, layers(m), 'weight', _sizes(m), torch.ones(1, 4).double())
    assert torch.allclose(s['0'].sum(1), s['3'].sum(0)) and (s['0'] > 0).all()

@given(st.integers(0, 200), st.sampled_from([.5, .9, .98]))
@settings(max_examples=4)
def test_synflow_empties_no_layer_before_it_must(seed, sparsity):
    "Down to one weight per layer, without a floor: what the scores alone keep, on layers of very different widths."
    m = mlp(12, 40, 3, 50, 2, seed=seed); n = sum(o.weight.numel() for o in layers(m).values())
    for s in (sparsity, 1-4/n):
        sc = methods()['synflow'](m, batch=(torch.rand(2, 12), torch.zeros(2).long()), sparsity=s, rounds=100)
        v = torch.cat([o.flatten() for o in sc.values()]); keep = v.argsort(descending=True, stable=True)[:kappa(n, s)]
        own = torch.repeat_interleave(torch.arange(4), torch.tensor([o.numel() for o in sc.values()]))
        assert (own[keep].bincount(minlength=4) > 0).all()

def test_synflow_looks_neither_at_data_nor_at_signs():
    m = Conv(); n = copy.deepcopy(m)
    with torch.no_grad():
        for p in n.parameters():
            if p.ndim > 1: p *= torch.where(torch.rand(p.shape, generator=gen(5)) < .5, -1., 1.)
    a, b, c = (methods()['synflow'](o, batch=(x, Y), rounds=5) for o,x in ((m, X), (n, X), (m, 100*X)))
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)

def test_synflow_by_rounds_is_its_definition():
    "Mask, look, keep the best part (1-s)^(t/T), 7 times, written out."
    m, s, T = mlp(10, 20, 15, 4, seed=4), .9, 7; n = sum(o.weight.numel() for o in layers(m).values())
    W = [o.weight.detach().abs().double() for o in layers(m).values()]; M = [torch.ones_like(w) for w in W]
    for t in range(1, T+1):
        ws = [(w*o).requires_grad_() for w,o in zip(W, M)]; h = torch.ones(10).double()
        for w in ws: h = w @ h
        v = torch.cat([(w*g).detach().flatten() for w,g in zip(ws, torch.autograd.grad(h.sum(), ws))])
        k = kappa(n, s) if t == T else n - int(n*(1-(1-s)**(t/T)))
        keep = torch.zeros(n).double(); keep[v.argsort(descending=True, stable=True)[:k]] = 1
        M = [o.view_as(w) for o,w in zip(keep.split([w.numel() for w in W]), W)]
    got = allocate(methods()['synflow'](m, batch=(torch.rand(2, 10), torch.zeros(2).long()), sparsity=s, rounds=T), s,
                   normalize=None)
    assert all(torch.equal(v, o.bool()) for v,o in zip(got.values(), M))

@pytest.mark.parametrize('tail,said', [(nn.Softmax(1), 'twice as much'), (nn.Sigmoid(), 'twice as much'),
                                       (nn.LayerNorm(4), 'twice as much'), (nn.LogSoftmax(1), 'twice as much')])
def test_what_does_not_scale_is_refused(tail, said):
    m = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), tail); n = nn.Sequential(m[0], tail, m[2])
    for net in (m, n):
        with pytest.raises(UnsupportedLayerError, match=said):
            methods()['synflow'](net, batch=(torch.rand(2, 3), Y[:2]))

def test_bad_calls_of_synflow():
    for kw,said in ((dict(rounds=0), 'rounds=0'), (dict(sparsity=90), 'sparsity=90'),
                    (dict(sparsity=1.), 'sparsity=1')):
        with pytest.raises(ValueError, match=said): methods()['synflow'](Conv(), **BATCH, **kw)
    with pytest.raises(ValueError, match='synflow needs images'): synflow(Conv())
    m = Conv(); m.a.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match='a.weight'): methods()['synflow'](m, **BATCH)

def test_a_hundred_rounds_by_name_and_fewer_if_asked():
    dls = get_dls('digits', bs=64)
    for kw,n in (({}, 100), (dict(rounds=3), 3)):
        learn = learner(build('lenet300', 1, 10, 8, seed=0), dls)
        r = prune(learn, 'synflow', .9, fine_tune_epochs=0, latency=False, **kw)
        assert (r.scores.meta['rounds'], r.scores.meta['sparsity']) == (n, .9) and len(r.reports) == 1
        assert r.mask.counts()[0] == kappa(r.mask.counts()[1], .9)

# ---- growth and movement

def test_growth_and_movement_by_hand():
    m = mlp(2, 2); m[0].weight.data = torch.tensor([[1., -3], [.5, 0]])
    init = {'0.weight': torch.tensor([[-2., -1], [.5, 4]])}
    assert mag_increase(m, init=init)['0'].tolist() == [[-1., 2], [0, -4]]
    assert movement(m, init=init)['0'].tolist() == [[3., 2], [0, 4]]

def test_channels_of_growth_and_movement_are_means():
    m, g = Conv(tied=False), trace(Conv(tied=False), X)
    init = {k:v+.1*torch.randn(v.shape, generator=gen(1)) if v.is_floating_point() else v
            for k,v in m.state_dict().items()}
    for f in (mag_increase, movement):
        w, c = f(m, init=init), f(m, init=init, unit='channel', graph=g)
        for k,v in c.items(): assert torch.allclose(v, w[k].flatten(1).mean(1))

def test_magsign_without_a_changed_sign_is_lth():
    learn = learner(build('lenet300', 1, 10, 8, seed=0), get_dls('digits', bs=64), lr=1e-4); init = learn.rewind.init
    with torch.no_grad():
        for k,p in learn.model.named_parameters(): p *= 1+torch.rand(p.shape, generator=gen(1))
    a, b = (allocate(methods()[k](learn.model, **kw), .9) for k,kw in (('magsign', dict(init=init)), ('lth', {})))
    assert all(torch.equal(a[k], v) for k,v in b.items())

def test_snip_by_rounds_is_its_definition():
    "Iterative SNIP as `snip(rounds=…)` has it: mask, look at |w g| of the masked network, keep (1-s)^(t/T)."
    m, s, T = mlp(6, 12, 3, seed=6), .8, 4; x, y = torch.randn(30, 6, generator=gen(7)), torch.arange(30) % 3
    names = ['0.weight', '2.weight']; n = sum(o.weight.numel() for o in layers(m).values()); keep = None
    for t in range(1, T+1):
        found = gradients(m, names, x, y, keep); v = torch.cat([(w*g).abs().flatten() for w,g in found.values()])
        if keep is not None: v = v - (~torch.cat([o.flatten() for o in keep.values()])).float()
        k = kappa(n, s) if t == T else n - int(n*(1-(1-s)**(t/T)))
        best = torch.zeros(n).bool(); best[v.argsort(descending=True, stable=True)[:k]] = True
        keep = {k:o.view_as(w) for o,(k,(w,_)) in zip(best.split([w.numel() for w,_ in found.values()]), found.items())}
    got = allocate(methods()['snip'](m, batch=(x, y), rounds=T, sparsity=s), s, normalize=None)
    assert all(torch.equal(got[k.removesuffix('.weight')], v) for k,v in keep.items())

def test_channel_magnitude_by_the_mean():
    m, g = Conv(tied=False), trace(Conv(tied=False), X)
    s = methods()['magnitude'](m, unit='channel', norm='mean', graph=g)
    for k,v in s.items(): assert torch.allclose(v, layers(m)[k].weight.detach().abs().flatten(1).mean(1))

# ---- all of them, on the networks of others

EARLY = ['grasp', 'synflow', 'mag_increase', 'movement']
def kw_of(name, model): return dict(init=model.state_dict()) if name in ('mag_increase', 'movement') else {}

@pytest.mark.parametrize('unit', ['weight', 'channel'])
@pytest.mark.parametrize('name', EARLY)
def test_exact_counts_floor_and_a_model_left_as_found(name, unit):
    tied = unit == 'weight'; m, other = Conv(tied=tied), Conv(1, tied)
    kw = dict(init=other.state_dict()) if kw_of(name, m) else {}
    m.a.weight.grad = mark = torch.ones_like(m.a.weight)
    before, g = {k:v.clone() for k,v in m.state_dict().items()}, trace(m, X)
    s = methods()[name](m, **BATCH, unit=unit, graph=g, **kw)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and m.a.weight.grad is mark
    assert m.b.weight.grad is None and not m.b.weight.requires_grad and m.training
    if unit == 'weight': assert list(s) == ['a', 'b', 'u', 'out'] and 'shares its weight' in s.skipped['v']
    for sparsity in (.3, .5, .99):
        mask = allocate(s, sparsity, **methods()[name].allocate); kept, n = mask.counts()
        assert all(v.any() for v in mask.values())
        if unit == 'weight': assert kept == kappa(n, sparsity)

@pytest.mark.parametrize('name', EARLY)
def test_zero_scores_are_ties_not_losses(name):
    "A layer of zeros scores zero; exactly as many units go as asked for."
    m = mlp(6, 8, 3); m[0].weight.data.zero_(); init = mlp(6, 8, 3).state_dict(); init['0.weight'].zero_()
    kw = dict(init=init) if kw_of(name, m) else {}
    try: s = methods()[name](m, batch=(torch.randn(12, 6, generator=gen()), Y[:12]), **kw)
    except UnsupportedLayerError as e: assert name == 'synflow' and 'gives 0' in str(e); return # nothing flows at all
    mask = allocate(s, .5, normalize=None); assert mask.counts() == (kappa(72, .5), 72)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('name', EARLY)
def test_other_dtypes(name, dtype):
    m, full = mlp(6, 8, 3, seed=3).to(dtype), mlp(6, 8, 3, seed=3).to(dtype).float()
    x = torch.randn(12, 6, generator=gen())
    kw = dict(init={k:v*.5 for k,v in full.state_dict().items()}) if kw_of(name, m) else {}
    a, b = (methods()[name](o, batch=(x.to(dtype).float(), Y[:12]), **kw) for o in (m, full))
    assert all(torch.allclose(a[k].double(), v.double(), rtol=2e-2, atol=1e-6) for k,v in b.items())
    assert {p.dtype for p in m.parameters()} == {dtype}

class Attends(nn.Module):
    "Attention and layer norms, two inputs in a dictionary."
    def __init__(self):
        super().__init__(); self.emb = nn.Embedding(20, 16)
        self.enc = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)
    def forward(self, ids, shift): return self.head(self.enc(self.emb(ids) + shift[..., None]).mean(1))

def test_grasp_goes_through_attention_and_synflow_says_why_not():
    with seed_everything(0): m = Attends()
    xb = dict(ids=torch.randint(20, (12, 5), generator=gen()), shift=torch.randn(12, 5, generator=gen()))
    s = methods()['grasp'](m, batch=(xb, Y[:12]))
    assert {'enc.linear1', 'head'} <= set(s) and all(v.any() for v in s.values())
    with pytest.raises(UnsupportedLayerError, match='layer norm'): methods()['synflow'](m, batch=(xb, Y[:12]))

def tabular():
    import pandas as pd
    from fastai.tabular.all import (CategoryBlock, Categorify, FillMissing, Normalize, TabularDataLoaders,
                                    tabular_learner)
    rng = np.random.default_rng(0); n = 120
    df = pd.DataFrame(dict(a=rng.normal(size=n), b=rng.normal(size=n), c=rng.choice(list('xyz'), n)))
    df['y'] = np.where(df.a+df.b > 0, 'p', 'q')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['c'],
                                     cont_names=['a', 'b'], y_names='y', y_block=CategoryBlock(), bs=16,
                                     valid_idx=list(range(30)))
    with seed_everything(0): return tabular_learner(dls, layers=[20, 10], n_out=2)

def vision():
    from fastai.data.core import DataLoaders
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18
    dl = torch.utils.data.DataLoader(list(zip(torch.rand(24, 3, 32, 32, generator=gen()), Y)), batch_size=8)
    dls = DataLoaders(dl, dl); dls.c = 3
    with seed_everything(0):
        return vision_learner(dls, resnet18, pretrained=False, n_out=3, loss_func=nn.CrossEntropyLoss())

@pytest.mark.parametrize('make', [tabular, vision])
def test_learners_of_fastai(make):
    from neuronprune.scoring import score_with
    learn = make()
    for name in EARLY if make is tabular else EARLY[:2]:
        kw = dict(rounds=2) if name == 'synflow' else dict(n=16) if name == 'grasp' else \
            dict(init={k:v.clone()*.9 for k,v in learn.model.state_dict().items()})
        s, _ = score_with(learn, methods()[name], **kw); mask = allocate(s, .9, **methods()[name].allocate)
        kept, n = mask.counts(); assert kept == kappa(n, .9) and all(v.any() for v in mask.values())

def test_a_copied_learner_goes_back_and_forth():
    "at='init' twice over, on a copy of a learner, whose weights were noted in the original only."
    learn = learner(build('lenet300', 1, 10, 8, seed=0), get_dls('digits', bs=64)); fit(learn, 1)
    r = prune(copy.deepcopy(learn), 'magnitude', .5, at='init', rewind='init', fine_tune_epochs=1, latency=False)
    assert r.mask.sparsity == .5

# ---- early birds

def normed():
    with seed_everything(0):
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                             nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                             nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 10))

def bird(**kw):
    learn = learner(normed(), get_dls('digits', bs=64), lr=.1, seed=0)
    return learn, prune(learn, 'earlybird', .5, **{**dict(fine_tune_epochs=0, latency=False), **kw})

@given(st.lists(st.floats(0, 1), max_size=12), st.integers(1, 6), st.floats(0, 1))
def test_settled_is_its_definition(ds, window, eps):
    assert settled(ds, window, eps) == (len(ds) >= window and all(d < eps for d in ds[len(ds)-window:]))

def test_distance_counts_units():
    a = dict(x=torch.tensor([1, 1, 0]).bool(), y=torch.tensor([0]).bool())
    assert distance(a, a) == 0 and distance(a, {k:~v for k,v in a.items()}) == 1
    assert distance(a, dict(a, x=torch.tensor([1, 0, 1]).bool())) == .5

class Gammas(Callback):
    "After each epoch the scales are set by hand: of the small and the large ones `turns` change places."
    order = 70
    def __init__(self, turns): self.turns,self.i,self.order_ = turns,0,torch.arange(1., 21)
    def after_train(self):
        k = self.turns[min(self.i, len(self.turns)-1)]; self.i += 1
        v = self.order_; lo, hi = v.argsort()[:10], v.argsort()[10:]
        v = v.clone(); v[lo[:k]], v[hi[:k]] = v[hi[:k]].clone(), v[lo[:k]].clone(); self.order_ = v
        with torch.no_grad(): self.model[1].weight.copy_(v[:8]); self.model[5].weight.copy_(v[8:])

def test_the_draw_is_at_the_first_epoch_at_which_the_window_is_below():
    "Distances 2k/20 by hand: .2, .1, .1, 0, … with eps .15 and a window of 3 settle after the fourth distance."
    learn = learner(normed(), get_dls('digits', bs=64), lr=.01, seed=0); learn.add_cb(Gammas([0, 2, 1, 1, 0]))
    res = prune(learn, 'earlybird', .5, window=3, eps=.15, lam=0., fine_tune_epochs=0, latency=False)
    assert [r['distance'] for r in res.found.curve] == [None, .2, .1, .1, 0.] and res.found.meta['drawn'] == 5
    assert res.found.status == 'optimal' and len(learn.history) == 5
    best = learn.gammas.order_.argsort()[10:]; kept = torch.zeros(20).bool(); kept[best] = True
    assert torch.equal(torch.cat([res.mask['0'], res.mask['4']]), kept) and res.mask['9'].all()

def test_an_early_bird_is_trained_and_stays_where_it_is():
    learn, res = bird(epochs=2, fine_tune_epochs=1)
    assert res.found.status == 'budget' and res.found.meta['drawn'] is None and len(learn.history) == 3
    assert (learn.model[0].weight[~res.mask['0']] == 0).all() and (learn.model[1].bias[~res.mask['0']] == 0).all()
    assert int(res.mask['0'].sum())+int(res.mask['4'].sum()) == 10 and methods()['earlybird'].trains

class Break(Callback):
    "An interruption in the second epoch of the search."
    def after_batch(self):
        for cb in self.learn.cbs:
            if self.training and isinstance(cb, _Drawing) and cb.last is not None and self.iter == 1:
                raise KeyboardInterrupt

def test_an_early_bird_is_taken_up_bit_for_bit(tmp_path):
    def run(folder, *cbs):
        learn = learner(normed(), get_dls('digits', bs=64), lr=.1, seed=0); learn.add_cbs(cbs)
        return prune(learn, 'earlybird', .5, epochs=3, fine_tune_epochs=1, latency=False, folder=tmp_path/folder)
    whole = run('a')
    with pytest.raises(KeyboardInterrupt): run('b', Break())
    assert (tmp_path/'b/search.safetensors').exists()
    again = run('b'); assert whole.found.curve == again.found.curve
    assert all(torch.equal(v, again.model.state_dict()[k]) for k,v in whole.model.state_dict().items())

def test_bad_calls_of_earlybird():
    for kw,said in ((dict(window=0), 'window=0'), (dict(eps=10), 'eps=10'), (dict(epochs=0), 'epochs=0'),
                    (dict(unit='weight'), "unit='weight'"), (dict(search_args=dict(lrr=1)), 'search_args')):
        with pytest.raises(ValueError, match=said): bird(**kw)
    with pytest.raises(ValueError, match='batch norm'):
        prune(learner(nn.Sequential(nn.Flatten(), *mlp(64, 20, 10)), get_dls('digits', bs=64)), 'earlybird', .5)
