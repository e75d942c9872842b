"""Why masks train: matrices whose scores are known, paths counted by hand and by brute force, runs that repeat."""
import copy, itertools, math
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from neuronprune.allocate import allocate
from neuronprune.core import layers, methods, seed_everything
from neuronprune.data import get_dls
from neuronprune.graph import trace
from neuronprune.masks import Mask, Scores
from neuronprune.models import build
from neuronprune.pipeline import prune
from neuronprune.surgery import apply
from neuronprune.train import as_learner, fit, learner
from neuronprune.trainability import (collapse, early_loss, grouped, orthogonality, plot_early_loss, plot_similarity,
                                      plot_validation_size, repair, similarity, validation_size)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def one(w):
    "A network of one layer without bias."
    w = torch.as_tensor(w, dtype=torch.float64).clone()
    m = nn.Sequential(nn.Linear(w.shape[1], len(w), bias=False).double())
    m[0].weight.data = w; return m
def row(model, mask=None): return orthogonality(model, mask).iloc[0]
def weight_mask(model, s, seed=1): return allocate(methods()['random'](model, seed=seed), s, normalize=None)
def as_weights(d): return Mask({k:torch.as_tensor(v).bool() for k,v in d.items()}, 'weight')

class Conv(nn.Module):
    "Two convolutions with batch norm in a residual sum, a depthwise one, a classifier."
    def __init__(self):
        super().__init__()
        with seed_everything(0):
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.bn, self.d = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.out = nn.Linear(4, 3)
    def forward(self, x):
        h = self.a(x).relu(); h = (self.bn(self.b(h)) + h).relu()
        return self.out(self.d(h).relu().mean((2, 3)))
X = torch.randn(8, 1, 6, 6, generator=gen())

# ---- orthogonality

@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
def test_scores_of_a_matrix_are_their_definitions(out, n, seed):
    A = torch.randn(out, n, generator=gen(seed)).double(); r = row(one(A)); I = torch.eye
    assert math.isclose(r.OS_ref, float(((A.T@A-I(n))**2).mean()), rel_tol=1e-9, abs_tol=1e-12)
    G = A.T@A if n < out else A@A.T
    assert math.isclose(r.OS_min, float(((G-I(len(G)))**2).mean()), rel_tol=1e-9, abs_tol=1e-12)
    s = np.linalg.svd(A.numpy(), compute_uv=False)
    assert math.isclose(r.sv_spread, s.std()/s.mean(), rel_tol=1e-9, abs_tol=1e-9) and r.energy_share == 1

@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.floats(.1, 3))
def test_what_keeps_lengths_scores_zero(out, n, seed, scale):
    big, small = max(out, n), min(out, n)
    Q = torch.linalg.qr(torch.randn(big, small, generator=gen(seed)).double())[0]; Q = Q if out >= n else Q.T
    r = row(one(Q)); assert r.OS_min < 1e-12 and r.sv_spread < 1e-6
    assert math.isclose(r.OS_ref, max(n-out, 0)/n**2, abs_tol=1e-12)           # its floor
    assert row(one(scale*Q)).sv_spread < 1e-6                                    # whatever the scale

def test_the_ends_of_the_published_range():
    m = build('sa_mlp', 1, 10, 28, seed=3)
    empty = as_weights({k:torch.zeros(o.weight.shape) for k,o in layers(m).items()})
    full, none, some = (orthogonality(m, o).iloc[-1] for o in (None, empty, weight_mask(m, .7)))
    assert abs(none.OS_ref - .01460884) < 1e-8 and abs(full.OS_ref - .01327) < 1e-4
    assert full.OS_ref < some.OS_ref < none.OS_ref and abs(some.OS_ref - .0141236) < 1e-4 # .0141236 is published
    assert none.energy_share == 0 and math.isnan(none.sv_spread) and abs(some.energy_share - .3) < .01
    assert math.isclose(full.OS_ref, orthogonality(m).OS_ref[:3].sum())

def test_masks_of_every_unit_are_what_they_leave():
    m, g = Conv(), trace(Conv(), X)
    ch = allocate(Scores({k:torch.rand(4, generator=gen(2)) for k in g.removable}, 'channel', graph=g), .5)
    lr = allocate(methods()['svd'](m), .5)
    for mask in (weight_mask(m, .6), ch, lr):
        cut = apply(copy.deepcopy(m), mask); a, b = orthogonality(m, mask), orthogonality(cut)
        assert np.allclose(a[['OS_ref', 'OS_min']], b[['OS_ref', 'OS_min']])
        square = lambda net, k: float((layers(net)[k].weight.detach()**2).sum())
        own = [square(cut, k)/square(m, k) for k in a.layer[:-1]]
        assert np.allclose(a.energy_share[:-1], own, atol=1e-6)
    assert a.layer.tolist() == ['a', 'b', 'd', 'out', 'network'] and a.inputs.tolist()[:3] == [9, 36, 9]

def test_a_shared_weight_counts_once_and_nan_is_refused():
    m = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)); m[2].weight = m[0].weight
    assert orthogonality(m).layer.tolist() == ['0', 'network']
    m[0].weight.data[0, 0] = torch.nan
    for f in (orthogonality, repair):
        with pytest.raises(ValueError, match='0.weight'): f(m)

# ---- repair

def test_one_step_of_repair_is_a_step_of_sgd():
    A = torch.randn(5, 3, generator=gen(1)).double()/3
    for w in (A, A.T.contiguous()):
        m, mask = one(w), as_weights({'0': torch.rand(w.shape, generator=gen(2)) < .6}); C = mask['0']
        v = w.clone().requires_grad_(); B = v*C
        ((B.T@B-torch.eye(w.shape[1]).double())**2).sum().backward()
        with torch.no_grad(): want = v - .1*v.grad
        got = repair(m, mask, steps=1); assert torch.allclose(m[0].weight, want, atol=1e-12)
        assert torch.equal(m[0].weight[~C], w[~C])
        n = min(w.shape); assert math.isclose(got.before[0], row(one(w), mask).OS_min*n**2, rel_tol=1e-9)

def test_repair_ends_at_an_isometry_where_the_mask_allows_one():
    m = build('lenet300', 1, 10, 8, seed=1); got = repair(m, steps=300)
    assert (got.after < 1e-6).all() and orthogonality(m).iloc[-1].OS_min < 1e-8
    m, mask = build('lenet300', 1, 10, 8, seed=1), weight_mask(m, .7); before = orthogonality(m, mask).iloc[-1]
    repair(m, mask); after = orthogonality(m, mask).iloc[-1]
    assert after.OS_min < before.OS_min/100 and after.sv_spread < before.sv_spread/2

def test_repair_refuses_what_it_cannot_do():
    m = Conv(); before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match='lr=9: the descent of layer'): repair(m, lr=9.)
    with pytest.raises(ValueError, match='ranks'): repair(m, allocate(methods()['svd'](m), .5))
    for kw,said in ((dict(steps=0), 'steps=0'), (dict(lr=0.), 'lr=0')):
        with pytest.raises(ValueError, match=said): repair(m, **kw)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

# ---- similarity

@pytest.mark.parametrize('density', [.1, .5])
def test_random_masks_have_the_density_for_a_cosine(density):
    "kappa of n twice by lot: the overlap is hypergeometric."
    m = build('lenet300', 1, 10, 8); n = sum(o.weight.numel() for o in layers(m).values())
    ms = {str(i):weight_mask(m, round(1-density, 2), i+10) for i in range(8)}; k = next(iter(ms.values())).counts()[0]
    cos = similarity(ms).values[np.triu_indices(8, 1)]
    sd = 100*math.sqrt(k*(k/n)*(1-k/n)*(n-k)/(n-1))/k
    assert (np.abs(cos-100*density) < 4*sd).all() and abs(cos.mean()-100*density) < 3*sd/math.sqrt(len(cos))
    assert np.allclose(similarity(ms, expected='random').values[np.triu_indices(8, 1)], 100*k/n)
    assert np.allclose(np.diag(similarity(ms)), 100, atol=1e-3)

def test_similarity_is_its_definition():
    m = Conv(); a, b = weight_mask(m, .3, 1), weight_mask(m, .8, 2)
    u, v = (torch.cat([o.flatten() for o in x.values()]).numpy().astype(float) for x in (a, b))
    df, norm = similarity(dict(a=a, b=b)), np.linalg.norm
    assert math.isclose(df.loc['a', 'b'], 100*u@v/norm(u)/norm(v), rel_tol=1e-5)
    want = sum(float(a[k].sum())*float(b[k].sum())/a[k].numel() for k in a)/math.sqrt(u.sum()*v.sum())
    assert math.isclose(similarity(dict(a=a, b=b), expected='layers').loc['b', 'a'], 100*want, rel_tol=1e-9)

def test_masks_of_several_units_by_their_weights():
    m, g = Conv(), trace(Conv(), X); w = weight_mask(m, .5)
    ch = allocate(Scores({k:torch.rand(4, generator=gen(2)) for k in g.removable}, 'channel', graph=g), .5)
    same = Mask({k.removesuffix('.weight'):v for k,v in ch.expand(m).items() if k.removesuffix('.weight') in layers(m)
                 and k.endswith('weight')}, 'weight')
    with pytest.raises(ValueError, match="'ch' is of Mask.*model="): similarity(dict(w=w, ch=ch))
    df = similarity(dict(w=w, ch=ch, same=same), m)
    assert abs(df.loc['ch', 'same']-100) < 1e-3 and abs(df.loc['w', 'ch']-df.loc['w', 'same']) < 1e-9

def test_bad_calls_of_similarity():
    m = Conv(); a = weight_mask(m, .5)
    with pytest.raises(ValueError, match='at least two'): similarity(dict(a=a))
    with pytest.raises(TypeError, match='masks'): similarity([a, a])
    with pytest.raises(ValueError, match="expected='chance'"): similarity(dict(a=a, b=a), expected='chance')
    with pytest.raises(ValueError, match="groups: 'b' is in none"): grouped(similarity(dict(a=a, b=a)), dict(a='x'))
    none = as_weights({k:torch.zeros(v.shape) for k,v in a.items()})
    assert math.isnan(similarity(dict(a=a, b=none)).loc['a', 'b'])

def test_groups_by_hand():
    df = pd.DataFrame([[100, 1, 2, 3], [1, 100, 4, 5], [2, 4, 100, 6], [3, 5, 6, 100]], list('abcd'), list('abcd'))
    got = grouped(df, dict(a='x', b='x', c='y', d='z'))
    assert got.loc['x'].tolist() == [1., 3., 4.] and got.loc['y', 'z'] == 6. and math.isnan(got.loc['y', 'y'])
    assert plot_similarity(df).axes[0].images
    fig, ax = plt.subplots(); plot_similarity(df, ax)
    assert ax.images and plt.fignum_exists(fig.number); plt.close(fig)

# ---- the first iterations

def small_learner(lr=.1):
    x = torch.randn(96, 6, generator=gen(3)); y = (x.sum(1) > 0).long()
    dl = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    with seed_everything(0): m = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    return as_learner(m, dl, dl, lr=lr, momentum=0.)

def test_early_losses_are_those_of_plain_sgd():
    "Masked weights, one seed of batches, written out in torch; the learner is left as found."
    learn = small_learner(); before = copy.deepcopy(learn.model.state_dict()); mask = weight_mask(learn.model, .5)
    df = early_loss(learn, dict(m=mask), iters=15, every=3, seed=4)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert df.rule.unique().tolist() == ['dense', 'm']
    assert df[df.rule == 'm'].iteration.tolist() == [0, 3, 6, 9, 12]
    batches = []
    from fastai.callback.core import Callback
    class Keep(Callback):
        def before_batch(self):
            if self.training: batches.append((self.xb[0].clone(), self.yb[0].clone()))
    twin = small_learner(); fit(twin, 3, schedule='flat', seed=4, cbs=[Keep()])
    net = apply(copy.deepcopy(learn.model), mask); want = []
    for x,y in batches[:15]:
        net.zero_grad(); loss = nn.functional.cross_entropy(net(x), y); loss.backward(); want.append(loss.item())
        with torch.no_grad():
            for p in net.parameters(): p -= .1*p.grad
            apply(net, mask)
    assert np.allclose(df[df.rule == 'm'].loss, want[::3], atol=1e-5)
    assert len(plot_early_loss(df).axes[0].lines) == 2

def test_early_losses_repeat_and_refuse():
    learn = small_learner(); mask = weight_mask(learn.model, .5)
    a, b = (early_loss(learn, dict(m=mask), iters=7, every=1) for _ in range(2)); assert a.equals(b) and len(a) == 14
    same = early_loss(learn, dict(m=Mask.ones_like(mask)), iters=7, every=1)
    assert same.loss[:7].tolist() == same.loss[7:].tolist()                      # a mask of ones is the dense network
    for kw,said in ((dict(iters=0), 'iters=0'), (dict(every=0), 'every=0'), (dict(start=3), 'epoch 3')):
        with pytest.raises(ValueError, match=said): early_loss(learn, dict(m=mask), **kw)
    with pytest.raises(ValueError, match=r"masks\['m'\]: .*ranks"):
        early_loss(learn, dict(m=allocate(methods()['svd'](learn.model), .5)))

# ---- collapse

def paths(ws):
    "Kept weights that lie on a path from an input to an output, by trying every path."
    on = [torch.zeros_like(w) for w in ws]
    for p in itertools.product(*[range(ws[0].shape[1])], *[range(len(w)) for w in ws]):
        if all(w[b, a] for w,a,b in zip(ws, p, p[1:])):
            for o,a,b in zip(on, p, p[1:]): o[b, a] = True
    return [int(o.sum()) for o in on]

@given(st.lists(st.integers(1, 4), min_size=3, max_size=5), st.floats(.2, .8), st.integers(0, 10**6))
@settings(max_examples=40)
def test_weights_on_paths_are_those_of_brute_force(widths, p, seed):
    g = gen(seed); ws = [torch.rand(b, a, generator=g) < p for a,b in zip(widths, widths[1:])]
    m = nn.Sequential(*[o for a,b in zip(widths, widths[1:]) for o in (nn.Linear(a, b), nn.ReLU())][:-1])
    mask = Mask({str(2*i):w for i,w in enumerate(ws)}, 'weight')
    df = collapse(m, mask, trace(m, torch.rand(2, widths[0]))); want = paths(ws)
    assert df.on_paths.tolist() == [*want, sum(want)] and df.kept.tolist()[-1] == sum(int(w.sum()) for w in ws)
    assert df.collapsed.tolist() == [*[o == 0 for o in want], min(want) == 0]

def test_collapse_follows_sums_depthwise_layers_and_channels():
    m, g = Conv(), trace(Conv(), X); ones = {k:torch.ones(o.weight.shape) for k,o in layers(m).items()}
    df = collapse(m, as_weights(ones), g); assert df.on_paths.tolist() == df.weights.tolist() == df.kept.tolist()
    cut = {**ones, 'b': 0*ones['b']}                         # the other branch of the sum is still there
    df = collapse(m, as_weights(cut), g).set_index('layer'); assert df.collapsed['b'] and df.on_paths['d'] == 36
    dead = {**ones, 'a': ones['a'].clone()}; dead['a'][1] = 0; dead['b'] = ones['b'].clone(); dead['b'][1] = 0
    df = collapse(m, as_weights(dead), g).set_index('layer')
    assert df.unreached['d'] == 1 and df.on_paths['d'] == 27 and df.on_paths['out'] == 9
    ch = allocate(Scores({k:torch.arange(4.) for k in g.removable}, 'channel', graph=g), .5)
    df = collapse(m, ch).set_index('layer')
    assert df.on_paths['out'] == df.kept['out']/2 == 6 and not df.collapsed['network']

def test_a_result_of_prune_is_taken_as_it_is():
    learn = learner(build('lenet300', 1, 10, 8, seed=0), get_dls('digits', bs=64)); m = copy.deepcopy(learn.model)
    r = prune(learn, 'magnitude', .9, fine_tune_epochs=0, latency=False)
    assert collapse(m, r.mask).kept.iloc[-1] == r.mask.counts()[0]
    assert orthogonality(m, r.mask).energy_share.iloc[-1] < 1

def test_bad_calls_of_collapse():
    m = Conv()
    with pytest.raises(ValueError, match='graph=trace'): collapse(m, weight_mask(m, .5))
    with pytest.raises(ValueError, match='ranks'): collapse(m, allocate(methods()['svd'](m), .5), trace(m, X))

# ---- validation size

def test_validation_size_calls_any_search():
    calls = []
    def search(n, seed): calls.append((n, seed)); return .5+1/n, n
    df = validation_size(search, lambda found: .5-1/found, (2, 4), seeds=(7, 8))
    assert calls == [(2, 7), (2, 8), (4, 7), (4, 8)] and df.gap.tolist() == [1., 1., .5, .5]
    assert df.columns.tolist() == ['images', 'seed', 'score', 'held_out', 'gap']
    assert len(plot_validation_size(df).axes[0].lines)

def test_bad_calls_of_validation_size():
    with pytest.raises(ValueError, match='counts=0'): validation_size(lambda n, s: (1., 0), lambda f: 1., (0,))
    with pytest.raises(ValueError, match='counts: empty'): validation_size(lambda n, s: (1., 0), lambda f: 1., ())
    for a,b,said in ((math.nan, 1., 'search: gave nan with 3'), (1., math.inf, 'held_out: gave inf')):
        with pytest.raises(ValueError, match=said): validation_size(lambda n, s: (a, 0), lambda f: b, (3,))
