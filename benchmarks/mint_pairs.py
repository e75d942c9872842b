"Milliseconds per (child, parent) pair: `mint.dependency` against the straightforward loop over samples. One thread."
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, time
import numpy as np
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree
from neuronprune.mint import dependency, thirds

def network_like(n, p, c, seed=0):
    "ReLU activations of two layers that share a few causes, float32."
    rng = np.random.default_rng(seed); cause = rng.normal(size=(n, 10))
    P = np.maximum(cause@rng.normal(size=(10, p)) + rng.normal(size=(n, p)), 0)
    return P.astype('f4'), np.maximum(P@rng.normal(size=(p, c))/p**.5, 0).astype('f4')

def straightforward(P, C, parent, child, k, g, seed=0):
    "Score of one pair: neighbours by a search tree, distances in a double loop, SciPy's spanning tree."
    s1, s2, s3 = thirds(len(P), np.random.default_rng(seed)); X, Y, Z = C[:, child == k], P[:, parent == g], P[:, parent != g]
    near = s2[cKDTree(Z[s2]).query(Z[s1])[1]]
    pool = np.r_[np.c_[X[s3], Y[s3], Z[s3]], np.c_[X[s1], Y[near], Z[s1]]]; N, m, n = len(pool), len(s3), len(s1)
    D = np.zeros((N, N))
    for i in range(N):
        for j in range(N): D[i,j] = np.linalg.norm(pool[i] - pool[j])
    t = minimum_spanning_tree(D).tocoo()
    return 1 - ((t.row < m) != (t.col < m)).sum()*(m+n)/(2*m*n)

def main():
    a = argparse.ArgumentParser(); a.add_argument('--rows', type=int, default=2500); a.add_argument('--groups', type=int, default=20); a.add_argument('--pairs', type=int, default=2)
    a = a.parse_args(); G = a.groups; P, C = network_like(a.rows, 500, 300); parent, child = np.arange(500)*G//500, np.arange(300)*G//300
    wall, cpu = time.perf_counter(), time.process_time(); fast = dependency(P, C, parent, child)[0]
    wall, cpu = [(t()-o)/G**2*1e3 for t,o in ((time.perf_counter, wall), (time.process_time, cpu))]
    pairs = [(i % G, 7*i % G) for i in range(a.pairs)]
    slow = time.process_time(); ref = [straightforward(P, C, parent, child, *o) for o in pairs]; slow = (time.process_time()-slow)/len(pairs)*1e3
    print(f'{a.rows} rows, N = {a.rows - 2*a.rows//3 + 2*a.rows//3//2} points per tree, {G} × {G} groups')
    print(f'dependency:      {cpu:8.2f} ms/pair CPU, {wall:.2f} ms/pair wall ({G*G} pairs)')
    print(f'straightforward: {slow:8.0f} ms/pair CPU ({len(pairs)} pairs), ratio {slow/cpu:.0f}, largest difference in score {max(abs(r - fast[o]) for r,o in zip(ref, pairs)):.2g}')

if __name__ == '__main__': main()
