"MIP neuron importance: the reduced program against the network, the plain model and brute force; errors."
import copy, math, signal, threading, time, warnings
from dataclasses import replace
from itertools import product
import cvxpy as cp, highspy, numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.optimize import linprog
from torch import nn
from neuronprune.core import UnsupportedLayerError, layers
from neuronprune.masks import Scores
from neuronprune.data import get_dls
from neuronprune.graph import trace
from neuronprune import mip, mip_solve as ms
from neuronprune.mip import choose, cut, dead_on_batch, score
from neuronprune.mip_program import ClassBalanceError, chain, problem, reduce, run
from neuronprune.mip_cvxpy import model, solve_cvxpy, solvers, sparsity
from neuronprune.mip_greedy import fit_heads
from neuronprune.mip_relax import complete, objective, terms, violation
from neuronprune.mip_solve import NoIncumbentError, Search, SolverNotSuitableError, solve, sweep
from neuronprune.models import build, mlp
from neuronprune.surgery import apply, difference, shrink
from neuronprune.train import fit, learner
from neuronprune.retrain import MaskCallback

# ---- networks

def seeded(f):
    "Nets and images by seed, without touching the global generator."
    def res(seed, *args):
        with torch.random.fork_rng(): torch.manual_seed(seed); return f(*args)
    return res

@seeded
def fc(*widths):
    return nn.Sequential(*[o for a,b in zip(widths, widths[1:]) for o in (nn.Linear(a, b), nn.ReLU())][:-1]).double()

def normed(net):
    "Batch norms with statistics of their own, negative factors included."
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, .3); m.running_var.uniform_(.5, 2)
            if m.affine: nn.init.normal_(m.weight, .5, 1); nn.init.normal_(m.bias, 0, .3)
    return net.double().eval()

NETS = dict(
    fc=((5,), lambda: [nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]),
    no_bias=((5,), lambda: [nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3, bias=False)]),
    linear_linear=((5,), lambda: [nn.Linear(5, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 3)]),
    bn_folded=((5,), lambda: [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4),
                              nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 3)]),
    bn_behind=((1, 6, 6), lambda: [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 2), nn.ReLU(),
                                   nn.Flatten(), nn.Linear(18, 3)]),
    bn_first=((2, 5, 5), lambda: [nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                                  nn.Linear(27, 3)]),
    conv=((2, 7, 6), lambda: [nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), nn.ReLU(),
                              nn.Conv2d(4, 3, 2, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)]),
    max_pool=((1, 7, 7), lambda: [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
                                  nn.Conv2d(2, 2, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(8, 3)]),
    pool_relu=((1, 6, 5), lambda: [nn.Conv2d(1, 2, 3), nn.MaxPool2d((2, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3),
                                   nn.ReLU(), nn.Linear(3, 3)]),
    overlap=((1, 6, 6), lambda: [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
                                 nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 3)]),
    avg_pool=((1, 7, 7), lambda: [nn.Conv2d(1, 3, 2), nn.ReLU(), nn.AvgPool2d(3, 2, padding=1), nn.Flatten(),
                                  nn.Linear(27, 4), nn.ReLU(), nn.Linear(4, 3)]),
    adaptive=((2, 7, 6), lambda: [nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 2)), nn.Flatten(),
                                  nn.Linear(24, 3), nn.ReLU(), nn.Linear(3, 3)]))

@seeded
def net_of(name): return normed(nn.Sequential(*NETS[name][1]()))

def images(seed, shape, n=3):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def case(name, seed=0, n=3, **kw):
    "(net, images, problem)"
    net, x = net_of(seed, name), images(seed, NETS[name][0], n)
    return net, x, problem(net, x, torch.arange(n) % 3, allow_imbalance=True, **kw)

def toy(seed, widths=(4, 6, 5, 3), n=3, **kw):
    net, x = fc(seed, *widths), images(seed, widths[:1], n)
    return net, x, problem(net, x, torch.arange(n) % widths[-1], allow_imbalance=True, **kw)

def logits(q, s): return q.Z@complete(q, s) + q.z0
def close(a, b, tol=2e-6): assert abs(a-b) <= tol*max(1, abs(a)), (a, b)

# ---- (1) all scores at 1: the network

@pytest.mark.parametrize('bounds', ['dense', 'sound'])
@pytest.mark.parametrize('name', NETS)
def test_at_one_it_is_the_network(name, bounds):
    for seed,eps in ((0, 1e-5), (1, .1)):
        net, x, p = case(name, seed, bounds=bounds, eps=eps); q = reduce(p); one = np.ones(q.n_s)
        assert np.abs(logits(q, one) - net(x).detach().numpy()).max() < 1e-9
        assert violation(q, complete(q, one)) < 1e-7
        assert np.abs(run(chain(net), x).detach().numpy() - net(x).detach().numpy()).max() < 1e-9

@settings(max_examples=60)
@given(st.data())
def test_any_convolution(data):
    "Stride, padding, dilation, groups, kernel and map of any shape."
    d = lambda a, b: data.draw(st.tuples(st.integers(a, b), st.integers(a, b)))
    groups = data.draw(st.integers(1, 2)); k, dil, hw = d(1, 3), d(1, 2), d(5, 8)
    with torch.random.fork_rng():
        torch.manual_seed(data.draw(st.integers(0, 99)))
        conv = nn.Conv2d(2, 2*groups, k, stride=d(1, 3), padding=d(0, 2), dilation=dil, groups=groups,
                         bias=data.draw(st.booleans()))
        pool = data.draw(st.sampled_from([nn.Identity(), nn.MaxPool2d(2, 1), nn.AvgPool2d((1, 2), 1),
                                          nn.AdaptiveAvgPool2d((2, 3)), nn.MaxPool2d(3, 2, padding=1)]))
        body = nn.Sequential(conv, nn.ReLU(), pool, nn.Flatten()); x = torch.rand(2, 2, *hw)
        try: width = body(x).shape[1]
        except RuntimeError: return # the map is smaller than the window
        net = nn.Sequential(*body, nn.Linear(width, 2)).double().eval()
    q = reduce(problem(net, x, torch.tensor([0, 1]), eps=.01))
    assert np.abs(logits(q, np.ones(q.n_s)) - net(x.double()).detach().numpy()).max() < 1e-9

def test_float32_and_training_mode_are_handled():
    net = net_of(0, 'bn_folded').float().train(); x = images(0, (5,)).float(); before = copy.deepcopy(net.state_dict())
    q = reduce(problem(net, x, torch.arange(3)))
    assert net.training and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert next(net.parameters()).dtype == torch.float32
    assert np.abs(logits(q, np.ones(q.n_s)) - net.eval()(x).detach().numpy()).max() < 1e-5

# ---- (2) other scores, sound bounds: the network with shifted pre-activations

def walk(p, s):
    "What every step gives, run by hand with a - (1-s) max(u, 0), or with the unclipped u where no ReLU follows."
    s, x = iter(np.split(s, np.cumsum([n for n,_ in p.layers.values()])[:-1])), p.x
    for t,o in enumerate(p.steps):
        x = run([o], x)
        if o.name in p.layers:
            l, u = p.bounds[t]
            top = run([o], (l+u)/2) + run([replace(o, w=o.w.abs(), b=torch.zeros_like(o.b))], (u-l)/2)
            if p.steps[t+1].kind == 'relu': top = top.clamp(min=0)
            x = x - (1-torch.from_numpy(next(s))).view(-1, *[1]*(x.ndim-2))*top
        yield x

def shifted(p, s): return list(walk(p, s))[-1].numpy()

@pytest.mark.parametrize('name', NETS)
def test_fixed_scores_shift_the_network(name):
    for seed in range(3):
        _, _, p = case(name, seed, bounds='sound', loss='margin'); q = reduce(p); rng = np.random.default_rng(seed)
        for s in (rng.random(q.n_s), rng.integers(0, 2, q.n_s).astype(float), np.zeros(q.n_s)):
            x = complete(q, s)
            assert violation(q, x) < 1e-7
            assert np.abs(q.Z@x + q.z0 - shifted(p, s)).max() < 1e-6

@pytest.mark.parametrize('name', ['fc', 'max_pool', 'pool_relu', 'linear_linear'])
def test_fixed_scores_in_the_plain_model(name):
    _, _, p = case(name, 1, n=2, bounds='sound', loss='margin')
    s = np.random.default_rng(0).random(sum(n for n,_ in p.layers.values()))
    prob, scores, z = model(p); parts = np.split(s, np.cumsum([n for n,_ in p.layers.values()])[:-1])
    fixed = [scores[k] == v for k,v in zip(p.layers, parts)]
    cp.Problem(cp.Minimize(0), prob.constraints + fixed).solve(solver='HIGHS')
    assert np.abs(z.value - shifted(p, s)).max() < 1e-6

def masked(net, p, s):
    "The network with the weights, bias and batch norm of the units at s = 0 at zero."
    net, at = copy.deepcopy(net), 0; mods = list(net.named_modules())
    for k,(n,_) in p.layers.items():
        off = torch.from_numpy(s[at:at+n] == 0); at += n
        i = [name for name,_ in mods].index(k)
        for m in [mods[i][1]] + [m for _,m in mods[i+1:i+2] if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]:
            if getattr(m, 'running_mean', None) is not None: m.running_mean[off] = 0
            for o in (m.weight, m.bias):
                if o is not None: o.data[off] = 0
    return net

@pytest.mark.parametrize('name',
                         ['fc', 'no_bias', 'bn_folded', 'bn_behind', 'conv', 'max_pool', 'avg_pool', 'adaptive'])
def test_dials_at_zero_are_a_mask(name):
    for seed in range(3):
        net, x, p = case(name, seed, bounds='sound'); q = reduce(p)
        s = np.random.default_rng(seed).integers(0, 2, q.n_s).astype(float)
        assert np.abs(logits(q, s) - masked(net, p, s)(x).detach().numpy()).max() < 1e-6

def test_a_first_layer_without_relu_can_be_switched_off():
    for seed in range(4):
        net = fc(seed, 4, 3, 3, 2); net = nn.Sequential(net[0], *net[2:]); x = images(seed, (4,), 1)
        q = reduce(problem(net, x, torch.tensor([0]), bounds='sound', allow_imbalance=True))
        s = np.r_[np.zeros(3), np.ones(3)]
        assert np.abs(logits(q, s) - net[1:](torch.zeros(1, 3).double()).detach().numpy()).max() < 1e-9

# ---- (3) brute force over the gates, written without chain, interval, reduce

def brute(net, x, y, eps, lam, kind):
    "(least objective over all patterns, number of open gates) by linear programs in full; cross-entropy by tangents."
    W = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in net if isinstance(m, nn.Linear)]; x = x.numpy()
    n, K = len(x), len(W[-1][0])
    N = [len(b) for _,b in W[:-1]]; S = sum(N); P = S + n*S + 1 + len(N) + n # s, h, tau, w, t
    first = np.cumsum([0]+N); col = lambda i, k: S + i*S + first[k] + np.arange(N[k]); tau = S + n*S
    rows, rhs, gates = [], [], []
    def le(coef, b):
        r = np.zeros(P)
        for j,v in coef: r[j] += v
        rows.append(r); rhs.append(b)
    for i in range(n):
        c, r = x[i], np.full(len(x[i]), eps)
        for k,(w,b) in enumerate(W[:-1]):
            l, u = w@c+b - np.abs(w)@r, w@c+b + np.abs(w)@r; U = np.maximum(u, 0)
            for j in range(N[k]):
                h, s = col(i, k)[j], first[k]+j
                # a = sum + b0
                a = [(o, w[j,m]) for m,o in enumerate(col(i, k-1))] if k else []; b0 = b[j] + (0 if k else w[j]@x[i])
                le([*a, (h, -1), (s, U[j])], U[j]-b0)                         # h >= a - (1-s)U
                le([(h, 1)], U[j])                                            # h <= vU, v <= 1
                up = np.zeros(P)
                for o,v in [(h, 1), (s, -U[j]), *[(o, -v) for o,v in a]]: up[o] += v
                gates.append((h, U[j], up, b0-U[j], l[j],
                              [v for v in (0, 1) if (v or l[j] <= 0 or u[j] <= 0) and (not v or u[j] > 0)]))
            lo, hi = np.maximum(l, 0), U; c, r = (lo+hi)/2, (hi-lo)/2
    w, b = W[-1]; cost = np.zeros(P); const = 0.
    if len(N) == 1: cost[:S] = 1/N[0]; const = -2.
    else:
        cost[tau] = len(N)-1; cost[tau+1:tau+1+len(N)] = 1
        for k in range(len(N)): le([(first[k]+j, 1/N[k]) for j in range(N[k])] + [(tau, -1), (tau+1+k, -1)], 2.)
    t = P-n+np.arange(n); cost[t] = lam/n; Z = np.zeros((n, K, P))
    for i in range(n): Z[i][:,col(i, len(N)-1)] = w
    if kind == 'margin':
        for i,k in product(range(n), range(K)):
            r = Z[i,k] - Z[i,y[i]]; r[t[i]] -= 1; rows.append(r); rhs.append(b[y[i]]-b[k]-(k != y[i]))
    lim = [(0, 1)]*S + [(0, None)]*(n*S) + [(None, None)] + [(0, None)]*len(N) + [(None, None)]*n
    if kind == 'ce': lim[-n:] = [(0, None)]*n
    best, cuts = math.inf, ([], [])
    for choice in product(*[g[5] for g in gates]):
        A, B = list(rows), list(rhs)
        for (h, U, up, d, l, _),v in zip(gates, choice):
            r = np.zeros(P); r[h] = 1; A.append(r); B.append(v*U)             # h <= vU
            A.append(up); B.append(d - (1-v)*l)                               # h <= a - (1-v)l - (1-s)U
        while True:
            o = linprog(cost, np.array(A+cuts[0]), np.array(B+cuts[1]), bounds=lim, method='highs',
                        options=dict(primal_feasibility_tolerance=1e-9, dual_feasibility_tolerance=1e-9))
            if o.status == 2 or o.fun + const > best + 1e-9: break
            z = Z@o.x + b; m = z.max(1, keepdims=True); e = np.exp(z-m); lse = np.log(e.sum(1)) + m[:,0]
            f = lse - z[np.arange(n), y]
            if kind == 'margin' or (f - o.x[t]).max() < 2e-7: best = min(best, o.fun+const); break
            for i in range(n): # t >= f + grad (x - x0)
                g = (e[i]/e[i].sum())@Z[i] - Z[i,y[i]]; r = g.copy(); r[t[i]] -= 1; cuts[0].append(r)
                cuts[1].append(g@o.x - f[i])
    return best, sum(len(g[5]) == 2 for g in gates)

@pytest.mark.parametrize('kind', ['margin', 'ce'])
def test_brute_force_over_gate_patterns(kind):
    opened = 0
    for seed,eps in product(range(8), (.08, .15, .3)):
        net, x, p = toy(seed, (4, 3, 3, 2), 2, loss=kind, eps=eps); q = reduce(p)
        if not 0 < len(q.gates) <= (7 if kind == 'margin' else 3): continue
        best, n = brute(net, x, [0, 1], eps, 5., kind); r = solve(q)
        assert n == len(q.gates) and r.status == 'optimal'; opened += n
        close(r.objective, best, 3e-6)
    assert opened >= (15 if kind == 'margin' else 6)

# ---- (4) the reduced program is the plain one

EPS = (1e-5, .02, .1)

def agree(p, tol=3e-6):
    "Both back-ends, every class with an open solver; `relaxed`: equal, or tighter with max pools."
    q, pooled = reduce(p), any(o.kind == 'max' for o in p.steps); opt = solve(q, relaxed=True)
    plain = solve_cvxpy(p, relaxed=True); exact = plain.status == 'optimal'; t = tol if exact else 1e-4
    if not pooled: close(opt.objective, plain.objective, t)
    else: assert plain.objective <= opt.objective + t*max(1, abs(opt.objective))
    best = solve(q, time_limit=20); exact = best.status == 'optimal'
    assert exact or len(q.gates) > 40
    assert opt.objective <= best.objective + 3e-6*max(1, abs(best.objective))
    if not q.gates: close(opt.objective, best.objective)
    if p.loss == 'margin':
        plain = solve_cvxpy(p, time_limit=20); assert plain.status == 'optimal'
        if exact: close(best.objective, plain.objective, tol)
        else: assert best.bound <= plain.objective + tol and plain.objective <= best.objective + tol
    return len(q.gates)

@pytest.mark.parametrize('kind', ['margin', 'ce'])
@pytest.mark.parametrize('eps', EPS)
def test_reduced_is_plain(eps, kind):
    opened = sum(agree(toy(seed, loss=kind, eps=eps)[2]) for seed in range(20))
    assert opened > 20 or eps < .1

@pytest.mark.parametrize('kind', ['margin', 'ce'])
@pytest.mark.parametrize('eps', EPS)
@pytest.mark.parametrize('name', ['overlap', 'pool_relu', 'conv', 'bn_behind', 'linear_linear', 'adaptive'])
def test_reduced_is_plain_for_every_layer(name, eps, kind):
    for seed in range(2): agree(case(name, seed, n=2, loss=kind, eps=eps)[2])

@pytest.mark.parametrize('name', ['fc', 'no_bias', 'bn_folded', 'linear_linear', 'overlap', 'pool_relu'])
def test_reduced_is_plain_with_sound_bounds(name):
    for seed in (0, 2, 3):
        p = case(name, seed, n=1, loss='margin', bounds='sound')[2]; r = solve(reduce(p), time_limit=20)
        assert r.status == 'optimal'
        close(r.objective, solve_cvxpy(p).objective)

def test_pixels_as_variables_change_nothing():
    p = toy(0, loss='margin', eps=.1)[2]
    close(solve_cvxpy(p).objective, solve_cvxpy(p, pixels=True).objective)

# ---- (5) to (8) values every solution obeys

@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from(EPS), kind=st.sampled_from(['ce', 'margin']),
       lam=st.floats(.1, 30))
def test_solution(seed, eps, kind, lam):
    net, x, p = toy(seed, loss=kind, eps=eps, lam=lam); q = reduce(p); r = solve(q); full = complete(q, r.s)
    assert r.status == 'optimal' and ((0 <= r.s) & (r.s <= 1)).all()
    assert violation(q, full) <= 1e-6
    close(r.objective, objective(q, full), 1e-9)
    assert r.bound <= r.objective + 1e-12 and r.gap <= 5e-6*max(1, abs(r.objective))
    top = objective(q, complete(q, np.ones(q.n_s)))
    z = net(x).detach(); y = torch.arange(3)
    ce = F.cross_entropy(z, y).item() if kind == 'ce' else (z + 1 - F.one_hot(y)).amax(1).sub(z[y,y]).mean().item()
    close(top, -1 + lam*ce, 1e-6)
    assert r.objective <= top + 2e-6*max(1, abs(top))

def test_dense_bound_of_a_convolution_counts_the_kernel():
    _, _, p = case('max_pool'); q = reduce(p)
    close(terms(q, complete(q, np.ones(q.n_s)))[0], max(-2/(2*9), -2/(2*4)), 1e-12)

@pytest.mark.parametrize('kind', ['margin', 'ce'])
def test_lambda_is_monotone(kind):
    for seed in range(3):
        q = reduce(toy(seed, loss=kind, eps=.02)[2]); lams = [.5, 1, 2, 5, 10, 24]
        ab = np.array([terms(q, complete(q, r.s)) for r in sweep(q, lams)])
        assert (np.diff(ab[:,0]) >= -2e-5).all() and (np.diff(ab[:,1]) <= 2e-5).all()
        for lam,o in zip(lams, ab): close(o[0]+lam*o[1], solve(replace(q, lam=lam)).objective, 5e-6)

def test_more_images_leave_less_room():
    "With the loss at (nearly) no weight the optimum is the feasible set's: images only shrink it."
    for seed in range(4):
        net, x = fc(seed, 4, 6, 5, 3), images(seed, (4,), 6)
        f = [solve(reduce(problem(net, x[:n], torch.arange(n) % 3, lam=1e-9, eps=.02, allow_imbalance=True))).objective
             for n in range(1, 7)]
        assert (np.diff(f) >= -3e-6).all()

@pytest.mark.parametrize('kind', ['margin', 'ce'])
def test_engines_agree(kind):
    for seed,eps in product(range(5), (1e-5, .1)):
        q = reduce(toy(seed, loss=kind, eps=eps)[2]); a, b = (solve(q, engine=e) for e in ('interior', 'simplex'))
        close(a.objective, b.objective); assert max(a.bound, b.bound) <= min(a.objective, b.objective) + 1e-6

@pytest.mark.parametrize('solver', ['CLARABEL', 'SCS'])
def test_cone_solvers_agree(solver):
    p = toy(1, loss='ce', eps=.02)[2]
    close(solve(reduce(p), relaxed=True).objective, solve_cvxpy(p, solver, relaxed=True).objective, 1e-4)

@pytest.mark.parametrize('solver', ['GLPK_MI', 'HIGHS'])
def test_mixed_integer_solvers_agree(solver):
    p = toy(2, loss='margin', eps=.1)[2]; r = solve_cvxpy(p, solver)
    assert r.status == 'optimal' and r.bound <= r.objective
    close(solve(reduce(p)).objective, r.objective)

# ---- (9) to (12), (15) invariances, planted units, bounds

@pytest.mark.parametrize('kind', ['margin', 'ce'])
def test_permutations_and_duplicates(kind):
    for seed in range(4):
        net, x, p = toy(seed, loss=kind, eps=.02); q = reduce(p); r = solve(q)
        order = np.random.default_rng(seed).permutation(6)
        other = copy.deepcopy(net)
        for o in (other[0].weight, other[0].bias): o.data = o.data[order]
        other[2].weight.data = other[2].weight.data[:,order]
        qp = reduce(problem(other, x, torch.arange(3), loss=kind, eps=.02)); rp = solve(qp)
        close(r.objective, rp.objective)
        moved = r.s.copy(); moved[:6] = moved[:6][order]
        close(objective(qp, complete(qp, moved)), r.objective, 1e-9); assert violation(qp, complete(qp, moved)) <= 1e-6
        same = lambda i: problem(net, x[i], torch.arange(3)[i], loss=kind, eps=.02)
        close(r.objective, solve(reduce(same([2, 0, 1]))).objective)
        close(r.objective, solve(reduce(same([0, 1, 2, 0, 1, 2]))).objective)

@pytest.mark.parametrize('kind', ['margin', 'ce'])
@pytest.mark.parametrize('backend', ['fast', 'cvxpy'])
def test_planted_units(kind, backend):
    "A unit that nothing reads and a unit that never fires are scored 0; by the fast back-end in the free layer too."
    for seed in range(4):
        net = fc(seed, 4, 6, 5, 3); net[2].weight.data[:,0] = 0; net[0].bias.data[1] = -100; net[2].bias.data[2] = -100
        p = problem(net, images(seed, (4,)), torch.arange(3), loss=kind)
        s = solve(reduce(p)).s if backend == 'fast' else solve_cvxpy(p, relaxed=True).s
        # only the fast back-end breaks ties
        free = np.argmin([s[:6].mean(), s[6:].mean()]) if backend == 'cvxpy' else None
        for layer,j in ((0, 0), (0, 1), (1, 6+2)): assert s[j] < 1e-3 or layer == free

@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4))
def test_sum_of_all_but_the_smallest(seed, n):
    rng = np.random.default_rng(seed)
    sizes = {str(k):(int(a), int(a*b)) for k,(a,b) in enumerate(zip(rng.integers(1, 5, n), rng.choice([1, 9, 25], n)))}
    s = {k:rng.random(a) for k,(a,_) in sizes.items()}; q = sorted((s[k].sum()-2*a)/d for k,(a,d) in sizes.items())
    expr, rows = sparsity({k:cp.Constant(v) for k,v in s.items()}, sizes)
    assert np.isclose(cp.Problem(cp.Minimize(expr), rows).solve(solver='HIGHS'), sum(q[1:]) if n > 1 else q[0])

def test_sparsity_term_is_a_sort():
    _, _, p = case('max_pool'); q = reduce(p); s = np.random.default_rng(0).random(q.n_s)
    k = sorted([(s[:2].sum()-4)/18, (s[2:].sum()-4)/8]); assert np.isclose(terms(q, complete(q, s))[0], k[1])
    _, _, p = toy(0, (4, 3, 4, 5, 3)); q = reduce(p); r = solve(q)
    k = sorted((v.sum()-2*len(v))/len(v) for v in np.split(r.s, [3, 7]))
    assert np.isclose(terms(q, r.s)[0], sum(k[1:]))

@pytest.mark.parametrize('name', NETS)
def test_bounds_hold(name):
    _, x, p = case(name, 2, eps=.05); g = torch.Generator().manual_seed(0)
    for _ in range(30):
        a = x + .05*(2*torch.rand(x.shape, generator=g, dtype=torch.float64)-1)
        for (l, u),o in zip(p.bounds, [*p.steps, None]):
            assert (l-1e-12 <= a).all() and (a <= u+1e-12).all()
            a = run([o], a) if o else a
    _, x, p = case(name, 2, bounds='sound'); rng = np.random.default_rng(0); n = sum(k for k,_ in p.layers.values())
    for s in [*rng.random((15, n)), *rng.integers(0, 2, (15, n)).astype(float)]:
        for (l, u),h,o in zip(p.bounds[1:], walk(p, s), p.steps):
            if o.name not in p.layers: assert (l-1e-9 <= h).all() and (h <= u+1e-9).all()

@pytest.mark.parametrize('name', ['fc', 'bn_folded', 'conv', 'max_pool', 'avg_pool'])
def test_dead_units_are_the_first_to_go(name):
    "Dead on the batch by hooks on the network itself; they are below any threshold."
    net, x, p = case(name, 0, lam=5.); seen = {}
    with torch.no_grad(): h = x
    for i,m in enumerate(net):
        h = m(h)
        if isinstance(m, nn.ReLU): seen[i] = h.detach().flatten(2).amax((0, 2)) if h.ndim > 2 else h.detach().amax(0)
    dead = {k:v < 1e-4 for k,v in zip(p.layers, seen.values())}; got = dead_on_batch(p); q = reduce(p); s = solve(q).s
    for (k,a),b in zip(dead.items(), got.values()):
        assert torch.equal(a, b)
        assert (s[q.layers[k][0]][a.numpy()] < 1e-3).all()

def test_dead_units_exist_and_are_scored_zero():
    net = fc(0, 4, 30, 20, 3); x = images(0, (4,)); p = problem(net, x, torch.arange(3)); d = dead_on_batch(p)
    want = [(net[0](x) < -1e-4).all(0), (net[:3](x) < -1e-4).all(0)]
    assert all(torch.equal(a, b) for a,b in zip(want, d.values())) and sum(int(v.sum()) for v in want) > 5
    s = solve(reduce(p)).s; assert (s[torch.cat(want).numpy()] < 1e-3).all()

# ---- (13) and the way into the pipeline

@pytest.fixture(scope='module')
def digits(): return get_dls('digits', bs=64, valid_pct=.2)

@pytest.fixture(scope='module')
def learn(digits):
    res = learner(mlp((24, 16), size=8), digits, opt='adam')
    with res.no_bar(): fit(res, 6, 5e-3)
    return res

@pytest.fixture
def net(learn): return copy.deepcopy(learn.model)

def test_score_and_cut(net, digits):
    before = copy.deepcopy(net.state_dict()); s = score(net, digits)
    assert {k:len(v) for k,v in s.items()} == dict(fc1=24, fc2=16) and 'fc3' in s.skipped
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert all(v.dtype == torch.float32 and v.min() >= 0 and v.max() <= 1 for v in s.values())
    assert s.meta['status'] == 'optimal'
    assert all(torch.equal(a, b) for a,b in zip(score(net, digits).values(), s.values()))
    m = cut(s, threshold=.1); assert all(torch.equal(m[k], v >= .1) for k,v in s.items())
    for f in (.25, .5): assert abs(cut(s, f).sparsity - f) < .02
    mean = cut(s, threshold='mean'); assert all(torch.equal(mean[k], v >= v.mean()) for k,v in s.items())

def test_dead_on_batch_is_masked(net, digits):
    xb, yb = choose(net, digits); s = score(net, batch=(xb, yb))
    h = nn.Sequential(*list(net)[:3])(xb), nn.Sequential(*list(net)[:5])(xb)
    for k,a in zip(s, h):
        assert (s[k][a.amax(0) == 0] < .01).all() and s.meta['n_dead_on_batch'][k] == int((a.amax(0) == 0).sum())

@pytest.mark.parametrize('variant', ['sequential', 'backward'])
def test_variants(net, digits, variant):
    s = score(net, digits, variant=variant); assert set(s) == {'fc1', 'fc2'} and s.meta['variant'] == variant
    assert all(0 <= v.min() and v.max() <= 1 for v in s.values())

def test_shrinking_keeps_the_function(net, digits):
    xb, yb = choose(net, digits); mask = cut(score(net, batch=(xb, yb)), .4)
    assert difference(apply(copy.deepcopy(net), mask).eval(), shrink(net, mask, xb[:2]).eval(), xb) < 1e-5

def test_mask_callback_with_momentum_and_decay(net, digits):
    mask = cut(score(net, digits), .4); apply(net, mask); res = learner(net, digits, opt='sgd', wd=1e-2, momentum=.9)
    with res.no_bar(): fit(res, 3, .05, cbs=MaskCallback(mask))
    assert 3*len(digits.train) >= 50
    state = dict(res.model.named_parameters())
    for n,k in mask.expand(res.model).items():
        if n in state: assert (state[n].detach().cpu()[~k.cpu()] == 0).all()

# ---- bad input, by message

TWO = lambda *o: nn.Sequential(nn.Linear(4, 3), *o, nn.Linear(3, 2))

@pytest.mark.parametrize('bad, name, what', [(TWO(nn.GELU()), "'1'", 'GELU'), (TWO(nn.Sigmoid()), "'1'", 'Sigmoid'),
                                             (TWO(nn.LayerNorm(3)), "'1'", 'LayerNorm')])
def test_unsupported_layers_are_named_with_the_list(bad, name, what):
    with pytest.raises(UnsupportedLayerError) as e: problem(bad, torch.rand(2, 4), torch.tensor([0, 1]))
    assert name in str(e.value) and what in str(e.value)
    assert all(o in str(e.value) for o in ('Linear', 'Conv2d', 'MaxPool2d', 'BatchNorm2d'))

def test_branches_and_unflattened_maps():
    with pytest.raises(UnsupportedLayerError, match='branches and sums'):
        problem(build('resnet18', 1, 10, 32), torch.rand(2, 1, 32, 32), torch.tensor([0, 1]))
    flat = lambda *end: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(4, 3), *end)
    with pytest.raises(UnsupportedLayerError, match="'2'.*Flatten"):
        problem(flat(nn.Flatten(), nn.Linear(24, 2)), torch.rand(2, 1, 6, 6), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r'model: outputs \(2, 2, 4, 3\)'):
        problem(flat(), torch.rand(2, 1, 6, 6), torch.tensor([0, 1]))
    with pytest.raises(UnsupportedLayerError, match='reflect'):
        problem(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode='reflect'), nn.Flatten(), nn.Linear(72, 2)),
                torch.rand(2, 1, 6, 6), torch.tensor([0, 1]))
    with pytest.raises(UnsupportedLayerError, match='ceil_mode'):
        problem(nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Flatten(), nn.Linear(8, 2)),
                torch.rand(2, 1, 6, 6), torch.tensor([0, 1]))

def test_wrong_solver_and_missing_solver():
    p = toy(0)[2]
    for solver in ('GLPK_MI', 'HIGHS', 'CLARABEL', None):
        with pytest.raises(SolverNotSuitableError, match="backend='fast'.*relaxed=True with CLARABEL.*loss='margin'"):
            solve_cvxpy(p, solver)
    with pytest.raises(SolverNotSuitableError): solve_cvxpy(p, 'HIGHS', relaxed=True)
    with pytest.raises(ValueError, match='LINGO'): solve_cvxpy(p, 'LINGO')
    gone = [k for k,v in solvers().iterrows() if not v.installed and v['margin, binary']]
    if gone:
        with pytest.raises(ImportError, match='pip install'): solve_cvxpy(replace(p, loss='margin'), gone[0])

def test_wrong_solver_through_score(net, digits):
    with pytest.raises(SolverNotSuitableError, match='relaxed=True'):
        score(net, digits, backend='cvxpy', solver='GLPK_MI')
    with pytest.raises(ValueError, match="backend='cvxpy'"): score(net, digits, solver='HIGHS')
    with pytest.raises(ValueError, match='all zero'): score(net, digits, bounds='sound', relaxed=True)

def test_solver_classes():
    t = solvers()
    assert t.loc['GLPK_MI', 'margin, binary'] and not t.loc['GLPK_MI', 'ce, binary']
    assert not t.loc['GLPK', 'margin, binary']
    assert t.loc['CLARABEL', 'ce, relaxed'] and not t.loc['CLARABEL', 'margin, binary']
    assert t.loc['ECOS_BB', 'ce, binary'] and not t.loc['SCIP', 'ce, binary']
    assert {'GLPK_MI', 'GLPK', 'HIGHS', 'CLARABEL', 'ECOS', 'SCS', 'SCIP', 'ECOS_BB', 'CBC', 'MOSEK',
            'GUROBI'} <= set(t.index)

def test_training_mode_and_dropout(digits):
    m = mlp((8, 6), size=8, dropout=.5).train(); xb, yb = choose(m, digits)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); a = score(m, batch=(xb, yb)); assert m.training
        b = score(m.eval(), batch=(xb, yb))
    assert all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_bad_weights_and_images(net, digits, value):
    xb, yb = choose(net, digits); x2 = xb.clone(); x2[0,0,0,0] = value
    with pytest.raises(ValueError, match='xb'): problem(net, x2, yb)
    layers(net)['fc1'].weight.data[0,0] = value
    with pytest.raises(ValueError, match='fc1.weight'): problem(net, xb, yb)

def test_bad_batches(net, digits):
    xb, yb = choose(net, digits)
    with pytest.raises(ValueError, match='expected 0 to 9'): problem(net, xb, yb.clone().fill_(10))
    with pytest.raises(ValueError, match='empty'): problem(net, xb[:0], yb[:0])
    with pytest.raises(ValueError, match='empty'): score(net, batch=(xb[:0], yb[:0]))
    with pytest.raises(ClassBalanceError, match='allow_imbalance=True'): problem(net, xb[:7], yb[:7])
    with pytest.raises(ClassBalanceError): score(net, batch=(xb[[0, *range(10)]], yb[[0, *range(10)]]))
    assert problem(net, xb[:7], yb[:7], allow_imbalance=True).x.shape[0] == 7
    with pytest.raises(ValueError, match='batch=|dls=None'): score(net)
    with pytest.raises((ValueError, TypeError), match='n_per_class'): score(net, digits, n_per_class=0)

def test_poor_model_warns(digits):
    with torch.random.fork_rng(): torch.manual_seed(0); m = mlp((8, 6), size=8)
    with pytest.warns(UserWarning, match='of the 10 chosen images'): score(m, digits)

@pytest.mark.parametrize('kw, word', [(dict(lam=0), 'lam=0'), (dict(lam=-1.), 'lam=-1'), (dict(eps=0), 'eps=0'),
    (dict(eps=math.nan), 'eps=nan'), (dict(loss='mse'), 'loss'), (dict(bounds='tight'), 'bounds'),
    (dict(variant='all'), 'variant'), (dict(backend='gurobi'), 'backend'), (dict(select='best'), 'select'),
    (dict(layers=['fc3']), 'logits'), (dict(layers=['fc9']), 'fc9'), (dict(start='fc9'), 'start'),
    (dict(start='fc2', layers=['fc1']), 'come before'), (dict(engine='magic'), 'engine'), (dict(threads=0), 'threads'),
    (dict(time_limit=-1), 'time_limit'), (dict(gap=-1), 'gap')])
def test_options_out_of_range(net, digits, kw, word):
    with pytest.raises(ValueError, match=word): score(net, digits, **kw)

@pytest.mark.parametrize('t', [0, -.1, 1.5, math.nan])
def test_threshold_out_of_range(net, digits, t):
    with pytest.raises(ValueError, match='threshold'): cut(score(net, digits), threshold=t)

def test_no_layer_is_emptied(net, digits):
    g = trace(net, next(iter(digits.valid))[0][:2])
    s = Scores(dict(fc1=torch.linspace(0, .05, 24), fc2=torch.linspace(0, 1, 16)), 'channel', graph=g)
    with pytest.warns(UserWarning, match='fc1.*below 0.1'): m = cut(s, threshold=.1)
    assert m['fc1'].tolist() == [False]*23 + [True]

def hard():
    "Sound bounds on a larger net: not solved in a second."
    net, x = fc(0, 8, 30, 30, 4), images(0, (8,), 8)
    return problem(net, x, torch.arange(8) % 4, loss='margin', bounds='sound')

def test_time_limit():
    p = hard(); q = reduce(p); start = time.perf_counter(); r = solve(q, time_limit=1.)
    assert time.perf_counter()-start < 3 and r.status == 'time_limit' and r.gap > 1e-3 and r.bound < r.objective
    assert violation(q, complete(q, r.s)) < 1e-6
    close(objective(q, complete(q, r.s)), r.objective, 1e-9)
    for solver in ('HIGHS', 'GLPK_MI'):
        start = time.perf_counter()
        try: r = solve_cvxpy(p, solver, time_limit=2.)
        except NoIncumbentError as e: assert 'time_limit=2' in str(e)
        else: assert r.status == 'time_limit' and r.bound < r.objective
        assert time.perf_counter()-start < 8

def test_time_limit_without_scores(net, digits):
    p = problem(net, *choose(net, digits), loss='margin')
    for solver,relaxed in (('HIGHS', False), ('GLPK_MI', False), ('GLPK', True), ('CLARABEL', True), ('SCS', True)):
        with pytest.raises(NoIncumbentError, match=f'{solver} found no feasible scores'):
            solve_cvxpy(p, solver, relaxed=relaxed, time_limit=.005)
    for solver in ('ECOS', 'ECOS_BB'):
        with pytest.raises((ValueError, ImportError), match=solver): solve_cvxpy(p, solver, relaxed=True, time_limit=1)

def test_interrupt():
    q = reduce(hard()); begin = time.perf_counter()
    timer = threading.Timer(1., signal.raise_signal, [signal.SIGINT]); timer.start()
    try: r = solve(q, time_limit=15)
    finally: timer.cancel()
    assert r.status == 'interrupted' and time.perf_counter()-begin < 8 and r.bound <= r.objective
    assert violation(q, complete(q, r.s)) < 1e-6

def test_a_wrong_program_is_named():
    "Bounds that exclude the network: an error with a row, never an empty answer."
    q = reduce(toy(0, eps=.02)[2]); bad = replace(q, lx=q.lx.copy(), ux=q.ux.copy()); bad.ux[:] = 0
    bad = replace(bad, G=np.r_[bad.G, np.ones((1, len(bad.lx)))], lo=np.r_[bad.lo, 1.], hi=np.r_[bad.hi, 2.])
    with pytest.raises(NoIncumbentError, match='row'): solve(bad)

def test_masks_of_another_architecture(net, digits):
    mask = cut(score(net, digits), .4)
    same = mlp((24, 16), size=8); apply(same, mask); assert (same.fc1.weight[~mask['fc1']] == 0).all()
    for other in (mlp((20, 16), size=8), mlp((24,), size=8), build('lenet5', 1, 10, 32)):
        with pytest.raises((ValueError, KeyError)) as e: apply(other, mask)
        assert 'fc' in str(e.value) and len(str(e.value)) > 20

# ---- found by a first reader

@pytest.mark.parametrize('theirs', [None, 1, 2, 3])
def test_scores_beside_another_user_of_highs(net, digits, theirs):
    "Whatever HiGHS did before, the simplex has the interior point's scores, and no other solve is disturbed."
    def other():
        h = highspy.Highs(); h.setOptionValue('output_flag', False)
        if theirs is not None: h.setOptionValue('threads', theirs)
        h.addVars(1, [1.], [2.]); h.changeColsCost(1, [0], [1.]); assert h.run() == highspy.HighsStatus.kOk
        assert h.getInfo().objective_function_value == 1
    want, kw = score(net, digits, n_per_class=1), dict(n_per_class=1, loss='margin'); linear = score(net, digits, **kw)
    other()
    for got, best in ((score(net, digits, n_per_class=1, engine='simplex'), want),
                      (score(net, digits, engine='simplex', **kw), linear),
                      (score(net, digits, backend='cvxpy', **kw), linear),
                      (score(net, digits, backend='cvxpy', threads=2, **kw), linear)):
        other(); assert got.meta['status'] == 'optimal'; close(got.meta['objective'], best.meta['objective'], 1e-5)
    highspy.Highs.resetGlobalScheduler(True)

def test_mean_threshold_keeps_a_plateau():
    for v in (.1, .2, .9):
        s = Scores({'fc1': torch.full((50,), v) + 1e-9*torch.randn(50, generator=torch.Generator().manual_seed(0)),
                    'fc2': torch.tensor([0., 1, 1, 1])}, 'channel')
        m = cut(s, threshold='mean'); assert m['fc1'].all() and m['fc2'].tolist() == [False, True, True, True]

def test_dead_units_do_not_depend_on_the_bounds():
    "Unit 0 of the second layer reads 1 - 2 < 0; sound bounds let its second input be turned down."
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    net[0].weight.data, net[2].weight.data = torch.eye(2), torch.tensor([[1., -1], [1, 1]])
    ps = [problem(net, torch.tensor([[1., 2]]), torch.tensor([0]), bounds=b, allow_imbalance=True)
          for b in ('dense', 'sound')]
    assert ps[1].bounds[3][1][0,0] > 0
    for p in ps: assert {k:v.tolist() for k,v in dead_on_batch(p).items()} == {'0': [False, False], '2': [True, False]}

@pytest.fixture(scope='module')
def deep(digits):
    torch.manual_seed(0); return fit(learner(mlp((24, 16, 16), size=8), digits, opt='adam', lr=1e-2), 5).model
@pytest.fixture(scope='module')
def convs(digits):
    torch.manual_seed(0)
    net = fit(learner(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
                                    nn.Linear(96, 10)), digits, opt='adam', lr=1e-2), 2).model
    return net, fit_heads(net, digits, 1)

def in_variant(variant, deep, convs):
    "Network, arguments of `score` and the number of programs."
    if variant == 'greedy': return convs[0], dict(variant=variant, heads=convs[1]), 2
    return deep, dict(variant=variant), dict(joint=1, sequential=10, backward=2)[variant]

@pytest.mark.parametrize('k', [0, 1])
@pytest.mark.parametrize('variant', ['joint', 'sequential', 'backward', 'greedy'])
def test_interrupt_ends_a_run_of_programs(deep, convs, digits, variant, k, monkeypatch):
    "Scores found come back with a warning, no program is begun after them; without any, the interrupt is the caller's."
    net, args, n = in_variant(variant, deep, convs); calls, own = [], mip.solve
    if k >= n: pytest.skip('one program')
    def interrupted(*a, **kw):
        r = own(*a, **kw); r.status = 'interrupted' if len(calls) == k else r.status; calls.append(1); return r
    monkeypatch.setattr(mip, 'solve', interrupted)
    with pytest.warns(UserWarning, match='mip: the search was interrupted') as said: s = score(net, digits, **args)
    assert len(calls) == k+1 == s.meta['programs'] and s.meta['status'] == 'interrupted' and s.meta['gap'] >= 0
    missing = set(layers(net)) - set(s) - set(s.graph.fixed)
    assert (missing != set()) == (variant in ('backward', 'greedy') and k+1 < n)
    assert all('interrupted' in s.skipped[o] for o in missing)
    assert all(o in str(said[-1].message) for o in missing) and not all((v == 1).all() for v in s.values())
    def at_once(*a, **kw): calls.append(1); raise KeyboardInterrupt
    calls.clear(); monkeypatch.setattr(mip, 'solve', own); monkeypatch.setattr(ms, 'active_set', at_once)
    with pytest.raises(KeyboardInterrupt): score(net, digits, **args)
    assert len(calls) == 1

@pytest.mark.parametrize('relaxed', [False, True])
@pytest.mark.parametrize('engine', ['auto', 'interior', 'simplex'])
@pytest.mark.parametrize('variant', ['joint', 'sequential', 'backward', 'greedy'])
def test_no_time_no_scores(deep, convs, digits, variant, engine, relaxed):
    "A time limit that is over before the first relaxation: an error, never scores of 1."
    net, args, _ = in_variant(variant, deep, convs)
    with pytest.raises(NoIncumbentError, match='no feasible scores'):
        score(net, digits, time_limit=1e-6, engine=engine, relaxed=relaxed, **args)
    with pytest.raises(NoIncumbentError, match='no feasible scores'):
        score(net, digits, time_limit=1e-6, backend='cvxpy', loss='margin', relaxed=relaxed, **args)

@pytest.mark.parametrize('variant', ['joint', 'sequential', 'backward', 'greedy'])
def test_an_unfinished_search_says_so(deep, convs, digits, variant, monkeypatch):
    "Late or inexact: all layers have scores, the worst status and the gap are kept, and a warning names both."
    net, args, n = in_variant(variant, deep, convs); own = mip.solve
    for ends,worst,word in ((['time_limit'], 'time_limit', 'stopped by time_limit'),
                            (['time_limit', 'inexact'], 'inexact', 'numerical trouble')):
        left = list(ends[-n:])
        def ended(*a, **kw):
            r = own(*a, **kw); r.status, r.bound = (left.pop(0), r.objective-.25) if left else (r.status, r.bound)
            return r
        monkeypatch.setattr(mip, 'solve', ended)
        with pytest.warns(UserWarning, match=f'{word}.*at most 0.25 above the optimum'): s = score(net, digits, **args)
        assert s.meta['status'] == worst and abs(s.meta['gap']-.25) < 1e-9 and s.meta['programs'] == n
        assert set(layers(net)) == set(s) | set(s.graph.fixed)
    monkeypatch.setattr(mip, 'solve', own)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); assert score(net, digits, **args).meta['status'] == 'optimal'

def test_sound_search_starts_from_the_network_as_it_is(monkeypatch):
    "The gates of s = 1 are tried, and alone give better scores than s = 1."
    tried, polish = [], Search.polish
    monkeypatch.setattr(Search, 'tree', lambda self: None)
    again = lambda self, x, point=None: (tried.append(x), polish(self, x))[1] if point is None else None
    monkeypatch.setattr(Search, 'polish', again)
    q = reduce(hard()); one = complete(q, np.ones(q.n_s)); r = solve(q, time_limit=60)
    assert len(tried) == 1 and np.array_equal(tried[0], one) and r.objective < objective(q, one) - 1e-3

def test_slips_of_type(net, digits):
    xb, yb = choose(net, digits)
    with pytest.raises(ValueError, match=r'layers=\[\]: no layer chosen'): score(net, digits, layers=[])
    assert list(score(net, digits, layers='fc1')) == ['fc1']
    with pytest.raises(TypeError, match=r'batch: expected a pair \(xb, yb\), got Tensor'): score(net, batch=xb)
    with pytest.raises(ValueError, match=r'yb: shape \(10, 10\); expected one integer class label'):
        score(net, batch=(xb, F.one_hot(yb)))
    with pytest.raises(TypeError, match='relaxed='): score(net, digits, relaxed='yes')
    a, b = (score(net, batch=(o, yb)) for o in (xb, xb.double()))
    assert all(torch.allclose(v, b[k], atol=1e-4) for k,v in a.items())
    twice = nn.Linear(4, 4)
    with pytest.raises(UnsupportedLayerError, match='runs twice'):
        chain(nn.Sequential(twice, nn.ReLU(), twice, nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(UnsupportedLayerError, match='return_indices'):
        chain(nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, return_indices=True), nn.Flatten(), nn.Linear(8, 2)))
