"The trees of MINT: every engine against SciPy, against each other, and on ties."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from torch._subclasses.fake_tensor import FakeTensorMode
from neuronprune import mint_engine
from neuronprune.mint_engine import (crossings, crossings_batched, crossings_near, kruskal_crossings, mst, pair_dists,
                                     sq_dists)

def cloud(seed, n, d): return np.random.default_rng(seed).normal(size=(n, d))
def length(d2, edges): return np.sqrt(d2[tuple(edges.T)]).sum()
def f32(o): return torch.as_tensor(np.asarray(o), dtype=torch.float32)

def scipy_tree(d2):
    "SciPy's tree with true (row, col) edges."
    t = minimum_spanning_tree(np.sqrt(np.asarray(d2, 'f8'))).tocoo()
    return t.sum(), np.c_[t.row, t.col]

def by_scipy(d2, m): return int(((scipy_tree(d2)[1] < m).sum(1) == 1).sum())

@settings(max_examples=40)
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
        assert crossings(a[None], b, n//3)[0] == by_scipy(a.double() + b, n//3)
        assert crossings_near(b.numpy(), x, np.zeros(3, int), n//3, n_max=10**6)[0][0] == by_scipy(a.double() + b, n//3)

@settings(max_examples=25)
@given(seed=st.integers(0, 2**20), n=st.integers(3, 40))
def test_duplicates(seed, n):
    "SciPy reads a zero distance as 'no edge', so its weight comes from the distinct points."
    x = np.random.default_rng(seed).integers(0, 3, (n, 2)).astype(float); d2, u = cdist(x, x)**2, np.unique(x, axis=0)
    e = mst(d2)
    assert len(e) == n-1 and np.isclose(length(d2, e), scipy_tree(cdist(u, u)**2)[0])
    assert 0 <= crossings(d2[None], np.zeros_like(d2), n//2)[0] <= n-1

@settings(max_examples=60)
@given(seed=st.integers(0, 2**20), n=st.integers(3, 90), scale=st.floats(.01, 2), guess=st.floats(0, 30),
       share=st.floats(0, 1))
def test_near_is_scipys(seed, n, scale, guess, share):
    "Whatever the children's scale and the guess of the slack."
    y, x, m = cloud(seed, n, 12), scale*cloud(seed+1, n, 6), int(share*n); idx = np.array([0,0,1,1,1,2])
    b = cdist(y, y)**2
    got, need = crossings_near(b, x, idx, m, guess, n_max=n)
    assert got.tolist() == [by_scipy(b + cdist(x[:,idx==k], x[:,idx==k])**2, m) for k in range(3)]
    assert np.isclose(need, max((cdist(x[:,idx==k], x[:,idx==k])**2)[tuple(mst(b).T)].max() for k in range(3)))

def test_certificate_is_tight_and_kept():
    "Every tree edge of every child is among the pairs; a slack of zero leaves the tree of b alone; the pairs are few."
    y, x = cloud(0, 150, 40), .3*cloud(1, 150, 6); b = cdist(y, y)**2
    trees = [mst(b + cdist(x[:,[k]], x[:,[k]])**2) for k in range(6)]
    need = max((cdist(x[:,[k]], x[:,[k]])**2)[tuple(mst(b).T)].max() for k in range(6)); found = mst(b, need)[1]
    found = found | found.T
    assert all(found[tuple(e.T)].all() for e in trees)
    assert mst(b, 0)[1].sum() == 149 and found.sum()/2 < 150*20
    assert any(not (mst(b, 0)[1] | mst(b, 0)[1].T)[tuple(e.T)].all() for e in trees)

def test_bottleneck_is_brute_force():
    "The pairs are those whose distance is within the slack of the longest edge on the tree's path."
    import networkx as nx
    b = cdist(*[cloud(3, 40, 5)]*2)**2; e, found = mst(b, .7); t = nx.Graph(e.tolist())
    for u in range(40):
        for v in range(u):
            path = nx.shortest_path(t, u, v); longest = max(b[p] for p in zip(path, path[1:]))
            assert (found[u,v] or found[v,u]) == (b[u,v] <= longest + .7)

@settings(max_examples=40)
@given(seed=st.integers(0, 2**20), n=st.integers(2, 40), top=st.sampled_from([1,2,5]))
def test_ties_go_the_same_way(seed, n, top):
    """Distances of a few whole numbers: Kruskal on the CPU and the batched Prim order equal lengths by
    (smaller, larger) index."""
    rng = np.random.default_rng(seed); x, y, m = rng.integers(0, top+1, (n,2)), rng.integers(0, top+1, (n,2)), n//2
    b, dx = (cdist(o, o, 'sqeuclidean').astype('f4') for o in (y, x))
    i, j = np.triu_indices(n, 1)
    plain, done, parent = 0, 0, list(range(n))                       # Kruskal by hand
    def root(a):
        while parent[a] != a: a = parent[a]
        return a
    for _,a,c in sorted(zip((b+dx)[i,j], i.tolist(), j.tolist())):
        if root(a) != root(c): parent[root(a)] = root(c); done += 1; plain += (a < m) != (c < m)
    assert done == n-1
    assert kruskal_crossings((b+dx)[i,j][None], i, j, n, m).tolist() == [plain]
    assert crossings_batched(f32(dx)[None], f32(b)[None], m).tolist() == [[plain]]
    assert crossings_near(b, x.astype('f4'), np.zeros(2, int), m, n_max=n)[0].tolist() == [plain]

def test_engines_agree_on_a_layer():
    y, x = cloud(5, 200, 30).astype('f4'), .5*cloud(6, 200, 8).astype('f4'); idx = np.arange(8)//2
    dx, bs = (torch.stack([sq_dists(x[:,idx==k]) for k in range(4)]),
              torch.stack([sq_dists(y), sq_dists(y[:,:3]), sq_dists(y[:,:25])]))
    batched = crossings_batched(dx, bs, 70)
    assert batched.shape == (4,3) and batched.dtype == torch.int64
    for g,b in enumerate(bs):
        assert (crossings(dx, b, 70).tolist() == batched[:,g].tolist()
                == crossings_near(b.numpy(), x, idx, 70, n_max=200)[0].tolist())

def test_children_do_not_interact():
    y, x = cloud(7, 90, 20), cloud(8, 90, 9); b, idx = cdist(y, y)**2, np.arange(9)//3
    every = crossings_near(b, x, idx, 30, n_max=90)[0]
    assert [crossings_near(b, x[:,idx==k], np.zeros(3, int), 30, n_max=90)[0][0] for k in range(3)] == every.tolist()
    assert len(set(every.tolist())) > 1

def test_gives_up_when_the_pairs_are_many():
    y, x = .01*cloud(0, 80, 2), cloud(1, 80, 4); b = cdist(y, y)**2
    assert crossings_near(b, x, np.zeros(4, int), 40, n_max=5)[0] is None
    assert crossings_near(b, x, np.zeros(4, int), 40, n_max=80)[0] is not None

def test_no_value_is_asked_of_the_card():
    with FakeTensorMode() as fake:
        dx = fake.from_tensor(torch.rand(3, 20, 20))
        assert crossings_batched(dx, fake.from_tensor(torch.rand(2, 20, 20)), 9).shape == (3,2)
        with pytest.raises(Exception): float(dx.sum())                # this is what a wait would do

@settings(max_examples=20)
@given(seed=st.integers(0, 2**20), shift=st.floats(-1e4, 1e4))
def test_distances(seed, shift):
    a, b = cloud(seed, 20, 7) + shift, cloud(seed+1, 9, 7) + shift
    np.testing.assert_allclose(sq_dists(a, b), cdist(a, b)**2, rtol=1e-9, atol=1e-9)
    assert sq_dists(a.astype('f4')).dtype == torch.float32 and (sq_dists(a) >= 0).all()
    np.testing.assert_allclose(pair_dists(a, np.array([0,0,1,1,1,2,2]), np.array([3]), np.array([8]))[:,0],
                               [((a[3,c]-a[8,c])**2).sum() for c in ([0,1],[2,3,4],[5,6])], rtol=1e-9, atol=1e-9)
