"""The pieces of the energy search against literal versions, its oracles, and what must not happen to it."""
import io, itertools, math, pytest, torch
import numpy as np
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from neuronprune.core import generator
from neuronprune import energy as en
from neuronprune.energy import (ENERGIES, OPERATORS, RESCORE, Search, ce, de_ref, de_xor, density, diversity, donors,
                                energy_of, flips, lock_reason, margin, offspring, population, rescored, select,
                                size_penalty)

nan, inf = math.nan, math.inf
seeds = st.integers(0, 2**20)
def bits(s): return torch.tensor([o == '1' for o in s])
def quadratic(n_bits, seed):
    q = torch.randn(n_bits, n_bits, generator=generator(seed))
    return lambda states: (states.float() @ q * states.float()).sum(1)
def everything(n_bits): return (torch.arange(2**n_bits)[:, None] >> torch.arange(n_bits)) % 2 == 1
def alike(a, b):
    return list(a) == list(b) and all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k]
                                      for k,v in a.items())

# Energies (oracle 1)

Z, Y = torch.tensor([[2., 1, 0], [0, 3, 5]]), torch.tensor([0, 1])

def test_energies_by_hand():
    assert margin(Z, Y).item() == .5 and margin(torch.tensor([[10., 0]]), torch.tensor([0])).item() == -10
    assert margin(torch.tensor([[1., 4]]), torch.tensor([0])).item() == 3 # two classes
    assert ce(torch.zeros(1, 2), torch.tensor([1])).item() == pytest.approx(math.log(2))

@settings(max_examples=40)
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(2, 6))
def test_energies_are_their_formulas(seed, s, b, c):
    g = generator(seed); z = 4*torch.randn(s, b, c, generator=g); y = torch.randint(c, (b,), generator=g)
    slow = [[max(z[i, j, k].item() for k in range(c) if k != y[j]) - z[i, j, y[j]].item() for j in range(b)]
            for i in range(s)]
    assert margin(z, y).tolist() == pytest.approx([sum(o)/b for o in slow], abs=1e-5)
    own = [torch.nn.functional.cross_entropy(o, y).item() for o in z]
    assert ce(z, y).tolist() == pytest.approx(own, abs=1e-5)
    assert ce(z, torch.eye(c)[y]).tolist() == pytest.approx(own, abs=1e-5)
    for f in (margin, ce):
        assert [f(o, y).item() for o in z] == pytest.approx(f(z, y).tolist(), abs=1e-5)
        assert f(z + torch.randn(s, b, 1, generator=g), y).tolist() == pytest.approx(f(z, y).tolist(), abs=1e-4)
    assert margin(8*z, y).tolist() == pytest.approx((8*margin(z, y)).tolist(), abs=1e-4)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_outputs_have_the_right_rival(dtype):
    "The programs find the rival by taking 10,000 from the label's output."
    z = torch.tensor([[40_000., 10, 20]], dtype=dtype); e = margin(z, torch.tensor([0]))
    assert e.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert e.item() == pytest.approx(20 - float(z[0, 0])) and ce(z, torch.tensor([0])).dtype == e.dtype

def test_a_callable_energy():
    wrong = lambda z,y: (z.argmax(-1) != y).float().mean(-1)
    assert energy_of(Z[None], Y, wrong).tolist() == [.5]
    assert all(torch.equal(energy_of(Z[None], Y, k), f(Z[None], Y)) for k,f in ENERGIES.items())

def test_emptied_network_has_a_constant_energy():
    "All inputs of the last layer off: outputs are its bias, and nothing is NaN."
    assert torch.isfinite(margin(torch.zeros(3, 4, 10) + torch.rand(10), torch.arange(4))).all()

def test_a_label_that_is_no_class_is_nan_where_nobody_may_look(monkeypatch):
    "On a GPU labels are not read by the host: the energy says so in the end."
    class Elsewhere(torch.Tensor):
        device = property(lambda self: type('D', (), dict(type='cuda', __index__=None))())
    y = torch.tensor([0, 7]); hit = y[:, None] == torch.arange(3)
    monkeypatch.setattr(torch, 'arange', lambda c, device=None: torch.tensor(range(c)))
    h, own = en._own(Z, y.as_subclass(Elsewhere))
    assert torch.equal(torch.Tensor(h.float()) > 0, hit) and own[0] == 2 and math.isnan(own[1])

# Operators (oracles 2 and 3)

def test_operators_by_hand():
    b, c, all_, none = bits('1010'), bits('1001'), bits('1111'), bits('0000')
    assert torch.equal(de_ref(bits('1100'), b, c, all_), bits('0000'))
    assert torch.equal(de_ref(bits('0000'), b, c, all_), bits('1100'))
    assert torch.equal(de_xor(bits('1100'), b, c, all_), bits('1111'))
    for f in OPERATORS.values(): assert torch.equal(f(bits('1100'), b, c, none), bits('1100'))

@given(st.tuples(*[st.booleans()]*4))
def test_operators_are_their_formulas(o):
    a, b, c, f = map(int, o); t = [torch.tensor([[v]]) for v in o]
    assert int(de_ref(*t)) == (a if not f else 1-a if b == c else 0)
    assert int(de_xor(*t)) == a ^ (f & (b ^ c)) and int(flips(*t)) == a ^ f

@pytest.mark.parametrize('n', [4, 5, 8])
def test_donors_are_different(n):
    for s in range(50):
        for i,row in enumerate(donors(n, generator(s)).tolist()):
            assert len({i, *row}) == 4 and set(row) < set(range(n))

def test_donors_are_equally_likely():
    n = torch.zeros(4, 4, 4)
    for s in range(2000):
        for row in donors(4, generator(s))[:1].tolist(): n[tuple(row)] += 1
    there = n[n > 0]
    assert len(there) == 6 and (there - 2000/6).abs().max() < 5*math.sqrt(2000/6)

def literal(P, e, rng, op, base, flip, cr, p_min):
    "`offspring` bit by bit, from the same draws."
    S, D = P.shape
    who = donors(S, rng).tolist()
    take, up = [(torch.rand(S, D, generator=rng) < p).tolist() for p in (cr, flip)]
    floor = (torch.rand(S, D, generator=rng) < p_min).tolist() if p_min else [[False]*D]*S
    P, res, best = P.int().tolist(), [], min(range(S), key=lambda i: (e[i], i))
    for i in range(S):
        a, b, c = (P[j] for j in who[i])
        if base == 'best': a = P[best]
        row = []
        for d in range(D):
            v = a[d]
            if up[i][d] and op == 'de_ref': v = 1-a[d] if b[d] == c[d] else 0
            if up[i][d] and op == 'de_xor': v = a[d] ^ (b[d] ^ c[d])
            if up[i][d] and op == 'flips': v = 1-a[d]
            row.append((v if take[i][d] else P[i][d]) ^ floor[i][d])
        res.append(row)
    return torch.tensor(res) == 1

@settings(max_examples=40)
@given(seeds, st.integers(4, 7), st.integers(1, 9), st.sampled_from(list(OPERATORS)), st.sampled_from(['rand', 'best']),
       *[st.sampled_from([0., .1, .5, 1.])]*3)
def test_offspring_is_bit_for_bit_the_literal_one(seed, s, d, op, base, flip, cr, p_min):
    P, e = population(s, d, rng=generator(seed)), torch.randint(3, (s,), generator=generator(seed)).float()
    kw = dict(op=op, base=base, flip=flip, cr=cr, p_min=p_min); before = P.clone()
    kids = offspring(P, e, rng=generator(seed+1), **kw)
    assert torch.equal(kids, literal(P, e.tolist(), generator(seed+1), **kw)) and torch.equal(P, before)
    assert kids.dtype == torch.bool and kids.data_ptr() != P.data_ptr()

def test_no_crossover_gives_the_parents_and_no_flip_the_base():
    P = population(4, 30, rng=generator(0))
    assert torch.equal(offspring(P, rng=generator(1), cr=0.), P)
    kids, who = offspring(P, rng=generator(1), cr=1., flip=0.), donors(4, generator(1))
    assert torch.equal(kids, P[who[:, 0]])

def test_first_generation_of_the_reference():
    n = 50_000; kids = offspring(population(8, n, rng=generator(3)), rng=generator(4))
    assert abs(kids.float().mean().item() - .4775) < 3*.5/math.sqrt(n)

def drift(op, n, **kw):
    rng = generator(0); P, rows = population(8, 4000, rng=rng), []
    for _ in range(n):
        P = offspring(P, rng=rng, op=op, **kw); rows.append((P.float().mean().item(), diversity(P).item()))
    return np.array(rows)

def test_drift_without_selection():
    ref, xor = drift('de_ref', 80), drift('de_xor', 80)
    assert .37 < ref[40:, 0].mean() < .41 and ref[40:, 1].min() > .3
    assert .45 < xor[:, 0].mean() < .55 and xor[-1, 1] < .005
    p = .5
    for _ in range(200): p = .1*p + .9*(.9*p + .1*(1-p)*(p*p + (1-p)**2))
    assert p == pytest.approx(.3522, abs=1e-4)

def test_a_converged_population():
    same = population(4, 4000, rng=generator(0))[:1].repeat(6, 1)
    changed = lambda **kw: (offspring(same, rng=generator(1), **kw) ^ same).float().mean().item()
    assert changed(op='de_xor') == 0 and changed() == pytest.approx(.09, abs=.006)
    assert 0 < changed(op='de_xor', p_min=1/400) < .005

# Figures and selection

@given(seeds, st.integers(1, 6), st.integers(1, 8))
def test_figures_of_a_population(seed, s, d):
    P = torch.rand(s, d, generator=generator(seed)) < .5; cost = torch.randint(1, 9, (d,), generator=generator(seed))
    pairs = [(P[i] ^ P[j]).float().mean().item() for i,j in itertools.combinations(range(s), 2)]
    assert diversity(P).item() == pytest.approx(sum(pairs)/max(len(pairs), 1), abs=1e-6)
    assert density(P).tolist() == pytest.approx(P.float().mean(1).tolist(), abs=1e-6)
    assert density(P, cost).tolist() == pytest.approx([sum(c for c,o in zip(cost.tolist(), r) if o)/sum(cost.tolist())
                                                       for r in P.tolist()], abs=1e-6)
    for sparsity in (0., .5):
        want = [7*abs(o-(1-sparsity)) for o in density(P, cost).tolist()]
        assert size_penalty(P, sparsity, cost, 7.).tolist() == pytest.approx(want, abs=1e-5)

numbers = st.sampled_from([nan, inf, 0., 1., 1., 2., -3.])
@given(st.integers(4, 6).flatmap(lambda n: st.tuples(*[st.lists(numbers, min_size=n, max_size=n)]*2)), seeds)
def test_selection_is_one_to_one(es, seed):
    old, young = es; n = len(old); P, Q = (population(n, 5, rng=generator(seed+i)) for i in (0, 1))
    if all(map(math.isnan, young)):
        with pytest.raises(ValueError, match=f'young: all {n} are NaN'):
            select(P, torch.tensor(old), Q, torch.tensor(young))
        return
    after, e, came = select(P, torch.tensor(old), Q, torch.tensor(young))
    clean = lambda x: inf if math.isnan(x) else x
    for i in range(n):
        better = clean(young[i]) < clean(old[i])
        assert came[i] == better and e[i] == clean((young if better else old)[i])
        assert torch.equal(after[i], (Q if better else P)[i])

def test_the_first_of_equals_is_the_best():
    assert en._first(torch.tensor([nan, 2., 1, 1])).tolist() == [2]
    s = Search(6, seed=0); s.step(lambda x: torch.ones(len(x))); assert torch.equal(s.best, s.states[0])

def test_the_best_state_is_a_copy():
    s = Search(6); s.step(quadratic(6, 0)); before = s.states.clone(); s.best[:] = True
    assert torch.equal(s.states, before)

# Energies of yesterday

def count(score, calls):
    def f(states): calls.append(states); return score(states)
    return f

@pytest.mark.parametrize('how,n', [('stale', 5), ('shift', 6), ('fresh', 10)])
def test_what_is_scored_and_what_is_shifted(how, n):
    P, Q, calls = population(5, 8, rng=generator(0)), population(5, 8, rng=generator(1)), []
    then, now = quadratic(8, 0), lambda s: quadratic(8, 0)(s) + 7
    old, young = rescored(P, then(P), Q, count(now, calls), how)
    assert len(calls) == 1 and len(calls[0]) == n and torch.equal(young, now(Q))
    assert torch.allclose(old, then(P) if how == 'stale' else now(P), atol=1e-5)

@pytest.mark.parametrize('was,now', [(inf, 3.), (2., inf)])
def test_a_shift_is_a_number(was, now):
    P, Q = population(4, 3, rng=generator(0)), population(4, 3, rng=generator(1))
    e = torch.tensor([was, inf, inf, inf] if was == inf else [was, 4., 5., 6.])
    old, young = rescored(P, e, Q, lambda s: torch.tensor([now, 1., 2, 3, 4]), 'shift')
    assert not old.isnan().any() and old[0] == now and torch.equal(old[1:], e[1:]) and young.tolist() == [1, 2, 3, 4]

def test_stale_energies_are_never_touched_and_fresh_ones_always():
    level = [0.]
    def score(states): level[0] += 1; return states.float().sum(1) + 100*level[0]
    stale, fresh, shift = (Search(6, rescore=o) for o in ('stale', 'fresh', 'shift'))
    for s in (stale, fresh, shift):
        level[0] = 0
        for _ in range(6): s.step(score)
    assert (stale.energies < 107).all() and (fresh.energies > 599).all() and (shift.energies > 599).all()
    assert stale.best_changes == 0 and stale.no_improve == 5

# The search (oracles 4 and 5)

@settings(max_examples=12)
@given(seeds, st.sampled_from(list(OPERATORS)), st.sampled_from(['rand', 'best']), st.sampled_from(RESCORE),
       st.sampled_from([None, .5]))
def test_energies_fall_on_a_fixed_batch(seed, op, base, rescore, sparsity):
    s, e = Search(12, 5, op=op, base=base, rescore=rescore, sparsity=sparsity, seed=seed), quadratic(12, seed)
    for _ in range(15): s.step(e)
    for a,b in zip(s.rows, s.rows[1:]): assert b['best'] <= a['best']+1e-4 and b['mean'] <= a['mean']+1e-4

def test_it_finds_the_best_of_all_states():
    "With more flips than published; the chapter has three more ways."
    found, states = 0, everything(10)
    for seed in range(40):
        e = quadratic(10, seed); exact, s = e(states).min() + 1e-5, Search(10, seed=seed, flip=.3)
        while s.generation < 200 and s.energies.min() > exact: s.step(e)
        found += bool(s.energies.min() <= exact)
    assert found >= 36

def test_the_size_that_is_asked_for():
    cost = torch.arange(1, 41)
    s = Search(40, base='best', flip=.05, sparsity=.7, cost=cost, lam=20.)
    for _ in range(300): s.step(lambda x: -x.float().mean(1))
    assert abs(density(s.best[None], cost).item() - .3) < .02 and s.rows[-1]['best_density'] == pytest.approx(
        density(s.best[None], cost).item())

def test_rows_are_what_happened():
    s, e, was = Search(9, 6, seed=2, flip=.3), quadratic(9, 2), None
    for g in range(30):
        before, best = s.states, None if was is None else s.best
        row = s.step(e)
        assert row['best'] == s.energies.min().item()
        assert row['mean'] == pytest.approx(s.energies.mean().item(), abs=1e-5)
        assert row['diversity'] == pytest.approx(diversity(s.states).item())
        assert row['n_scored'] == (6 if g == 0 else 7)
        assert row['changed'] == int(g > 0 and not torch.equal(best, s.best))
        assert row['accepted'] >= (s.states != before).any(1).sum() and row['improved'] == int(
            g > 0 and row['best'] < was - 1e-6)
        was = row['best']
    rows = s.curve()
    assert [r['generation'] for r in rows] == list(range(30)) and rows[-1]['best_changes'] == s.best_changes
    assert all(isinstance(v, (int, float)) for r in rows for v in r.values()) and s.plot() is not None

def test_nan_counts_and_does_not_win():
    s = Search(8, seed=1)
    def score(x): e = x.float().sum(1); e[-1] = nan; return e
    for _ in range(10): s.step(score)
    assert s.n_nan == 10 and not s.energies.isnan().any() and s.energies.min().isfinite()

def test_no_global_random_state():
    before = torch.get_rng_state(); s = Search(8)
    for _ in range(3): s.step(quadratic(8, 0))
    assert torch.equal(before, torch.get_rng_state())

class Syncs(TorchDispatchMode):
    "Counts what would make a host wait for its GPU."
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        waits = ('_local_scalar_dense', 'nonzero', 'equal', 'is_nonzero', 'masked_select', 'unique')
        self.n += f.overloadpacket.__name__ in waits
        if f.overloadpacket.__name__ == 'index':
            self.n += any(o is not None and o.dtype == torch.bool for o in args[1])
        return f(*args, **(kwargs or {}))

@pytest.mark.parametrize('rescore', RESCORE)
def test_a_generation_waits_for_nothing_but_its_row(rescore, monkeypatch):
    s = Search(8, rescore=rescore, base='best', op='de_xor', sparsity=.5, cost=torch.arange(1, 9))
    pieces, to = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda self: pieces.append(1) or to(self))
    for _ in range(3):
        with Syncs() as seen: s.step(lambda x: x.float().sum(1))
        assert seen.n == 0
    assert len(pieces) == 3
    with Syncs() as seen: bool(torch.ones(1) > 0)
    assert seen.n == 1

# The lock (oracle 10)

def scripted(best, rescore='stale'):
    "A search whose lowest energies are these: every child has the next one."
    s, it = Search(6, rescore=rescore), iter(best)
    def step(): e = next(it); return s.step(lambda x: torch.full((len(x),), e))
    return s, step

def test_patience():
    s, step = scripted([5.]*20)
    for g in range(11):
        step(); assert s.locked(patience=10, min_steps=0, min_diversity=0.) == ('patience' if g == 10 else None)

def test_one_repetition_does_not_lock():
    seq = [*map(float, range(20, 10, -1)), 11., *map(float, range(10, 0, -1))]; s, step = scripted(seq)
    for g in range(len(seq)):
        step(); assert s.locked(patience=10, min_steps=0) is None
        if g == 10: assert np.mean(np.array(seq[:g])[-9:] == seq[g]) # the released criterion

def test_worse_children_are_no_improvement():
    s, step = scripted([5., 6., 6., 5., 7., 4.9, 5., 5.])
    assert [step() and s.no_improve for _ in range(8)] == [0, 1, 2, 3, 4, 0, 1, 2]

def test_reasons():
    assert lock_reason(50, 999, .4) is None and lock_reason(50, 1000, .4) == 'patience'
    assert lock_reason(9, 5000, .4) is None and lock_reason(0, 1, 9e-4) == 'collapse'
    assert lock_reason(0, 1, .4, 4, lock_epoch=5) is None and lock_reason(0, 1, .4, 5, lock_epoch=5) == 'epoch'
    assert lock_reason(0, 1, .4, 0, lock_epoch=0) == 'epoch' and Search(5).locked() is None

# Stop, and go on (oracle 12)

@settings(max_examples=15)
@given(seeds, st.sampled_from(list(OPERATORS)), st.sampled_from(['rand', 'best']), st.sampled_from(RESCORE),
       st.sampled_from([None, .5]), st.integers(0, 6))
def test_five_generations_after_a_reload(seed, op, base, rescore, sparsity, at):
    kw = dict(op=op, base=base, rescore=rescore, sparsity=sparsity, cost=torch.arange(1, 11) if sparsity else None)
    a, e = Search(10, 5, seed=seed, **kw), quadratic(10, seed)
    for _ in range(at): a.step(e)
    f = io.BytesIO(); torch.save(a.state_dict(), f); f.seek(0)
    b = Search(10, 5, seed=seed+1, **kw); b.load_state_dict(torch.load(f, weights_only=True))
    later = [a.step(e) for _ in range(5)]
    assert [b.step(e) for _ in range(5)] == later and alike(a.state_dict(), b.state_dict()) and a.rows == b.rows
    assert all(type(v) is type(b.rows[0][k]) for r in a.rows for k,v in r.items())

def test_a_state_is_a_copy():
    s, e = Search(8), quadratic(8, 0); s.step(e); a = s.state_dict(); b = {k:v.clone() if hasattr(v, 'clone') else v
                                                                         for k,v in a.items()}
    for _ in range(4): s.step(e)
    assert alike(a, b); s.load_state_dict(a); s.states[:] = True; assert alike(a, b)

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_what_fails_leaves_no_trace(error):
    s, e = Search(8, seed=4), quadratic(8, 0)
    for _ in range(3): s.step(e)
    before = s.state_dict()
    def broken(x): raise error
    for bad in (broken, lambda x: torch.full((len(x),), nan), lambda x: torch.zeros(2)):
        with pytest.raises((error, ValueError)): s.step(bad)
        assert alike(s.state_dict(), before)

def test_the_same_seed_gives_the_same_search():
    rows = []
    for seed in (1, 1, 2):
        s = Search(10, seed=seed); rows.append([s.step(quadratic(10, 0)) for _ in range(5)])
    assert rows[0] == rows[1] != rows[2]

# Wrong arguments

P4, Q4, E4 = population(4, 3, rng=generator(0)), population(4, 3, rng=generator(1)), torch.arange(4.)
@pytest.mark.parametrize('call,said', [
    (lambda: population(3, 5, rng=generator(0)), 'n_pop=3: expected a whole number of at least 4'),
    (lambda: population(4, 0, rng=generator(0)), 'n_bits=0'), (lambda: population(4, 5, 0., rng=generator(0)), 'p0=0'),
    (lambda: population(4, 5, 1., rng=generator(0)), 'p0=1'),
    (lambda: population(4, 5, True, rng=generator(0)), 'p0=True'),
    (lambda: population(4, 5, rng=7), 'rng.*expected a Generator'), (lambda: donors(3, generator(0)), 'n_pop=3'),
    (lambda: offspring(P4.int(), rng=generator(0)), 'states: dtype torch.int32'),
    (lambda: offspring(P4[0], rng=generator(0)), r'states: shape \(3,\)'),
    (lambda: offspring(P4[:3], rng=generator(0)), 'states: 3 of them; expected at least 4'),
    (lambda: offspring(P4, rng=generator(0), op='de_xr'), "did you mean 'de_xor'"),
    (lambda: offspring(P4, rng=generator(0), base='beste'), "did you mean 'best'"),
    (lambda: offspring(P4, rng=generator(0), base='best'), 'energies: expected a Tensor, got NoneType'),
    (lambda: offspring(P4, E4[:2], rng=generator(0), base='best'), r'energies: .*expected one .* per state, \[4\]'),
    (lambda: offspring(P4, rng=generator(0), flip=10), 'flip=10: .*did you mean 0.1'),
    (lambda: offspring(P4, rng=generator(0), cr=-.1), 'cr=-0.1'),
    (lambda: select(P4, E4, Q4[:, :2], E4), r'children: shape \(4, 2\); expected \[states, 3\]'),
    (lambda: select(P4, E4, Q4[:2], E4), 'children: 2 of them'),
    (lambda: select(P4, E4, Q4, E4.int()), 'young: torch.int32'),
    (lambda: rescored(P4, E4, Q4, lambda s: E4, 'new'), "rescore='new'"), (lambda: rescored(P4, E4, Q4, 5), 'score'),
    (lambda: margin(Z[:, :1], Y*0), 'logits: 1 class'), (lambda: margin(Z, torch.eye(3)[Y]), "soft .* go with 'ce'"),
    (lambda: margin(Z, Y.float()), 'yb: torch.float32'), (lambda: margin(Z, Y > 0), 'yb: torch.bool'),
    (lambda: margin(Z, Y[:1]), 'yb: 1 of them; expected one per example, 2'), (lambda: margin(Z, Y+2), 'from 2 to 3'),
    (lambda: margin(Z, Y-1), 'from -1 to 0; expected 0 to 2'), (lambda: ce(Z[:0], Y[:0]), 'none of these 0'),
    (lambda: ce(Z, torch.eye(4)[:2]), 'yb: torch.float32'), (lambda: margin(Z.long(), Y), 'logits: torch.int64'),
    (lambda: margin([1], Y), 'logits: expected a .*Tensor'), (lambda: energy_of(Z, Y), r'logits: shape \(2, 3\)'),
    (lambda: energy_of(Z[None], Y, 'margn'), "did you mean 'margin'"),
    (lambda: energy_of(Z[None], Y, lambda z,y: z), 'energy: .*expected one floating-point number per state'),
    (lambda: size_penalty(P4, 50), 'did you mean 0.5'), (lambda: size_penalty(P4, .5, [1, 2]), r'cost: shape \(2,\)'),
    (lambda: lock_reason(0, 0, .5, patience=0), 'patience=0'), (lambda: Search(0), 'n_bits=0'),
    (lambda: Search(5, 3), 'n_pop=3'), (lambda: Search(5, rescore='old'), "rescore='old'"),
    (lambda: Search(5, op='de'), "op='de'"), (lambda: Search(5, base='b'), "base='b'"),
    (lambda: Search(5, sparsity=1.), 'sparsity=1'), (lambda: Search(5, cost=[1, 2]), r'cost: shape \(2,\)'),
    (lambda: Search(5, flip=2.), 'flip=2'), (lambda: Search(5, seed=.5), 'seed=0.5'),
    (lambda: Search(5).step(5), 'score'), (lambda: Search(5).step(lambda s: [1]), 'score: expected a Tensor, got list'),
    (lambda: Search(5).step(lambda s: s.float()), 'score: .*per state'),
    (lambda: Search(5).load_state_dict({}), 'state: .*expected the keys'),
    (lambda: Search(5).load_state_dict(Search(5, flip=.2).state_dict()), 'flip=0.2; this search has flip=0.1'),
    (lambda: Search(5).load_state_dict(Search(6).state_dict()), r'expected \[states, 5\]'),
    (lambda: Search(5).load_state_dict(Search(5, 6).state_dict()), '6 states; expected 8')])
def test_wrong_arguments(call, said):
    with pytest.raises((ValueError, TypeError), match=said): call()
