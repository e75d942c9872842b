"MINT: the tree against SciPy, the estimator against exact values, the score against its promises."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from torch import nn
from neuronprune import mint
from neuronprune.core import Mask, Scores, UnsupportedLayerError, generator, layers, methods
from neuronprune.data import get_dls
from neuronprune.graph import trace
from neuronprune.mint import (activations, cgmi, crossings, dependency, divergence, gmi, group_index, mst, neighbours, parent_of,
                              pool_dists, score, sq_dists, thirds)

def cloud(seed, n, d): return np.random.default_rng(seed).normal(size=(n, d))
def length(d2, edges): return np.sqrt(d2[tuple(edges.T)]).sum()

def scipy_tree(d2):
    "SciPy's tree with true (row, col) edges."
    t = minimum_spanning_tree(np.sqrt(d2)).tocoo()
    return t.sum(), np.c_[t.row, t.col]

def plain_dependency(P, C, parent, child, seed):
    "The definition: one pair at a time, explicit columns, cdist, SciPy."
    s1, s2, s3 = thirds(len(P), np.random.default_rng(seed)); res = np.zeros((child.max()+1, parent.max()+1))
    for k in range(len(res)):
        for g in range(res.shape[1]):
            X, Y, Z = C[:, child == k], P[:, parent == g], P[:, parent != g]
            near = s2[cdist(Z[s1], Z[s2]).argmin(1)]
            pool = np.r_[np.c_[X[s3], Y[s3], Z[s3]], np.c_[X[s1], Y[near], Z[s1]]]
            _, e = scipy_tree(cdist(pool, pool)**2); m, n = len(s3), len(s1)
            res[k,g] = 1 - ((e < m).sum(1) == 1).sum()*(m+n)/(2*m*n)
    return res

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(2, 120), d=st.sampled_from([1,2,5,50]), share=st.floats(0, 1))
def test_tree_is_scipys(seed, n, d, share):
    d2 = cdist(*[cloud(seed, n, d)]*2)**2; m = int(share*n); e, (total, ref) = mst(d2), scipy_tree(d2)
    assert len(e) == n-1 and np.isclose(length(d2, e), total)
    assert set(map(frozenset, e.tolist())) == set(map(frozenset, ref.tolist()))
    assert crossings(d2[None], np.zeros_like(d2), m)[0] == ((ref < m).sum(1) == 1).sum()

@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_large_tree(dtype):
    for n in (300, 800):
        x, y = cloud(n, n, 3).astype(dtype), cloud(n+1, n, 20).astype(dtype); a, b = sq_dists(x), sq_dists(y)
        assert crossings(a[None], b, n//3)[0] == ((scipy_tree(a.astype('f8') + b)[1] < n//3).sum(1) == 1).sum()

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(3, 40))
def test_duplicates(seed, n):
    "SciPy reads a zero distance as 'no edge', so its weight comes from the distinct points."
    x = np.random.default_rng(seed).integers(0, 3, (n, 2)).astype(float); d2, u = cdist(x, x)**2, np.unique(x, axis=0)
    e = mst(d2)
    assert len(e) == n-1 and np.isclose(length(d2, e), scipy_tree(cdist(u, u)**2)[0])
    assert 0 <= crossings(d2[None], np.zeros_like(d2), n//2)[0] <= n-1

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), w=st.integers(1, 6), p=st.integers(7, 40))
def test_assembled_distances(seed, w, p):
    P, x = cloud(seed, 60, p)*3+5, cloud(seed+1, 60, 4); g = np.arange(p) < w; Z = P[:, ~g]
    s = s1, s2, s3 = thirds(60, np.random.default_rng(seed)); pool = np.r_[s3, s1]
    near = neighbours(P, P[:,g], s)
    assert (near == s2[cdist(Z[s1], Z[s2]).argmin(1)]).all()
    D = sq_dists(x[pool]) + pool_dists(P[:,g], s, near, sq_dists(P[pool])); full = np.c_[x[pool], P[np.r_[s3,near]][:,g], Z[pool]]
    ref = cdist(full, full)**2
    np.testing.assert_allclose(D, ref, rtol=1e-9, atol=1e-9)

def network_like(n=240, p=30, c=12, seed=0):
    "Smooth instead of ReLU: two images without any active unit would be duplicates, and ties may be broken either way."
    rng = np.random.default_rng(seed); P = np.logaddexp(0, rng.normal(size=(n,p)) + rng.normal(size=(n,1)))
    return P, np.logaddexp(0, P@rng.normal(size=(p,c))), np.arange(p)*5//p, np.arange(c)*4//c

def test_dependency_is_the_definition():
    P, C, parent, child = network_like()
    plain, batched = plain_dependency(P, C, parent, child, 3), dependency(P, C, parent, child, seed=3)[0]
    np.testing.assert_allclose(batched, plain, atol=1e-12)
    single = dependency(P, C, parent, child, seed=3, max_mem=1e-9)[0]          # one child group at a time
    np.testing.assert_array_equal(single, batched)
    f32 = dependency(P.astype('f4'), C.astype('f4'), parent, child, seed=3)[0]
    np.testing.assert_array_equal(f32, batched)

def test_children_do_not_interact():
    P, C, parent, child = network_like()
    every = dependency(P, C, parent, child, seed=1)[0]
    for k in range(4): np.testing.assert_array_equal(dependency(P, C[:, child == k], parent, child[child == k]*0, seed=1)[0,0], every[k])

def exact_gmi(r, lim=7, h=.02):
    x, y = np.meshgrid(*[np.arange(-lim, lim, h)]*2)
    f = np.exp(-(x*x - 2*r*x*y + y*y)/(2*(1-r*r)))/(2*np.pi*(1-r*r)**.5); g = np.exp(-(x*x + y*y)/2)/(2*np.pi)
    return 1 - 2*(f*g/(f+g)).sum()*h*h

@pytest.mark.parametrize('r,exact,sd', [(0,0,.023), (.3,.0231,.027), (.5,.0683,.023), (.7,.1534,.020), (.9,.3517,.014), (.95,.4701,.023), (.99,.6924,.018)])
def test_gaussian(r, exact, sd):
    assert abs(exact_gmi(r) - exact) < 2e-4
    x, e = np.random.default_rng(int(100*r)).normal(size=(2,3000,1))
    assert abs(gmi(x, r*x + (1-r*r)**.5*e) - exact) < 4*sd

def test_known_dependence():
    z, a, b, c = cloud(0, 1500, 4).T[..., None]; x, y = z+.2*a, z+.2*b
    assert abs(gmi(a, b, n_trials=4)) < .06 and abs(cgmi(a, b, c, n_trials=4)) < .12
    assert gmi(x, y, n_trials=4) > .3 and cgmi(x, y, z, n_trials=4) < .15
    assert cgmi(a, a, c) > .6

def test_invariances():
    P, C, parent, child = network_like(); base = dependency(P, C, parent, child, seed=5)
    turn = lambda n: np.linalg.qr(cloud(n, n, n))[0]
    Pr, Cr = P.copy(), C.copy()
    for g in range(5): Pr[:, parent == g] = P[:, parent == g]@turn((parent == g).sum()) + g
    for k in range(4): Cr[:, child == k] = C[:, child == k]@turn((child == k).sum()) - k
    np.testing.assert_array_equal(dependency(Pr, Cr, parent, child, seed=5), base)
    np.testing.assert_array_equal(dependency(8*P, 8*C, parent, child, seed=5), base)
    assert (dependency(P, 8*C, parent, child, seed=5) != base).any()           # the scale of one layer alone matters
    i = np.random.default_rng(0).permutation(30)
    np.testing.assert_array_equal(dependency(P[:,i], C, parent[i], child, seed=5), base)
    rng = np.random.default_rng(5); order = np.arange(len(P))
    for s in thirds(len(P), np.random.default_rng(5)): order[s] = rng.permutation(s)
    np.testing.assert_array_equal(dependency(P[order], C[order], parent, child, seed=5), base)

def test_unpaired_rows_score_nothing():
    rng = np.random.default_rng(0); P = rng.normal(size=(1200,2)); C = P + .1*rng.normal(size=P.shape); idx = np.arange(2)
    paired, broken = dependency(P, C, idx, idx, n_trials=4).mean(0), dependency(P, rng.permutation(C), idx, idx, n_trials=4).mean(0)
    assert np.diag(paired).min() > .4 and abs(broken).max() < .1

def test_constant_groups_and_one_group():
    P, C, parent, child = network_like(); P[:, parent == 2] = 0; C[:, child == 1] = 3.
    r = dependency(P, C, parent, child)[0]
    assert (r[1] == 0).all() and (r[:,2] == 0).all() and (np.delete(np.delete(r, 1, 0), 2, 1) != 0).any()
    one = parent*0
    np.testing.assert_array_equal(dependency(P, C, one, child), dependency(P, C, one, child, 'gmi'))
    assert (dependency(P*0, C*0, parent, child) == 0).all()

def test_bad_inputs():
    P, C, parent, child = network_like()
    with pytest.raises(ValueError, match='at least 6'): dependency(P[:5], C[:5], parent, child)
    with pytest.raises(ValueError, match='same images'): dependency(P[:50], C, parent, child)
    with pytest.raises(ValueError, match='estimator'): dependency(P, C, parent, child, 'mi')
    with pytest.raises(ValueError, match='n_trials=0'): dependency(P, C, parent, child, n_trials=0)
    with pytest.raises(ValueError, match="'fc9' has only 4"): group_index(4, 5, layer='fc9')

@settings(max_examples=50, deadline=None)
@given(width=st.integers(1, 200), share=st.floats(.01, 1), grouping=st.sampled_from(['contiguous','random']))
def test_groups_are_balanced(width, share, grouping):
    n = max(1, int(share*width)); c = group_index(width, n, grouping).bincount()
    assert len(c) == n and c.sum() == width and c.max()-c.min() <= 1

class Res(nn.Module):
    "A residual sum, a batch norm, dropout, a grouped convolution and a flatten."
    def __init__(self):
        super().__init__()
        self.c1, self.bn, self.c2, self.c3 = nn.Conv2d(1,6,3,padding=1), nn.BatchNorm2d(6), nn.Conv2d(6,6,3,padding=1), nn.Conv2d(6,6,3,padding=1,groups=3)
        self.fc, self.drop, self.out = nn.Linear(6*4,8), nn.Dropout(), nn.Linear(8,10)
    def forward(self, x):
        a = self.bn(self.c1(x)).relu(); a = (a + self.c2(a)).relu()
        return self.out(self.drop(self.fc(nn.functional.max_pool2d(self.c3(a), 4).flatten(1)).relu()))

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64)

@pytest.fixture
def res(): torch.manual_seed(0); return Res().train()

def test_score(dls, res):
    res.c1.weight.requires_grad_(False); state = {k:v.clone() for k,v in res.state_dict().items()}
    s = score(res, dls, n_per_class=20, n_trials=2)
    assert list(s) == ['c2','fc','out'] and s.unit == 'group' and set(s.skipped) == {'c1','c3'}
    assert s['fc'].shape == (8,6) and s['out'].shape == (10,8)
    for k,m in layers(res).items():
        if k in s: assert (s.cost[k].sum() == m.weight.numel()) and len(s.labels[k][0]) == m.weight.shape[0] and len(s.labels[k][1]) == m.weight.shape[1]
    assert s.labels['fc'][1].tolist() == [i//4 for i in range(24)]
    assert s.meta['n'] == 200 and np.shape(s.meta['se']['fc']) == (8,6)
    assert res.training and not res.c1.weight.requires_grad and all(len(m._forward_hooks) + len(m._forward_pre_hooks) == 0 for m in res.modules())
    assert all(torch.equal(v, state[k]) for k,v in res.state_dict().items())
    again = score(res, dls, n_per_class=20, n_trials=2)
    assert all(torch.equal(s[k], again[k]) for k in s)

def test_score_sees_the_tensor_that_is_read(dls, res):
    xb = torch.randn(40, 1, 8, 8, generator=generator(0)); g = trace(res, xb); res.eval()
    P, C = mint._layer_acts(g, 'c2', activations(res, xb, ['c2','c3']))
    with torch.no_grad():
        a = res.bn(res.c1(xb)).relu(); b = (a + res.c2(a)).relu()
    np.testing.assert_allclose(P, a.mean((2,3)), atol=1e-5); np.testing.assert_allclose(C, b.mean((2,3)), atol=1e-5)

def test_score_options(dls, res):
    kw = dict(n_per_class=5)
    s = score(res, dls, layers=['fc'], n_groups=(3,4), grouping='random', estimator='gmi', **kw)
    assert list(s) == ['fc'] and s['fc'].shape == (4,3) and s.skipped['out'] == 'not chosen'
    for bad, match in [(dict(layers=['c1']), "'c1' cannot"), (dict(layers=['fc9']), 'fc'), (dict(n_groups=(7,4)), "'c2:in' has only 6|'fc:in' has only 6"),
                       (dict(n_groups=(3,9)), 'has only'), (dict(grouping='kmean'), 'grouping'), (dict(estimator='mi'), 'cgmi')]:
        with pytest.raises(ValueError, match=match): score(res, dls, **kw, **bad)
    with pytest.raises(TypeError, match='pair'): score(res, dls, n_groups=20, **kw)
    with pytest.raises(ValueError, match='dls=None'): score(res)
    with pytest.raises(ValueError): score(res, dls, n_per_class=10**6)
    with torch.no_grad(): res.fc.weight.fill_(float('nan'))
    with pytest.raises(ValueError, match="layer 'out"): score(res, dls, **kw)
    assert res.training

def test_dead_layer_is_flagged(dls, res):
    with torch.no_grad(): res.fc.weight.zero_(); res.fc.bias.fill_(-1)
    s = score(res, dls, n_per_class=5)
    assert (s['fc'] == 0).all() and (s['out'] == 0).all() and s.meta['constant']['fc'] == dict(children=list(range(8)), parents=[])

def test_reused_layer(dls):
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Linear(64,8), nn.Linear(8,8), nn.Linear(8,10)
        def forward(self, x): return self.c(self.b(self.b(self.a(x.flatten(1)).relu()).relu()).relu())
    with pytest.raises(UnsupportedLayerError, match='once'): activations(Twice(), torch.randn(8,64), ['b'])

def test_registered(): 
    m = methods()['mint']
    assert m.unit == 'group' and m.allocate == dict(of='params', scope='layer') and m.fn is score

def test_save_load(dls, res, tmp_path):
    s = score(res, dls, n_per_class=5, n_trials=2); s.save(tmp_path/'s.safetensors'); t = Scores.load(tmp_path/'s.safetensors')
    assert all(torch.equal(s[k], t[k]) for k in s) and t.meta['se'] == s.meta['se'] and t.meta['constant'] == s.meta['constant']

def test_zero_blocks(dls, res):
    "A mask on these labels cuts whole kernels between the right channels."
    s = score(res, dls, n_per_class=5, n_groups=(3,2)); m = Mask({k:torch.ones_like(v).bool() for k,v in s.items()}, 'group', graph=s.graph, labels=s.labels)
    m['c2'][1,0] = False; w = m.expand(res)['c2.weight']
    assert not w[3:, :2].any() and w[:3].all() and w[3:, 2:].all()
    assert mint.dead_units(m).dead_children.sum() == 0
