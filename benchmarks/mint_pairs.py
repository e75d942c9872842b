"""Milliseconds per (child, parent) pair of `mint.dependency` against a straightforward implementation,
and how the cost grows.

python benchmarks/mint_pairs.py              the layer of the paper's MLP, one thread, against the double loop
python benchmarks/mint_pairs.py --curves     points, groups and width in turn
python benchmarks/mint_pairs.py --jobs 2     the same with two processes
python benchmarks/mint_pairs.py --device cuda  on a graphics card, against one core of the same machine
Give --activations FILE (.npz with P [n, parents] and C [n, children]) to use a real layer instead of the
artificial one."""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, time
import numpy as np, torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree
from neuronprune.mint import dependency, thirds

def network_like(n, p=500, c=300, seed=0):
    "ReLU activations of two layers that share a few causes, float32."
    rng = np.random.default_rng(seed); cause = rng.normal(size=(n, 10))
    P = np.maximum(cause@rng.normal(size=(10, p)) + rng.normal(size=(n, p)), 0)
    return P.astype('f4'), np.maximum(P@rng.normal(size=(p, c))/p**.5, 0).astype('f4')

def groups(width, n): return np.arange(width)*n//width

def straightforward(P, C, parent, child, k, g, seed=0, trial=0):
    """Score of one pair from the definition: neighbours by a search tree, one norm per pair of samples,
    SciPy's spanning tree."""
    s1, s2, s3 = thirds(len(P), np.random.default_rng([seed, trial]))
    X, Y, Z = C[:, child == k], P[:, parent == g], P[:, parent != g]
    near = s2[cKDTree(Z[s2]).query(Z[s1])[1]]
    pool = np.r_[np.c_[X[s3], Y[s3], Z[s3]], np.c_[X[s1], Y[near], Z[s1]]]; N, m, n = len(pool), len(s3), len(s1)
    D = np.zeros((N, N))
    for i in range(N):
        for j in range(N): D[i,j] = np.linalg.norm(pool[i] - pool[j])
    t = minimum_spanning_tree(D).tocoo()
    return 1 - ((t.row < m) != (t.col < m)).sum()*(m+n)/(2*m*n)

def timed(f):
    "(result, CPU seconds, wall seconds)"
    wall, cpu = time.perf_counter(), time.process_time(); r = f()
    return r, time.process_time()-cpu, time.perf_counter()-wall

def points(n): return n - 2*n//3 + 2*n//3//2

def per_pair(P, C, G, K, **kw):
    "(scores, CPU ms, wall ms) per pair; two processes count in wall time only."
    r, cpu, wall = timed(lambda: dependency(P, C, groups(P.shape[1], G), groups(C.shape[1], K), **kw)[0])
    return r, 1e3*cpu/(G*K), 1e3*wall/(G*K)

def against_loop(P, C, G, n_pairs, **kw):
    parent, child = groups(P.shape[1], G), groups(C.shape[1], G); pairs = [(i % G, 7*i % G) for i in range(n_pairs)]
    ref, slow, _ = timed(lambda: [straightforward(P, C, parent, child, *o) for o in pairs])
    for est in ('cgmi', 'gmi'):
        fast, cpu, wall = per_pair(P, C, G, G, estimator=est, **kw)
        apart, ratio = max(abs(r - fast[o]) for r,o in zip(ref, pairs)), 1e3*slow/n_pairs/cpu
        same = f', largest difference in score {apart:.2g}, ratio {ratio:,.0f}' if est == 'cgmi' else ''
        print(f'{est:5} {G}×{G} groups, {points(len(P))} points: '
              f'{cpu:7.3f} ms/pair CPU, {wall:7.3f} wall, {wall*G*G/1e3:.1f} s in all{same}')
    print(f'straightforward: {1e3*slow/n_pairs:,.0f} ms/pair CPU ({n_pairs} pairs)')

def curves(jobs):
    for what, values in (('rows', (500, 1000, 2500, 5000)), ('groups', (5, 10, 20, 50, 100)),
                         ('width', (125, 250, 500, 1000, 2000))):
        for v in values:
            o = dict(rows=2500, groups=20, width=500) | {what: v}; P, C = network_like(o['rows'], o['width'], 300)
            cells = [f'{est} {cpu:7.3f} CPU {wall:7.3f} wall' for est in ('cgmi', 'gmi')
                     for _,cpu,wall in [per_pair(P, C, o['groups'], o['groups'], estimator=est, n_jobs=jobs)]]
            print(f'{what:6} {v:5}: {points(o["rows"]):5} points, ms/pair: ' + '; '.join(cells), flush=True)

def on_card(P, C, G):
    parent, child = groups(P.shape[1], G), groups(C.shape[1], G); card = [torch.as_tensor(o).cuda() for o in (P, C)]
    print(torch.cuda.get_device_name())
    for est in ('cgmi', 'gmi'):
        run = lambda: (dependency(*card, parent, child, est, max_mem=16)[0], torch.cuda.synchronize())[0]
        run(); fast, _, wall = timed(run); ref, cpu, _ = timed(lambda: dependency(P, C, parent, child, est)[0])
        print(f'{est:5} {G}×{G}: card {1e3*wall/G**2:.3f} ms/pair, one core {1e3*cpu/G**2:.3f}, ratio {cpu/wall:.1f}; '
              f'{(fast != ref).mean():.2%} of the scores differ, by at most {abs(fast-ref).max():.2g}')

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(rows=2500, groups=20, pairs=2, jobs=1).items(): a.add_argument(f'--{k}', type=int, default=v)
    a.add_argument('--curves', action='store_true'); a.add_argument('--device', default='cpu')
    a.add_argument('--activations')
    a = a.parse_args(); z = np.load(a.activations) if a.activations else None
    P, C = (z['P'], z['C']) if z else network_like(a.rows)
    if a.curves: curves(a.jobs)
    elif a.device == 'cuda': on_card(P, C, a.groups)
    else: against_loop(P, C, a.groups, a.pairs, n_jobs=a.jobs)

if __name__ == '__main__': main()
