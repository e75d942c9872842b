"""CPU seconds and peak memory of `allocate` on as many weights as VGG-16 has,
against `torch.kthvalue` and torch's own global pruning in the same run.

python benchmarks/allocate.py               14.7 million weights in 13 layers
python benchmarks/allocate.py --sparsity .5 another sparsity"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, time
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from neuronprune.allocate import allocate
from neuronprune.core import layers
from neuronprune.masks import Scores
from neuronprune.models import build
from neuronprune.costs import metered

def timed(f, n=3):
    "Smallest CPU seconds of `n` runs, and the peak of memory of the last one in MiB."
    secs = []
    for _ in range(n):
        with metered() as m: t = time.process_time(); f(); secs.append(time.process_time()-t)
    return min(secs), m.peak_mib

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sparsity', type=float, default=.8); s = p.parse_args().sparsity
    torch.set_num_threads(1)
    model = build('vgg16', c_in=3, n_out=10, size=32, seed=0); mods = layers(model)
    scores = Scores({k:m.weight.detach().abs() for k,m in mods.items()}, 'weight')
    flat = torch.cat([v.flatten() for v in scores.values()]); n = len(flat)
    def global_prune():
        torch_prune.global_unstructured([(m, 'weight') for m in mods.values()], torch_prune.L1Unstructured, amount=s)
        for m in mods.values(): torch_prune.remove(m, 'weight')
    rows = {'torch.kthvalue': lambda: torch.kthvalue(flat, int(s*n)), 'allocate': lambda: allocate(scores, s),
            'allocate, layer by layer': lambda: allocate(scores, s, scope='layer'),
            'allocate, ranking': lambda: allocate(scores, s, caps=1.), "torch's global prune": global_prune}
    base = None
    print(f'{n:,} weights, sparsity {s:g}, {torch.__version__}', flush=True)
    for name,f in rows.items():
        secs, peak = timed(f); base = base or secs
        print(f'{name:26s} {secs:7.2f} s {secs/base:6.1f} x kthvalue {peak:8.0f} MiB', flush=True)

if __name__ == '__main__': main()
