"""Ranks: Eckart and Young, numpy, scikit-learn and brute force over every choice of ranks and groups."""
import copy, itertools, math, warnings
import numpy as np, pytest, scipy.linalg, torch, torch.nn.functional as F
from fractions import Fraction
from hypothesis import given, settings, strategies as st
from sklearn.decomposition import PCA
from torch import nn
from neuronprune import lowrank
from neuronprune.allocate import allocate
from neuronprune.core import generator, layers
from neuronprune.masks import Mask, Scores
from neuronprune.data import get_dls
from neuronprune.lowrank import (VARIANTS, alds, cut, folded, groupings, output_moments, pca, principal, spectrum, svd,
                                 tail_error)
from neuronprune.forms import unpacked
from neuronprune.models import build
from neuronprune.pipeline import channel_table, prune
from neuronprune.costs import count_macs, count_params
from neuronprune.surgery import Factored, apply, difference, factorise, merge, shrink
from neuronprune.train import fit, learner
from test_graph import found

def rnd(*s, seed=0): return torch.randn(*s, generator=generator(seed))
def quiet(*a, **kw):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return cut(*a, **kw)

def net(seed=0):
    "A convolution with everything, one that reads it, and two linear layers; weights in general position."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2, padding_mode='reflect'), nn.ReLU(),
                             nn.Conv2d(8, 6, 3, bias=False), nn.Flatten(),
                             nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
XB = rnd(7, 3, 8, 8)

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64, device='cpu')

def weights_of(model): return sum(m.weight.numel() for m in layers(model).values())

# ---- which layers

def test_folded_lists_what_it_leaves():
    m = nn.ModuleDict(dict(a=nn.Conv2d(3, 8, 3), g=nn.Conv2d(8, 8, 3, groups=2), one=nn.Linear(9, 1), s=nn.Linear(4, 4),
                           t=nn.Linear(4, 4), c1=nn.Conv1d(2, 5, 3)))
    m['t'].weight = m['s'].weight
    mats, skipped = folded(m)
    assert ({k:tuple(v.shape) for k,v in mats.items()} == dict(a=(8, 27), c1=(5, 6))
            and set(skipped) == {'g', 'one', 's', 't'} and mats['a'].dtype == torch.float64)
    assert ('grouped' in skipped['g'] and 'as many' in skipped['one']
            and skipped['s'] == "it shares its weight with 't'" and skipped['t'] == "it shares its weight with 's'")
    assert torch.equal(mats['a'], m['a'].weight.detach().double().reshape(8, 27))

# ---- singular values

@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_spectrum_is_numpys(o, k, width, seed):
    w = rnd(o, k*width, seed=seed).double(); s = spectrum(w, k)
    want = np.stack([np.linalg.svd(b, compute_uv=False) for b in np.split(w.numpy(), k, axis=1)])
    assert s.shape == (k, min(o, width)) and np.allclose(s, want, atol=1e-10)

@settings(max_examples=40)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=8), st.sampled_from(VARIANTS))
def test_tail_errors_by_hand(s, variant):
    s = sorted(s, reverse=True); got = tail_error(torch.tensor(s, dtype=torch.float64), variant).tolist(); n = len(s)
    want = dict(energy=[sum(v*v for v in s[i:]) for i in range(n)], nuclear=[sum(s[i:]) for i in range(n)], error=s,
                uniform=[1-i/n for i in range(n)])[variant]
    top = 1 if variant == 'uniform' else want[0]
    if top > 1e-300: assert np.allclose(got, [v/top for v in want], rtol=1e-9, atol=1e-15)
    assert all(a >= b for a,b in zip(got, got[1:])), 'never increasing: a threshold keeps the first components'

@pytest.mark.parametrize('j', [1, 2, 5])
def test_eckart_young(j):
    m = net(); mats, _ = folded(m)
    for n,w in mats.items():
        r = min(w.shape); j_ = min(j, r-1); cut_ = apply(copy.deepcopy(m), Mask({n: torch.arange(r) < j_}, 'rank'))
        u, s, vh = scipy.linalg.svd(w.numpy(), full_matrices=False)
        got = layers(cut_)[n].weight.detach().double().reshape(w.shape).numpy(); off = w.numpy()-got
        assert np.allclose(got, u[:, :j_]*s[:j_] @ vh[:j_], atol=1e-6)
        assert (np.linalg.norm(off, 2) == pytest.approx(s[j_], rel=1e-5)
                and (off**2).sum() == pytest.approx((s[j_:]**2).sum(), rel=1e-5))
        assert np.linalg.matrix_rank(got, tol=1e-4*s[0]) == j_
        assert float(tail_error(torch.tensor(s))[j_]) == pytest.approx((off**2).sum()/(w.numpy()**2).sum(), rel=1e-4)
        assert all(torch.equal(p, q) for (a,p),(_,q) in zip(m.named_parameters(), cut_.named_parameters())
                   if a != f'{n}.weight'), 'only this weight changed'

def test_components_in_the_middle_can_go():
    w = net()[4].weight.detach(); u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]).bool()
    got = apply(net(), Mask({'4': keep}, 'rank'))[4].weight.detach().double()
    assert torch.allclose(got, u*(s*keep) @ vh, atol=1e-6)
    small = shrink(net(), Mask({'4': keep}, 'rank'), XB); assert small[4][0].weight.shape == (4, 24)

# ---- the budget

@st.composite
def rank_scores(draw, groups=True):
    "Random tables: layers of random shapes, scores with ties, groupings with prices of their own."
    units, cost, more, gen = {}, {}, {}, generator(draw(st.integers(0, 9999)))
    coarse = draw(st.sampled_from([3, 10, 10**6]))
    fall = lambda r: (torch.rand(r, generator=gen, dtype=torch.float64).mul(coarse).round()/coarse).sort(
        descending=True).values
    for i in range(draw(st.integers(1, 4))):
        o, k = draw(st.integers(2, 9)), draw(st.sampled_from([4, 6, 8, 12]))
        units[f'l{i}'], cost[f'l{i}'] = fall(min(o, k)), o+k
        more[f'l{i}'] = ([[g, k+g*o, fall(min(o, k//g)).tolist()] for g in range(2, k+1) if k % g == 0 and k+g*o < o*k]
                         if groups else [])
    return Scores(units, 'rank', cost=cost, meta=dict(groupings=more))

def price(sc, n, keep, k):
    "Weights of layer `n` with this mask."
    r, c = len(sc[n]), int(sc.cost[n]); j = int(keep.view(k, -1)[0].sum())
    assert (keep.view(k, -1) == keep.view(k, -1)[0]).all()
    return min(r*(c-r), j*next((p for g,p,_ in sc.meta['groupings'][n] if g == k), c))
def whole(sc, n): r = len(sc[n]); return r*(int(sc.cost[n])-r)
def error(sc, n, keep, k):
    e = next((e for g,_,e in sc.meta['groupings'][n] if g == k), sc[n].tolist()); j = int(keep.view(k, -1)[0].sum())
    return e[j] if j < len(e) else 0.
def k_of(keep): return len(keep) if keep.ndim == 2 else 1

@settings(max_examples=200)
@given(rank_scores(), st.floats(0, .99))
def test_the_budget_is_met_from_below_to_one_rank(sc, s):
    mask = quiet(sc, s); total = sum(whole(sc, n) for n in sc)
    saved = total-sum(price(sc, n, v, k_of(v)) for n,v in mask.items()); budget = math.floor(Fraction(str(s))*total)
    assert (saved <= budget and mask.meta['achieved'] == pytest.approx(saved/total) and mask.meta['of'] == 'params'
            and mask.meta['requested'] == s)
    most = total-sum(min([whole(sc, n), int(sc.cost[n])]) for n in sc)
    dearest = max([int(sc.cost[n]) for n in sc]+[p for o in sc.meta['groupings'].values() for _,p,_ in o])
    assert saved > budget-dearest or saved == most, 'one more rank, of one grouping, would be too much'
    for n,v in mask.items():
        v = v.view(k_of(v), -1); assert v.any() and (v[:, :-1] | ~v[:, 1:]).all(), 'the first components'
        assert price(sc, n, mask[n], k_of(mask[n])) < whole(sc, n) or v.all(), 'a layer that does not pay is whole'

@settings(max_examples=60)
@given(rank_scores(), st.floats(0, .9), st.floats(0, .9))
def test_more_sparsity_never_leaves_more(sc, a, b):
    a, b = sorted((a, b)); assert quiet(sc, a).meta['achieved'] <= quiet(sc, b).meta['achieved']

def choices(sc, n):
    "Every form of a layer: (weights, error)."
    r, c = len(sc[n]), int(sc.cost[n]); tables = [(1, c, sc[n].tolist())]+sc.meta['groupings'][n]
    return [(whole(sc, n), 0.)]+[(p*j, e[j] if j < len(e) else 0.) for _,p,e in tables for j in range(1, len(e)+1)]

@settings(max_examples=150)
@given(rank_scores(), st.floats(.05, .95))
def test_no_choice_of_groups_and_ranks_has_a_smaller_largest_error(sc, s):
    "Brute force over all pairs (k, j) of all layers, at the size that `cut` used."
    mask = quiet(sc, s)
    size, worst = (sum(price(sc, n, v, k_of(v)) for n,v in mask.items()),
                   max(error(sc, n, v, k_of(v)) for n,v in mask.items()))
    per = [sorted({(w, e) for w,e in choices(sc, n)}) for n in sc]
    pareto = [[o for o in p if not any(q[0] <= o[0] and q[1] <= o[1] and q != o for q in p)] for p in per]
    best = min(max(e for _,e in c) for c in itertools.product(*pareto) if sum(w for w,_ in c) <= size)
    assert worst == pytest.approx(best, abs=1e-12)

@settings(max_examples=60)
@given(rank_scores(groups=False), st.floats(0, .9))
def test_one_threshold_reproduces_a_cut(sc, s):
    mask = quiet(sc, s); gone = [float(v) for n in sc for v in sc[n][~mask[n]]]; total = sum(whole(sc, n) for n in sc)
    if not gone: return
    t = max(gone); loose, tight = quiet(sc, threshold=t), quiet(sc, threshold=math.nextafter(t, 9))
    for n in sc:
        if len(loose[n].unique()) > 1 or len(tight[n].unique()) > 1:
            assert (mask[n] <= loose[n]).all() and (tight[n] <= mask[n]).all(), (
                'between keeping and dropping the ties at the threshold')
    assert loose.meta['achieved'] <= mask.meta['achieved'] <= tight.meta['achieved']

def test_ties_go_by_layer_and_from_the_end():
    "Two layers of 36 weights, 12 per rank: factors pay from two ranks down."
    sc = Scores({'a': torch.ones(6), 'b': torch.ones(6)}, 'rank', cost=dict(a=12, b=12))
    at = lambda s: [int(v.sum()) for v in cut(sc, s).values()]
    assert ([at(s) for s in (.16, .17, .34, .5, .67)] == [[6, 6], [2, 6], [1, 6], [1, 2], [1, 1]]
            and cut(sc, .2)['a'].tolist() == [True]*2+[False]*4)

def test_keep_and_min_keep():
    sc = svd(net()); m = quiet(sc, .9, keep='4', min_keep=2)
    assert m['4'].all() and all(v.sum() >= 2 for v in m.values()) and int(m['6'].sum()) == 2
    assert (all(v.all() for k,v in quiet(sc, .5, keep=['0', '2']).items() if k in '02')
            and quiet(sc, .5, keep='*').sparsity == 0)
    with pytest.warns(UserWarning, match='out of reach'): cut(sc, .95)
    with warnings.catch_warnings(): warnings.simplefilter('error'); cut(sc, .3)

ONE = Scores({'a': torch.tensor([3., 2, 1])}, 'rank', cost={'a': 8})
@pytest.mark.parametrize('kw,err,said', [
    (dict(), ValueError, 'exactly one of the two'), (dict(sparsity=.5, threshold=1.), ValueError, 'exactly one'),
    (dict(sparsity=50), ValueError, 'did you mean 0.5'), (dict(sparsity=1.), ValueError, 'sparsity'),
    (dict(sparsity=float('nan')), ValueError, 'sparsity'), (dict(threshold=float('nan')), ValueError, 'finite'),
    (dict(threshold=True), ValueError, 'threshold'), (dict(sparsity=.5, keep='b'), ValueError, "keep='b'"),
    (dict(sparsity=.5, keep=3), TypeError, 'keep: expected an Iterable'),
    (dict(sparsity=.5, keep=[3]), TypeError, 'keep: expected a str'),
    (dict(sparsity=.5, min_keep=0), ValueError, 'min_keep'), (dict(sparsity=.5, min_keep=1.), TypeError, 'min_keep'),
    (dict(scores=None, sparsity=.5), TypeError, 'scores'),
    (dict(scores=Scores({'a': torch.rand(3)}, 'channel'), sparsity=.5), ValueError, "unit 'rank'"),
    (dict(scores=Scores({'a': torch.rand(3)}, 'rank'), sparsity=.5), ValueError, "no entry for 'a'"),
    (dict(scores=Scores({'a': torch.rand(2, 3)}, 'rank', cost={'a': 9}), sparsity=.5), ValueError, '[r]')])
def test_cut_errors(kw, err, said):
    with pytest.raises(err) as e: cut(**{'scores': ONE, **kw})
    assert said in str(e.value)

# ---- svd

@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('s', [0., .2, .5, .8])
def test_svd_means_the_same_error_everywhere(variant, s):
    m = net(); sc = svd(m, variant=variant); mask = quiet(sc, s); small = shrink(m, mask, XB)
    assert weights_of(small) == round((1-mask.meta['achieved'])*weights_of(m)), 'the budget counts what is stored'
    top = [float(sc[n][~v].max()) for n,v in mask.items() if not v.all()]
    low = [float(sc[n][v].min()) for n,v in mask.items() if not v.all() and v.sum() > 1]
    assert not top or not low or max(top) <= min(low)+1e-12
    if variant == 'uniform' and len(top) > 1: assert max(top)-min(top) <= max(1/len(v) for v in sc.values())+1e-12
    if s == 0:
        alike = lambda o: all(map(torch.equal, m.state_dict().values(), o.state_dict().values()))
        assert mask.sparsity == 0 and alike(small) and alike(apply(copy.deepcopy(m), mask)), 'bit-identical'

def test_plain_allocation_counts_ranks_and_nothing_else():
    m = net(); sc = svd(m); mask = allocate(sc, .5); n = sum(map(len, sc.values()))
    assert (mask.unit == 'rank' and mask.counts() == (n-n//2, n)
            and difference(apply(copy.deepcopy(m), mask), shrink(m, mask, XB), XB) <= 1e-5)
    for of in ('params', 'macs'):
        with pytest.raises(ValueError, match='lowrank.cut'): allocate(sc, .5, of=of)

@pytest.mark.parametrize('f,s', [(f, s) for f in (svd, alds) for s in (.3, .6, .85)])
def test_cut_prices_what_shrink_stores(f, s):
    m = net(1); mask = quiet(f(m), s); small = shrink(m, mask, XB)
    biases = lambda o: sum(p.numel() for n,p in o.named_parameters() if n.endswith('bias'))
    assert (biases(m) == biases(small)
            and 1-(count_params(small)-biases(m))/weights_of(m) == pytest.approx(mask.meta['achieved'], abs=1e-12))
    assert s-.04 < mask.meta['achieved'] <= s

@pytest.mark.parametrize('f', [svd, alds])
def test_the_same_mask_after_a_file(f, tmp_path):
    m = net(); sc = f(m); sc.save(tmp_path/'s'); back = Scores.load(tmp_path/'s')
    mask, again = quiet(sc, .6), quiet(back, .6); mask.save(tmp_path/'m'); read = Mask.load(tmp_path/'m')
    for o in (again, read):
        assert all(torch.equal(v, o[k]) for k,v in mask.items()) and o.meta == mask.meta
        assert all(torch.equal(p, q)
                   for p,q in zip(apply(copy.deepcopy(m), mask).parameters(), apply(copy.deepcopy(m), o).parameters()))
    assert back.meta == sc.meta and all(back.cost[k] == v for k,v in sc.cost.items())

# ---- alds

@settings(max_examples=30)
@given(st.integers(2, 8), st.sampled_from([2, 3, 4, 6]), st.sampled_from([1, 4]), st.integers(0, 99))
def test_groupings_by_loops(o, channels, taps, seed):
    w = rnd(o, channels*taps, seed=seed).double()
    k_all = [k for k in range(2, channels+1) if channels % k == 0 and channels*taps + k*o < o*channels*taps]
    for (k,c,e),(_,_,b),want in zip(groupings(w, channels), groupings(w, channels, bound=True), k_all, strict=True):
        assert k == want and c == channels*taps + k*o
        parts = np.split(w.numpy(), k, axis=1); svs = [np.linalg.svd(p) for p in parts]
        top = np.linalg.norm(w.numpy(), 2)
        assert np.allclose(e, np.max([s for _,s,_ in svs], 0)/top) and np.allclose(b, np.sqrt(k)*np.array(e))
        for j in range(len(e)):
            off = np.concatenate([p-(u[:, :j]*s[:j]) @ v[:j] for p,(u,s,v) in zip(parts, svs)], 1)
            assert e[j]-1e-9 <= np.linalg.norm(off, 2)/top <= b[j]+1e-9
    assert [k for k,*_ in groupings(w, channels, 2)] == [k for k in k_all if k <= 2]

def test_alds_groups_where_groups_are():
    "Four unrelated groups of input channels, rank one each."
    m = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 3))
    m[0].weight.data = torch.cat([rnd(16, 1, seed=i) @ rnd(1, 18, seed=9+i) for i in range(4)], 1).view(16, 8, 3, 3)
    mask = cut(alds(m), .757)
    assert (mask['2'].all() and mask['0'].shape == (4, 16) and (mask['0'].sum(1) == 1).all()
            and mask.meta['groups']['0'] == 4)
    small = shrink(m, mask, rnd(5, 8, 4, 4)); assert difference(m, small, rnd(5, 8, 4, 4)) < 1e-5, 'nothing is lost'
    assert (isinstance(small[0], Factored) and small[0][0].groups == 4 and small[0][0].weight.shape == (4, 2, 3, 3)
            and small[0][1].weight.shape == (16, 4, 1, 1))

@pytest.mark.parametrize('s', [.3, .6, .8])
def test_alds_end_to_end(s):
    m = net(3); mask = quiet(alds(m, bound=True), s); small = shrink(m, mask, XB)
    masked = apply(copy.deepcopy(m), mask)
    assert weights_of(small) == round((1-mask.meta['achieved'])*weights_of(m)) and difference(masked, small, XB) <= 1e-5
    for n,v in mask.items():
        k = k_of(v); w, got = (layers(o)[n].weight.detach().double().flatten(1) for o in (m, masked))
        for a,b,keep in zip(w.chunk(k, 1), got.chunk(k, 1), v.view(k, -1)):
            u, t, vh = torch.linalg.svd(a, full_matrices=False); assert torch.allclose(b, u*(t*keep) @ vh, atol=1e-6)

def test_one_group_is_svd_error():
    a, b = alds(net(), max_groups=1), svd(net(), variant='error')
    assert all(torch.equal(a[k], v) for k,v in b.items()) and not any(a.meta['groupings'].values())
    assert all(torch.equal(v, cut(b, .5)[k]) for k,v in cut(a, .5).items())
    with pytest.raises(ValueError, match='max_groups'): alds(net(), max_groups=0)

# ---- pca

def layer(bias=True, seed=0):
    m = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=bias)); m[1].weight.data = rnd(10, 64, seed=seed)/8
    if bias: m[1].bias.data = rnd(10, seed=1)
    return m

def test_pca_is_scikit_learns(dls):
    m = layer(); sc = pca(m, dls, n=300); xb = next(iter(dls.valid))[0]; u, centre = sc.labels['1']
    from neuronprune.data import calib_batch
    y = m(calib_batch(dls, n=300, split='train', seed=0)[0]).detach().double().numpy(); ref = PCA().fit(y)
    lam = ref.explained_variance_*299/300
    assert np.allclose(centre, ref.mean_) and np.allclose(np.abs(u.T.numpy() @ ref.components_.T), np.eye(10),
                                                          atol=1e-5)
    assert np.allclose(sc['1'], lam/lam.cumsum()/74, rtol=1e-6)
    for j in (1, 4, 9):
        cut_ = apply(copy.deepcopy(m), Mask({'1': torch.arange(10) < j}, 'rank', labels=sc.labels)); p = PCA(j).fit(y)
        want = p.inverse_transform(p.transform(m(xb).detach().double().numpy()))
        assert np.allclose(cut_(xb).detach(), want, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a,b in zip(cut_.parameters(), apply(copy.deepcopy(cut_), Mask(
            {'1': torch.arange(10) < j}, 'rank', labels=sc.labels)).parameters())), 'twice is once'

def test_without_a_bias_directions_pass_through_zero(dls):
    m = layer(bias=False); sc = pca(m, dls, n=100); u, centre = sc.labels['1']; assert not centre.any()
    from neuronprune.data import calib_batch
    y = m(calib_batch(dls, n=100, split='train', seed=0)[0]).detach().double()
    _, s, vh = torch.linalg.svd(y, full_matrices=False)
    assert (torch.allclose((u.T @ vh.T).abs(), torch.eye(10).double(), atol=1e-5)
            and torch.allclose(sc['1']*74, (s**2)/(s**2).cumsum(0)))
    bad = Mask({'1': torch.arange(10) < 3}, 'rank', labels={'1': (u, torch.ones(10))})
    with pytest.raises(ValueError, match='bias to take it up'): apply(m, bad)

def test_convolution_outputs_position_by_position():
    m = net(); xb = rnd(20, 3, 8, 8, seed=4); got = output_moments(m, xb, ['0', '2', '4'])
    acts, x = {}, xb
    for i,l in enumerate(m): x = l(x); acts[str(i)] = x.detach().double()
    for n in got:
        y = acts[n].movedim(1, 0).flatten(1) if acts[n].ndim == 4 else acts[n].T
        assert (got[n][0] == y.shape[1] and torch.allclose(got[n][1], y.sum(1)) and torch.allclose(got[n][2], y @ y.T)
                and got[n][3] == y.shape[1]//20)
    again = output_moments(m, xb, ['2'], bs=3)['2']; assert torch.allclose(again[2], got['2'][2], rtol=1e-5)
    few = output_moments(m, xb, ['0'], max_columns=60, seed=1)['0']; assert few[0] == 60 and few[3] == 16
    assert (torch.equal(few[2], output_moments(m, xb, ['0'], max_columns=60, seed=1)['0'][2])
            and not torch.equal(few[2], output_moments(m, xb, ['0'], max_columns=60, seed=2)['0'][2]))

def test_principal_is_numpys():
    y = rnd(5, 40).double()+3; lam, u, m = principal(40, y.sum(1), y @ y.T)
    want, _ = np.linalg.eigh(np.cov(y.numpy(), bias=True))
    assert (np.allclose(lam, want[::-1]) and torch.allclose(u @ torch.diag(lam) @ u.T, torch.cov(y, correction=0))
            and torch.allclose(m, y.mean(1)))

def test_pca_travels_with_its_directions(dls, tmp_path):
    m = build('lenet5', 1, 10, 16, seed=0); d = get_dls('digits', size=16, bs=64, device='cpu'); sc = pca(m, d, n=64)
    mask = cut(sc, .6); xb = next(iter(d.valid))[0][:20]
    mask.save(tmp_path/'m'); read = Mask.load(tmp_path/'m')
    a, b = apply(copy.deepcopy(m), mask), apply(copy.deepcopy(m), read)
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters())) and difference(a, m, xb) > 1e-3
    assert difference(a, shrink(m, read, xb), xb) <= 1e-5 and difference(
        a, apply(copy.deepcopy(m), Mask(mask.units, 'rank')), xb) > 1e-3, 'the singular directions are others'
    assert (allocate(sc, .5).labels.keys() == sc.labels.keys()
            and (mask & Mask.ones_like(mask)).labels.keys() == sc.labels.keys())

def test_price_per_macs(dls):
    m = net(); d = get_dls('digits', size=8, bs=64, device='cpu', c_in=3)
    a, b = pca(m, d, n=50), pca(m, d, n=50, per='macs')
    assert torch.allclose(a['0'], b['0']*16) and torch.allclose(a['4'], b['4']) and b.meta['per'] == 'macs'

@pytest.mark.parametrize('kw,err,said',
                         [(dict(per='flops'), ValueError, 'per='), (dict(max_columns=0), ValueError, 'max_columns'),
                          (dict(n=10**6), ValueError, 'n=1000000'), (dict(split='all'), ValueError, 'split')])
def test_pca_errors(dls, kw, err, said):
    with pytest.raises(err) as e: pca(layer(), dls, **kw)
    assert said in str(e.value)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('f', [svd, alds, pca])
def test_other_dtypes(dls, f, dtype):
    m = layer().to(dtype); full = copy.deepcopy(m).float(); got, want = (f(o, dls) for o in (m, full))
    assert m[1].weight.dtype == dtype
    assert torch.allclose(got['1'], want['1'], rtol=0,
                          atol=float(want['1'].max())*(1e-5 if f is not pca or dtype == torch.float64 else .02))

def test_images_that_do_not_fit_are_named():
    m = layer()
    with pytest.raises(ValueError, match=r'xb: the model cannot digest a batch of shape \(3, 1, 9, 9\)'):
        pca(m, get_dls('digits', size=9, bs=64, device='cpu'), n=3)
    assert not m[1]._forward_hooks

def test_layers_that_are_never_reached(dls):
    m = layer(); m.spare = nn.Linear(9, 9); m.forward = lambda x: m[1](m[0](x))
    assert pca(m, dls, n=50).skipped == {'spare': 'never reached in the forward pass'}

# ---- the whole flow

@pytest.mark.parametrize('name,kw', [('svd', {}), ('svd', dict(variant='error')), ('alds', {}),
                                     ('alds', dict(bound=True)), ('pca', dict(n=300))])
def test_prune_ends_in_factors_that_train(dls, name, kw):
    learn = fit(learner(build('mlp', 1, 10, 8, seed=0), dls, lr=.1), 3); dense = copy.deepcopy(learn.model)
    res = prune(learn, name, .8, fine_tune_epochs=2, shrink=True, **kw); r = res.report
    assert (res.model is learn.model and any(isinstance(m, Factored) for m in res.model.modules())
            and res.mask.unit == 'rank')
    assert (r.weights_removed == pytest.approx(res.mask.meta['achieved']) and .78 < r.weights_removed <= .8
            and r.params_after == count_params(res.model) < .25*r.params_before)
    assert (r.macs_after == count_macs(res.model, next(iter(dls.valid))[0]) < .25*r.macs_before
            and r.memory_after['dense'] == pytest.approx(r.memory_before['dense']*(1-r.weights_removed)))
    cut_only = shrink(dense, res.mask, next(iter(dls.valid))[0][:9])
    assert [p.shape for p in cut_only.parameters()] == [p.shape for p in res.model.parameters()] and all(
        (p != q).any() for p,q in zip(cut_only.parameters(), res.model.parameters())), 'every factor was trained'
    assert r.tuned.accuracy > .6

def test_prune_without_shrinking_keeps_shape_and_rank(dls):
    learn = fit(learner(build('mlp', 1, 10, 8, seed=0), dls, lr=.1), 3)
    res = prune(learn, 'svd', .8, fine_tune_epochs=1); names = list(build('mlp', 1, 10, 8).state_dict())
    assert (list(learn.model.state_dict()) == names and res.model is learn.model
            and res.report.params_after < .25*res.report.params_before)
    for n,v in res.mask.items():
        assert np.linalg.matrix_rank(layers(res.model)[n].weight.detach().double().numpy(), tol=1e-4) <= int(v.sum())

def test_rounds_merge_and_cut_again(dls):
    learn = fit(learner(build('mlp', 1, 10, 8, seed=0), dls, lr=.1), 3)
    res = prune(learn, 'alds', .8, rounds=2, fine_tune_epochs=1, shrink=True)
    assert .78 < res.report.weights_removed <= .8 and res.report.extra['rounds'] == 2

def test_the_table_of_the_experiments_page(dls):
    learn = fit(learner(build('mlp', 1, 10, 8, seed=0), dls, lr=.1), 1)
    res = prune(learn, 'alds', .6, fine_tune_epochs=0)
    t = channel_table(res, build('mlp', 1, 10, 8))
    assert t.layer.tolist() == list(res.mask) and t.kept.tolist() == [int(v.sum()) for v in res.mask.values()]

def test_layers_that_a_fused_encoder_reads_itself_are_skipped_and_unpacked_frees_them():
    net = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(), nn.Linear(64, 8))
    mats, skipped = lowrank.folded(net)
    assert list(mats) == ['2'] and set(skipped) == {'0.self_attn.out_proj', '0.linear1', '0.linear2'}
    assert all('unpacked' in o for o in skipped.values())
    free = unpacked(net); mats, _ = lowrank.folded(free)
    assert {'0.linear1', '0.linear2'} <= set(mats)
    small = shrink(free, allocate(Scores({k:torch.rand(min(w.shape)) for k,w in mats.items()}, 'rank'), .5),
                   torch.rand(4, 4, 16))
    with torch.no_grad(): assert small.eval()(torch.rand(4, 4, 16)).shape == (4, 8)
