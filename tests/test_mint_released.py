"The released MINT against a literal, slow transcription of what it does, and each of its defects pinned."
import copy, random
import numpy as np, pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from hypothesis import assume, given, settings, strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors
from torch import nn
from neuronprune import mint, mint_released as rel
from neuronprune.allocate import allocate
from neuronprune.core import UnsupportedLayerError, generator
from neuronprune.masks import Mask, Scores
from neuronprune.data import get_dls
from neuronprune.graph import trace
from neuronprune.mint_released import (conv_out, cut, dependency, pair_score, released_crossings, released_groups,
                                       released_neighbours, sample_rows, score, stored_tree, weight_mask)
from neuronprune.surgery import apply, difference, shrink

# The literal version: loops, explicit columns, scikit-learn's ball tree, SciPy's tree, the array `indices`

def literal_pool(X, Y, Z):
    n = len(X); t = 2*n//3; h = t//2
    ask = NearestNeighbors(n_neighbors=1, algorithm='ball_tree', metric='l2').fit(Z[:h]).kneighbors(Z[h:t])[1]
    borrowed = np.array([Y[h:t][ask[i,0]] for i in range(h)])
    return np.vstack([np.hstack([X, Y, Z])[t:], np.hstack([X[:h], borrowed, Z[:h]])]), n-t

def literal_tree(pool):
    N = len(pool); d = np.zeros((N, N))
    for i in range(N):
        for j in range(N): d[i,j] = np.linalg.norm(pool[i]-pool[j])
    return minimum_spanning_tree(csr_matrix(d))

def literal(X, Y, Z, repeats=1):
    total = 0.
    for _ in range(repeats):
        pool, m = literal_pool(X, Y, Z); tree, r = literal_tree(pool), 0
        for e in range(len(pool)-1):
            if (tree.indices[e] >= m and e < m) or (tree.indices[e] < m and e >= m): r += 1
        total += 1 - min(r, m)/(len(X)/3)
    return total/repeats

def literal_all(P, C, parent, child):
    return np.array([[literal(C[:,child == k], P[:,parent == g], P[:,(parent != g) & (parent >= 0)])
                      for g in range(parent.max()+1)] for k in range(child.max()+1)])

def data(kind, seed, n, d):
    "Rows [n, d]: continuous, continuous with repetitions, or on a grid full of ties."
    rng = np.random.default_rng(seed)
    if kind == 'grid': return rng.integers(0, 4, (n, d)).astype(float)
    x = rng.normal(size=(n, d))
    return x[rng.integers(0, n, n)] if kind == 'twice' else x

kinds = st.sampled_from(['normal', 'twice', 'grid'])

@settings(max_examples=60)
@given(kind=kinds, seed=st.integers(0, 2**20), n=st.integers(3, 50), a=st.integers(1, 3), b=st.integers(1, 3),
       c=st.integers(1, 4))
def test_pair_is_the_literal_one(kind, seed, n, a, b, c):
    X, P = data(kind, seed, n, a), data(kind, seed+1, n, b+c)
    assume(len(np.unique(literal_pool(X, P[:,:b], P[:,b:])[0], axis=0)) > 1)
    assert pair_score(X, P[:,:b], P[:,b:]) == pytest.approx(literal(X, P[:,:b], P[:,b:]), abs=1e-12)

@pytest.mark.parametrize('n', [60, 61, 62, 100])
@pytest.mark.parametrize('kind', ['normal', 'twice', 'grid'])
def test_all_pairs_are_the_literal_ones(kind, n):
    P, C = data(kind, n, n, 11), data(kind, n+1, n, 7)
    parent, child = np.array([0,0,1,1,2,2,3,3,4,4,-1]), np.array([0,0,0,1,1,1,-1])
    want = literal_all(P, C, parent, child)
    assert np.allclose(dependency(P, C, parent, child), want, atol=1e-12) and len(np.unique(want)) > 2
    shuffled = np.array([3,-1,1,0,2,1,0,2,3,1,0])      # groups need not be in a row
    assert np.allclose(dependency(P, C, shuffled, child), literal_all(P, C, shuffled, child), atol=1e-12)

def test_float32_is_computed_in_float64():
    P, C = (data('normal', s, 90, 6).astype('f4') for s in (0, 1)); parent, child = np.arange(6)//2, np.arange(6)//3
    assert np.array_equal(dependency(P, C, parent, child), dependency(P.astype('f8'), C.astype('f8'), parent, child))

def test_trees_grow_on_distances_in_double_precision(monkeypatch):
    "Squares would order lengths that the root makes equal."
    P, C = data('normal', 0, 90, 6), data('normal', 1, 90, 2); seen = []
    def spy(d, m): seen.append((d, m)); return released_crossings(d, m)
    monkeypatch.setattr(rel, 'released_crossings', spy)
    dependency(P, C, np.arange(6)//2, [0, 0])
    for g, (d, m) in enumerate(seen):
        pool, want = literal_pool(C, P[:,2*g:2*g+2], np.delete(P, [2*g, 2*g+1], 1))
        assert (m == want and d.dtype == np.float64 and np.allclose(d, cdist(pool, pool), rtol=1e-13, atol=0)
                and np.array_equal(d, d.T))
    assert len(seen) == 3

def test_turns_change_nothing():
    P, C = data('normal', 0, 90, 6), data('normal', 1, 90, 6); args = P, C, np.arange(6)//2, np.arange(6)
    seen = []
    def bar(o): seen.append(len(o)); return o
    assert np.array_equal(dependency(*args), dependency(*args, max_mem=2.1*8*60**2/1e9, bar=bar)) and seen == [3, 3, 3]

@settings(max_examples=60)
@given(kind=kinds, seed=st.integers(0, 2**20), n=st.integers(1, 70), d=st.integers(1, 6))
def test_tree_is_stored_as_scipy_stores_it(kind, seed, n, d):
    x = data(kind, seed, n, d); assume(n == 1 or len(np.unique(x, axis=0)) > 1)
    D = cdist(x, x); t = minimum_spanning_tree(csr_matrix(D)); rows = np.repeat(np.arange(n), np.diff(t.indptr))
    assert np.array_equal(stored_tree(D), np.c_[rows, t.indices].reshape(-1, 2))

@pytest.mark.parametrize('kind', ['normal', 'twice', 'grid'])
def test_large_tree(kind):
    x = data(kind, 3, 700, 4); D = cdist(x, x); t = minimum_spanning_tree(csr_matrix(D))
    assert np.array_equal(stored_tree(D)[:,1], t.indices)

@settings(max_examples=60)
@given(kind=kinds, seed=st.integers(0, 2**20), h=st.integers(1, 40), more=st.integers(0, 1), d=st.integers(1, 5))
def test_neighbours_are_the_literal_ones(kind, seed, h, more, d):
    z = data(kind, seed, 2*h+more, d); z1, z2 = z[:h], z[h:]
    want = NearestNeighbors(n_neighbors=1, algorithm='ball_tree', metric='l2').fit(z1).kneighbors(z2)[1][:h,0]
    assert np.array_equal(released_neighbours(z1, z2), want)
    assert np.array_equal(released_neighbours(z1, z2, cdist(z2, z1, 'sqeuclidean')), want)

@pytest.mark.parametrize('kind', ['twice', 'grid'])
@pytest.mark.parametrize('h', [61, 150, 300])
def test_tied_neighbours_are_the_ball_trees(kind, h):
    "Beyond 60 rows a ball tree has several leaves, and it does not find the first of equally near rows."
    z1, z2 = data(kind, 0, 2*h, 3)[:h], data(kind, 0, 2*h, 3)[h:] + .01*data('normal', 1, h, 3)
    want = NearestNeighbors(n_neighbors=1, algorithm='ball_tree', metric='l2').fit(z1).kneighbors(z2)[1][:,0]
    assert np.array_equal(released_neighbours(z1, z2), want) and (want != cdist(z2, z1).argmin(1)).any()

# The defects

def test_d1_d5_rows():
    y = np.repeat(np.arange(4), [50, 60, 70, 80]); rng = np.random.default_rng(0)
    a, b = sample_rows(y, 50, rng), sample_rows(y, 50, rng)
    assert np.array_equal(np.bincount(y[a]), [50]*4) and np.array_equal(np.bincount(y[b]), [50]*4)
    assert len(np.unique(a)) < 150, 'with replacement (D5)'
    assert (a == b).mean() < .1 and (y[a] == y[b]).mean() < .45, 'two draws have nothing in common (D1)'
    assert (np.diff(y[a]) < 0).sum() > 20, 'shuffled'
    assert len(sample_rows(y, 300, rng)) == 1200, 'more than there are is no problem'
    assert np.array_equal(sample_rows(y, 5, np.random.default_rng(1)),
                          sample_rows(torch.tensor(y), 5, np.random.default_rng(1)))

def test_d1_in_the_score(monkeypatch):
    seen = []
    def spy(P, C, *args, **kw): seen.append((P, C)); return dependency(P, C, *args, **kw)
    monkeypatch.setattr(rel, 'dependency', spy)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    dls = loaders()
    for m in (net[1], net[3]): m.weight.data.copy_(torch.eye(4)); m.bias.data.fill_(5.)
    score(net, dls, n_per_class=30, n_groups=(2, 2), layers=['3'])
    (P, C), = seen
    assert P.shape == C.shape == (90, 4)
    same = (np.abs(P + 5 - C) < 1e-5).all(1)     # the child repeats its parent, if it is the same image
    assert same.mean() < .2
    X = np.concatenate([o[0].flatten(1) + 5 for o in dls.train])
    assert all((np.abs(X - p) < 1e-5).all(1).any() for p in P), 'rows are training images'

def test_d2_neighbours_are_asked_the_wrong_way():
    z = data('normal', 0, 300, 1); z1, z2 = z[:150], z[150:]; near = released_neighbours(z1, z2)
    assert np.array_equal(near, cdist(z2, z1).argmin(1)) and (near == cdist(z1, z2).argmin(1)).mean() < .1
    e, f, z = data('normal', 1, 1200, 3).T[...,None]
    assert np.mean([pair_score(z[i::2]+.3*e[i::2], z[i::2]+.3*f[i::2], z[i::2]) for i in (0, 1)]) > .4, (
        'the true value is 0')

def test_d2_last_row_of_a_longer_third_is_never_lent():
    n = 12; assert 2*n//3 == 8
    n = 11; t = 2*n//3; h = t//2; assert t-h == h+1
    X, Y, Z = data('normal', 0, n, 3).T[...,None]; Y2 = Y.copy(); Y2[t-1] = 1e6
    assert pair_score(X, Y, Z) == pair_score(X, Y2, Z)
    Z2 = Z.copy(); Z2[t-1] = -1e6
    assert pair_score(X, Y, Z) == pair_score(X, Y, Z2), 'nor asked'

def test_d3_counts_positions():
    x = data('normal', 0, 90, 2); D = cdist(x, x); e = stored_tree(D)
    for m in (0, 20, 45, 70, 90):
        j = minimum_spanning_tree(csr_matrix(D)).indices
        assert released_crossings(D, m) == sum((j[i] >= m) != (i >= m) for i in range(89))
    assert released_crossings(D, 45) != ((e >= 45).sum(1) == 1).sum()
    assert np.mean([pair_score(*data('normal', s, 600, 3).T[...,None]) for s in range(4)]) > .2, (
        'independent: the true value is 0')

def test_r_is_capped():
    "The lowest value is that of R = m, which is below 0 when 3 does not divide n."
    assert rel._value(99, 7, 20) == 1 - 7/(20/3) < 0 and rel._value(99, 7, 21) == 0 and rel._value(6, 7, 21) == 1 - 6/7

def test_d5_equal_rows_have_no_edge():
    x = np.array([[0.], [0], [3], [9]]); D = cdist(x, x)
    assert np.array_equal(stored_tree(D), [[0,2], [1,2], [2,3]])

def test_d10_repeating_changes_nothing():
    P = data('normal', 4, 47, 3).T[...,None]; i = np.random.default_rng(0).permutation(47)
    assert literal(*P, repeats=3) == pytest.approx(pair_score(*P), abs=1e-12)
    assert pair_score(*P) != pair_score(*(o[i] for o in P)), 'the order of the rows decides, nothing shuffles them'
    v = dependency(data('normal', 1, 47, 4), data('normal', 2, 47, 2), [0,0,1,1], [0,1])*47/3
    assert np.allclose(v, v.round(), atol=.34) and np.allclose((47/3-v), (47/3-v).round(), atol=1e-9), (
        'one whole number of crossings, no mean')

# The cut

def literal_mask(I, weights, labels, p, UL):
    "The released loop over layers, children and parents; `labels` = layer -> (child groups, parent groups)."
    weights, masks = {k: v.copy() for k, v in weights.items()}, {}
    every = np.sort(np.unique(np.concatenate([v.reshape(-1) for v in I.values()])))
    cutoff = every[np.round(p*every.shape[0]).astype('int')]
    for k, v in I.items():
        K, G = v.shape; w = weights[k]
        for child in range(K):
            share = float(len(np.where(v.reshape(-1) <= cutoff)[0])*(w.shape[0]/G)*(w.shape[1]/K))/np.prod(w.shape[:2])
            here = cutoff
            if share >= UL:
                own = np.sort(np.unique(v.reshape(-1))); here = own[np.round(UL*own.shape[0]).astype('int')]
            for g in range(G):
                if v[child, g] <= here:
                    for a in np.where(labels[k][1] == g)[0]:
                        for b in np.where(labels[k][0] == child)[0]: w[b, a] = 0.
        masks[k] = (w != 0)
    kept = sum(m.sum() for m in masks.values())/sum(m.size for m in masks.values())*100
    return masks, kept

def case(seed, shapes, values):
    """Scores of several layers, tails included where the width is not a multiple of the groups;
    a network with those weights."""
    rng = np.random.default_rng(seed)
    net, I, units, labels, weights, raw, ungrouped = nn.Module(), {}, {}, {}, {}, {}, {}
    for i, (K, G, a, b) in enumerate(shapes):
        k, n_out, n_in = f'l{i}', K*a + (a-1)*(seed%2), G*b + (b-1)*(seed//2%2)
        I[k] = 1 - rng.integers(0, values, (K, G))/values
        c, p = released_groups(n_out, K), released_groups(n_in, G); raw[k] = c, p
        full, lc, lp, tails = rel._with_tail(I[k], c, p)
        units[k], labels[k] = full, (lc, lp)
        if any(v is not None for v in tails.values()): ungrouped[k] = tails
        lin = nn.Linear(n_in, n_out); lin.weight.data[torch.rand(n_out, n_in, generator=generator(seed)) < .05] = 0
        net.add_module(k, lin)
        weights[k] = lin.weight.detach().double().numpy()
    return Scores(units, 'group', labels=labels, meta=dict(ungrouped=ungrouped)), net, I, weights, raw

shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)), min_size=1,
                  max_size=3)

@settings(max_examples=150)
@given(seed=st.integers(0, 2**20), shapes=shapes, values=st.sampled_from([3, 8, 1000]), p=st.floats(0, 1),
       UL=st.one_of(st.just(1.1), st.floats(0, 1), st.sampled_from([.25, .5, .75, 1.])))
def test_d4_cut_is_the_literal_one(seed, shapes, values, p, UL):
    s, net, I, weights, raw = case(seed, shapes, values)
    try: want, kept = literal_mask(I, weights, raw, p, UL)
    except IndexError:
        with pytest.raises(ValueError, match='distinct scores'): cut(s, p, UL)
        return
    got = weight_mask(cut(s, p, UL), net)
    assert all(np.array_equal(got[k].numpy(), want[k]) for k in want)
    assert got.meta['true_prune_percent'] == pytest.approx(kept), 'the percentage kept (D9)'

def toy(v, **kw):
    v = torch.tensor(v)
    return Scores({'fc': v}, 'group', labels={'fc': (torch.arange(v.shape[0]), torch.arange(v.shape[1]))}, **kw)

def test_d4_quantile_of_distinct_values():
    s = toy([[.1, .1, .1, .1], [.1, .1, .2, .3]])
    assert [(~cut(s, p)['fc']).sum() for p in (0, .1, .2, .25, .5)] == [6, 6, 7, 7, 8]       # np.round(1.5) is 2
    assert [(~cut(toy([[.1, .2, .3, .4, .5]]), p)['fc']).sum() for p in (.5, .1, .7)] == [3, 1, 5], (
        'np.round(2.5) is 2, .5 is 0, 3.5 is 4')
    assert (~cut(s, .25, .6)['fc']).sum() == 8 > (~cut(s, .25)['fc']).sum(), 'the cap removes more'
    assert (~allocate(s, .25)['fc']).sum() == 2, 'what a quarter should be'

def test_d4_cap_is_reached_by_the_share_of_blocks():
    s = toy([[.1, .1, .2, .3, .4]]); removed = lambda u: int((~cut(s, .25, u)['fc']).sum())
    # positions 2, 1, 0 of the layer's four values: .3, .2, .1
    assert [removed(u) for u in (1.1, .61, .6, .3, .1)] == [3, 3, 4, 3, 2]

def test_cap_per_layer():
    v = torch.tensor([[.1, .2, .3, .4]]); lab = (torch.zeros(1).long(), torch.arange(4))
    s = Scores({'a': v, 'b': v}, 'group', labels={'a': lab, 'b': lab}); got = cut(s, .5, {'b': .25})
    assert got['a'].tolist() == [[False]*3+[True]] and got['b'].tolist() == [[False]*2+[True]*2]
    assert got.meta['upper_limit'] == {'a': 1.1, 'b': .25} and got.meta['compat'] == 'released'

def test_d8_zero_weights_are_masked():
    net = nn.Sequential(); net.add_module('fc', nn.Linear(4, 2)); nn.init.ones_(net.fc.weight)
    net.fc.weight.data[1,3] = 0
    m = weight_mask(cut(toy([[.1, .1, .2, .2], [.1, .2, .2, .2]]), 0), net)
    assert m.unit == 'weight' and m['fc'].tolist() == [[False, False, True, True], [False, True, True, False]]

def test_d9_is_what_is_kept():
    net = nn.Sequential(); net.add_module('fc', nn.Linear(4, 2)); nn.init.ones_(net.fc.weight)
    assert weight_mask(cut(toy([[.1, .1, .2, .2], [.1, .2, .2, .2]]), 0), net).meta['true_prune_percent'] == 62.5

def test_bad_cuts():
    s = toy([[.1, .2, .3]])
    for p in (1., .9): 
        with pytest.raises(ValueError, match='prune_percent'): cut(s, p)
    with pytest.raises(ValueError, match='upper_limit=1.0'): cut(s, .8, 1.)
    with pytest.raises(ValueError, match='0.8'): cut(s, 80)
    for u, e in ((-.1, ValueError), (float('nan'), ValueError), ('0.5', TypeError), (True, TypeError),
                 ({'no': .5}, ValueError), ({'fc': -1}, ValueError)):
        with pytest.raises(e, match='upper_limit'): cut(s, .5, u)
    with pytest.raises(ValueError, match="unit 'group'"): cut(Scores({'a': torch.rand(3)}, 'channel'), .5)
    with pytest.raises(TypeError, match='Scores'): cut({}, .5)
    with pytest.raises(TypeError, match='Module'): weight_mask(cut(s, 0), 'net')

# Groups

@settings(max_examples=100)
@given(width=st.integers(1, 600), n=st.integers(1, 600))
def test_groups_are_the_literal_ones(width, n):
    if n > width:
        with pytest.raises(ValueError, match='n_groups'): released_groups(width, n)
        return
    want = np.arange(n) if width == n else np.repeat(np.arange(n), width//n)
    got = released_groups(width, n)
    assert np.array_equal(got[:len(want)], want) and (got[len(want):] == -1).all() and len(got) == width

def test_tail_is_not_in_z():
    P, C = data('normal', 0, 60, 5), data('normal', 1, 60, 2); P2 = P.copy()
    P2[:,4] = 1e3*data('normal', 2, 60, 1)[:,0]
    args = [0,0,1,1,-1], [0,1]
    assert np.array_equal(dependency(P, C, *args), dependency(P2, C, *args))
    assert not np.array_equal(dependency(P, C, *args), dependency(P, C, [0,0,1,1,1], [0,1]))

# The score of a network

def loaders(n=240, c=3, side=2, channels=1):
    g = generator(0); x, y = torch.rand(n, channels, side, side, generator=g), torch.arange(n)%c
    dls = DataLoaders(*[DataLoader(list(zip(x, y)), bs=16, num_workers=0) for _ in range(2)]); dls.c = dls.n_out = c
    return dls

def mlp(n_in=4, n_out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(n_in, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 7), nn.BatchNorm1d(7),
                         nn.ReLU(), nn.Linear(7, n_out))

def test_score_is_the_literal_pipeline():
    net, dls = mlp(), loaders(); s = score(net, dls, n_per_class=15, n_groups=(3, 2), seed=5); net.eval()
    x, y = (torch.cat(o) for o in zip(*dls.train.new(shuffle=False, drop_last=False)))
    rng = np.random.default_rng(5); rp, rc = (sample_rows(y, 15, rng) for _ in range(2))
    with torch.no_grad():
        # after ReLU; raw; logits
        a, b, c = (f(x.as_subclass(torch.Tensor)).double().numpy() for f in (net[:3], net[:5], net))
    two = np.array([0,0,0,1,1,1,-1])
    assert list(s) == ['4', '7'] and s.meta['parents'] == {'4': '1', '7': '4'} and "input" in s.skipped['1']
    assert np.array_equal(s['4'][:2,:3], literal_all(a[rp], b[rc], np.array([0,0,1,1,2,2,-1,-1]), two))
    assert np.array_equal(s['7'][:,:3], literal_all(b[rp], c[rc], np.array([0,0,1,1,2,2,-1]), np.arange(3)))
    assert (s['4'].dtype == torch.float64 and s.unit == 'group' and s.method == 'mint'
            and s.meta['compat'] == 'released' and s.meta['n'] == 45)
    assert s.meta['ungrouped'] == {'4': dict(child=2, parent=3), '7': dict(child=None, parent=3)}
    assert s['4'].shape == (3, 4) and (s['4'][2] == 2).all() and (s['4'][:,3] == 2).all() and s['7'].shape == (3, 4)
    assert s.labels['4'][0].tolist() == [0,0,0,1,1,1,2] and s.labels['4'][1].tolist() == [0,0,1,1,2,2,3,3]
    assert s.cost['4'].tolist() == [[6,6,6,6], [6,6,6,6], [2,2,2,2]]

def test_tail_is_never_cut(tmp_path):
    net, dls = mlp(), loaders(); s = score(net, dls, n_per_class=15, n_groups=(3, 2))
    s.save(tmp_path/'s'); back = Scores.load(tmp_path/'s')
    u = len(np.unique(np.concatenate([s['4'][:2,:3].ravel(), s['7'][:,:3].ravel()])))
    m = cut(s, (u-1)/u)
    assert (not m['4'][:2,:3].any() and m['4'][2].all() and m['4'][:,3].all() and not m['7'][:,:3].any()
            and m['7'][:,3].all())
    assert all(torch.equal(v, cut(back, (u-1)/u)[k]) for k, v in m.items())
    with pytest.raises(ValueError, match=f'of {u} distinct'): cut(s, 1.)
    for k, v in allocate(s, .4).items(): assert v[s[k] == 2].all(), 'plain allocation takes it last'
    x = torch.rand(8, 1, 2, 2, generator=generator(1))
    assert difference(apply(copy.deepcopy(net), cut(s, .3)), shrink(net, cut(s, .3), x), x) <= 1e-5

class Skips(nn.Module):
    "Layers registered in another order than executed; a wider layer before the one that reads fewer columns."
    def __init__(self):
        super().__init__()
        self.c, self.side, self.b, self.a = (nn.Conv2d(4, 5, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 4, 3, padding=1),
                                             nn.Conv2d(1, 4, 3, padding=1))
        self.bn, self.fc, self.never = nn.BatchNorm2d(5), nn.Linear(5*4, 3), nn.Linear(2, 2)
    def forward(self, x):
        x = self.a(x).relu(); y = self.b(x).relu(); self.side(x)
        return self.fc(self.bn(self.c(x+y)).relu().flatten(1))

def test_parent_is_what_was_executed_before(monkeypatch):
    seen = []
    monkeypatch.setattr(rel, 'dependency',
                        lambda P, C, p, c, **kw: seen.append((P, C)) or np.zeros((max(c)+1, max(p)+1)))
    torch.manual_seed(0); net, dls = Skips(), loaders(); s = score(net, dls, n_per_class=20, n_groups=(2, 2))
    net.eval()
    assert s.meta['parents'] == {'b': 'a', 'side': 'b', 'c': 'side'}
    assert 'reads 20 columns' in s.skipped['fc'] and "input" in s.skipped['a'] and 'does not run' in s.skipped['never']
    x, y = (torch.cat(o) for o in zip(*dls.train.new(shuffle=False, drop_last=False))); x = x.as_subclass(torch.Tensor)
    rng = np.random.default_rng(0); rp, rc = (sample_rows(y, 20, rng) for _ in range(2))
    with torch.no_grad():
        a = net.a(x); r = a.relu(); b = net.b(r); side = net.side(r); c = net.c(r + b.relu())
    for (P, C), (p, k) in zip(seen, ((a, b), (b, side), (side[:,:4], c))):      # raw outputs; the first four of six
        assert (np.allclose(P, p.mean((2,3)).numpy()[rp], atol=1e-5)
                and np.allclose(C, k.mean((2,3)).numpy()[rc], atol=1e-5))
    assert s.cost['b'].tolist() == [[36, 36], [36, 36]], 'all taps of a block'

def test_linear_layers_after_their_relu_only():
    net = mlp().eval(); x = torch.rand(9, 1, 2, 2, generator=generator(0)); acts = conv_out(net, x)
    with torch.no_grad(): want = {'1': net[:3](x), '4': net[:5](x), '7': net(x)}
    assert (list(acts) == list(want) and all(torch.allclose(acts[k], want[k], atol=1e-6) for k in want)
            and (acts['4'] < 0).any() and (acts['1'] >= 0).all())

def test_convolutions_are_raw_even_if_a_relu_is_next():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(20, 1, 1, 1)
    with torch.no_grad():
        assert (conv_out(net, x)['0'] < 0).any() and torch.equal(conv_out(net, x)['0'], net[0](x).flatten(1))

def test_shared_layer_and_grouped_convolution():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        def forward(self, x): return self.b(self.a(self.a(x.flatten(1))))
    with pytest.raises(UnsupportedLayerError, match="'a'"): score(Twice(), loaders(), n_per_class=10)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(4, 3))
    s = score(net, loaders(), n_per_class=10, n_groups=(2, 2))
    assert 'grouped' in s.skipped['1'] and list(s) == ['2', '5'] and s.meta['parents'] == {'2': '1', '5': '2'}

def test_reproducible_and_left_as_found():
    net, dls = mlp(64, 10).train(), get_dls('digits', bs=64); net[1].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    a = score(net, dls, n_per_class=10, n_groups=(2, 2))
    assert (torch.equal(state[0], torch.get_rng_state())
            and state[1:] == (random.getstate(), np.random.get_state()[1].tolist()))
    assert (net.training and not net[1].weight.requires_grad
            and all(torch.equal(v, before[k]) for k, v in net.state_dict().items()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    np.random.rand(3)
    b = score(mlp(64, 10), dls, n_per_class=10, n_groups=(2, 2), graph=trace(net, torch.rand(1, 1, 8, 8)))
    other = score(net, dls, n_per_class=10, n_groups=(2, 2), seed=1)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], other[k]) for k in a)

def test_layers_do_not_disturb_each_other():
    "Every pair of layers is a process of its own with the same seed."
    net, dls = mlp(), loaders()
    a, b = (score(net, dls, n_per_class=10, n_groups=(2, 2)),
            score(net, dls, n_per_class=10, n_groups=(2, 2), layers=['7']))
    assert list(b) == ['7'] and torch.equal(a['7'], b['7']) and b.skipped['4'] == 'not chosen'

def test_mint_score_ends_up_here():
    a, b = (mint.score(mlp(), loaders(), compat='released', n_per_class=10, n_groups=(2, 2), seed=3),
            score(mlp(), loaders(), n_per_class=10, n_groups=(2, 2), seed=3))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a) and a.meta['compat'] == 'released'

def test_defaults():
    s = score(mlp(), loaders(c=3))
    assert s.meta['n_per_class'] == 250 and s.meta['n'] == 750 and s['4'].shape == (7, 8) and not s.meta['ungrouped']

def test_our_loaders():
    dls = get_dls('digits', bs=64); torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
    s = score(net, dls, n_per_class=6, n_groups=(3, 5)); y = dls.train.dataset.y; rng = np.random.default_rng(0)
    rp, rc = (sample_rows(y, 6, rng) for _ in range(2)); x = dls.train.prep.plain()(dls.train.dataset.x)
    with torch.no_grad(): a, b = net[:3](x), net(x)
    assert (np.allclose(s['3'], dependency(a.numpy()[rp], b.numpy()[rc], np.arange(6)//2, np.arange(10)), atol=.07)
            and s['3'].shape == (10, 3))

def test_bad_inputs():
    X, Y, Z = data('normal', 0, 30, 3).T[...,None]; one = np.ones((30, 1))
    with pytest.raises(ValueError, match='at least 3 rows'): pair_score(X[:2], Y[:2], Z[:2])
    with pytest.raises(ValueError, match='29, 30, 30'): pair_score(X[:29], Y, Z)
    with pytest.raises(ValueError, match='constant'): pair_score(one, one, one)
    with pytest.raises(ValueError, match='parent groups'): pair_score(X, Y, Z[:,:0])
    P, C = data('normal', 0, 30, 4), data('normal', 1, 30, 2); two = np.array([0, 0, 1, 1])
    for parent, child, name in (([0]*4, [0, 1], 'parent'), ([0, 0, 2, 2], [0, 1], 'parent'), ([-1]*4, [0, 1], 'parent'),
                                ([0, 1, -2, 1], [0, 1], 'parent'), (two[:3], [0, 1], 'parent'),
                                (two, [1, 1], 'child'), (two, [-1, -1], 'child'), (two, [0], 'child')):
        with pytest.raises(ValueError, match=name): dependency(P, C, parent, child)
    for bad in (np.nan, np.inf):
        Q = P.copy(); Q[3,1] = bad
        with pytest.raises(ValueError, match='parent.*NaN'): dependency(Q, C, two, [0, 1])
        with pytest.raises(ValueError, match='child.*NaN'): dependency(C, Q, [0, 1], two)
    with pytest.raises(ValueError, match='30 rows'): dependency(P, C[:20], two, [0, 1])
    for y in ([], [[1, 2]]):
        with pytest.raises(ValueError, match='labels'): sample_rows(y, 3, np.random.default_rng(0))
    with pytest.raises(ValueError, match='n_per_class'): sample_rows([0, 1], 0, np.random.default_rng(0))

def test_bad_arguments_of_score():
    net, dls = mlp(), loaders()
    for kw, what in ((dict(n_groups=(1, 2)), 'n_groups'), (dict(n_groups=(9, 2)), "'4'"),
                     (dict(n_groups=(2, 8)), "'4'"), (dict(n_per_class=0), 'n_per_class'), (dict(seed=-1), 'seed'),
                     (dict(layers=['nope']), 'layers'), (dict(layers=['1']), "network's input")):
        with pytest.raises(ValueError, match=what): score(net, dls, **dict(n_per_class=5) | kw)
    with pytest.raises(TypeError, match='pair'): score(net, dls, n_groups=4)
    with pytest.raises(ValueError, match='dls'): score(net)
    with pytest.raises(TypeError, match='Module'): score('mlp', dls)
    with pytest.raises(ValueError, match='no layer'):
        score(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), dls, n_per_class=5)
    with pytest.raises(ValueError, match='empty'): score(net, loaders(0), n_per_class=5)
    bad = mlp(); bad[1].weight.data[0,0] = float('nan')
    with pytest.raises(ValueError, match='NaN'): score(bad, dls, n_per_class=5)
    with pytest.raises(ValueError, match='digest'): score(net, loaders(side=3), n_per_class=5)
    # a class too many, one without images, no classes
    for y in (torch.arange(60)%4, torch.arange(60)%2, torch.arange(60)/60):
        odd = loaders(60); odd.loaders[0] = DataLoader(list(zip(torch.rand(60, 1, 2, 2), y)), bs=16, num_workers=0)
        with pytest.raises(ValueError, match='yb|class'): score(net, odd, n_per_class=5)
