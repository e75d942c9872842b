"""Neighbours of a filter mask: dense masked network, compact network, and one swap proposed and committed.

python benchmarks/anneal_filters.py             basiccnn, 1,024 images of 3x32x32, half and a fifth of the filters
python benchmarks/anneal_filters.py --quick     256 images, one round
python benchmarks/anneal_filters.py --norms     norms with statistics, as after training; else those of a new network

CPU seconds of one process and one thread, all in turns, medians. A swap within and between any two layers is timed,
and the mean weights each pair as swaps drawn from all filters hit it; every proposal is scored in full and committed.
The dense network goes through the images in the same chunks as the evaluator, which suits it better than all at once;
its second row has the channels innermost in memory, as the evaluator has them."""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, statistics, time
import numpy as np, torch
from neuronprune.anneal_filters import FilterEvaluator
from neuronprune.applying import apply
from neuronprune.core import copied, generator, kappa
from neuronprune.models import build

GOALS = {.5: 20, .8: 50}

def clock(f):
    "(CPU seconds, answer) of a call."
    t = time.process_time(); res = f()
    return time.process_time()-t, res

def network(norms):
    "The zoo's basiccnn, never trained; with `norms` its batch norms have statistics."
    model, gen = build('basiccnn', 3, 10, 32, seed=0).eval(), generator(0)
    for m in model.modules():
        if not norms or not isinstance(m, torch.nn.BatchNorm2d): continue
        for o in (m.weight, m.bias, m.running_mean, m.running_var): o.data.copy_(.5+torch.rand(len(o), generator=gen))
    return model

@torch.no_grad()
def right(model, xs, ys): return sum(int((model(x).argmax(1) == y).sum()) for x,y in zip(xs, ys))

def swap(ev, rng, i, j):
    "A random swap of a filter of layer `i` for one of layer `j`, proposed and committed."
    pick = lambda l, kept: ev.groups[l].start+rng.choice(np.flatnonzero(ev.mask[ev.groups[l]] == kept), 1)
    off, on = pick(i, True), pick(j, False)
    def f(): score = ev.propose(off, on); ev.commit(); return score
    return f

def weights(ev):
    "Probability of every (layer of the filter that goes, layer of the one that comes)."
    on, off = (np.array([(ev.mask[g] == k).sum() for g in ev.groups]) for k in (True, False))
    return np.outer(on/on.sum(), off/off.sum())

def measured(ev, model, x, y, s, rounds):
    rng = np.random.default_rng(0); mask = rng.permutation(ev.n) < kappa(ev.n, s)
    dense = apply(copied(model), ev.to_mask(mask)).eval(); last = copied(dense).to(memory_format=torch.channels_last)
    xs, ys = x.split(ev.chunk), y.split(ev.chunk); xl = [o.contiguous(memory_format=torch.channels_last) for o in xs]
    secs, L = {}, range(len(ev.groups))
    assert ev.reset(mask)*len(y) == right(dense, xs, ys)
    for i in L: swap(ev, rng, i, i)()
    for _ in range(rounds):
        todo = {'dense': lambda: right(dense, xs, ys), 'dense, channels last': lambda: right(last, xl, ys),
                'compact': lambda: ev.score(mask)*len(y), **{(i, j):(i, j) for i in L for j in L}}
        for k,f in todo.items(): # in turns, so that a busy machine slows all
            if isinstance(k, tuple): f = swap(ev, rng, *k)
            secs.setdefault(k, []).append(clock(f)[0])
    check = apply(copied(model), ev.to_mask(ev.mask)).eval()
    assert ev.score(ev.mask)*len(y) == right(check, xs, ys), 'counts differ after the swaps'
    p, t = weights(ev), {k:statistics.median(v) for k,v in secs.items()}
    pairs = np.array([[t[i, j] for j in L] for i in L])
    return t, pairs, (p*pairs).sum(), sum((p.sum(1)+p.sum(0))[i]/2*pairs[i, i] for i in L)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=1024); p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--sparsities', type=float, nargs='+', default=[.5, .8]); p.add_argument('--chunk', type=int)
    p.add_argument('--norms', action='store_true'); p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    if a.quick: a.images, a.rounds = 256, 1
    torch.set_num_threads(1)
    model, gen = network(a.norms), generator(1)
    x, y = torch.rand(a.images, 3, 32, 32, generator=gen), torch.randint(0, 10, (a.images,), generator=gen)
    ev = FilterEvaluator(model, x, y, chunk=a.chunk)
    print(f"basiccnn, {a.images} images of 3x32x32 in chunks of {ev.chunk}, norms {'with' if a.norms else 'without'} "
          f"statistics, torch {torch.__version__}, one thread, load {os.getloadavg()[0]:.1f}, {a.rounds} rounds")
    for s in a.sparsities:
        t, pairs, mean, within = measured(ev, model, x, y, s, a.rounds)
        print(f"\nsparsity {s:g} {'milliseconds':>30} {'dense / this':>13} {'last / this':>12} {'goal':>5}")
        rows = [('dense, channels last', t['dense, channels last'], ''), ('compact, from scratch', t['compact'], ''),
                *((f'swap within {k}', pairs[i, i], '') for i,k in enumerate(ev.names)),
                ('swap within a layer, mean', within, ''), ('swap among all, mean', mean, GOALS.get(s, ''))]
        print(f"{'dense':28} {1e3*t['dense']:15.1f}")
        for name,v,goal in rows:
            last = t['dense, channels last']/v
            print(f"{name:28} {1e3*v:15.1f} {t['dense']/v:13.1f} {last:12.1f} {goal:>5}", flush=True)

if __name__ == '__main__': main()
