"""CPU seconds of the MIP scores: the plain cvxpy model with open solvers against the reduced program,
on the same images.

One thread. Each network has a process of its own, so that its memory goes when it is done;
every row says the peak so far.
python benchmarks/mip_solvers.py --quick    two networks, six lambdas, at most a minute for a slow solver"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, math, multiprocessing, platform, resource, time
from importlib.metadata import version
import cvxpy as cp, pandas as pd, torch
from neuronprune.data import calib_batch, get_dls
from neuronprune.mip import problem, reduce
from neuronprune.mip_cvxpy import solve_cvxpy
from neuronprune.mip_solve import NoIncumbentError, solve, sweep
from neuronprune.models import build, mlp
from neuronprune.train import fit, learner
from neuronprune.evaluation import evaluate

WIDTHS = {'fc_baseline':(50, 20), 'fc3':(300, 100), 'fc4':(200, 100, 100)}
PLAIN = [(net, *o) for net,os in dict( # net, loss, solver, relaxed, pixels as variables
    fc_baseline=[('margin', 'GLPK_MI', False, True), ('margin', 'GLPK_MI', False, False),
                 ('margin', 'HIGHS', False, True),
                 ('margin', 'HIGHS', False, False), ('ce', 'CLARABEL', True, True), ('ce', 'CLARABEL', True, False),
                 ('ce', 'ECOS', True, True)],
    fc3=[('margin', 'HIGHS', False, True), ('margin', 'HIGHS', False, False), ('ce', 'CLARABEL', True, False),
         ('margin', 'GLPK_MI', False, False)]
).items() for o in os]

def trained(name, dls, epochs):
    "The network after a few epochs, and its accuracy on the test images."
    torch.manual_seed(0)
    net = build('lenet5', 1, 10, 32) if name == 'lenet5' else mlp(WIDTHS[name], size=28)
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
    "A row of the table, printed as it is measured; a run that was stopped gives a lower bound of the ratio."
    failed = isinstance(r, Exception)
    stopped = failed and isinstance(r, NoIncumbentError) or not failed and r.status == 'time_limit'
    row = dict(net=name, loss=kind, way=way, cpu_s=secs,
               status='stopped' if stopped else type(r).__name__ if failed else r.status,
               objective=math.nan if failed else float(r.objective))
    if base: row.update(ratio=f"{'>= ' if stopped or failed else ''}{secs/base[0]:.0f}",
                        difference=math.nan if failed else float(r.objective-base[1]))
    row.update(more, peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)
    print({k:float(f'{v:.6g}') if isinstance(v, float) else v for k,v in row.items()}, flush=True)
    return row

def data(a, size):
    if a.root: return get_dls('mnist', root=a.root, bs=128, valid_pct=.2, size=size, normalize='unit')
    return get_dls('digits', bs=64, valid_pct=.2, size=size, normalize='unit')

def reduced(name, kind, net, batch, a):
    "Rows of the reduced program and of a sweep, and what the plain ones are compared with."
    q, r, tb, ts = ours(problem(net, *batch, loss=kind), a.repeats); base = tb+ts, r.objective
    yield line(name, kind, 'reduced', r, tb+ts, build_s=tb, solve_s=ts, gap=float(r.gap), scores=q.n_s,
               rows=f'{len(q.G)} of {q.n_rows}', gates=len(q.gates)), base
    lams = [l for l in range(1, 25) if not a.quick or l in (1, 2, 5, 10, 17, 24)]
    sols, ts, _ = timed(lambda: sweep(q, lams))
    failed = isinstance(sols, Exception); at5 = sols if failed else sols[lams.index(5)]
    gap = {} if failed else dict(gap=float(max(o.gap for o in sols)))
    yield line(name, kind, f'sweep of {len(lams)} lambdas', at5, tb+ts, base=base, build_s=tb, solve_s=ts, **gap), base

def network(name, a):
    "All rows of one network."
    torch.set_num_threads(1); dls = data(a, 32 if name == 'lenet5' else 28); net, acc = trained(name, dls, a.epochs)
    print(f'{name}: accuracy {acc:.3f} after {a.epochs} epochs', flush=True)
    batch, rows, base = calib_batch(dls, n_per_class=1), [], {}
    for kind in ('margin', 'ce'):
        for row,b in reduced(name, kind, net, batch, a): rows.append(row); base[kind] = b
    for kind in ('margin', 'ce') if name == 'fc3' else ():
        q, r, tb, ts = ours(problem(net, *calib_batch(dls, n_per_class=5), loss=kind), 1)
        rows.append(line(name, kind, 'reduced, 50 images', r, tb+ts, build_s=tb, solve_s=ts, gap=float(r.gap)))
    for _,kind,solver,relaxed,pixels in () if a.skip_slow else [o for o in PLAIN if o[0] == name
                                                                and o[2] in cp.installed_solvers()]:
        p = problem(net, *batch, loss=kind); limit = None if solver == 'ECOS' else a.limit
        r, secs, _ = timed(lambda: solve_cvxpy(p, solver, relaxed=relaxed, pixels=pixels, time_limit=limit))
        way = f"cvxpy+{solver}{', relaxed' if relaxed else ''}{', pixels' if pixels else ''}"
        rows.append(line(name, kind, way, r, secs, base=base[kind]))
    return rows

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--root', default=os.environ.get('NEURONPRUNE_DATA'),
                   help='folder with MNIST; without it digits, enlarged')
    a.add_argument('--quick', action='store_true',
                   help='fc_baseline and fc3, six lambdas, one epoch, one repeat, --limit 60')
    a.add_argument('--limit', type=float, help='seconds for a slow solver, 600')
    a.add_argument('--epochs', type=int, help='3')
    a.add_argument('--repeats', type=int, help='of the fast runs, 3; the best counts')
    a.add_argument('--skip-slow', action='store_true')
    a.add_argument('--nets', nargs='+', choices=[*WIDTHS, 'lenet5'], help='which of the networks')
    a = a.parse_args()
    for k,quick,full in (('limit', 60, 600), ('epochs', 1, 3), ('repeats', 1, 3),
                         ('nets', ['fc_baseline', 'fc3'], [*WIDTHS, 'lenet5'])):
        if getattr(a, k) is None: setattr(a, k, quick if a.quick else full)
    cpu = (next((o.split(':')[1].strip() for o in open('/proc/cpuinfo') if 'model name' in o), '')
           if os.path.exists('/proc/cpuinfo') else '')
    print(f"{cpu or platform.processor()}, {os.cpu_count()} cores, one used; load {os.getloadavg()[0]:.1f}; "
          f"Python {platform.python_version()}, "
          + ', '.join(f'{k} {version(k)}'
                      for k in ('torch', 'numpy', 'scipy', 'highspy', 'cvxpy', 'cvxopt', 'clarabel')))
    print(f"{'MNIST' if a.root else 'digits, enlarged to 28x28'}; 10 images, one per class; "
          "lambda 5, eps 1e-5, dense bounds", flush=True)
    with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        rows = [row for name in a.nets for row in pool.apply(network, (name, a))]
    cols = ['net', 'loss', 'way', 'cpu_s', 'status', 'objective', 'ratio', 'difference', 'peak_mib']
    print(pd.DataFrame(rows)[cols].to_string(index=False, float_format=lambda o: f'{o:.5g}', na_rep=''))

if __name__ == '__main__': main()
