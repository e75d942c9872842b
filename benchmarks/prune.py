"""CPU seconds of `prune` on ResNet-50 at 64 pixels, and the share of each step:
the wiring, the scores, the mask, surgery, the record.

python benchmarks/prune.py                      magnitude of channels, without fine-tuning
python benchmarks/prune.py --model resnet18     another network of torchvision's
python benchmarks/prune.py --stem small   the stem for small images, which the zoo chooses at 64 pixels:
16 times the work
python benchmarks/prune.py --no-latency         a record without clocks"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, time
from contextlib import contextmanager
import torch
from neuronprune import pipeline, report, surgery
from neuronprune.data import get_dls
from neuronprune.models import build
from neuronprune.train import learner

SECS, OPEN = {}, []

@contextmanager
def clock(name):
    "Add the CPU seconds of the block to `name`; those of a step inside it count there only."
    t, inner = time.process_time(), SECS.setdefault('', 0.); OPEN.append(0.)
    try: yield
    finally:
        secs = time.process_time()-t
        SECS[name] = SECS.get(name, 0.) + secs - OPEN.pop()
        if OPEN: OPEN[-1] += secs

def watch(owner, attr, name):
    f = getattr(owner, attr)
    def timed(*a, **kw):
        with clock(name): return f(*a, **kw)
    setattr(owner, attr, timed)

class One:
    "A loader of one batch."
    def __init__(self, b): self.b = b
    def __iter__(self): return iter([self.b])
    def __len__(self): return 1

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='resnet50'); p.add_argument('--size', type=int, default=64)
    p.add_argument('--bs', type=int, default=64)
    p.add_argument('--stem', default='full', choices=['full', 'small'])
    p.add_argument('--no-latency', action='store_true'); a = p.parse_args()
    torch.set_num_threads(1)
    # accuracies of one batch: they are not the question
    dls = get_dls('digits', size=a.size, bs=a.bs); dls.loaders[2] = One([o[:a.bs] for o in dls.loaders[2].one_batch()])
    learn = learner(build(a.model, c_in=dls.c_in, n_out=10, size=a.size, stem=a.stem, seed=0), dls)
    for owner,attr,name in ((pipeline, 'trace', 'wiring'), (pipeline, 'score_with', 'scores'),
                            (pipeline, '_round', 'mask'), (pipeline, '_tested', 'accuracies'),
                            (pipeline, '_tune', 'cut'), (pipeline, '_finish', 'surgery'),
                            (pipeline.Report, 'measure', 'record, other'),
                            (report, '_latencies', 'record, latency'), (report, 'memory', 'record, memory'),
                            (report, '_all_macs', 'record, MACs')):
        watch(owner, attr, name)
    with clock('other'):
        pipeline.prune(learn, 'magnitude', .5, unit='channel', fine_tune_epochs=0, latency=not a.no_latency)
    total = sum(SECS.values())
    print(f'{a.model} at {a.size} pixels, {a.stem} stem, batches of {a.bs}, torch {torch.__version__}: '
          f'{total:.1f} s CPU, {total-SECS["wiring"]:.1f} s without the wiring')
    for k,v in sorted(SECS.items(), key=lambda o: -o[1]):
        if k: print(f'{k:18s} {v:7.2f} s {v/total:6.1%}', flush=True)

if __name__ == '__main__': main()
