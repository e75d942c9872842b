"""The annealer on tables: moves, acceptance, schedules, the distribution it samples, optima, resuming, bad calls."""
import json, math, warnings
from types import SimpleNamespace
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from joblib import parallel_config
from scipy.stats import chi2
from neuronprune import anneal as here
from neuronprune.anneal import RELEASED, Annealed, Released, Schedule, Swaps, TableEvaluator, anneal, start_temperature

@pytest.fixture(scope='module')
def toy():
    "All masks of 12 weights into three classes, and the scores of their accuracy on 60 points."
    g = np.random.default_rng(10); X, W = g.normal(size=(60, 4)), g.normal(size=(4, 3))
    y = (X @ W + g.normal(size=(60, 3))).argmax(1)
    bits = (np.arange(2**12)[:, None] >> np.arange(12) & 1).astype(bool)
    table = ((X @ (W.ravel()*bits).reshape(-1, 4, 3)).argmax(-1) == y).mean(1)
    return SimpleNamespace(bits=bits, table=table, half=bits.sum(1) == 6, top=table[bits.sum(1) == 6].max())

GROUPS = [slice(0, 40), slice(40, 55), slice(55, 60)]

# Swap moves

@given(st.integers(0, 2**31), st.integers(1, 40), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_moves_keep_the_budget(seed, kappa, fixed, informed):
    rng = np.random.default_rng(seed); mask = rng.permutation(60) < kappa
    S = rng.normal(size=60) if informed else None
    sw = Swaps(mask, GROUPS, fixed); counts = sw.counts.copy()
    if not sw.ways[-1]: return
    for _ in range(40):
        before, h = sw.mask.copy(), int(rng.integers(1, 12))
        goes, comes, _ = sw.draw(rng, h, S, 4)
        assert before[goes].all() and not before[comes].any() and len(goes) == len(comes) <= h
        assert len(set(goes)) == len(set(comes)) == len(goes)
        sw.commit()
        assert sw.mask.sum() == kappa and (before != sw.mask).sum() == 2*len(goes)
        on, off = (np.sort(np.concatenate(o)) for o in zip(*sw.parts))
        assert (on == np.flatnonzero(sw.mask)).all() and (off == np.flatnonzero(~sw.mask)).all()
        assert (sw.counts == [sw.mask[s].sum() for s in GROUPS]).all()
        assert not fixed or (sw.counts == counts).all()

@pytest.mark.parametrize('n,kappa,h', [(12, 6, 1), (12, 6, 2), (20_000, 10_500, 1)])
def test_all_moves_are_as_likely(n, kappa, h):
    rng, mask = np.random.default_rng(0), np.arange(n) < kappa; sw = Swaps(mask, [slice(0, n)])
    drawn = [sw.draw(rng, h)[:2] for _ in range(6000)]
    for j,size in ((0, kappa), (1, n-kappa)):
        units = np.concatenate([d[j] for d in drawn]) - (0 if j == 0 else kappa)
        seen = np.bincount(units*min(size, 12)//size, minlength=min(size, 12)); want = len(units)/len(seen)
        assert ((seen-want)**2/want).sum() < chi2.ppf(.9999, len(seen)-1)

def test_a_layer_is_drawn_by_its_possible_swaps():
    mask = np.zeros(60, dtype=bool); mask[[0, 1, 41, 42, 43, 56]] = True
    sw, rng = Swaps(mask, GROUPS, fixed=True), np.random.default_rng(1)
    got = np.bincount([sw.group[sw.draw(rng, 1)[0][0]] for _ in range(8000)], minlength=3)/8000
    ways = np.array([2*38, 3*12, 1*4]); p = ways/ways.sum()
    assert (np.abs(got-p) < 4*np.sqrt(p*(1-p)/8000)).all()

def test_the_floor_refuses_and_counts():
    ev = TableEvaluator(lambda m: .5 + .4*m[:40].mean(), 60, groups=GROUPS) # pulls all units into the first layer
    r = anneal(ev, 30, lambda f: (1e-6, 3), budget=1500, min_keep=2)
    assert min(r.layers.values()) == 2 and r.collapsed > 0
    assert r.evaluations == 1500 - r.collapsed + 2 + 9 # start, end, and a stop after every 22 levels of 7 moves
    assert anneal(ev, 30, lambda f: (1e-6, 1), budget=1500, min_keep=0).layers['2'] == 0

# Acceptance

class Script(TableEvaluator):
    "Scores a proposal `then`, whatever it is; the state scores .5."
    def __init__(self, then, **kw): super().__init__(lambda m: .5, 12, **kw); self.then = then
    def propose(self, off, on, threshold=-math.inf): self.tried = self.mask; return self.then
    def commit(self): self.committed = getattr(self, 'committed', 0)+1

def walk(ev, T, n, **kw):
    cfg = SimpleNamespace(**{**dict(compat=None, fixed=False, min_keep=0, informed=False, tournament=16), **kw})
    w = here._Walk(ev, np.arange(12) < 6, np.random.default_rng(0), cfg)
    for _ in range(n): w.moves(T, 1, 1); w.score = .5
    return w

@pytest.mark.parametrize('T,loss,p', [(.01, .01, math.exp(-1)), (.01, .03, math.exp(-3)), (.01, 0., 1.), (0., 0., 1.),
                                      (0., 1e-9, 0.), (1e-12, 1e-3, 0.), (math.inf, .5, 1.), (.01, -.2, 1.)])
def test_acceptance(T, loss, p):
    n = 4000; got = walk(Script(.5-loss), T, n).accepted/n
    assert abs(got-p) <= 4*math.sqrt(p*(1-p)/n)

def test_early_rejection_changes_nothing(toy):
    class Early(TableEvaluator):
        stopped = 0
        def propose(self, off, on, threshold=-math.inf):
            a = super().propose(off, on)
            if a < threshold: self.stopped += 1; return threshold - abs(a) - 1
            return a
    a, b = (anneal(E(toy.table), 6, Schedule(.05, .01, 2), budget=1000, min_keep=0) for E in (TableEvaluator, Early))
    ev = Early(toy.table); assert anneal(ev, 6, Schedule(.05, .01, 2), budget=1000, min_keep=0).log == a.log
    assert ev.stopped > 100 and a.log == b.log and (a.last == b.last).all()

def test_no_number_is_refused_and_counted():
    r = anneal(TableEvaluator(lambda m: math.nan if m[0] else m[1:7].mean(), 12), 6, budget=400, min_keep=0)
    assert r.nans > 0 and not r.mask[0] and math.isfinite(r.score)

def test_boltzmann(toy):
    class Counting(TableEvaluator):
        def propose(self, off, on, threshold=-math.inf):
            self.seen[self.key] += 1; return super().propose(off, on)
    ev = Counting(toy.table); ev.seen = np.zeros(2**12); w = walk(ev, .03, 0)
    w.moves(.03, 1, 70_000)
    p = np.exp(toy.table/.03)*toy.half; p /= p.sum(); assert abs(ev.seen/ev.seen.sum()-p).sum()/2 < .06

def test_the_optimum_is_found_and_climbing_is_not_enough(toy):
    ev = TableEvaluator(toy.table)
    run = lambda s,schedule: np.isclose(anneal(ev, 6, schedule, budget=600, min_keep=0, seed=s).score, toy.top)
    found, climbed = (sum(run(s, o) for s in range(20)) for o in (Schedule(.02, .001, 1), lambda f: (0., 1)))
    assert found >= 19 and climbed < found

# Schedules

def test_schedule_of_progress():
    s = Schedule().resolved(26_620, 26_620, 1/2000)
    assert s(0) == (.006, 133) and math.isclose(s(1)[0], 3e-4) and math.isclose(s(.5)[0], math.sqrt(.006*3e-4))
    h = [s(f)[1] for f in np.linspace(0, 1, 200)]
    assert h == sorted(h, reverse=True) and s(.7)[1] == 1 and s(.35)[1] == round(133**.5)
    assert Schedule().resolved(10_000, 10_000, 1e-4).T1 == .6e-4 and Schedule().resolved(10, 10, .1).T1 == 3e-4

def test_released_schedules():
    def course(s, kappa, budget):
        n, levels = 0, s.levels(kappa); rows = []
        for k,(T, h, L) in enumerate(levels):
            if n >= budget or k == s.n_levels: return rows, n, T
            rows.append((n, h)); n += L
    rows, n, T = course(RELEASED['mlp'], 26_620, 100_000)
    assert (len(rows), n) == (2596, 100_006) and math.isclose(T, 4.47e-4, rel_tol=1e-3)
    assert [rows[k] for k in (139, 500, 785, 1000, 2000)] == [(139, 14_823), (1988, 2955), (9456, 792), (20_206, 253),
                                                            (70_206, 1)]
    for k in (480, 384, 288, 192):
        rows, n, T = course(RELEASED['cnn'], k, math.inf); assert (len(rows), n) == (1000, 8219) and T < 3.4e-5

def test_released_acceptance_is_of_the_mean():
    "While a level has one move the mean stays at 5 %: everything that is not below is accepted, as published."
    ev = TableEvaluator(lambda m: .2 + .3*m[:6].mean(), 12)
    r = anneal(ev, 6, Released(T0=1e-9), compat='released', budget=100, min_keep=0)
    assert [row['acceptance'] for row in r.log[:100]] == [1.]*100
    grown = anneal(ev, 6, Released(T0=1e-9, L0=20.), compat='released', budget=400, min_keep=0)
    assert min(row['acceptance'] for row in grown.log) < 1 and r.mask.sum() == 6

# Chains, tempering, resuming

def test_tempering_with_one_rung_is_annealing(toy):
    ev = TableEvaluator(toy.table); a, b = (anneal(ev, 6, budget=300, ladder=o, min_keep=0) for o in (None, (1.,)))
    assert a.log == b.log and (a.last == b.last).all()
    same = anneal(ev, 6, budget=900, ladder=(1., 1., 1.), min_keep=0)
    assert same.meta['exchanges'] == same.meta['exchanged'] > 0
    apart = anneal(ev, 6, budget=900, ladder=(1., 50.), min_keep=0)
    assert apart.meta['exchanged'] < apart.meta['exchanges']

def test_chains_are_independent_and_the_best_counts(toy):
    ev = TableEvaluator(toy.table); args = dict(budget=60, min_keep=0, chains=4)
    with parallel_config(backend='threading'): b = anneal(ev, 6, n_jobs=2, **args)
    a = anneal(ev, 6, **args)
    assert a.log == b.log and (a.mask == b.mask).all() and a.score == max(a.scores) and len({tuple(r.items())
        for r in a.log if r['evaluations'] == 10}) == 4
    again = anneal(ev, 6, **args); assert again.log == a.log
    assert anneal(ev, 6, seed=1, **args).log != a.log

class Tired(TableEvaluator):
    left = 10**9
    def propose(self, off, on, threshold=-math.inf):
        self.left -= 1
        if not self.left: raise KeyboardInterrupt
        return super().propose(off, on, threshold)
    def sensitivity(self): return np.where(self.mask, -1., 1.)*np.arange(self.n) if self.f else np.arange(self.n)/1.
    def redraw(self, k): self.drawn = k

@pytest.mark.parametrize('kw', [{}, dict(chains=2), dict(ladder=(1., 2.)), dict(groups=[4, 2]), dict(restart=30),
                                dict(proposal='informed', look_every=70), dict(refresh_every=90),
                                dict(compat='released')], ids=str)
def test_taken_up_it_ends_as_if_nothing_had_been(toy, kw):
    args = dict(budget=400, min_keep=0, save_every=50, **kw)
    whole = anneal(Tired(toy.table, groups=[slice(0, 8), slice(8, 12)]), 6, **args)
    ev = Tired(toy.table, groups=[slice(0, 8), slice(8, 12)]); ev.left = 150 if 'ladder' in kw else 250
    part = anneal(ev, 6, **args); assert part.status == 'interrupted' and part.score <= whole.score + .2
    state = {k:v if isinstance(v, np.ndarray) else json.loads(json.dumps(v)) for k,v in part.state.items()}
    again = anneal(ev, 6, **args, state=state)
    assert again.log == whole.log and (again.mask == whole.mask).all() and (again.last == whole.last).all()
    assert again.evaluations == whole.evaluations

def test_it_hands_out_what_it_has(toy):
    seen = []; r = anneal(TableEvaluator(toy.table), 6, budget=200, min_keep=0, save_every=50, keep=seen.append)
    assert [s.status for s in seen] == ['running']*5 and r.status == 'optimal'
    assert all(s.mask.sum() == 6 for s in seen) and [len(s.log) for s in seen] == [50, 100, 150, 200, 200]
    bests = [row['best'] for row in r.log]; assert bests == sorted(bests) and r.score == bests[-1]

def test_new_images_are_never_compared(toy):
    class Moody(TableEvaluator):
        "Another table at every drawing: the first is full of praise."
        def redraw(self, k): self.table = toy.table + (10 if k == 0 else 0)
    r = anneal(Moody(toy.table), 6, budget=400, refresh_every=100, min_keep=0)
    assert r.score <= toy.top and max(row['best'] for row in r.log) > 10

def test_restart_goes_back():
    ev = TableEvaluator(lambda m: m[:100].mean(), 200)
    hot = dict(schedule=lambda f: (10., 1), budget=600, min_keep=0, save_every=20)
    back = anneal(ev, 100, restart=10, **hot); free = anneal(ev, 100, **hot)
    mean = lambda r: np.mean([row['score'] for row in r.log])
    assert mean(back) > mean(free) + .02

def test_informed_moves_follow_the_slopes():
    class Slopes(TableEvaluator):
        def sensitivity(self): return -np.arange(200.)
    ev = Slopes(lambda m: m[100:].mean(), 200); informed, plain = (
        anneal(ev, 100, budget=60, proposal=p, min_keep=0).score for p in ('informed', 'uniform'))
    assert informed == .6*.5/.5 or informed > plain + .05

def test_seconds(toy):
    r = anneal(TableEvaluator(toy.table), 6, seconds=.15, min_keep=0)
    assert .1 < r.meta['secs'] < 3 and not r.meta['reproducible'] and r.log[0]['T'] > r.log[-1]['T']

def test_start_temperature():
    ev = TableEvaluator(lambda m: .5 + .01*m[0], 12) # every second move or so changes nothing
    assert math.isclose(start_temperature(Script(.49), 6), .01/math.log(2))
    assert 0 < start_temperature(ev, 6) < .01
    assert start_temperature(TableEvaluator(lambda m: .5, 12, quantum=.1), 6) == .1/math.log(2)

def test_plot_and_frame(toy):
    r = anneal(TableEvaluator(toy.table), 6, budget=100, chains=2, min_keep=0)
    assert list(r.frame().chain.unique()) == [0, 1] and len(r.plot().axes) == 4
    assert len(anneal(TableEvaluator(toy.table), 6, budget=0, min_keep=0).plot().axes) == 4

# Calls that cannot be meant

@pytest.mark.parametrize('kw', [dict(kappa=0), dict(kappa=12), dict(budget=0), dict(seconds=0.)], ids=str)
def test_nothing_to_do_is_no_mistake(toy, kw):
    r = anneal(TableEvaluator(toy.table), **{'kappa': 6, 'min_keep': 0, **kw})
    assert r.log == [] and r.score == toy.table[(r.mask << np.arange(12)).sum()]

def test_full_layers_leave_nothing_to_swap(toy):
    ev = TableEvaluator(toy.table, groups=[slice(0, 6), slice(6, 12)])
    assert anneal(ev, 6, groups=[6, 0], min_keep=0).mask[:6].all()

def test_too_many_swaps_are_said(toy):
    with pytest.warns(UserWarning, match='h0=100: only 6'):
        r = anneal(TableEvaluator(toy.table), 6, Schedule(h0=100), budget=50, min_keep=0)
    assert max(row['h'] for row in r.log) == 6

@pytest.mark.parametrize('kw,said', [
    (dict(kappa=13), 'kappa=13'), (dict(kappa=-1), 'kappa=-1'), (dict(kappa=6.), 'kappa'), (dict(chains=0), 'chains=0'),
    (dict(budget=-1), 'budget=-1'), (dict(seconds=-1.), 'seconds=-1'), (dict(schedule=Schedule(T0=0.)), 'T0=0.0'),
    (dict(schedule=Schedule(T0=-1.)), 'T0=-1'), (dict(schedule=Schedule(1e-3, 1e-2)), 'T1=0.01'),
    (dict(schedule=3), 'schedule'),
    (dict(init=np.arange(12) < 5), 'init: keeps 5'), (dict(init=np.ones(12)), 'init: float64'),
    (dict(init=np.ones(11, bool)), 'init: bool of shape (11,)'), (dict(groups=[4]), 'groups: 1 counts'),
    (dict(groups=[9, 0]), "groups['a']=9"), (dict(groups=[4, 4]), 'expected kappa=6'),
    (dict(groups=dict(c=6)), "groups='c'"), (dict(groups=[4, 2], init=np.arange(12) < 6), 'groups=[4, 2]'),
    (dict(proposal='informed'), 'no sensitivity'), (dict(proposal='best'), "proposal='best'"),
    (dict(compat='old'), "compat='old'"), (dict(refresh_every=5), 'refresh_every=5'), (dict(restart=0), 'restart=0'),
    (dict(ladder=(2., 1.)), 'ladder'), (dict(ladder=()), 'ladder'),
    (dict(compat='released', ladder=(1., 2.)), 'ladder'),
    (dict(min_keep=4), 'min_keep=4'), (dict(init=np.arange(12) < 6, min_keep=1), "layer 'b' keeps 0"),
    (dict(seed=-1), 'seed')], ids=lambda o: o if isinstance(o, str) else '')
def test_wrong_calls(toy, kw, said):
    ev = TableEvaluator(toy.table, groups=[slice(0, 8), slice(8, 12)], names=['a', 'b'])
    with pytest.raises((ValueError, TypeError)) as e: anneal(ev, **{'kappa': 6, 'budget': 20, 'min_keep': 0, **kw})
    assert said in str(e.value)

@pytest.mark.parametrize('groups', [[slice(0, 8), slice(9, 12)], [slice(0, 8)], [slice(4, 12), slice(0, 4)]])
def test_groups_partition_the_units(toy, groups):
    with pytest.raises(ValueError, match='partition'): anneal(TableEvaluator(toy.table, groups=groups), 6)

def test_a_table_has_a_score_for_every_mask():
    with pytest.raises(ValueError, match='power of 2'): TableEvaluator(np.zeros(100))
