"""The solver of the MIP chapter against other solvers, brute force and closed forms, on programs made here by hand."""
import itertools, math, threading, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import cvxpy as cp, highspy, numpy as np, pytest
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from neuronprune import mip_relax, mip_solve as ms
from neuronprune.mip_relax import (TIE, Gate, Point, Program, active_set, complete, convex, interior, lower, objective,
                                   pattern, terms, undecided, value, violation)
from neuronprune.mip_solve import (NoIncumbentError, Search, Simplex, Solution, SolverNotSuitableError, settle, solve,
                                   sweep)

def make(seed=0, sizes=(4, 3, 5), n=3, K=3, R=15, gates=(), lam=2., loss='ce', scale=1.):
    """All units on is feasible; `gates` = pieces of each gate, over the scores and the gates before it.
    Bounds of a gate come from corners of the box that its pieces depend on."""
    rng, S = np.random.default_rng(seed), sum(sizes); C = S+len(gates)
    ends = np.cumsum(sizes)
    layers = {f'l{k}': (slice(int(e-m), int(e)), float(m*rng.choice([1, 1, 9])))
              for k,(e, m) in enumerate(zip(ends, sizes))}
    lx, ux, made, G, lo, hi = np.zeros(C), np.ones(C), [], [], [], []
    for g, A in enumerate(gates):
        col, P = S+g, np.zeros((A, C+1))
        P[:, :S] = rng.normal(size=(A, S))*scale*(rng.random((A, S)) < .6); P[:, S:col] = rng.normal(size=(A, g))*.7
        P[:, -1] = rng.normal(size=A)*.4
        if A == 2: P[1] = 0                                                     # a ReLU
        least = P[:, -1] + np.minimum(P[:, :-1]*lx, P[:, :-1]*ux).sum(1)
        most = P[:, -1] + np.maximum(P[:, :-1]*lx, P[:, :-1]*ux).sum(1)
        lx[col], ux[col] = least.max(), most.max()
        M = np.maximum(ux[col]-least, 1e-6); own = len(G) + np.arange(A)
        for a in range(A):
            r = -P[a, :-1].copy(); r[col] += 1; G.append(r); lo.append(P[a, -1]-1e-9); hi.append(P[a, -1]+M[a])
        G.append(sum(G[i]/m for i, m in zip(own, M))); lo.append(-np.inf); hi.append(A-1+(P[:, -1]/M).sum())
        made.append(Gate(col, P, own))
    Z, z0 = rng.normal(size=(n, K, C))*2, rng.normal(size=(n, K))
    p = Program(np.zeros((0, C)), np.zeros(0), np.zeros(0), Z, z0, rng.integers(K, size=n), layers, lx, ux, made, lam,
                loss)
    own = rng.normal(size=(R, C)); at = own@complete(p, np.ones(S))
    one = rng.random(R) < .3
    p.G = np.array([*G, *own]).reshape(-1, C); p.lo = np.r_[lo, np.where(one, -np.inf, at-rng.uniform(0, 1, R))]
    p.hi = np.r_[hi, at+rng.uniform(0, .4, R)]
    return p

def reference(q):
    "Optimum of a relaxation by scipy (linear) or Clarabel."
    if q.Z is None:
        fin, inf = np.isfinite(q.hi), np.isfinite(q.lo)
        r = linprog(q.c, np.r_[q.A[fin], -q.A[inf]], np.r_[q.hi[fin], -q.lo[inf]], bounds=np.c_[q.lv, q.uv],
                    method='highs-ds')
        return r.fun + q.c0 if r.status == 0 else math.inf
    v = cp.Variable(len(q.c)); fin, inf = np.isfinite(q.hi), np.isfinite(q.lo)
    cons = [v >= q.lv, v <= q.uv, q.A[fin]@v <= q.hi[fin], q.A[inf]@v >= q.lo[inf]]
    p = cp.Problem(cp.Minimize(q.c@v + q.c0 + q.w*sum(cp.log_sum_exp(Z@v + z) for Z, z in zip(q.Z, q.z0))), cons)
    for tol in (1e-10, 1e-9, 1e-8):
        try:
            found = p.solve(cp.CLARABEL, tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
            if found is not None and p.status == 'optimal': return p.value
        except cp.SolverError: pass

def brute(p):
    "The smallest optimum over all choices of pieces, each solved by an independent solver."
    best = math.inf
    for choice in itertools.product(*[range(len(g.pieces)) for g in p.gates]):
        q = convex(settle(p, choice)); f = reference(q) if q.Z is None else None
        if q.Z is not None:
            v, _, f = Simplex(settle(p, choice)).solve(tol=1e-9)
            if v is None: continue
        best = min(best, f)
    return best

def same(a, b, tol=1e-6): assert abs(a-b) <= tol*max(1, abs(a)), (a, b)

# The relaxation

@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('loss', ['margin', 'ce'])
def test_interior_simplex_and_others_agree(seed, loss):
    p = make(seed, loss=loss, sizes=[(4, 3, 5), (8,), (6, 2)][seed % 3], gates=[(), (2, 3), (2,)][seed//3 % 3])
    q = convex(p)
    v, y, ok = interior(q); f = value(q, v)[0]
    assert ok
    same(f, Simplex(p, q).solve()[2]); same(f, value(q, active_set(q).v)[0])
    r = reference(q)
    assert r is not None; same(f, r)
    assert lower(q, v, y) <= f + 1e-12 and f - lower(q, v, y) < 1e-6

@pytest.mark.parametrize('loss', ['margin', 'ce'])
def test_many_rows_few_at_a_time(loss):
    p = make(1, sizes=(12, 8), R=400, n=4, K=3, loss=loss); q = convex(p); pt = active_set(q)
    assert pt.ok; same(value(q, pt.v)[0], reference(q)); same(value(q, pt.v)[0], Simplex(p, q).solve()[2])
    u = q.A@pt.v
    assert np.maximum(q.lo-u, u-q.hi).max() < 1e-6
    q2 = convex(replace(p, lam=3.)); near = active_set(q2, pt)
    assert near.ok; same(value(q2, near.v)[0], value(q2, active_set(q2).v)[0])

@pytest.mark.parametrize('seed', range(6))
def test_any_duals_give_a_bound(seed):
    p = make(seed, loss=['ce', 'margin'][seed % 2]); q = convex(p); f = value(q, interior(q)[0])[0]
    rng = np.random.default_rng(seed)
    for _ in range(30):
        v = rng.uniform(q.lv, q.uv); y = rng.normal(size=len(q.A))*rng.choice([.01, .1, 1])
        assert lower(q, v, y) <= f + 1e-7
    for k in range(12): v, y, _ = interior(q, max_iter=k); assert lower(q, v, y) <= f + 1e-7

def test_everything_at_rest():
    p = make(1); q = convex(p); pt = active_set(q)
    all_down = type(pt)(q.lv.copy(), np.zeros(len(q.A)), np.ones(len(q.c)), True)
    same(value(q, active_set(q, all_down).v)[0], value(q, pt.v)[0])

def test_gradient():
    q = convex(make()); rng = np.random.default_rng(0); v = rng.uniform(q.lv, q.uv); d = rng.normal(size=len(v))
    same((value(q, v+1e-6*d)[0]-value(q, v-1e-6*d)[0])/2e-6, value(q, v)[1]@d, 1e-6)

# The objective

@pytest.mark.parametrize('seed', range(10))
def test_all_but_the_smallest_term(seed):
    sizes = [(4, 3, 5), (6,), (2, 7), (3, 3, 3, 3)][seed % 4]
    p = make(seed, sizes=sizes, loss=['ce', 'margin'][seed % 2]); sol = solve(p); rng = np.random.default_rng(seed)
    for s in (sol.s, *rng.random((5, p.n_s))):
        q = np.sort([(s[o].sum()-2*(o.stop-o.start))/d for o, d in p.layers.values()])
        same(terms(p, s)[0], q[1:].sum() if len(q) > 1 else q[0], 1e-12)
    q = convex(p); v = interior(q)[0]; tie = TIE*np.mean([v[o].mean() for o, _ in p.layers.values()])
    same(value(q, v)[0]-tie, objective(p, v[:p.n_s]), 1e-7)

def test_losses():
    p = make(loss='ce'); x = np.random.default_rng(0).random(p.n_s); z = p.Z@x + p.z0
    ce = np.mean([math.log(sum(math.exp(a) for a in zi)) - zi[y] for zi, y in zip(z, p.y)])
    same(terms(p, x)[1], ce, 1e-12)
    margin = np.mean([max(zi[k]+(k != y) for k in range(3)) - zi[y] for zi, y in zip(z, p.y)])
    same(terms(replace(p, loss='margin'), x)[1], margin, 1e-12)

@pytest.mark.parametrize('loss', ['margin', 'ce'])
@pytest.mark.parametrize('engine', ['auto', 'simplex'])
def test_units_without_influence_go(loss, engine):
    p = make(3, sizes=(6, 5), loss=loss, lam=20.); idle = [0, 3, 7]
    k = p.G[:, idle].sum(1); p.lo, p.hi = p.lo-k, p.hi-k; p.Z[:, :, idle] = 0; p.G[:, idle] = 0
    sol = solve(p, engine=engine)
    assert sol.s[idle].max() < 1e-4
    q = convex(p)
    tie = [TIE/(2*(o.stop-o.start)) for o,_ in p.layers.values() for _ in range(o.start, o.stop)]
    free = replace(q, c=q.c - np.r_[tie, np.zeros(len(q.c)-p.n_s)])
    best = reference(free)
    assert best - 2e-7 <= sol.objective <= best + TIE + 2e-7

# Gates

CASES = [(2,), (3,), (2, 2), (3, 2), (4, 3), (2, 2, 2), (3, 3, 2), (5, 2, 2), (2,)*4, (3, 2, 4, 2), (2,)*5, (2,)*6]
@pytest.mark.parametrize('loss', ['margin', 'ce'])
@pytest.mark.parametrize('i', range(len(CASES)))
def test_brute_force(i, loss):
    p = make(40+i, gates=CASES[i], loss=loss, R=6, lam=1.); sol = solve(p); f = brute(p)
    assert sol.status == 'optimal' and sol.bound <= sol.objective <= sol.bound + 3e-6
    assert abs(f - sol.objective) <= 2e-6*max(1, abs(f)), (f, sol)
    assert solve(p, relaxed=True).objective <= sol.objective + 1e-6
    x = complete(p, sol.s)
    assert violation(p, x) <= 1e-6 and undecided(p, x).max() == 0
    same(objective(p, x), sol.objective, 1e-12)
    for engine in ('interior', 'simplex'):
        assert abs(solve(p, engine=engine).objective - sol.objective) <= 3e-6*max(1, abs(f))

def test_the_tree_is_needed_somewhere():
    assert max(solve(make(40+i, gates=g, loss='margin', R=6, lam=1.)).n_solved for i, g in enumerate(CASES)) > 5

@pytest.mark.parametrize('seed', range(5))
def test_settled_program_is_the_program(seed):
    p = make(seed, gates=(2, 3, 2)); rng = np.random.default_rng(seed)
    for _ in range(10):
        x = complete(p, rng.random(p.n_s)); t = settle(p, pattern(p, x)); s = x[:p.n_s]
        assert t.gates == [] and t.n_s == p.n_s == len(t.lx)
        same(objective(t, s), objective(p, x), 1e-9)
        assert (violation(p, x) < 1e-8) == (violation(t, s) < 1e-8)

def test_fixing_a_gate_in_the_simplex():
    p = make(41, gates=(3, 2), loss='margin', R=6); sx = Simplex(p)
    free = sx.solve()[1]
    for a, b in itertools.product(range(3), range(2)):
        v, bound, f = sx.solve({0: a, 1: b}); r = reference(convex(settle(p, (a, b))))
        assert (v is None and r == math.inf) or abs(f-r) < 1e-6
        if v is not None: assert abs(undecided(p, v[:len(p.lx)])).max() < 1e-6 and f >= free - 1e-9
    same(sx.solve()[1], free)

def test_trimming_changes_nothing():
    p = make(2, R=200); sx = Simplex(p); f = sx.solve()[2]; n = sx.h.getNumRow(); sx.trim()
    assert sx.h.getNumRow() < n
    same(sx.solve()[2], f)

# Other users of HiGHS in the same process: its thread scheduler outlives a solve

def lp_of(h):
    "min -x - y subject to x + 2 y <= 4 in the box [0, 10]^2, solved by the given `Highs`: -4."
    h.addVars(2, np.zeros(2), np.full(2, 10.)); h.changeColsCost(2, np.arange(2, dtype=np.int32), -np.ones(2))
    h.addRow(-highspy.kHighsInf, 4., 2, np.arange(2, dtype=np.int32), np.array([1., 2.])); status = h.run()
    assert status == highspy.HighsStatus.kOk, status
    return h.getInfo().objective_function_value

def raw(threads):
    h = highspy.Highs(); h.setOptionValue('output_flag', False)
    if threads is not None: h.setOptionValue('threads', threads)
    return lp_of(h)

def by_cvxpy(threads):
    x = cp.Variable(2); prob = cp.Problem(cp.Minimize(-cp.sum(x)), [x >= 0, x <= 10, x@[1, 2] <= 4])
    return prob.solve(solver='HIGHS', **({} if threads is None else dict(threads=threads)))

def by_scipy(threads):
    return milp([-1, -1], bounds=Bounds(0, 10), constraints=LinearConstraint([[1, 2]], ub=4), integrality=[1, 1]).fun

@pytest.mark.parametrize('other', [raw, by_cvxpy, by_scipy])
@pytest.mark.parametrize('theirs,ours', [(None, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 1)])
def test_another_user_of_highs(other, theirs, ours):
    "Before, between and after; our engine first, too. The other user always asks for the same number of threads."
    highspy.Highs.resetGlobalScheduler(True)
    p = make(3, gates=(2, 3), loss='margin'); want = brute(p); alone = solve(p, engine='simplex', threads=ours)
    for _ in range(2):
        same(other(theirs), -4.); sol = solve(p, engine='simplex', threads=ours)
        assert sol.status == 'optimal' and np.array_equal(sol.s, alone.s) and sol.n_solved > 5
        same(sol.objective, want, 2e-6)
    same(other(theirs), -4.); highspy.Highs.resetGlobalScheduler(True)

def test_another_user_of_highs_with_another_count_each_time():
    p = make(3, gates=(2, 3), loss='margin'); want = solve(p).objective; highspy.Highs.resetGlobalScheduler(True)
    for threads in (1, 2, None, 1, 3):
        same(solve(p, engine='simplex', threads=1).objective, want, 3e-6); same(raw(threads), -4.)
    highspy.Highs.resetGlobalScheduler(True)

def test_highs_in_another_thread_goes_on():
    "A search here throws our workers away, not those of a solve that runs beside it."
    p = make(3, gates=(2, 3), loss='margin'); res = []
    beside = threading.Thread(target=lambda: res.extend(raw(2) for _ in range(200))); beside.start()
    while beside.is_alive(): assert solve(p, engine='simplex').status == 'optimal'
    beside.join(); assert len(res) == 200 and set(res) == {-4.}

CALLS = ['setOptionValue', 'addVars', 'changeColsCost', 'addRows', 'deleteRows', 'changeRowBounds', 'run']

@pytest.mark.parametrize('name', CALLS)
def test_an_error_of_highs_is_an_error(name, monkeypatch):
    "Each call in turn fails: never a result, always its name and its text."
    class Failing(ms._Quiet): pass
    def fails(self, *a):
        if self.getOptionValue('output_flag')[1]:
            Path(self.getOptionValue('log_file')[1]).write_text('ERROR: out of\n luck')
        return highspy.HighsStatus.kError
    p = make(2, R=200, gates=(2, 3)); sx = Simplex(p); v = sx.solve()[0]
    setattr(Failing, name, fails)
    if name != 'setOptionValue': monkeypatch.setattr(ms, '_Quiet', Failing)
    else: monkeypatch.setattr(ms.highspy.Highs, name, lambda self, *a: highspy.HighsStatus.kError)
    def whole(): s = Simplex(p); s.solve(); s.trim(); s.solve({0: 0})
    with pytest.raises(RuntimeError, match=f'HiGHS fails in {name}') as e: whole()
    assert name == 'setOptionValue' or 'ERROR: out of luck' in str(e.value)
    if name in ('addVars', 'addRows', 'run'):
        with pytest.raises(RuntimeError, match=name): solve(p, engine='simplex')

def test_the_text_of_highs():
    "A count refused by HiGHS itself, and the log is closed again."
    h = highspy.Highs(); h.setOptionValue('output_flag', False)
    with pytest.raises(RuntimeError, match='setOptionValue: .*-5.*threads.*below lower bound'):
        ms._ask(h, 'setOptionValue', 'threads', -5)
    assert h.getOptionValue('output_flag')[1] is False and h.getOptionValue('log_file')[1] == ''
    same(lp_of(h), -4.)

# How a search ends

def hard(): return make(2, sizes=(20, 20), n=10, R=10, gates=(2,)*60, loss='margin')

def ones(p): return np.clip(np.ones(p.n_s), p.lx[:p.n_s], p.ux[:p.n_s])

@pytest.mark.parametrize('relaxed', [False, True])
@pytest.mark.parametrize('engine', ['auto', 'interior', 'simplex'])
def test_time_limit(engine, relaxed, monkeypatch):
    "Scores of its own with a gap, or an error: never the network as it is. The clock here ticks when it is looked at."
    p, on, ended = hard(), objective(hard(), complete(hard(), ones(hard()))), set()
    for limit in (0, 1, 2, 3, 5, 8, 13, 20, 40, 80, 160):
        ticks = itertools.count(); clock = SimpleNamespace(perf_counter=lambda: next(ticks))
        for o in (ms, mip_relax): monkeypatch.setattr(o, 'time', clock)
        try: sol = solve(p, time_limit=limit, engine=engine, relaxed=relaxed)
        except NoIncumbentError as e:
            assert 'all scores at 1' in str(e) and ('too early; raise time_limit' in str(e) or engine == 'interior')
            ended.add('error'); continue
        ended.add(sol.status); late = sol.status == 'time_limit'
        assert late or sol.status == 'optimal' and relaxed
        assert math.isfinite(sol.gap) and (sol.gap > 0 or not late) and sol.objective <= on - 1e-3
        assert sol.s.min() < .999
        assert sol.bound <= sol.objective and (relaxed or violation(p, complete(p, sol.s)) <= 1e-6)
    assert 'error' in ended and ('time_limit' in ended or relaxed or engine == 'interior')

def test_time_limit_by_the_clock():
    start = time.perf_counter()
    with pytest.raises(NoIncumbentError): solve(hard(), time_limit=1e-9)
    assert time.perf_counter()-start < 1
    try: assert solve(hard(), time_limit=.5).status in ('time_limit', 'optimal')
    except NoIncumbentError: pass # a slow machine
    assert time.perf_counter()-start < 3

def test_numerical_trouble(monkeypatch):
    "A relaxation that no engine finishes, with all the time there is."
    p = make(3, loss='margin', gates=(2, 3)); good = solve(p)
    unfinished = lambda q, near=None, deadline=0: Point(q.uv.copy(), np.zeros(len(q.A)), q.c, False)
    monkeypatch.setattr(ms, 'active_set', unfinished)
    monkeypatch.setattr(Simplex, '_run', lambda self, deadline: 'unknown')
    for engine, relaxed in itertools.product(('auto', 'interior', 'simplex'), (False, True)):
        with pytest.raises(NoIncumbentError, match='all scores at 1.*numerical trouble'):
            solve(p, engine=engine, relaxed=relaxed)
    sol = solve(p, starts=[good.s]); assert sol.status == 'inexact' and np.array_equal(sol.s, good.s)
    with pytest.raises(NoIncumbentError): solve(p, starts=[ones(p)])

def test_all_units_on_can_be_the_answer():
    "A loss that weighs everything: every score 1 is then optimal, and said to be so."
    p = make(1, R=0, lam=1e6, loss='ce'); p.Z[:] = .01*np.eye(3)[p.y][:, :, None]; sol = solve(p)
    assert sol.status == 'optimal' and sol.s.min() > .999 and sol.gap <= 2e-6*sol.objective

def interrupt(at, monkeypatch, cls=Simplex, name='solve'):
    n, run = [0], getattr(cls, name)
    def stop(*a, **k):
        n[0] += 1
        if n[0] == at: raise KeyboardInterrupt
        return run(*a, **k)
    monkeypatch.setattr(cls, name, stop)
    return n

def test_interrupted(monkeypatch):
    p = hard(); n = interrupt(15, monkeypatch); sol = solve(p)
    assert sol.status == 'interrupted' and math.isfinite(sol.gap) and sol.bound <= sol.objective and sol.s.min() < .999
    n[0] = 0; assert [o.status for o in sweep(p, [5., 6.])] == ['interrupted']

@pytest.mark.parametrize('engine', ['auto', 'interior', 'simplex'])
@pytest.mark.parametrize('relaxed', [False, True])
def test_interrupted_before_there_are_scores(engine, relaxed, monkeypatch):
    p = hard(); good = solve(p, time_limit=1.)
    interrupt(1, monkeypatch, *((Simplex, 'solve') if engine == 'simplex' else (ms, 'active_set')))
    with pytest.raises(KeyboardInterrupt): solve(p, engine=engine, relaxed=relaxed)
    interrupt(1, monkeypatch, *((Simplex, 'solve') if engine == 'simplex' else (ms, 'active_set')))
    sol = solve(p, engine=engine, relaxed=relaxed, starts=[good.s])
    assert sol.status == 'interrupted' and np.array_equal(sol.s, good.s)

def test_starts():
    p = hard(); good = solve(p, time_limit=1.5)
    again = solve(p, time_limit=1e-9, starts=[good.s])
    same(again.objective, good.objective, 1e-9)

def test_infeasible():
    p = make(1, R=5); p.lo[2], p.hi[2] = 100, 101
    for engine in ('auto', 'simplex'):
        with pytest.raises(NoIncumbentError, match=r'row 2 is .*expected 100 to 101.*infeasible'):
            solve(p, engine=engine)
    with pytest.raises(NoIncumbentError, match='row 2'): solve(p, relaxed=True)
    with pytest.raises(NoIncumbentError, match='too early'): solve(p, time_limit=1e-9)
    assert issubclass(NoIncumbentError, RuntimeError) and issubclass(SolverNotSuitableError, ValueError)

def test_all_units_on_need_not_be_feasible():
    p = make(1, R=0, gates=(2,)); C = len(p.lx); G = np.zeros((1, C)); G[0, :p.n_s] = 1
    p.G, p.lo, p.hi = np.r_[p.G, G], np.r_[p.lo, -np.inf], np.r_[p.hi, 4.]
    sol = solve(p)
    assert sol.status == 'optimal' and sol.s.sum() <= 4+1e-6
    same(brute(p), sol.objective, 2e-6)

@pytest.mark.parametrize('kw,say', [(dict(engine='glpk'), 'engine='), (dict(gap=-1), 'gap='),
                                    (dict(time_limit='1'), 'time_limit='), (dict(threads=0), 'threads=')])
def test_options(kw, say):
    with pytest.raises((ValueError, TypeError), match=say): solve(make(), **kw)
def test_program_is_checked():
    with pytest.raises(ValueError, match="loss='l2'"): solve(replace(make(), loss='l2'))
    with pytest.raises(ValueError, match='lam=-1'): solve(replace(make(), lam=-1))
    with pytest.raises(ValueError, match='lx, ux'): solve(replace(make(), ux=np.full(12, np.inf)))

# Invariance

@pytest.mark.parametrize('loss', ['margin', 'ce'])
def test_permuted_and_doubled(loss):
    p = make(9, loss=loss); f = solve(p).objective; i = [2, 0, 1]
    same(solve(replace(p, Z=p.Z[i], z0=p.z0[i], y=p.y[i])).objective, f)
    same(solve(replace(p, Z=np.r_[p.Z, p.Z], z0=np.r_[p.z0, p.z0], y=np.r_[p.y, p.y])).objective, f)
    j = [3, 1, 0, 2, *range(4, p.n_s)]                                          # units of the first layer
    sol = solve(replace(p, G=p.G[:, j], Z=p.Z[:, :, j]))
    same(sol.objective, f)

def test_program_is_left_alone():
    p = make(gates=(2, 3)); before = [o.copy() for o in (p.G, p.lo, p.hi, p.Z, p.z0, p.lx, p.ux)]
    a, b = solve(p), solve(p)
    assert all(np.array_equal(o, n) for o, n in zip(before, (p.G, p.lo, p.hi, p.Z, p.z0, p.lx, p.ux)))
    assert np.array_equal(a.s, b.s) and a.bound == b.bound

# The sweep

@pytest.mark.parametrize('loss', ['margin', 'ce'])
@pytest.mark.parametrize('gates', [(), (2, 3)])
def test_sweep(loss, gates):
    p = make(4, sizes=(20, 15), n=6, K=5, R=120, gates=gates, loss=loss); lams = [1, 2, 3, 5, 8, 4, .1, 20]
    sols = sweep(p, lams)
    for lam, sol in zip(lams, sols):
        assert sol.status == 'optimal'
        f = solve(replace(p, lam=lam)).objective
        assert abs(f - sol.objective) <= 2e-6*max(1, abs(f))
    order = np.argsort(lams); t = np.array([terms(p, complete(p, o.s)) for o in sols])[order]
    assert (np.diff(t[:, 0]) > -1e-4).all() and (np.diff(t[:, 1]) < 1e-4).all()
    assert sweep(p, []) == []
    simplex = sweep(p, lams[:3], engine='simplex')
    for a, b in zip(sols, simplex): assert abs(a.objective-b.objective) <= 3e-6*max(1, abs(a.objective))
