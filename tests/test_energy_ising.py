"""The Ising energy against torch.distributions and the whole matrix, its oracles, and what it must not depend on."""
import math, pytest, torch
from hypothesis import given, settings, strategies as st
from neuronprune.core import generator
from neuronprune.energy import Search, population
from neuronprune.energy_ising import Ising, dissimilarity, entropies, ising_energy, kernel_kl
from test_energy import Syncs

seeds = st.integers(0, 2**20)
def weight(n, c, *k, seed=0): return torch.randn(n, c, *k, generator=generator(seed))

def reference_kl(w):
    "One pair after the other, by torch's own Gaussians."
    x = w.double().reshape(len(w), w.shape[1], -1); k = x.shape[2]; ns = []
    for o in x:
        c = torch.cov(o.T).view(k, k)
        ns.append(torch.distributions.MultivariateNormal(o.mean(0), c + 1e-6*c.trace()/k*torch.eye(k).double()))
    return torch.tensor([[torch.distributions.kl_divergence(a, b).item() for b in ns] for a in ns])

# Divergences

@settings(max_examples=15)
@given(seeds, st.integers(1, 5), st.sampled_from([(12, 3, 3), (12, 1, 1), (12,), (30, 5), (3, 2, 2), (4, 2, 1, 2)]))
def test_divergences_are_those_of_torch(seed, n, shape):
    w = weight(n, *shape, seed=seed) + 3
    kl, ref = kernel_kl(w), reference_kl(w)
    assert kl.shape == (n, n) and kl.dtype == torch.float64
    assert torch.allclose(kl, ref.double(), rtol=1e-4, atol=1e-5) and (kl >= 0).all() and not kl.diagonal().any()

def test_a_filter_does_not_differ_from_its_copy():
    w = weight(5, 20, 3, 3); w[3] = w[1]
    assert kernel_kl(w)[1, 3] < 1e-9 and kernel_kl(w)[3, 1] < 1e-9 and dissimilarity(w)[1, 3] < 1e-9

@pytest.mark.parametrize('w', [weight(6, 1, 3, 3), weight(6, 3, 3, 3), weight(6, 1, 1, 1), weight(1, 4, 3, 3),
                               weight(4, 7), torch.zeros(3, 4, 3, 3), torch.ones(3, 1, 3, 3), weight(6, 8, 3, 3)*1e-18,
                               torch.cat([weight(5, 8, 3, 3), torch.zeros(1, 8, 3, 3)]), weight(5, 8, 3, 3).half()])
def test_where_there_is_little_to_estimate(w):
    "One input channel, colours, empty filters: no determinant is zero, and nothing is NaN."
    for compat in (None, 'released'):
        k = dissimilarity(w, compat)
        assert torch.isfinite(k).all() and torch.equal(k, k.T) and 0 <= k.min() and k.max() <= 1

@settings(max_examples=15)
@given(seeds, st.integers(2, 6), st.sampled_from([(12, 3, 3), (1, 3, 3), (3, 2, 2), (9,)]))
def test_what_a_dissimilarity_does_not_depend_on(seed, n, shape):
    w, order = weight(n, *shape, seed=seed), torch.randperm(n, generator=generator(seed))
    k = dissimilarity(w)
    assert torch.allclose(dissimilarity(w[order]), k[order][:, order], atol=1e-6)
    assert torch.allclose(dissimilarity(8*w), k, atol=1e-6) and torch.allclose(dissimilarity(w+1), k, atol=1e-2)

def test_one_input_channel_leaves_the_distances_of_the_means():
    w = torch.tensor([0., 1, 3]).view(3, 1, 1, 1)
    assert dissimilarity(w)[0].tolist() == pytest.approx([0, 1/9, 1])

def test_released_is_half_of_the_upper_triangle():
    w = weight(5, 20, 3, 3); up = kernel_kl(w).triu(); up = up/up.max()
    assert torch.allclose(dissimilarity(w, 'released'), (up+up.T)/2) and dissimilarity(w, 'released').max() == .5

# Entropies (oracle 11)

RAMP = torch.arange(256.).view(1, 1, 16, 16)
def test_entropies_by_hand():
    flat = torch.full_like(RAMP, 7.); maps = torch.cat([RAMP, flat, (RAMP > 127)*255.], 1)
    assert entropies(maps).tolist() == pytest.approx([8, 0, 1]) and entropies(flat).tolist() == [0]
    assert entropies(maps, 'released').tolist() == [0, 0, 0] # the program's: flat and constant are one
    two = torch.tensor([0., 0, 0, 255]).view(1, 1, 2, 2)
    assert entropies(two).item() == pytest.approx(.75*math.log2(4/3) + .25*2)
    assert entropies(two, 'released').item() == pytest.approx(-math.log2(1/3)/3)

@settings(max_examples=25)
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.sampled_from([(5, 7), (6,), (), (2, 3, 4)]))
def test_entropies_are_their_formula(seed, b, n, size):
    x = torch.rand(b, n, *size, generator=generator(seed)); y = x.double().mean(0).reshape(n, -1)
    level = ((y-y.min())/max(float(y.max()-y.min()), 1e-300)*256).long().clamp(max=255)
    for compat in (None, 'released'):
        want = []
        for row in level.tolist():
            counts = [row.count(v) for v in set(row)]; total = max(counts) if compat else sum(counts)
            want.append(-sum(c/total*math.log2(c/total) for c in counts))
        assert entropies(x, compat).tolist() == pytest.approx(want, abs=1e-9)
    assert torch.equal(entropies(4*x), entropies(x)) and (entropies(x) <= math.log2(max(y.shape[1], 1)) + 1e-9).all()

# The energy

def dense(states, blocks, floor=.1):
    "The formula as it stands: the whole matrix, state by state."
    d = states.shape[1]; J = torch.zeros(d, d).double(); at = [torch.arange(d)[c] for c,_,_ in blocks]
    for i,(_,K,H) in enumerate(blocks):
        if K is not None: J[at[i][:, None], at[i]] += K
        if H is not None and i+1 < len(blocks): J[at[i][:, None], at[i+1]] += H[:, None]
    J = J - 1
    return torch.stack([-s @ J @ s + s.sum()*J.sum()/d + 1e5*d*max(0., floor-s.mean().item()) for s in states.double()])

def test_energies_by_hand():
    two = [(slice(0, 1), None, torch.tensor([2.]).double()), (slice(1, 2), None, None)]
    s = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool()
    assert ising_energy(s, two).tolist() == [0, 0, 0, 1e5*2*.1]

@st.composite
def nets(draw):
    "Blocks of random size, by slices or by indices that may be shared, with or without K and H."
    g, sizes = generator(draw(seeds)), draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    d, at, blocks = sum(sizes), 0, []
    for n in sizes:
        cols = slice(at, at+n) if draw(st.booleans()) else torch.randperm(d, generator=g)[:n]; at += n
        K, H = torch.rand(n, n, generator=g).double(), torch.rand(n, generator=g).double()
        blocks.append((cols, (K+K.T)/2 if draw(st.booleans()) else None, H if draw(st.booleans()) else None))
    return blocks, torch.rand(7, d, generator=g) < draw(st.sampled_from([.05, .5, .9]))

@settings(max_examples=60)
@given(nets(), st.sampled_from([0., .1, .5]))
def test_blocks_give_the_energy_of_the_whole_matrix(net, floor):
    blocks, states = net; e = ising_energy(states, blocks, floor)
    assert e.shape == (7,) and torch.allclose(e, dense(states, blocks, floor), atol=1e-6)
    one = torch.cat([ising_energy(s[None], blocks, floor) for s in states]) # no state mixes with another
    assert torch.allclose(e, one, atol=1e-9)

def test_the_floor():
    s = torch.zeros(3, 20, dtype=torch.bool); s[1, :1], s[2, :2] = True, True
    e = ising_energy(s, []) + s.sum(1)*(20-s.sum(1))
    assert e.tolist() == pytest.approx([1e5*20*.1, 1e5*20*.05, 0])

def test_large_states_are_exact_enough():
    "Sums of D² = 3·10^9 must not drown the couplings of two units."
    d = 58_560; blocks = [(slice(0, 2), torch.tensor([[0., 1], [1, 0]]).double(), None)]
    s = torch.ones(2, d, dtype=torch.bool); s[0, 0] = s[1, 2] = False
    assert (ising_energy(s, blocks)[0] - ising_energy(s, blocks)[1]).item() == pytest.approx(2, abs=1e-4)

def layers(seed=0):
    g = generator(seed)
    return [torch.randn(6, 3, 3, 3, generator=g), torch.randn(4, 6, 3, 3, generator=g), None], \
           [torch.rand(5, 6, 8, 8, generator=g), torch.rand(5, 4, 4, 4, generator=g), None]
COLS = [slice(0, 6), slice(6, 10), slice(10, 14)]

@pytest.mark.parametrize('compat', [None, 'released'])
def test_from_weights_and_maps(compat):
    (w, m), ising = layers(), Ising(COLS, compat=compat, floor=.2); ising.update(w, m)
    H = [entropies(o, compat) for o in m[:2]]; H = [h/h.max() for h in H]
    blocks = [*[(c, dissimilarity(o, compat), h) for c,o,h in zip(COLS, w, H)], (COLS[2], None, None)]
    s = population(20, 14, rng=generator(0))
    assert torch.allclose(ising(s), dense(s, blocks, .2), atol=1e-6)

def test_constant_maps_are_no_nan():
    ising = Ising(COLS[:2]); ising.update(layers()[0][:2], [torch.zeros(5, 6, 8, 8), torch.zeros(5, 4)])
    assert torch.isfinite(ising(population(4, 10, rng=generator(0)))).all()

def test_divergences_every_few_updates(monkeypatch):
    from neuronprune import energy_ising as ei
    n, kl = [], ei._kl; monkeypatch.setattr(ei, '_kl', lambda w: n.append(1) or kl(w))
    ising = Ising(COLS, kl_every=3); seen = []
    for i in range(7): ising.update(*layers(i)); seen.append((len(n), ising.blocks[0]))
    assert [o for o,_ in seen] == [2, 2, 2, 4, 4, 4, 6]
    for i,(_,(_,K,H)) in enumerate(seen):
        now = entropies(layers(i)[1][0]); assert torch.equal(H, now/now.max())
        assert torch.equal(K, dissimilarity(layers(i - i % 3)[0][0]))

def test_it_waits_for_nothing():
    ising, s = Ising(COLS), population(4, 14, rng=generator(0))
    with Syncs() as seen: ising.update(*layers()); ising(s)
    assert seen.n == 0

@pytest.mark.parametrize('which', [0, 1])
def test_nan_is_noticed_in_the_end(which):
    a = layers(); a[which][0].view(-1)[5] = math.nan; ising, s = Ising(COLS), Search(14); ising.update(*a)
    with pytest.raises(ValueError, match='score: all 8 are NaN'): s.step(ising)

def test_going_on():
    a, b = Ising(COLS, kl_every=4), Ising(COLS, kl_every=4); s = population(5, 14, rng=generator(0))
    for i in range(2): a.update(*layers(i))
    b.load_state_dict(a.state_dict())
    for i in range(2, 8): a.update(*layers(i)); b.update(*layers(i)); assert torch.equal(a(s), b(s))

def test_weights_stay_as_they_are_and_keep_no_graph():
    w, m = layers(); w[0].requires_grad_(); m[0].requires_grad_(); before = w[0].detach().clone()
    ising = Ising(COLS); ising.update(w, m)
    assert torch.equal(w[0], before) and not ising(population(4, 14, rng=generator(0))).requires_grad

def test_the_search_takes_it():
    ising = Ising(COLS[:2]); ising.update(*[o[:2] for o in layers()]); s = Search(10, flip=.3, seed=1)
    every = (torch.arange(1024)[:, None] >> torch.arange(10)) % 2 == 1
    for _ in range(150): s.step(ising)
    assert s.energies.min() <= ising(every).min() + 1e-9 and s.energies.dtype == torch.float64

W, M = layers()
@pytest.mark.parametrize('call,said', [
    (lambda: kernel_kl(torch.ones(3)), r'weight: shape \(3,\); expected \[filters, inputs'),
    (lambda: kernel_kl(W[0]*math.nan), 'weight: .*NaN'), (lambda: kernel_kl([1]), 'weight: expected'),
    (lambda: dissimilarity(W[0], 'paper'), "compat='paper': expected one of None, 'released'"),
    (lambda: entropies(torch.ones(0, 3, 2)), r'maps: shape \(0, 3, 2\)'),
    (lambda: entropies(M[0]/0), 'maps: .*infinite'),
    (lambda: entropies(M[0], 'old'), "compat='old'"), (lambda: Ising(COLS, kl_every=0), 'kl_every=0'),
    (lambda: Ising(COLS, floor=1.), 'floor=1'), (lambda: Ising(COLS, compat='x'), "compat='x'"),
    (lambda: Ising(COLS).update(W[:1], M), 'kernels: 1 layers; expected 3'),
    (lambda: Ising(COLS).update(W, M[:1]), 'maps: 1 layers'),
    (lambda: Ising(COLS)(population(4, 14, rng=generator(0))), r'call update\(kernels, maps\) first'),
    (lambda: Ising(COLS).load_state_dict({'K0': 1}), 'state: .*expected n_updates'),
    (lambda: ising_energy(torch.ones(2, 4), []), 'states: dtype torch.float32'),
    (lambda: ising_energy(torch.ones(2, 4).bool(), [(slice(0, 3), torch.ones(2, 2).double(), None)]),
     r'blocks\[0\]: K of shape \(2, 2\) for 3 bits'),
    (lambda: ising_energy(torch.ones(2, 4).bool(), [(slice(0, 3), None, torch.ones(9).double())]),
     r'blocks\[0\]: H of shape')])
def test_wrong_arguments(call, said):
    with pytest.raises((ValueError, TypeError), match=said): call()
