"""Draws with replacement against loops, closed forms and repetition."""
import math, pytest, torch
import numpy as np
from hypothesis import given, settings, strategies as st
from scipy.stats import chi2
from neuronprune.draws import MAX_DRAWS, draw, draws_for, draws_near, expected_unique, reweigh, sample

def rng(seed=0): return np.random.default_rng(seed)

def exact_unique(q, n): return sum(1-(1-o)**n for o in q)

def smallest(q, t):
    "The smallest n by trying one after the other; all items but one at most."
    nnz = sum(o > 0 for o in q); t = min(t, nnz-1 if nnz > 1 else nnz)
    n = 0
    while exact_unique(q, n) < t - 1e-10: n += 1
    return n

weights = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)

@given(weights, st.integers(0, 60))
def test_expected_unique_by_hand(w, n):
    q = np.array(w)/sum(w)
    assert expected_unique(q, n) == pytest.approx(exact_unique(q, n), abs=1e-12)

@given(weights)
def test_infinitely_many_draws_hit_what_can_be_hit(w):
    q = np.array(w+[0])/sum(w)
    assert expected_unique(q, np.inf) == sum(o > 0 for o in w) and expected_unique([0., 0.], np.inf) == 0

def test_rows_with_target_zero_are_gone():
    f, n = sample(np.full((2, 4), .25), [0, 2], rng()); assert (f[0] == 0).all() and n[0] == 0 and f[1].any()

@given(st.lists(weights, min_size=1, max_size=4), st.data())
def test_draws_for_is_the_smallest_of_a_loop(rows, data):
    k = max(map(len, rows)); q = np.array([np.pad(np.array(r)/sum(r), (0, k-len(r))) for r in rows])
    t = [data.draw(st.integers(0, len(r))) for r in rows]
    n = draws_for(q, t)
    assert (n.dtype == np.int64 and n.tolist() == [smallest(*o) for o in zip(q, t)]
            and [draws_for(*o) for o in zip(q, t)] == n.tolist())

@pytest.mark.parametrize('k', (2, 3, 10, 1000))
def test_uniform_closed_form(k):
    t = np.unique(np.linspace(2, k-1, 50).astype(int)) if k > 2 else np.array([1])
    want = [math.ceil(math.log(k/(k-o))/math.log(k/(k-1)) - 1e-9) for o in t]
    assert draws_for(np.full((len(t), k), 1/k), t).tolist() == want

def test_millions_of_draws():
    w = rng().normal(size=(30, 784))**2; q = w/w.sum(1, keepdims=True); t = rng(1).integers(2, 784, 30); t[0] = 783
    n = draws_for(q, t)
    assert n.max() > 1e7 and (expected_unique(q, n) >= t*(1-1e-12)).all() and (expected_unique(q, n-1) < t).all()

def test_target_of_everything_is_finite_and_ends_at_the_limit():
    assert draws_for([.5, .5, 0.], 2) == 1 and draws_for([1., 0.], 1) == 1 and draws_for([0., 0.], 2) == 0
    assert draws_for([1-2e-300, 1e-300, 1e-300], 2) == MAX_DRAWS

def test_fractions_of_items(): assert draws_for([.5, .25, .25], 1.5) == 2 and draws_for([.5, .5], .2) == 1

def test_rows_of_any_shape():
    q = rng().dirichlet(np.ones(5), (2, 3)); t = np.array([[0, 1, 2], [3, 4, 5]])
    n = draws_for(q, t); f, m = sample(q, t, rng())
    assert n.shape == draws_near(q, t).shape == (2, 3) and f.shape == q.shape and expected_unique(q, n).shape == (2, 3)
    assert n.ravel().tolist() == draws_for(q.reshape(6, 5), t.ravel()).tolist() and m[1,2] == 0 and (f[1,2] == 1).all()

def test_draw_counts_add_up_and_follow_the_probabilities():
    q = np.array([[.5, .2, 0, .3]]*4000); n = 50
    c = draw(q, n, rng())
    assert (c.sum(1) == n).all() and (c[:, 2] == 0).all()
    expect = 4000*n*q[0, [0,1,3]]; stat = ((c.sum(0)[[0,1,3]]-expect)**2/expect).sum()
    assert stat < chi2.ppf(.9999, 2)
    var = n*q[0, 0]*(1-q[0, 0]); assert abs(c[:, 0].var()/var-1) < .1      # a multinomial, not independent rounding

@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([1, 10**9, MAX_DRAWS]))
@settings(max_examples=40)
def test_items_without_probability_are_never_drawn(seed, k, n):
    g = rng(seed); q = g.random(k)**8*(g.random(k) < .6)
    if not q.any(): return
    c = draw(q/q.sum(), n, g)
    assert c.sum() == n and (c >= 0).all() and (c[q == 0] == 0).all()

def test_the_last_item_does_not_collect_rounding():
    q = np.append(np.full(10, .1), 0.); q[:10] += np.array([1, -1]*5)*1e-9; q /= q.sum()
    assert draw(np.tile(q, (50, 1)), MAX_DRAWS, rng())[:, -1].max() == 0

@pytest.mark.parametrize('t', (1, 4, 8, 9, 10))
def test_unbiased(t):
    w = rng(5).normal(size=10)**2; q, n_sims = w/w.sum(), 4000
    f, n = sample(np.tile(q, (n_sims, 1)), t, rng(t))
    se = f.std(0)/n_sims**.5
    assert (np.abs(f.mean(0)-1) <= 4*se).all() and ((n == 0).all() if t == 10 else (n > 0).all())
    if t < 10: assert np.allclose((f*q).sum(1), 1)                        # nothing is lost, nothing added

def test_the_decision_never_looks_at_the_outcome():
    q = np.tile([.4, .35, .25], (2000, 1)); f, n = sample(q, 2, rng())
    all_hit = (f > 0).all(1)
    assert all_hit.any() and not np.allclose(f[all_hit], 1) and (n == sample(q, 2, rng(1))[1]).all()

def test_distinct_items_are_as_many_as_wanted():
    q = rng().dirichlet(np.full(30, .5)); f, n = sample(np.tile(q, (5000, 1)), 12, rng(2)); seen = (f > 0).sum(1)
    assert (abs(seen.mean()-12) < 4*seen.std()/5000**.5
            and abs(expected_unique(np.tile(q, (5000, 1)), n).sum()-60_000) < .5)

@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 8))
def test_a_budget_over_rows_is_met_to_half_a_draw(seed, k, rows):
    g = rng(seed); q = g.dirichlet(np.ones(k), rows); t = g.integers(0, k, rows)
    many, near = draws_for(q, t), draws_near(q, t); less = many-near
    step = expected_unique(q, many)-expected_unique(q, np.maximum(many-1, 0)); total = expected_unique(q, near).sum()
    assert (set(less.tolist()) <= {0, 1} and (near >= np.minimum(t, 1)).all()
            and abs(total-t.sum()) <= step.max()/2 + 1e-9)

def test_targets_of_a_budget_are_cut_too(): assert draws_near([[.5, .5, 0], [0, 0, 0]], [2, 1]).tolist() == [1, 0]

def test_same_seed_same_draws_and_torch_tensors_will_do():
    q = torch.rand(4, 6, dtype=torch.float64); q /= q.sum(1, keepdim=True)
    a, b, c = (sample(o, 3, rng(s))[0] for o,s in ((q, 1), (q.numpy(), 1), (q, 2)))
    assert (a == b).all() and (a != c).any()

def test_the_global_random_state_is_not_touched():
    before = np.random.get_state()[1].tolist(); sample([.5, .5], 1, rng())
    assert np.random.get_state()[1].tolist() == before

def test_reweigh_is_its_formula():
    q, c = rng().dirichlet(np.ones(4), 3), rng().integers(0, 5, (3, 4))
    f = reweigh(q, [10, 0, 7], c, [False, False, True])
    assert np.allclose(f[0], c[0]/(10*q[0])) and (f[1] == 0).all() and (f[2] == 1).all()

BAD = [[.5, float('nan')], [1.5, -.5], [.3, .3], [float('inf'), 0.], 1., []]
@pytest.mark.parametrize('q', BAD)
@pytest.mark.parametrize('f', (lambda q: expected_unique(q, 1), lambda q: draws_for(q, 1), lambda q: draw(q, 1, rng()),
                               lambda q: reweigh(q, 1, q), lambda q: sample(q, 1, rng())))
def test_bad_probabilities(q, f):
    with pytest.raises(ValueError, match='^q: '): f(q)

@pytest.mark.parametrize('t', (-1, 3, float('nan'), float('inf'), [1, 1, 1]))
def test_bad_targets(t):
    with pytest.raises(ValueError, match='^target: '): draws_for([[.5, .5], [1, 0]], t)
    with pytest.raises(ValueError, match='^target: '): sample([[.5, .5], [1, 0]], t, rng())

@pytest.mark.parametrize('n', (-1, .5, float('nan'), 2.**54))
def test_bad_numbers_of_draws(n):
    with pytest.raises(ValueError, match='^n: '): draw([.5, .5], n, rng())

def test_other_bad_arguments():
    with pytest.raises(ValueError, match='without probabilities'): draw([[0., 0.], [1, 0]], [1, 1], rng())
    with pytest.raises(ValueError, match='^counts: '): reweigh([.5, .5], 1, [1, 2, 3])
    with pytest.raises(TypeError, match='default_rng'): sample([.5, .5], 1, 0)
