"""Sensitivities against the definition, allocations against other solvers, and what SiPP and PFP promise."""
import copy, math, pytest, torch, warnings
from functools import cache
import numpy as np, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.allocate import allocate, weights_left
from neuronprune.budget import sizes
from neuronprune.core import kappa, layers
from neuronprune.masks import Mask, Scores
from neuronprune.data import calib_batch, get_dls
from neuronprune.draws import expected_unique
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.provable import _sampling_row, calib_size, pfp, sensitivities, sensitivity, sipp, sipp_cut
from neuronprune import provable_allocate
from neuronprune.provable_allocate import _factors, equalise, predicted_error, sample_rows, spread, spread_cvxpy, whole
from neuronprune.surgery import apply, difference, shrink
from neuronprune.train import fit, learner
from neuronprune.retrain import MaskCallback, fine_tune

def shares(w, cols):
    "The definition: g [n, o, k, p] for weights [o, k] and non-negative columns [n, k, p], float64 loops over signs."
    g = torch.zeros(len(cols), *w.shape, cols.shape[-1], dtype=torch.float64)
    for side in (1, -1):
        part = (side*w).clamp(min=0).double()
        terms = part[None, :, :, None]*cols.double()[:, None]
        z = terms.sum(2, keepdim=True)
        g += torch.where(z > 1.2e-7, terms/z, 0.)
    return g

def brute(m, a, reduce='max'):
    "Sensitivities straight from the definition, with torch's own unfold group by group."
    halves = [a.clamp(min=0), (-a).clamp(min=0)] if (a < 0).any() else [a]
    best = torch.zeros(m.weight.shape, dtype=torch.float64)
    for h in halves:
        for g in range(getattr(m, 'groups', 1)):
            if isinstance(m, nn.Linear): cols, rows = h.reshape(len(h), -1, h.shape[-1]).transpose(1, 2), slice(None)
            else:
                n_in, n_out = m.in_channels//m.groups, m.out_channels//m.groups
                part, rows = h[:, g*n_in:(g+1)*n_in], slice(g*n_out, (g+1)*n_out)
                pad = m.padding if isinstance(m.padding, tuple) else (0, 0)
                if m.padding_mode != 'zeros':
                    part, pad = F.pad(part, (pad[1], pad[1], pad[0], pad[0]), mode=m.padding_mode), 0
                cols = F.unfold(part, m.kernel_size, m.dilation, pad, m.stride)
            x = shares(m.weight[rows].detach().flatten(1), cols)
            x = x.amax(3) if reduce == 'max' else x.mean(3)
            best[rows] = torch.maximum(best[rows], x.amax(0).view(best[rows].shape))
    return best.float()

LAYERS = dict(linear=(lambda: nn.Linear(7, 5), (6, 7)), tokens=(lambda: nn.Linear(7, 5), (6, 3, 7)),
              conv=(lambda: nn.Conv2d(3, 4, 3, 2, 1), (5, 3, 7, 6)),
              dilated=(lambda: nn.Conv2d(2, 3, (3, 2), dilation=2), (4, 2, 9, 8)),
              grouped=(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5, 5)),
              depthwise=(lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 4, 6, 6)),
              reflect=(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode='reflect'), (3, 2, 5, 5)))

@pytest.mark.parametrize('reduce', ('max', 'mean'))
@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('signed', (True, False))
def test_sensitivity_is_the_definition(kind, signed, reduce):
    torch.manual_seed(len(kind)); make, shape = LAYERS[kind]
    m, a = make(), torch.randn(shape) if signed else torch.rand(shape)
    with torch.no_grad(): m.weight.view(-1)[::5] = 0
    s = sensitivity(m, a, reduce)
    torch.testing.assert_close(s, brute(m, a, reduce), rtol=1e-5, atol=1e-7)
    assert s.shape == m.weight.shape and (s[m.weight == 0] == 0).all() and s.max() <= 1+1e-5

@pytest.mark.parametrize('cache', (64, 4096, 2**20))
@pytest.mark.parametrize('few', (0, 1000))
def test_blocks_do_not_matter(monkeypatch, cache, few):
    import neuronprune.provable as pv
    torch.manual_seed(0); m, a = nn.Conv2d(4, 6, 3, groups=2), torch.randn(9, 4, 8, 8)
    want = [brute(m, a, o) for o in ('max', 'mean')]
    monkeypatch.setitem(pv.CACHE, 'cpu', cache); monkeypatch.setattr(pv, 'FEW', few)
    both = pv._sensitivity(m, a, ('max', 'mean'))
    for o,w in zip(('max', 'mean'), want):
        torch.testing.assert_close(both[o], w, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(sensitivity(m, a, o), w, rtol=1e-5, atol=1e-7)

def test_patches_of_all_images_are_never_there_at_once(monkeypatch):
    import neuronprune.provable as pv
    m, a, own, seen = nn.Conv2d(3, 4, 3), torch.randn(20, 3, 8, 8), pv._columns, []
    monkeypatch.setitem(pv.CACHE, 'cpu', 64)
    monkeypatch.setattr(pv, '_columns', lambda m, a: seen.append(own(m, a)) or seen[-1])
    torch.testing.assert_close(sensitivity(m, a), brute(m, a, 'max'), rtol=1e-5, atol=1e-7)
    assert max(o.numel() for o in seen) <= 64*64 < own(m, a).numel()

def test_dead_inputs_dead_rows_and_half_precision():
    m = nn.Linear(4, 3); a = torch.rand(5, 4); a[:, 1] = 0
    with torch.no_grad(): m.weight[2] = 0
    s = sensitivity(m, a)
    assert (s[:, 1] == 0).all() and (s[2] == 0).all() and torch.isfinite(s).all()
    assert (sensitivity(m, torch.zeros(2, 4)) == 0).all()
    half = copy.deepcopy(m).to(torch.bfloat16)
    torch.testing.assert_close(sensitivity(half, a.bfloat16()), brute(half.float(), a.bfloat16().float()), rtol=1e-5,
                               atol=1e-7)

@pytest.mark.parametrize('kind', LAYERS)
def test_the_shares_of_one_sign_add_up_to_one(kind):
    """On a single point the sensitivities are the shares: their sum is 1 for a live sign of a neuron, 0 for a dead one;
    and none exceeds 1."""
    torch.manual_seed(len(kind)); make, shape = LAYERS[kind]; m = make()
    if kind == 'tokens': shape = (6, 7)
    a = torch.rand(1, *shape[1:])
    if m.weight.ndim == 4:
        a = a[..., :m.kernel_size[0]+(m.dilation[0]-1)*(m.kernel_size[0]-1),
              :m.kernel_size[1]+(m.dilation[1]-1)*(m.kernel_size[1]-1)]
        m.padding, m.padding_mode, m._reversed_padding_repeated_twice = 0, 'zeros', [0]*4
    with torch.no_grad(): m.weight[0] = m.weight[0].abs()
    s = sensitivity(m, a).flatten(1); w = m.weight.flatten(1)
    for side in (1, -1):
        on = side*w > 0; total = (s*on).sum(1)
        torch.testing.assert_close(total, on.any(1).float(), rtol=0, atol=1e-5)
    assert s.max() <= 1+1e-6

@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('reduce', ('max', 'mean'))
def test_invariances(kind, reduce):
    """Neither the size of a neuron's weights nor of the inputs matters, nor their order;
    more inputs never lower anything; the other reduction is no larger."""
    torch.manual_seed(len(kind)); make, shape = LAYERS[kind]; m, a = make(), torch.randn(shape)
    s = sensitivity(m, a, reduce); other = copy.deepcopy(m)
    with torch.no_grad(): other.weight *= torch.rand(len(m.weight)).view(-1, *[1]*(m.weight.ndim-1))*9+.1
    close = lambda x: torch.testing.assert_close(x, s, rtol=1e-5, atol=1e-6)
    close(sensitivity(other, a, reduce)); close(sensitivity(m, 40*a, reduce)); close(sensitivity(m, a.flip(0), reduce))
    assert ((s <= sensitivity(m, torch.cat([a, torch.randn(shape)]), reduce)+1e-6).all()
            and (s <= sensitivity(m, a)+1e-6).all())

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.out, self.idle = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(2, 2)
    def forward(self, x): return self.out(self.bn(self.fc(self.fc(x).relu())).relu())

def test_one_pass_over_shared_layers_in_batches():
    torch.manual_seed(0); m, x = Twice().train(), torch.randn(50, 6)
    before = copy.deepcopy(m.state_dict())
    res = sensitivities(m, x, ('max', 'mean'), bs=7)
    with torch.no_grad(): h = m.fc(x).relu()
    torch.testing.assert_close(res['max']['fc'], torch.maximum(brute(m.fc, x), brute(m.fc, h)), rtol=1e-5, atol=1e-7)
    assert 'idle' not in res['max'] and m.training and all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    assert not any(o._forward_pre_hooks for o in m.modules())
    torch.testing.assert_close(sensitivities(m, x, bs=50)['max']['out'], res['max']['out'], rtol=1e-5, atol=1e-7)
    perm = sensitivities(m, x.flip(0), bs=7)['max']['fc']
    torch.testing.assert_close(perm, res['max']['fc'], rtol=1e-5, atol=1e-7)

def test_bad_data_names_the_layer():
    m = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad(): m[0].bias[1] = math.inf
    with pytest.raises(ValueError, match="activations into '2'"): sensitivities(m, torch.rand(4, 3))
    with torch.no_grad(): m[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="0.weight"): sensitivities(m, torch.rand(4, 3))
    with pytest.raises(ValueError, match='cannot digest'): sensitivities(nn.Linear(3, 2), torch.rand(4, 5))
    with pytest.raises(ValueError, match='empty'): sensitivities(nn.Linear(3, 2), torch.rand(0, 3))
    conv, lin = nn.Conv2d(2, 3, 3), nn.Linear(4, 3)
    for l, a in ((lin, torch.rand(0, 4)), (conv, torch.rand(2, 5, 5)), (conv, torch.rand(0, 2, 5, 5)),
                 (lin, torch.rand(4)), (lin, torch.rand(2, 0, 4))):
        with pytest.raises(ValueError, match='a batch of at least one'): sensitivity(l, a)
    with pytest.raises(ValueError, match='a: 1 of 8 entries'):
        sensitivity(lin, torch.tensor([[1., 2, 3, math.nan]]*1+[[1., 2, 3, 4]]))
    with pytest.raises(TypeError, match='a: expected'): sensitivity(lin, [[1, 2, 3, 4]])

def test_a_lack_of_memory_is_not_the_batch():
    class Full(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(3, 2)
        def forward(self, x): self.fc(x); raise torch.cuda.OutOfMemoryError('CUDA out of memory')
    m = Full()
    with pytest.raises(torch.cuda.OutOfMemoryError): sensitivities(m, torch.rand(4, 3))
    assert not m.fc._forward_pre_hooks

class Pair(nn.Module):
    "Two layers that hold one weight."
    def __init__(self):
        super().__init__(); self.a, self.b, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.b.weight = self.a.weight
    def forward(self, x): return self.out(self.b(self.a(x.flatten(1)).relu()).relu())

class Again(nn.Module):
    "A layer called twice."
    def __init__(self): super().__init__(); self.fc, self.out = nn.Linear(64, 64), nn.Linear(64, 10)
    def forward(self, x): return self.out(self.fc(self.fc(x.flatten(1)).relu()).relu())

@pytest.mark.parametrize('variant', ('det', 'rand', 'hybrid'))
@pytest.mark.parametrize('net, name, why', ((Pair, 'b', "shares its weight with 'a'"), (Again, 'fc', 'used 2 times')))
def test_layers_and_weights_used_twice(dls, variant, net, name, why):
    torch.manual_seed(0); m = net(); xb, _ = calib_batch(dls, n=32); sc = sipp(m, dls, variant=variant, n=32)
    mask = sipp_cut(sc, .6)
    if net is Again and variant == 'det': assert 'fc' in sc and not sc.skipped
    else: assert name not in sc and why in sc.skipped[name]
    after = apply(copy.deepcopy(m), mask); assert all((layers(after)[k].weight[~v] == 0).all() for k,v in mask.items())
    if net is Pair:
        s = sensitivities(m, xb)['max']; h = m.a(xb.flatten(1)).relu().detach()
        torch.testing.assert_close(s['a'], torch.maximum(brute(m.a, xb.flatten(1)), brute(m.b, h)), rtol=1e-5,
                                   atol=1e-7)
        assert torch.equal(s['a'], s['b'])

@pytest.mark.parametrize('net, left', ((Pair, ['out:in']), (Again, ['out:in'])))
def test_filters_of_layers_used_twice(dls, net, left):
    torch.manual_seed(0); m = net(); sc = pfp(m, dls, n=16); mask = equalise(sc, .05)
    assert list(sc) == left and set(sc.skipped) == {'a', 'b'} if net is Pair else {'fc'}
    apply(copy.deepcopy(m), mask)

def test_calib_size_by_hand():
    g = trace(build('lenet300', seed=0), torch.zeros(1, 1, 28, 28))
    assert calib_size(g, 1e-12, 10) == 415 == math.ceil(10*math.log(8*300*410/1e-12))
    with pytest.raises(ValueError, match='delta'): calib_size(g, math.nan)
    for kw, text in ((dict(delta=0), '(0, 1)'), (dict(delta=1.5), 'delta'), (dict(c=0), 'positive'),
                     (dict(c=math.nan), 'c=nan: expected a finite')):
        with pytest.raises(ValueError, match=text.replace('(', r'\(').replace(')', r'\)')): calib_size(g, **kw)

# -- allocations ----------------------------------------------------------------------------------------------

@settings(max_examples=15)
@given(st.integers(3, 25), st.integers(0, 10**6), st.floats(.05, .95))
def test_spread_is_optimal(n, seed, share):
    rng = np.random.default_rng(seed)
    alpha, weight, room = rng.uniform(1, 900, n), rng.uniform(.01, 1, n), rng.integers(1, 400, n)
    b = share*room.sum(); x = spread(alpha, weight, room, b)
    assert abs(x.sum()-b) < 1e-6*b and (x >= 0).all() and (x <= room+1e-9).all()
    value = lambda o: float(weight @ predicted_error(o, alpha))
    y = spread_cvxpy(alpha, weight, room, b); y = np.maximum(y, 1e-12)
    assert value(x) <= value(y*min(1, b/y.sum()))*(1+1e-4)
    assert abs(value(x)/value(y)-1) < 1e-3 or value(x) < value(y)

@settings(max_examples=40)
@given(st.integers(2, 25), st.integers(0, 10**6), st.floats(.02, .98))
def test_spread_satisfies_kkt(n, seed, share):
    """One multiplier: rows with room have equal marginal gains, full rows at least that;
    the derivative is written out here."""
    rng = np.random.default_rng(seed)
    alpha, weight, room = rng.uniform(1, 900, n), rng.uniform(.01, 1, n), rng.integers(1, 400, n).astype(float)
    x = spread(alpha, weight, room, share*room.sum()); u = alpha/(3*x)
    gain = weight*(1+(2*u+6)/(2*np.sqrt(u*u+6*u)))/2*u/x
    free = x < room*(1-1e-9)
    if free.any():
        lam = gain[free].mean(); assert np.allclose(gain[free], lam, rtol=1e-3) and (gain[~free] >= lam*(1-1e-3)).all()

@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(0, 10**6), st.floats(0, 1))
def test_whole_is_exact_and_close(n, seed, share):
    rng = np.random.default_rng(seed); room = rng.integers(0, 20, n); x = room*rng.uniform(0, 1, n)
    b = int(round(share*room.sum())); x = x*min(1, b/max(x.sum(), 1e-9)); k = whole(x, room, b)
    assert k.sum() == b and (k >= 0).all() and (k <= room).all()
    assert (k >= np.floor(x)-1e-9).all()

def test_predicted_error_solves_its_quadratic():
    u = np.geomspace(1e-4, 1e3, 20); e = predicted_error(1/(3*u), 1.)
    np.testing.assert_allclose(e*e, u*(e+1.5), rtol=1e-10) # eps^2 = u eps + 3u/2

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64)

@pytest.fixture(scope='module')
def trained(dls):
    l = learner(build('lenet300', size=8, seed=0), dls); fit(l, 4); return l

@pytest.fixture(scope='module')
def det(trained, dls): return sipp(trained.model, dls, n=64)

@pytest.fixture(scope='module')
def rand(trained, dls): return sipp(trained.model, dls, variant='rand', n=64)

@pytest.mark.parametrize('sparsity', (.3, .777, .85))
def test_det_is_the_global_ranking(det, sparsity):
    sc = det; m = sipp_cut(sc, sparsity)
    flat, keep = torch.cat([v.flatten() for v in sc.values()]), torch.cat([v.flatten() for v in m.values()])
    assert int(keep.sum()) == kappa(len(flat), sparsity) and flat[keep].min() >= flat[~keep].max() and not m.scale
    nested = sipp_cut(sc, .88)
    assert all((nested[k] <= m[k]).all() for k in m)

def test_scores_of_one_pass(trained, dls):
    xb, _ = calib_batch(dls, n=64, split='valid', seed=0)
    s = sensitivities(trained.model, xb)['max']; p = pfp(trained.model, dls, n=64, seed=0)
    for k,v in s.items(): assert torch.equal(p[f'{k}:in'], v.amax(0))
    conv = build('lenet5_conv', size=32, seed=0); x = torch.rand(3, 1, 32, 32)
    for k,v in pfp(conv, [(x, torch.zeros(3, dtype=torch.long))] and get_dls('digits', size=32, bs=8), n=3).items():
        assert v.ndim == 1 and len(v) == layers(conv)[k.removesuffix(':in')].weight.shape[1]
    seen, dl = {}, get_dls('digits', size=32, bs=8); xb, _ = calib_batch(dl, n=3)
    hooks = [l.register_forward_pre_hook(lambda m, i, k=k: seen.update({k: i[0].detach()}))
             for k,l in layers(conv).items()]
    conv.eval()(xb); [h.remove() for h in hooks]
    for k,v in pfp(conv, dl, n=3).items(): # the largest of all weights that read the channel, kernel positions included
        torch.testing.assert_close(v, brute(l := layers(conv)[k[:-3]], seen[k[:-3]]).movedim(1, 0).reshape(
            l.weight.shape[1], -1).amax(1), rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('variant', ('rand', 'hybrid'))
def test_sampling_keeps_signs_zeros_and_the_budget(trained, dls, variant):
    net = copy.deepcopy(trained.model)
    with torch.no_grad(): net.fc2.weight[3] = 0
    sc = sipp(net, dls, variant=variant, n=64, delta=.1); total = sum(v.numel() for v in sc.values())
    for s in (.5, .9, .98):
        m = sipp_cut(sc, s); left = sum(int(v.sum()) for v in m.values())
        assert m.meta['allocated'] == kappa(total, s) and abs(left-kappa(total, s)) < max(.015*kappa(total, s), 40)
        after = apply(copy.deepcopy(net), m)
        for k,w in layers(after).items():
            old = layers(net)[k].weight
            assert (((w.weight*old >= 0) & ((old != 0) | (w.weight == 0))).all()
                    and torch.equal(w.weight != 0, m[k] & (old != 0)))
        again = sipp_cut(sc, s)
        assert all(torch.equal(again.scale[k], m.scale[k]) for k in m)
        other = sipp_cut(sc, s, seed=9)
        assert any(not torch.equal(other.scale[k], m.scale[k]) for k in m) == any(map(any, m.meta['draws'].values()))

def test_order_of_calls_does_not_matter(trained, dls):
    "The released hybrid edits its cached allocation, and a second call with the same ratio gives another network."
    sc = sipp(trained.model, dls, variant='hybrid', n=64, delta=.1); first = sipp_cut(sc, .8); sipp_cut(sc, .95)
    second = sipp_cut(sc, .8)
    assert (any(map(any, first.meta['draws'].values())) and first.meta == second.meta
            and all(torch.equal(first.scale[k], second.scale[k]) for k in first))

@pytest.mark.parametrize('target', (1, 9, 10))
def test_draws_are_unbiased_per_weight(target):
    "Mean of 4,000 draws of a neuron of ten weights per sign, also where all but one are wanted, and where all are."
    rng = np.random.default_rng(target); s = rng.uniform(.01, 1, (2, 20)); s[0, 10:] = 0; s[1, :10] = 0
    from neuronprune.draws import sample
    x = sample(np.tile(s/s.sum(1, keepdims=True), (4000, 1, 1)), target, rng)[0]
    se = x.std(0)/math.sqrt(len(x))
    assert (np.abs(x.mean(0)-(s > 0)) <= 4*se + 1e-12).all()

def test_unbiased_through_the_mask():
    """The mean over 2,000 copies of a small layer is 1 for every weight, within 4 standard errors,
    whatever its row was given."""
    torch.manual_seed(0); w = torch.randn(4, 8); s = torch.rand(4, 8)*(w > -1.5)
    many = Scores({'a': s.repeat(2000, 1)}, 'weight', labels={'a': (_sampling_row(w.repeat(2000, 1)), torch.tensor(
        [100.]))}, meta=dict(variant='rand', c=3., seed=0), method='sipp')
    x = sipp_cut(many, .5).scale['a'].view(2000, 4, 8)
    mean, se, live = x.mean(0), x.std(0)/math.sqrt(len(x)), s > 0
    assert ((mean-1).abs()[live] <= 4*se[live] + 1e-6).all() and (x[:, ~live] == 0).all()
    assert abs(float((x > 0).sum((1, 2)).float().mean()) - 16) < .5 # and as many distinct weights as asked for

def row_scores(s, w=None, variant='rand', log=100.):
    "Scores of one layer whose rows are drawn."
    w = torch.ones_like(s) if w is None else w
    return Scores({'a': s}, 'weight', labels={'a': (_sampling_row(w), torch.tensor([log]))},
                  meta=dict(variant=variant, c=3., seed=0), method='sipp')

@pytest.mark.parametrize('min_keep', (2, 4, 5))
def test_min_keep_is_kept_before_drawing(min_keep):
    "Never fewer than asked for, always unbiased: 250 masks of one neuron of eight weights, five of them wanted."
    sc = row_scores(torch.linspace(.2, .9, 8)[None])
    x = torch.stack([sample_rows(sc, .375, min_keep=min_keep, seed=i).scale['a'][0] for i in range(250)])
    mean, se, drawn = x.mean(0), x.std(0)/len(x)**.5, 5 > min_keep
    assert (x > 0).sum(1).min() >= min_keep and (x[:, -min_keep:] == 1).all()
    assert (((mean-1).abs() <= 4*se+1e-6)[:None if drawn else 0].all()
            and sample_rows(sc, .375, min_keep=min_keep).meta['allocated'] == 5)

def test_min_keep_in_every_layer_is_part_of_the_budget():
    torch.manual_seed(0); w = {k:torch.randn(n, 12) for k,n in (('loud', 20), ('quiet', 3), ('dead', 2))}
    s = {k:torch.rand(v.shape)*dict(loud=1., quiet=1e-6, dead=0)[k] for k,v in w.items()}
    sc = Scores(s, 'weight', labels={k:(_sampling_row(v), torch.tensor([30.])) for k,v in w.items()},
                meta=dict(variant='rand', c=3., seed=0), method='sipp')
    for o in (1, 3, 10):
        m = sample_rows(sc, .8, min_keep=o)
        assert (m.meta['allocated'] == kappa(300, .8) and all(int(m[k].sum()) >= min(o, v.numel()) for k,v in m.items())
                and max(v.max() for k,v in m.scale.items() if k == 'dead') == 1)

def test_too_few_weights_to_draw_from_are_reported():
    s = torch.rand(4, 10); s[:, 5:] = 0
    with pytest.warns(UserWarning, match='asks for 32 weights, 20 are given out'): m = sample_rows(row_scores(s), .2)
    assert m.meta['allocated'] == 20 and torch.equal(m.scale['a'], (s > 0).float())
    with warnings.catch_warnings(): warnings.simplefilter('error'); sample_rows(row_scores(s), .6)

@pytest.mark.parametrize('variant', ('rand', 'hybrid'))
def test_a_row_has_no_more_weights_than_draws(trained, dls, variant):
    sc = sipp(trained.model, dls, variant=variant, n=64, delta=.1)
    for s in (.5, .8):
        m = sipp_cut(sc, s); assert any(map(any, m.meta['draws'].values()))
        for k,v in m.scale.items():
            w, n = layers(trained.model)[k].weight.flatten(1), torch.tensor(m.meta['draws'][k]).view(-1, 2)
            hit = torch.stack([((v.flatten(1) > 0) & (side*w > 0)).sum(1) for side in (1, -1)], 1)
            assert (hit <= n)[n > 0].all()

def test_the_budget_of_draws_is_met_on_average(rand):
    left = [int(sum(v.sum() for v in sipp_cut(rand, .8, seed=i).values())) for i in range(20)]
    assert abs(np.mean(left)/kappa(sum(v.numel() for v in rand.values()), .8)-1) < .01

@pytest.mark.parametrize('variant', ('rand', 'top'))
def test_factors_of_a_family(variant):
    """All-zero families keep what they must; `min_keep` > 1 is reserved;
    the sure ones are exact and everything else is unbiased."""
    f, n = _factors(np.zeros(5), 2, variant, 2, np.random.default_rng(0))
    assert f.tolist() == [1, 1, 0, 0, 0] and not n.any()
    f, n = _factors(np.array([.5, .2, 0, 0]), 3, variant, 1, np.random.default_rng(0))
    assert f.tolist() == [1, 1, 1, 0] and not n.any()
    s = np.sort(np.random.default_rng(1).uniform(.05, 1, 12))[::-1]
    for keep in (1, 4):
        x = np.stack([_factors(s, 6, variant, keep, np.random.default_rng([keep, i]))[0] for i in range(600)])
        n = _factors(s, 6, variant, keep, np.random.default_rng(0))[1]
        assert ((np.abs(x.mean(0)-1) <= 4*x.std(0)/len(x)**.5+1e-9).all() and (x > 0).sum(1).min() >= keep
                and (x[:, n == 0] == 1).all() and (variant == 'top' or (n[:keep] == 0).all() == (keep > 1)))

def test_hybrid_takes_the_cheaper_rule(trained, dls):
    sc = {v:sipp(trained.model, dls, variant=v, n=64, delta=.1) for v in ('rand', 'hybrid')}
    m = {v:sipp_cut(o, .8) for v,o in sc.items()}
    rows = lambda o: {k:sum(n > 0 for n in v) for k,v in o.meta['draws'].items()}
    assert all(rows(m['hybrid'])[k] <= rows(m['rand'])[k] for k in m['rand'])
    assert 0 < sum(rows(m['hybrid']).values()) < sum(rows(m['rand']).values())
    # rows that are not drawn keep their best, and that costs no more than drawing as many
    for k,v in m['hybrid'].items():
        s, w, n = (sc['hybrid'][k].double(), layers(trained.model)[k].weight,
                   torch.tensor(m['hybrid'].meta['draws'][k]).view(-1, 2))
        log = float(sc['hybrid'].labels[k][1])
        for o in range(len(w)):
            for j,side in enumerate((1, -1)):
                on = side*w[o] > 0; lost, left = s[o][on & ~v[o]], s[o][on & v[o]]
                if n[o, j] or not len(left): continue
                assert (3*float(lost.sum()) <= predicted_error(len(left), 2*log*float(s[o][on].sum()))+1e-9
                        and (not len(lost) or left.min() >= lost.max()))

@pytest.mark.parametrize('variant', ('det', 'rand', 'hybrid'))
def test_density_one_changes_nothing_sipp(trained, dls, variant):
    m = sipp_cut(sipp(trained.model, dls, variant=variant, n=16), 0.); net = apply(copy.deepcopy(trained.model), m)
    assert not m.scale and all(torch.equal(a, b) for a,b in zip(net.parameters(), trained.model.parameters()))

@pytest.mark.parametrize('variant', ('det', 'rand', 'top'))
def test_density_one_changes_nothing_pfp(trained, dls, variant):
    m = equalise(pfp(trained.model, dls, variant=variant, n=16), 0.); net = apply(copy.deepcopy(trained.model), m)
    assert not m.scale and all(torch.equal(a, b) for a,b in zip(net.parameters(), trained.model.parameters()))

# -- filters --------------------------------------------------------------------------------------------------

def made_scores(name, size=32, seed=0):
    "Random sensitivities for the inputs of a network that is not trained; (scores, model, images)."
    torch.manual_seed(seed); m = build(name, 3 if 'lenet' not in name else 1, 10, size, seed=seed).eval()
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d):
            nn.init.uniform_(o.weight, .5, 1.5); nn.init.normal_(o.bias); nn.init.normal_(o.running_mean)
            nn.init.uniform_(o.running_var, .5, 2)
    x = torch.rand(4, 3 if 'lenet' not in name else 1, size, size); g = trace(m, x)
    found = {f'{k}:in':l.weight.shape[1] for k,l in layers(m).items() if getattr(l, 'groups', 1) == 1 and k in g.layers}
    meta = dict(variant='det', n=1, delta=1e-12, c=3., seed=0,
                logs={k.removesuffix(':in'):1+i/10 for i,k in enumerate(found)})
    return Scores({k:torch.rand(n)**3 for k,n in found.items()}, 'channel', graph=g, meta=meta, method='pfp'), m, x

made_once = cache(made_scores) # where nothing of it is changed

@pytest.mark.parametrize('variant', ('det', 'rand', 'top'))
def test_channels_without_sensitivity_go_only_as_far_as_asked(variant):
    "Three in ten score 0: small budgets are met all the same, with zeros only, and the predicted error is 0."
    sc, model, x = made_scores('lenet300', 28); sc.meta['variant'] = variant; total = weights_left(sc.graph, {})
    for v in sc.values(): v[::3] = 0
    last = None
    for s in (.01, .1, .3):
        m = equalise(sc, s); left = weights_left(sc.graph, m); zero = {k:~v for k,v in m.items()}
        assert (0 <= left-kappa(total, s) <= 1200 and m.meta['error'] == 0
                and all((sc[k][v] == 0).all() for k,v in zero.items()))
        assert not m.scale or all((m.scale[k] == v).all() for k,v in m.items())
        assert last is None or all((last[k] <= v).all() for k,v in zero.items()); last = zero
    m = equalise(sc, .6); assert m.meta['error'] > 0 and all((~v[sc[k] == 0]).all() for k,v in m.items())

class Mixing(nn.Module):
    "Its last layer reads sums of two channels each."
    def __init__(self): super().__init__(); self.fc, self.out = nn.Linear(64, 16), nn.Linear(8, 10)
    def forward(self, x): h = self.fc(x.flatten(1)).relu(); return self.out(h[:, :8]+h[:, 8:])

def test_mixed_columns_are_not_the_networks_inputs(dls):
    torch.manual_seed(0); m = Mixing(); sc = pfp(m, dls, n=32); mask = equalise(sc, .05, prune_inputs=False)
    assert mask['fc:in'].all() and 0 < mask['out:in'].sum() < 8

@pytest.mark.parametrize('name', ('lenet5_conv', 'resnet20', 'densenet22', 'vgg7_bn'))
@pytest.mark.parametrize('tied', (True, False))
def test_pfp_meets_the_budget_and_shrinks(name, tied):
    sc, model, x = made_once(name, 32 if name == 'lenet5_conv' else 16)
    for s in (.3, .8):
        m = equalise(sc, s, tied=tied, prune_inputs=not tied)
        total, left = weights_left(sc.graph, {}), weights_left(sc.graph, m)
        assert left >= kappa(total, s) and (left-kappa(total, s))/kappa(
            total, s) < (.04 if name == 'lenet5_conv' else .0075), (name, s, left/kappa(total, s))
        masked = apply(copy.deepcopy(model), m); small = shrink(model, m, x)
        assert difference(masked, small, x) <= 1e-5 and difference(model, masked, x) > 1e-3
        if tied: assert sum(o.weight.numel() for o in layers(small).values()) == left

def test_a_channel_goes_when_all_its_readers_drop_it():
    sc, model, x = made_once('resnet20', 16); m = equalise(sc, .8, tied=False); keep, g = m.expand(model), sc.graph
    cut = g.unread({k.removesuffix(':in'):~v for k,v in m.items()})
    for k,gone in cut.items(): assert (~keep[f'{k}.weight'].flatten(1).any(1) == gone).all()
    assert any(v.any() for v in cut.values())

def test_pfp_equalises_the_error_and_is_not_a_top_k():
    """Two layers: one with a few loud inputs, one with even ones. Equal errors cut the uneven one deeper;
    a global ranking does not."""
    net = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
    g = trace(net, torch.rand(2, 40))
    loud = torch.cat([torch.full((4,), .9), torch.full((36,), .02)]); even = torch.linspace(.028, .031, 40)
    sc = Scores({'2:in':loud, '4:in':even}, 'channel', graph=g,
                meta=dict(variant='det', seed=0, c=3., logs={'2':5., '4':5.}), method='pfp')
    m = equalise(sc, .5); top = allocate(sc, .5, of='network', normalize=None)
    assert int(m['2:in'].sum()) != int(top['2:in'].sum())
    counts = {k:int(v.sum()) for k,v in m.items()}; tau = m.meta['tau']
    more = []
    # what each layer keeps is what its samples hit, at one and the same predicted error;
    # the one that stopped keeps one more
    for k,v in sc.items():
        draws = tau*float(v.double().sum())*5; alpha = 2*3.*5*float(v.double().sum())
        more.append(counts[k] - math.ceil(float(expected_unique((v/v.sum()).numpy(), draws))))
        assert abs(predicted_error(draws, alpha)-m.meta['error']) < 1e-9
    assert sorted(more) in ([0, 0], [0, 1]), more
    errors = [float(predicted_error(_draws(v, int(top[k].sum())), 30.*float(v.sum()))) for k,v in sc.items()]
    assert max(errors)/min(errors) > 2 # the global ranking does not equalise
    ours = [float(predicted_error(_draws(v, counts[k]), 30.*float(v.sum()))) for k,v in sc.items()]
    near = [[float(predicted_error(_draws(v, counts[k]+d), 30.*float(v.sum()))) for d in (-1, 1)] for k,v in sc.items()]
    # as close as whole channels allow
    assert max(ours)/min(ours) < 1.1 and max(o[1] for o in near) <= min(o[0] for o in near)

def _draws(v, kept):
    "Real number of draws that hit `kept` distinct inputs on average."
    q, lo, hi = (v/v.sum()).double().numpy(), 0., 1e9
    for _ in range(200):
        mid = (lo+hi)/2; lo, hi = (mid, hi) if expected_unique(q, mid) < min(kept, len(q)-1e-6) else (lo, mid)
    return hi

@pytest.mark.parametrize('seed', range(3))
def test_pfp_meets_the_budget_of_a_small_network(seed):
    """Half a per cent from above; no layer is cut further than where another, stopped,
    would have lost its second channel."""
    sc, model, x = made_scores('lenet300', 28, seed); total = weights_left(sc.graph, {}); slack = []
    for d in sizes('harmonic', lo=.05, count=.8):
        m = equalise(sc, 1-d); goal = kappa(total, 1-d); left = weights_left(sc.graph, m)
        counts = {k:int(v.sum()) for k,v in m.items()}; tau, want = m.meta['tau'], {}
        for k,v in sc.items():
            q = (v.double()/v.double().sum()).numpy()
            want[k] = math.ceil(
                round(float(expected_unique(q, tau*float(v.double().sum())*sc.meta['logs'][k[:-3]])), 9))
            assert torch.equal(m[k], torch.zeros_like(m[k]).index_fill_(0, v.double().topk(counts[k]).indices, True))
        assert all(0 <= counts[k]-want[k] <= 1 for k in sc) and left >= goal
        slack.append(left/goal-1)
    assert max(slack) <= .005, slack

def test_constants_cancel():
    sc, *_ = made_scores('lenet5_conv'); a = equalise(sc, .6)
    sc.meta['logs'] = {k:7*v for k,v in sc.meta['logs'].items()}; sc.meta['c'] = 10.
    b = equalise(sc, .6)
    assert all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('name, size, most, steps',
                         (('vgg7_bn', 32, 0, 6), ('lenet300', 28, 0, 24), ('lenet5_conv', 32, 2, 32)))
def test_fewer_weights_hardly_ever_more_channels(name, size, most, steps):
    """Where channels are fine a smaller budget never gives a layer more of them;
    where they are coarse, two more at most, and fewer in all layers over a longer way."""
    sc, *_ = made_scores(name, size)
    all_ = [{k:int(v.sum()) for k,v in equalise(sc, round(float(s), 3)).items()} for s in np.linspace(.05, .97, steps)]
    assert max(b[k]-a[k] for a,b in zip(all_, all_[1:]) for k in a) <= most
    assert all(b[k] <= a[k] for a,b in zip(all_, all_[4:]) for k in a)

def test_inputs_spared(trained, dls):
    sc = pfp(trained.model, dls, n=64)
    free, spared = equalise(sc, .5), equalise(sc, .5, prune_inputs=False)
    assert not free['fc1:in'].all() and spared['fc1:in'].all() and spared['fc2:in'].sum() < free['fc2:in'].sum()
    assert equalise(sc, .5, keep=['fc2'])['fc2:in'].all()

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
def test_pfp_draws(trained, dls, variant, one_search):
    sc = pfp(trained.model, dls, variant=variant, n=64); m = equalise(sc, .6); a = equalise(sc, .6)
    assert all(torch.equal(m.scale[k], a.scale[k]) and torch.equal(m[k], m.scale[k] > 0) for k in m)
    x = torch.stack([equalise(sc, .6, seed=i).scale['fc3:in'] for i in range(100)])
    mean, se, often = x.mean(0), x.std(0)/len(x)**.5, (x > 0).sum(0) >= 20
    assert often.sum() > 20 and ((mean-1).abs() <= 4*se+1e-6)[often].all() and (x[:, sc['fc3:in'] == 0] == 0).all()
    if variant == 'top': assert (x == 1).all(0).any() and (x == 1).all(0).sum() < x.shape[1]
    net = apply(copy.deepcopy(trained.model), m); small = shrink(trained.model, m, calib_batch(dls, n=8)[0])
    assert difference(net, small, calib_batch(dls, n=8)[0]) < 1e-5

def test_masks_hold_through_training(dls):
    l = learner(build('lenet300', size=8, seed=1), dls, wd=1e-2); fit(l, 1); m = sipp_cut(sipp(l.model, dls, n=32), .9)
    fine_tune(l, m, 2)
    assert all((layers(l.model)[k].weight[~v] == 0).all() for k,v in m.items())
    more = sipp(l.model, dls, n=32)
    assert all((more[k][~v] == 0).all() for k,v in m.items()) # what is pruned scores 0 and stays pruned

@pytest.mark.parametrize('opt', ('sgd', 'adam'))
def test_masks_hold_after_reloading_the_optimiser(dls, opt):
    """Momentum from before the cut would move the zeros:
    the mask holds through training, saving, loading and more training."""
    l = learner(build('lenet300', size=8, seed=1), dls, opt, wd=1e-2); fit(l, 1)
    m = sipp_cut(sipp(l.model, dls, n=32), .9)
    state = copy.deepcopy(l.opt.state_dict()); apply(l.model, m)
    zero = lambda: all((layers(l.model)[k].weight[~v] == 0).all() for k,v in m.items())
    for _ in range(2):
        before = copy.deepcopy(l.model); l.opt.load_state_dict(state); l.fit(1, cbs=MaskCallback(m), reset_opt=False)
        state = copy.deepcopy(l.opt.state_dict())
        assert zero() and any(not torch.equal(a, b) for a,b in zip(before.parameters(), l.model.parameters()))
    # without the callback they would not hold
    l.opt.load_state_dict(state); l.fit(1, reset_opt=False); assert not zero()

@pytest.mark.parametrize('kw, text', ((dict(variant='best'), 'variant'), (dict(n=0), 'n=0'), (dict(delta=2.), 'delta'),
                                      (dict(split='all'), 'split'),
                                      (dict(n=8, delta=0.), 'delta'), (dict(n=8, delta=-1.), 'delta'),
                                      (dict(n=8, delta=math.nan), 'delta'),
                                      (dict(n=8, c=math.nan), 'c=nan'), (dict(n=8, c=0.), 'c=0'),
                                      (dict(n=8, c=-3.), 'c=-3'), (dict(n=8, c='3'), "c='3'")))
@pytest.mark.parametrize('f', (sipp, pfp))
def test_bad_arguments(trained, dls, f, kw, text):
    with pytest.raises(ValueError, match=text): f(trained.model, dls, **kw)

@pytest.mark.parametrize('f', (sipp, pfp))
def test_graphs_of_other_models(trained, dls, f):
    with pytest.raises(TypeError, match='graph'): f(trained.model, dls, n=8, graph='x')
    other = trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Linear(7, 10)), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="graph: its layer '1'"): f(trained.model, dls, n=8, graph=other)
    part = trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 64)), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="graph: it does not know the model's layer '2'"):
        f(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 10)), dls, n=8, graph=part)

def test_messages(trained, dls, rand):
    with pytest.raises(ValueError, match='needs images'): sipp(trained.model)
    with pytest.raises(ValueError, match='reduce'): sipp(trained.model, dls, reduce='sum')
    with pytest.raises(ValueError, match='sparsity'): sipp_cut(rand, 90)
    with pytest.raises(ValueError, match='sparsity'): equalise(pfp(trained.model, dls, n=8), 1.)
    with pytest.raises(ValueError, match='keep'): sipp_cut(rand, .5, keep=('fc1',))
    det, p = sipp(trained.model, dls, n=8), pfp(trained.model, dls, n=8)
    for f in (lambda: equalise(det, .5), lambda: sample_rows(det, .5), lambda: sipp_cut(p, .5)):
        with pytest.raises(ValueError, match='scores: made by'): f()
    with pytest.raises(ValueError, match="keep='fc9'"): equalise(p, .5, keep='fc9')
    with pytest.raises(ValueError, match='min_keep'): sipp_cut(rand, .5, min_keep=0)
    with pytest.raises(ValueError, match='budget=-1'): spread([1.], [1.], [3], -1)
    with pytest.raises(ValueError, match='expected a Linear or Conv2d'):
        sensitivity(nn.Conv1d(2, 3, 1), torch.rand(2, 2, 4))
    with pytest.raises(ValueError, match='expected inputs of Linear'): sensitivity(nn.Linear(4, 3), torch.rand(2, 5))
    with pytest.warns(UserWarning, match='out of reach'): m = equalise(p, .9999)
    assert all(int(v.sum()) >= 1 for v in m.values())

def test_a_layer_of_zeros_keeps_the_weight_it_had():
    "No sensitivity, no order: the weight that is kept is the one an earlier round kept, as the second key says."
    s = {'a': torch.rand(3, 4), 'b': torch.zeros(2, 4)}; first = {k:torch.zeros_like(v) for k,v in s.items()}
    first['b'][1, 2] = 1
    sc = Scores(s, 'weight', labels={k:(_sampling_row(torch.ones_like(v)), torch.tensor([30.])) for k,v in s.items()},
                tiebreak=first, meta=dict(variant='rand', c=3., seed=0), method='sipp')
    assert sipp_cut(sc, .6)['b'].nonzero().tolist() == [[1, 2]]
