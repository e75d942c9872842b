"CPU seconds of the MIP scores: the plain cvxpy model with open solvers against the reduced program, on the same images. One thread, one process."
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, math, platform, time
from importlib.metadata import version
import cvxpy as cp, pandas as pd, torch
from neuronprune.data import calib_batch, get_dls
from neuronprune.mip import problem, reduce
from neuronprune.mip_cvxpy import solve_cvxpy
from neuronprune.mip_solve import NoIncumbentError, solve, sweep
from neuronprune.models import build, mlp
from neuronprune.train import evaluate, fit, learner

WIDTHS = {'fc_baseline':(50, 20), 'fc3':(300, 100), 'fc4':(200, 100, 100)}
PLAIN = [('fc_baseline', 'margin', 'GLPK_MI', False, True), ('fc_baseline', 'margin', 'GLPK_MI', False, False), ('fc_baseline', 'margin', 'HIGHS', False, True), ('fc_baseline', 'margin', 'HIGHS', False, False),
         ('fc_baseline', 'ce', 'CLARABEL', True, True), ('fc_baseline', 'ce', 'CLARABEL', True, False), ('fc_baseline', 'ce', 'ECOS', True, True), ('fc3', 'margin', 'HIGHS', False, True), ('fc3', 'margin', 'HIGHS', False, False),
         ('fc3', 'ce', 'CLARABEL', True, False), ('fc3', 'margin', 'GLPK_MI', False, False)] # net, loss, solver, relaxed, pixels as variables

def trained(name, dls, size, epochs):
    "The network after a few epochs, and its accuracy on the test images."
    torch.manual_seed(0)
    net = build('lenet5', 1, 10, size) if name == 'lenet5' else mlp(WIDTHS[name], size=size)
    learn = learner(net, dls, opt='adam')
    with learn.no_bar(): fit(learn, epochs, 1e-3)
    return learn.model.eval(), evaluate(learn, dls.loaders[2]).accuracy

def timed(f):
    "(result or the exception, CPU seconds, wall seconds)"
    cpu, wall = time.process_time(), time.perf_counter()
    try: r = f()
    except Exception as e: r = e
    return r, time.process_time()-cpu, time.perf_counter()-wall

def best_of(f, n):
    "The run with the least CPU seconds of n."
    return min((timed(f) for _ in range(n)), key=lambda o: o[1])

def ours(p, repeats, relaxed=False):
    built, build_secs, _ = best_of(lambda: reduce(p), repeats)
    r, secs, wall = best_of(lambda: solve(built, relaxed=relaxed), repeats)
    return built, r, build_secs, secs

def line(name, kind, way, r, secs, base=None, **more):
    "A row of the table; a run that was stopped gives a lower bound of the ratio."
    failed = isinstance(r, Exception); stopped = failed and isinstance(r, NoIncumbentError) or not failed and r.status == 'time_limit'
    row = dict(net=name, loss=kind, way=way, cpu_s=secs, status='stopped' if stopped else type(r).__name__ if failed else r.status, objective=math.nan if failed else float(r.objective))
    if base: row.update(ratio=f"{'>= ' if stopped or failed else ''}{secs/base[0]:.0f}", difference=math.nan if failed else float(r.objective-base[1]))
    print({k:round(v, 6) if isinstance(v, float) else v for k,v in {**row, **more}.items()}, flush=True)
    return {**row, **more}

def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('--root', default=os.environ.get('NEURONPRUNE_DATA'), help='folder with MNIST; without it digits, enlarged')
    a.add_argument('--limit', type=float, default=600, help='seconds for a slow solver'); a.add_argument('--epochs', type=int, default=3)
    a.add_argument('--repeats', type=int, default=3, help='of the fast runs; the best counts'); a.add_argument('--skip-slow', action='store_true')
    a = a.parse_args(); torch.set_num_threads(1)
    get = lambda size: get_dls('mnist', root=a.root, bs=128, valid_pct=.2, size=size, normalize='unit') if a.root else get_dls('digits', bs=64, valid_pct=.2, size=size, normalize='unit')
    dls, big = get(28), get(32)
    cpu = next((o.split(':')[1].strip() for o in open('/proc/cpuinfo') if 'model name' in o), platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    print(f"{cpu}, {os.cpu_count()} cores, one used; load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, " + ', '.join(f'{k} {version(k)}' for k in ('torch', 'numpy', 'scipy', 'highspy', 'cvxpy', 'cvxopt', 'clarabel')))
    print(f"{'MNIST' if a.root else 'digits, enlarged to 28x28'}; 10 images, one per class; lambda 5, eps 1e-5, dense bounds", flush=True)
    xb, yb = calib_batch(dls, n_per_class=1); rows, base, progs = [], {}, {}
    for name in (*WIDTHS, 'lenet5'):
        d, size = (big, 32) if name == 'lenet5' else (dls, 28); net, acc = trained(name, d, size, a.epochs)
        b = calib_batch(d, n_per_class=1); progs[name] = net
        for kind in ('margin', 'ce'):
            p = problem(net, *b, loss=kind); q, r, tb, ts = ours(p, a.repeats); base[name,kind] = tb+ts, r.objective
            rows.append(line(name, kind, 'reduced', r, tb+ts, build_s=tb, solve_s=ts, gap=float(r.gap), scores=q.n_s, rows=f'{len(q.G)} of {q.n_rows}', gates=len(q.gates), accuracy=acc))
        for kind in ('margin', 'ce'):
            lams = range(1, 25); q, tb, _ = best_of(lambda: reduce(problem(net, *b, loss=kind)), 1); sols, ts, _ = timed(lambda: sweep(q, lams)); one = base[name,kind][0]
            if isinstance(sols, Exception): print(name, kind, 'sweep', sols); continue
            rows.append(line(name, kind, 'sweep of 24 lambdas', sols[4], tb+ts, base=(one, base[name,kind][1]), build_s=tb, solve_s=ts, gap=float(max(o.gap for o in sols))))
    x50 = calib_batch(dls, n_per_class=5)
    for kind in ('margin', 'ce'):
        q, r, tb, ts = ours(problem(progs['fc3'], *x50, loss=kind), 1); rows.append(line('fc3', kind, 'reduced, 50 images', r, tb+ts, build_s=tb, solve_s=ts, gap=float(r.gap)))
    for name,kind,solver,relaxed,pixels in () if a.skip_slow else [o for o in PLAIN if o[2] in cp.installed_solvers()]:
        p = problem(progs[name], xb, yb, loss=kind)
        r, secs, _ = timed(lambda: solve_cvxpy(p, solver, relaxed=relaxed, pixels=pixels, time_limit=None if solver == 'ECOS' else a.limit))
        rows.append(line(name, kind, f"cvxpy+{solver}{', relaxed' if relaxed else ''}{', pixels' if pixels else ''}", r, secs, base=base[name,kind]))
    print(pd.DataFrame(rows).drop(columns=['build_s', 'solve_s', 'rows', 'scores', 'gates', 'accuracy', 'gap']).to_string(index=False, float_format=lambda o: f'{o:.5g}', na_rep=''))

if __name__ == '__main__': main()
