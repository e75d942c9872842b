"MINT: the estimator against its definition and exact values, the score against its promises."
import numpy as np, os, pytest, torch, warnings
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from fastai.data.core import DataLoaders
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from neuronprune import mint
from neuronprune.blocks import dead_units
from neuronprune.core import UnsupportedLayerError, generator, layers, methods
from neuronprune.files import save_tensors
from neuronprune.masks import Mask, Scores
from neuronprune.data import get_dls
from neuronprune.graph import trace
from neuronprune.mint import (activations, cgmi, cut, dependencies, dependency, divergence, gmi, neighbours, pool_dists,
                              score, thirds)
from neuronprune.mint_engine import sq_dists
from neuronprune.scoring import shortened

def cloud(seed, n, d): return np.random.default_rng(seed).normal(size=(n, d))

def scipy_tree(d2):
    "SciPy's tree with true (row, col) edges."
    t = minimum_spanning_tree(np.sqrt(d2)).tocoo()
    return t.sum(), np.c_[t.row, t.col]

def plain_dependency(P, C, parent, child, seed, trial=0):
    "The definition: one pair at a time, explicit columns, cdist, SciPy."
    s1, s2, s3 = thirds(len(P), np.random.default_rng([seed, trial])); res = np.zeros((child.max()+1, parent.max()+1))
    for k in range(len(res)):
        for g in range(res.shape[1]):
            X, Y, Z = C[:, child == k], P[:, parent == g], P[:, parent != g]
            near = s2[cdist(Z[s1], Z[s2]).argmin(1)]
            pool = np.r_[np.c_[X[s3], Y[s3], Z[s3]], np.c_[X[s1], Y[near], Z[s1]]]
            _, e = scipy_tree(cdist(pool, pool)**2); m, n = len(s3), len(s1)
            res[k,g] = 1 - ((e < m).sum(1) == 1).sum()*(m+n)/(2*m*n)
    return res

@settings(max_examples=25)
@given(seed=st.integers(0, 2**20), w=st.integers(1, 6), p=st.integers(7, 40))
def test_assembled_distances(seed, w, p):
    P, x = cloud(seed, 60, p)*3+5, cloud(seed+1, 60, 4); g = np.arange(p) < w; Z = P[:, ~g]
    s1, s2, s3 = thirds(60, np.random.default_rng(seed)); pool = np.r_[s3, s1]
    s = [torch.tensor(o) for o in (s1, s2, s3)]
    T = torch.tensor(P); near = neighbours(T, T[:,g], s); buffer = (d := sq_dists(P[pool])).clone()
    assert (near.numpy() == s2[cdist(Z[s1], Z[s2]).argmin(1)]).all()
    other = neighbours(T, T[:,~g], s); pool_dists(T[:,~g], s, other, d, buffer) # a buffer that was used before
    assert torch.equal(pool_dists(T[:,g], s, near, d), pool_dists(T[:,g], s, near, d, buffer))
    D = sq_dists(x[pool]) + pool_dists(T[:,g], s, near, d); full = np.c_[x[pool], P[np.r_[s3,near]][:,g], Z[pool]]
    ref = cdist(full, full)**2
    np.testing.assert_allclose(D, ref, rtol=1e-9, atol=1e-9)

def network_like(n=240, p=30, c=12, seed=0):
    "Smooth instead of ReLU: two images without any active unit would be duplicates, and ties may be broken either way."
    rng = np.random.default_rng(seed); P = np.logaddexp(0, rng.normal(size=(n,p)) + rng.normal(size=(n,1)))
    return P, np.logaddexp(0, P@rng.normal(size=(p,c))), np.arange(p)*5//p, np.arange(c)*4//c

def test_dependency_is_the_definition():
    P, C, parent, child = network_like()
    every = dependency(P, C, parent, child, seed=3, n_trials=2)
    for t in range(2): np.testing.assert_allclose(every[t], plain_dependency(P, C, parent, child, 3, t), atol=1e-12)
    f32 = dependency(P.astype('f4'), C.astype('f4'), parent, child, seed=3, n_trials=2)
    np.testing.assert_array_equal(f32, every)

def test_both_ways_to_grow_the_trees(monkeypatch):
    "Without the certificate, and one child group at a time: the same scores."
    P, C, parent, child = network_like(); every = dependency(P, C, parent, child, seed=3, calibrate=True); sizes = []
    monkeypatch.setattr(mint, '_near', lambda x, child, bs, gs, m: np.full((int(child.max())+1, len(gs)), -1))
    grow = mint.crossings
    monkeypatch.setattr(mint, 'crossings', lambda dx, b, m: sizes.append(len(dx)) or grow(dx, b, m))
    np.testing.assert_array_equal(dependency(P, C, parent, child, seed=3, calibrate=True), every)
    n, room = 160, 2.5*160**2*8/1e9                                            # the least that is accepted
    assert set(sizes) == {8}
    sizes.clear()
    np.testing.assert_array_equal(dependency(P, C, parent, child, seed=3, calibrate=True, max_mem=room), every)
    assert set(sizes) == {1}

def test_batched_engine_counts_the_same(monkeypatch):
    "What runs on a card, here on the CPU."
    P, C, parent, child = network_like(120)
    P, C, parent, child = *(torch.tensor(o).float() for o in (P, C)), torch.tensor(parent), torch.tensor(child)
    s = [torch.tensor(o) for o in thirds(120, np.random.default_rng(0))]; pool = torch.cat([s[2], s[0]])
    bs = torch.stack([b.clone() for b in mint._parent_dists(P, parent, range(5), s, True)])
    dx = torch.stack([sq_dists(C[pool][:, child == k]) for k in range(4)])
    near = mint._near(C[pool], child, lambda gs: mint._parent_dists(P, parent, gs, s, True), range(5), 40)
    assert mint.crossings_batched(dx, bs, 40).tolist() == near.tolist()

def test_jobs_side_by_side_and_resumed(tmp_path, monkeypatch):
    P, C, _, child = network_like(90, p=70); parent = np.arange(70); args = dict(n_trials=2, seed=4)
    every = dependency(P, C, parent, child, **args)
    np.testing.assert_array_equal(dependency(P, C, parent, child, n_jobs=2, **args), every)
    calls, work = [], mint._split_scores
    def some(*a):
        if len(calls) == 4: raise KeyboardInterrupt
        calls.append(a); return work(*a)
    monkeypatch.setattr(mint, '_split_scores', some)
    with pytest.raises(KeyboardInterrupt): dependency(P, C, parent, child, cache=tmp_path, **args)
    assert len(os.listdir(tmp_path)) == 4 and not list(tmp_path.glob('*.tmp'))
    calls.clear(); np.testing.assert_array_equal(dependency(P, C, parent, child, cache=tmp_path, **args), every)
    assert len(calls) == 2 and len(os.listdir(tmp_path)) == 6 # 3 parts of at most 32 parent groups, 2 splits
    monkeypatch.setattr(mint, '_split_scores', work)
    for other in (dict(seed=5), dict(estimator='gmi'), dict(calibrate=True)):
        n = len(os.listdir(tmp_path)); new = dependency(P, C, parent, child, cache=tmp_path, **{**args, **other})
        assert len(os.listdir(tmp_path)) == n+6 and (new != every).any()
    dependency(P+1e-3*(P > 1), C, parent, child, cache=tmp_path, **args)
    dependency(P, C, parent, child[::-1].copy(), cache=tmp_path, **args)
    assert len(os.listdir(tmp_path)) == 36

def flip(f, i=-3): b = bytearray(f.read_bytes()); b[i] ^= 1; f.write_bytes(bytes(b))

DAMAGE = {'cut short': lambda f, other: f.write_bytes(f.read_bytes()[:-1]),
          'empty': lambda f, other: f.write_bytes(b''), 'a flipped bit': lambda f, other: flip(f),
          'foreign': lambda f, other: f.write_text('<html>404</html>'),
          'of another job': lambda f, other: f.write_bytes(other.read_bytes()),
          'a broadcast shape': lambda f, other: save_tensors(f, {'scores': torch.zeros(1, 1, dtype=torch.float64)},
                                                             dict(kind='mint', job=f.stem)),
          'one dimension': lambda f, other: save_tensors(f, {'scores': torch.zeros(32, dtype=torch.float64)},
                                                         dict(kind='mint', job=f.stem)),
          'a mask': lambda f, other: Mask({'scores': torch.ones(4, 5, dtype=torch.bool)}, 'weight').save(f),
          'NaN': lambda f, other: save_tensors(f, {'scores': torch.full((4, 5), float('nan'), dtype=torch.float64)},
                                               dict(kind='mint', job=f.stem))}

@pytest.mark.parametrize('what', DAMAGE)
def test_a_damaged_cache_is_named_and_mended(what, tmp_path):
    "The scores are those without a cache, a warning names the file, and the next call finds a whole one."
    P, C, parent, child = network_like(60, p=10, c=8); args = dict(n_trials=2, seed=4, cache=tmp_path)
    first = dependency(P, C, parent, child, **args)
    a, b = sorted(tmp_path.iterdir()); DAMAGE[what](a, b)
    with pytest.warns(UserWarning, match=f'cache: .*{a.name}.*delete the file'):
        again = dependency(P, C, parent, child, **args)
    np.testing.assert_array_equal(again, first)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); np.testing.assert_array_equal(dependency(P, C, parent, child, **args), first)

def test_contribution_is_its_definition():
    """One pair at a time: what the block sends, times the root of the number of groups;
    rows that the neighbours' rule does not touch."""
    P, C, parent, child = network_like(); rng = np.random.default_rng(9); W = rng.normal(size=(C.shape[1], P.shape[1]))
    W[child == 2] *= .01
    got = dependency(P, C, parent, child, 'contribution', seed=3, weights=W)[0]
    s1, s2, s3 = thirds(len(P), np.random.default_rng([3, 0]))
    for k in range(4):
        for g in range(5):
            X, Y = C[:, child == k], 5**.5*P[:, parent == g]@W[np.ix_(child == k, parent == g)].T
            pool = np.r_[np.c_[X[s3], Y[s3]], np.c_[X[s1], Y[s2[:len(s1)]]]]; _, e = scipy_tree(cdist(pool, pool)**2)
            m, n = len(s3), len(s1)
            np.testing.assert_allclose(got[k,g], 1 - ((e < m).sum(1) == 1).sum()*(m+n)/(2*m*n), atol=1e-12)
    np.testing.assert_array_equal(
        dependency(P, C, parent, child, 'contribution', seed=3, weights=W, max_mem=2.5*160**2*8/1e9)[0], got)
    C[:, child == 1] = 0 # a dead child group: the others keep their own weights
    np.testing.assert_array_equal(dependency(P, C, parent, child, 'contribution', seed=3, weights=W)[0],
                                  np.where(np.arange(4)[:,None] == 1, 0, got))
    fair = dependency(P, C, parent, child, 'contribution', seed=3, weights=W, calibrate=True)[0]
    assert fair.shape == got.shape and (fair != got).any()
    with pytest.raises(ValueError, match='needs the weights'): dependency(P, C, parent, child, 'contribution')

def test_messages_add_up(dls, res):
    """What all blocks of a layer send is its mean output, less the bias;
    convolutions with a border and linear layers after a flatten."""
    xb = torch.randn(30, 1, 8, 8, generator=generator(0)); g = trace(res, xb); res.eval()
    acts = mint._acts_of(res, g, ['c2','fc','out'], xb, 'child_input', True)
    raw = activations(res, xb, outs=['c2','fc','out'])
    for k in ('c2','fc','out'):
        m = res.get_submodule(k); P, C, parent, child, w = mint._arrays(m, *acts[k], *mint.block_labels(g, k, (3,2)))
        np.testing.assert_allclose((P@w.T + m.bias).detach(), raw[k], atol=1e-5)
        assert len(parent) == P.shape[1] == w.shape[1]
        s = score(res, dls, layers=[k], n_groups=(3,2), estimator='contribution', n_per_class=5, n_trials=1)
        assert s[k].shape == (10 if k == 'out' else 2, 3) and (s[k] != 0).any()

@settings(max_examples=30)
@given(k=st.tuples(st.integers(1,3), st.integers(1,3)), stride=st.integers(1,3), pad=st.integers(0,2),
       gap=st.integers(1,2), mode=st.sampled_from(['zeros','reflect','circular']))
def test_tap_means(k, stride, pad, gap, mode):
    m = nn.Conv2d(2, 4, k, stride=stride, padding=pad, dilation=gap, padding_mode=mode); x = torch.randn(3, 2, 9, 8)
    with torch.no_grad():
        np.testing.assert_allclose(mint.tap_means(x, m)@m.weight.flatten(1).T + m.bias, m(x).mean((2,3)), atol=1e-5)

def test_many_layers_are_each_alone():
    P, C, parent, child = network_like(); Q, D, q, d = network_like(100, 20, 6, 1)
    both = dependencies({'a': (P, C, parent, child), 'b': (Q, D, q, d)}, n_trials=2)
    np.testing.assert_array_equal(both['a'], dependency(P, C, parent, child, n_trials=2))
    np.testing.assert_array_equal(both['b'], dependency(Q, D, q, d, n_trials=2))

def test_calibration():
    "Permuted children score zero, calibrated; dependent ones keep a score; without calibration zero is not zero."
    rng = np.random.default_rng(2); Z = rng.normal(size=(900,30)); Y = rng.normal(size=(900,4)) + Z[:,:4]
    P = np.c_[Y,Z]; parent = np.repeat([0,1], [4,30])
    X = np.c_[rng.normal(size=(900,4)), Y]; child = np.repeat([0,1], 4)
    raw, fair = (dependency(P, X, parent, child, n_trials=8, calibrate=c)[:,:,0] for c in (False, True))
    se = lambda v: v.std(0, ddof=1)/8**.5
    assert raw[:,0].mean() > 4*se(raw)[0] and abs(fair[:,0].mean()) < 3*se(fair)[0] and fair[:,1].mean() > 6*se(fair)[1]
    broken = dependency(P, rng.permutation(X), parent, child, n_trials=8, calibrate=True)[:,:,0]
    assert (abs(broken.mean(0)) < 3*se(broken)).all()

def test_children_do_not_interact():
    P, C, parent, child = network_like()
    every = dependency(P, C, parent, child, seed=1)[0]
    for k in range(4):
        np.testing.assert_array_equal(dependency(P, C[:, child == k], parent, child[child == k]*0, seed=1)[0,0],
                                      every[k])

def exact_gmi(r, lim=7, h=.02):
    x, y = np.meshgrid(*[np.arange(-lim, lim, h)]*2)
    f = np.exp(-(x*x - 2*r*x*y + y*y)/(2*(1-r*r)))/(2*np.pi*(1-r*r)**.5); g = np.exp(-(x*x + y*y)/2)/(2*np.pi)
    return 1 - 2*(f*g/(f+g)).sum()*h*h

@pytest.mark.parametrize('r,exact,sd', [(0,0,.023), (.3,.0231,.027), (.5,.0683,.023), (.7,.1534,.020), (.9,.3517,.014),
                                        (.95,.4701,.023), (.99,.6924,.018)])
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
    for s in thirds(len(P), np.random.default_rng([5, 0])): order[s] = rng.permutation(s)
    np.testing.assert_array_equal(dependency(P[order], C[order], parent, child, seed=5), base)

def test_unpaired_rows_score_nothing():
    rng = np.random.default_rng(0); P = rng.normal(size=(1200,2)); C = P + .1*rng.normal(size=P.shape)
    idx = np.arange(2)
    paired, broken = (dependency(P, C, idx, idx, n_trials=4).mean(0),
                      dependency(P, rng.permutation(C), idx, idx, n_trials=4).mean(0))
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
    with pytest.raises(ValueError, match='parent: 29 labels for 30'): dependency(P, C, parent[1:], child)
    with pytest.raises(ValueError, match='child: 11 labels for 12'): dependency(P, C, parent, child[1:])
    with pytest.raises(ValueError, match='estimator'): dependency(P, C, parent, child, 'mi')
    with pytest.raises(ValueError, match='n_trials=0'): dependency(P, C, parent, child, n_trials=0)
    with pytest.raises(ValueError, match='max_mem=1e-06'): dependency(P, C, parent, child, max_mem=1e-6)
    with pytest.raises(ValueError, match='seed'): dependency(P, C, parent, child, seed=-1)

class Res(nn.Module):
    "A residual sum, a batch norm, dropout, a grouped convolution and a flatten."
    def __init__(self):
        super().__init__()
        self.c1, self.bn, self.c2, self.c3 = (nn.Conv2d(1,6,3,padding=1), nn.BatchNorm2d(6), nn.Conv2d(6,6,3,padding=1),
                                              nn.Conv2d(6,6,3,padding=1,groups=3))
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
        if k in s:
            assert ((s.cost[k].sum() == m.weight.numel()) and len(s.labels[k][0]) == m.weight.shape[0]
                    and len(s.labels[k][1]) == m.weight.shape[1])
    assert s.labels['fc'][1].tolist() == [i//4 for i in range(24)]
    assert s.meta['n'] == 200 and np.shape(s.meta['se']['fc']) == (8,6)
    assert (res.training and not res.c1.weight.requires_grad
            and all(len(m._forward_hooks) + len(m._forward_pre_hooks) == 0 for m in res.modules()))
    assert all(torch.equal(v, state[k]) for k,v in res.state_dict().items())
    again = score(res, dls, n_per_class=20, n_trials=2)
    assert all(torch.equal(s[k], again[k]) for k in s)

def test_score_sees_the_tensor_that_is_read(dls, res):
    xb = torch.randn(40, 1, 8, 8, generator=generator(0)); g = trace(res, xb); res.eval()
    P, C, _ = mint._acts_of(res, g, ['c2'], xb, 'child_input')['c2']
    with torch.no_grad():
        a = res.bn(res.c1(xb)).relu(); b = (a + res.c2(a)).relu()
        raw = [res.c1(xb).mean((2,3)), res.c2(a).mean((2,3))]
    np.testing.assert_allclose(P, a.mean((2,3)), atol=1e-5); np.testing.assert_allclose(C, b.mean((2,3)), atol=1e-5)
    P, C, _ = mint._acts_of(res, g, ['c2'], xb, 'conv_out')['c2']
    np.testing.assert_allclose(P, raw[0], atol=1e-5); np.testing.assert_allclose(C, raw[1], atol=1e-5)
    P, C, _ = mint._acts_of(res, g, ['c3'], xb, 'conv_out')['c3'] # reads a sum: the raw outputs of both, summed
    np.testing.assert_allclose(P, raw[0]+raw[1], atol=1e-5)

def test_score_options(dls, res):
    kw = dict(n_per_class=5)
    s = score(res, dls, layers=['fc'], n_groups=(3,4), grouping='random', estimator='gmi', **kw)
    assert list(s) == ['fc'] and s['fc'].shape == (4,3) and s.skipped['out'] == 'not chosen'
    for bad, match in [(dict(layers=['c1']), "'c1' has no blocks"), (dict(layers=['fc9']), 'fc'),
                       (dict(n_groups=(7,4)), "'c2:in' has only 6|'fc:in' has only 6"),
                       (dict(n_groups=(3,9)), 'has only'), (dict(grouping='kmean'), 'grouping'),
                       (dict(estimator='mi'), 'cgmi'), (dict(tap='out'), 'tap'), (dict(compat='paper'), 'released')]:
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
    assert ((s['fc'] == 0).all() and (s['out'] == 0).all()
            and s.meta['constant']['fc'] == dict(children=list(range(8)), parents=[]))

def test_how_many_images_where_targets_are_no_classes():
    g = generator(0); x = torch.randn(90, 6, generator=g); y = x[:, :1]*x[:, 1:2]
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), 30) for _ in range(2)])
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    kw = dict(n_groups=(2, 2), n_trials=1)
    assert [score(net, dls, n=n, **kw).meta['n'] for n in (30, 60)] == [30, 60]
    a, b, other = (score(net, dls, n=30, seed=s, **kw) for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], other[k]) for k in a)
    for bad,words in [(dict(n=91), 'n=91'), (dict(n=30, n_per_class=5), 'n_per_class'),
                      (dict(n=30, compat='released'), 'n=30')]:
        with pytest.raises(ValueError, match=words): score(net, dls, **bad, **kw)
    assert shortened(methods()['mint'], dict(n=30)) == dict(n_trials=1)

def test_reused_layer(dls):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.c = nn.Linear(64,8), nn.Linear(8,8), nn.Linear(8,10)
        def forward(self, x): return self.c(self.b(self.b(self.a(x.flatten(1)).relu()).relu()).relu())
    with pytest.raises(UnsupportedLayerError, match='once'): activations(Twice(), torch.randn(8,64), ['b'])

def test_registered(): 
    m = methods()['mint']
    assert m.unit == 'group' and m.allocate is cut and m.fn is score

def test_save_load(dls, res, tmp_path):
    s = score(res, dls, n_per_class=5, n_trials=2); s.save(tmp_path/'s.safetensors')
    t = Scores.load(tmp_path/'s.safetensors')
    assert (all(torch.equal(s[k], t[k]) for k in s) and t.meta['se'] == s.meta['se']
            and t.meta['constant'] == s.meta['constant'])

def test_zero_blocks(dls, res):
    "A mask on these labels cuts whole kernels between the right channels."
    s = score(res, dls, n_per_class=5, n_groups=(3,2))
    m = Mask({k:torch.ones_like(v).bool() for k,v in s.items()}, 'group', graph=s.graph, labels=s.labels)
    m['c2'][1,0] = False; w = m.expand(res)['c2.weight']
    assert not w[3:, :2].any() and w[:3].all() and w[3:, 2:].all()
    assert dead_units(m).dead_children.sum() == 0

def test_clip_and_tiebreak(dls, res):
    kw = dict(n_per_class=10, n_trials=2); raw, clipped = score(res, dls, **kw), score(res, dls, clip=True, **kw)
    assert any((v < 0).any() for v in raw.values())
    for k,v in raw.items():
        assert torch.equal(clipped[k], v.clamp(min=0)); np.testing.assert_allclose(clipped.meta['raw'][k], v, atol=1e-7)
        w = dict(res.named_modules())[k].weight.detach().abs(); child, parent = raw.labels[k]
        np.testing.assert_allclose(raw.tiebreak[k][1,2], w[child == 1][:, parent == 2].mean(), rtol=1e-5)

def test_weighted(dls, res):
    kw = dict(n_per_class=10, n_trials=2, estimator='gmi')
    plain, heavy = score(res, dls, **kw), score(res, dls, weighted=True, **kw)
    for k,v in plain.items():
        np.testing.assert_allclose(heavy[k], v.double()*plain.tiebreak[k], rtol=1e-5)
        assert plain.tiebreak[k].std() > 0
        np.testing.assert_allclose(heavy.meta['se'][k], torch.tensor(plain.meta['se'][k])*plain.tiebreak[k], rtol=1e-5)
    with pytest.raises(TypeError, match='weighted'): score(res, dls, weighted='magnitude', **kw)

def test_released_takes_no_other_choice(dls, res):
    for kw in (dict(estimator='gmi'), dict(tap='conv_out'), dict(grouping='random'), dict(calibrate=True),
               dict(weighted=True), dict(clip=True)):
        with pytest.raises(ValueError, match=next(iter(kw))): score(res, dls, compat='released', **kw)

def test_groups_by_kmeans(dls, res):
    "Twin channels land in one group."
    with torch.no_grad():
        for i in range(3): res.fc.weight[i+3], res.fc.bias[i+3] = res.fc.weight[i], res.fc.bias[i]
    s = score(res, dls, layers=['fc'], n_groups=(3,4), grouping='kmeans', n_per_class=8, n_trials=1)
    child = s.labels['fc'][0]
    assert torch.equal(child[:3], child[3:6]) and len(child.unique()) == 4

def block_scores(values, labels, of, tiebreak=None):
    return Scores(values, 'group', labels=labels, cost={k:mint.block_cost(v) for k,v in labels.items()},
                  tiebreak=tiebreak)

@pytest.mark.filterwarnings('ignore:allocate')
@settings(max_examples=60)
@given(seed=st.integers(0, 2**20), sparsity=st.floats(0, .85), cap=st.floats(.1, 1),
       scope=st.sampled_from(['global','layer']), keep=st.integers(1, 2))
def test_cut_is_exact(seed, sparsity, cap, scope, keep):
    "Against a plain loop over the sorted blocks: never above the request or a cap, and not one more block would fit."
    rng = np.random.default_rng(seed); sizes = {'a': (4,5), 'b': (3,6)}
    labels = {k:tuple(torch.tensor(np.sort(np.r_[np.arange(n), rng.integers(0, n, 7)])) for n in o)
              for k,o in sizes.items()}
    units, ties = ({k:torch.tensor(f(o)).float() for k,o in sizes.items()}
                   for f in (lambda o: rng.integers(0, 4, o), lambda o: rng.normal(size=o)))
    s = block_scores(units, labels, 'params', ties)
    mask = cut(s, sparsity, scope=scope, caps={'a': cap} if cap < 1 else None, min_keep_parents_per_child=keep)
    for part in (['a','b'],) if scope == 'global' else (['a'], ['b']):
        cost = {k:s.cost[k].numpy() for k in part}; total = sum(c.sum() for c in cost.values())
        gone = {k:~mask[k].numpy() for k in part}
        assert sum(cost[k][gone[k]].sum() for k in part) <= sparsity*total*(1+1e-9)
        if 'a' in part: assert cost['a'][gone['a']].sum() <= cap*cost['a'].sum()*(1+1e-9) or cap == 1
        for k in part:
            assert (mask[k].sum(1) >= keep).all()
            key = lambda k,i: (float(units[k][i]), float(ties[k][i]))
            for i in zip(*gone[k].nonzero()): # within a child group the order is never broken
                assert all(key(k, i) <= key(k, (i[0], j)) for j in np.flatnonzero(~gone[k][i[0]])) 

def test_cut_by_hand():
    s = block_scores({'a': torch.tensor([[.1,.2],[.3,.4]]), 'b': torch.tensor([[.15,.9],[.25,.35]])},
                     {k:(torch.tensor([0,0,1]), torch.tensor([0,1,1])) for k in 'ab'}, 'params')
    assert s.cost['a'].tolist() == [[2,4],[1,2]]
    gone = lambda *a, **kw: {k:(~v).nonzero().tolist() for k,v in cut(s, *a, **kw).items()}
    # 2 + 2 of 18, then 1 ([1,0] of b) would make 5 > 4.5
    assert gone(.25, scope='global') == {'a': [[0,0]], 'b': [[0,0]]}
    assert gone(.3, scope='global') == {'a': [[0,0]], 'b': [[0,0],[1,0]]}      # the other block of child 0 is protected
    assert gone(.3, scope='global', caps={'b': .25}) == {'a': [[0,0],[1,0]], 'b': [[0,0]]}   # the surplus moves
    assert gone(threshold=.22) == {'a': [[0,0]], 'b': [[0,0]]}
    assert gone(.25, keep='b') == {'a': [[0,0]], 'b': []}
    with pytest.warns(UserWarning, match='out of reach'): cut(s, .9)
    for bad in (-.1, 1, 90): 
        with pytest.raises(ValueError, match='sparsity'): cut(s, bad)
    for bad in (-.1, 1.5): 
        with pytest.raises(ValueError, match='caps'): cut(s, .5, caps=bad)
