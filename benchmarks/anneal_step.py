"""Masks of a network scored one after the other: as published, by a dense pass, and step by step.

python benchmarks/anneal_step.py                  MLP 784-300-100-10, 90 %, 2,000 images; then filters
python benchmarks/anneal_step.py --quick          fewer repeats, short anneals
python benchmarks/anneal_step.py --budget 20000   moves of the whole anneals
python benchmarks/anneal_step.py --device cuda    also many masks in one call, on a graphics card (wall seconds)

Processor seconds, one thread, all in turns in one process. Counts of right answers are compared with the dense pass.
The published loop is written from its description: images that are decoded at every evaluation through a loader,
a memory of 50 masks, swaps by nonzero and randperm, one forward pass."""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, io, statistics, time
import numpy as np, torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from neuronprune import models
from neuronprune.anneal import Released, Schedule, anneal
from neuronprune.anneal_evaluators import WeightEvaluator
from neuronprune.core import kappa, seed_everything

GOALS = {'dense, cached': 25, 'published loop': 300} # times that a single swap is faster

class Pictures(Dataset):
    "Images kept as PNG files in memory, decoded and normalised one by one."
    def __init__(self, x, y):
        self.y, self.files = y, []
        for o in (x[:, 0]*255).byte().numpy():
            f = io.BytesIO(); Image.fromarray(o).save(f, format='png'); self.files.append(f.getvalue())
    def __len__(self): return len(self.y)
    def __getitem__(self, i):
        o = torch.from_numpy(np.array(Image.open(io.BytesIO(self.files[i])))).float().div(255)
        return o[None].sub(.1307).div(.3081), int(self.y[i])

class Published:
    "One evaluation after the other, as in the published program."
    def __init__(self, model, files, mask, bs=64):
        self.ws, self.loader = [m.weight.detach() for m in model if hasattr(m, 'weight')], DataLoader(files, bs)
        self.mask, self.memory, self.n = mask, [], len(files)
    def neighbour(self, h):
        for _ in range(50):
            on, off = self.mask.nonzero().flatten(), (~self.mask).nonzero().flatten()
            new = self.mask.clone()
            new[on[torch.randperm(len(on))[:h]]] = False; new[off[torch.randperm(len(off))[:h]]] = True
            if all(int((new != o).sum()) >= h for o in self.memory): break
        self.memory = [*self.memory[-49:], new]
        return new
    @torch.no_grad()
    def __call__(self, h=1):
        parts, right = self.neighbour(h).split([w.numel() for w in self.ws]), 0
        ws = [w*p.view(w.shape) for w,p in zip(self.ws, parts)]
        for x,y in self.loader:
            z = x.flatten(1)
            for i,w in enumerate(ws): z = (z.relu() if i else z) @ w.T
            right += int((z.log_softmax(1).argmax(1) == y).sum())
        return right/self.n

def clock(f, n=1):
    "Median processor milliseconds of a call."
    ts = []
    for _ in range(n): t = time.process_time(); f(); ts.append(time.process_time()-t)
    return statistics.median(ts)*1e3

def pictures(n, size, c_in, seed=0):
    "Images with shapes in them, and labels that depend on them."
    g = torch.Generator().manual_seed(seed); protos = torch.rand(10, c_in, size, size, generator=g) < .2
    y = torch.randint(10, (n,), generator=g)
    return (protos[y]*torch.rand(n, c_in, size, size, generator=g) + .1*torch.rand(n, c_in, size, size, generator=g)
            ).clamp(0, 1), y

def moves(rng, mask, h, n):
    on, off = np.flatnonzero(mask), np.flatnonzero(~mask)
    return [(rng.choice(on, h, replace=False), rng.choice(off, h, replace=False)) for _ in range(n)]

def exact(ev, mask, rng, sizes, n):
    "How many of the proposals, some of them committed, score as a dense pass does."
    ev.reset(mask); same = total = 0
    for h in sizes:
        for i in range(n):
            off, on = moves(rng, mask, h, 1)[0]; new = mask.copy(); new[off], new[on] = False, True
            same += ev.propose(off, on) == ev.score(new); total += 1
            if i % 2: ev.commit(); mask = new
    return same, total

def mlp(a):
    with seed_everything(0): net = models.mlp((300, 100), size=28, bias=False)
    x, y = pictures(a.images, 28, 1); files = Pictures(x, y); xn = (x-.1307)/.3081
    rng = np.random.default_rng(0); ev = WeightEvaluator(net, xn, y); k = kappa(ev.n, .9)
    mask = rng.permutation(ev.n) < k; ev.reset(mask); old = Published(net, files, torch.from_numpy(mask))
    M = ev._masked(mask)
    def dense(): # masked weights at hand, images laid out: the fairest that a dense pass can be
        return ev._sum([(ev._through(M, ev.X)[-1], ev.y)], len(y))
    one = moves(rng, mask, 1, 500); rounds = 3 if a.quick else 9; ts = {}
    with torch.inference_mode():
        for _ in range(rounds): # in turns, so that a busy machine slows all
            ts.setdefault('published loop', []).append(clock(old))
            ts.setdefault('dense, cached', []).append(clock(dense, 3))
            ts.setdefault('step by step, 1 swap', []).append(clock(lambda: [ev.propose(*m) for m in one[:60]])/60)
            for h in (5, 20, 130, 2000):
                ms = moves(rng, mask, h, 3)
                ts.setdefault(f'step by step, {h} swaps', []).append(clock(lambda: [ev.propose(*m) for m in ms])/3)
    ms = {q:statistics.median(v) for q,v in ts.items()}; base = ms['step by step, 1 swap']
    print(f'MLP 784-300-100-10, {k:,} of {ev.n:,} weights kept, {len(y):,} images, torch {torch.__version__}, one '
          f'thread, load {os.getloadavg()[0]:.1f}')
    print(f"{'':28s} {'ms':>8} {'to 1 swap':>10} {'goal':>5}")
    for q,v in ms.items(): print(f"{q:28s} {v:8.3f} {v/base:9.1f}x {GOALS.get(q, ''):>5}", flush=True)
    same, total = exact(WeightEvaluator(net, xn, y), mask, rng, (1, 3, 50, 500), 5 if a.quick else 20)
    print(f'right answers equal to a dense pass: {same} of {total} proposals')
    return net, xn, y, k, ms

def wholes(a, net, xn, y, k, ms):
    "Whole anneals: moves per processor second, everything included."
    cases = {'our schedule': dict(budget=a.budget), 'informed': dict(budget=a.budget, proposal='informed'),
             'published schedule': dict(budget=100_000 if a.full else a.budget, schedule=Released(), compat='released')}
    print(f"{'whole anneal':28s} {'moves':>8} {'moves/s':>8} {'to published loop':>18}")
    for q,kw in cases.items():
        ev = WeightEvaluator(net, xn, y); t = time.process_time(); r = anneal(ev, k, **kw)
        t = time.process_time()-t; n = r.evaluations
        print(f"{q:28s} {n:8,d} {n/t:8.0f} {n/t*ms['published loop']/1e3:17.0f}x   score {r.score:.3f}", flush=True)

def filters(a):
    "Filters of the BasicCNN, where their evaluator is there."
    try: from neuronprune.anneal_filters import FilterEvaluator
    except ImportError: return
    from neuronprune.anneal_evaluators import ModuleEvaluator
    from neuronprune.chain_search import candidates
    from neuronprune.graph import trace
    x, y = pictures(a.filter_images, 32, 3); net = models.build('basiccnn', 3, 10, 32, seed=0)
    units = candidates(net, 'channel', trace(net, x[:4])); rng = np.random.default_rng(0)
    print(f"{'BasicCNN, filters':28s} {'dense ms':>9} {'1 swap ms':>10} {'ratio':>6}")
    for s in (.5, .8):
        ev, dense = FilterEvaluator(net, x, y, units), ModuleEvaluator(net, x, y, units)
        mask = rng.permutation(ev.n) < kappa(ev.n, s); ev.reset(mask)
        t, ms = clock(lambda: dense.score(mask), 1 if a.quick else 3), moves(rng, mask, 1, 5 if a.quick else 30)
        fast = clock(lambda: [ev.propose(*m) for m in ms])/len(ms)
        print(f'{s:28.0%} {t:9.1f} {fast:10.2f} {t/fast:5.1f}x', flush=True)

def many(a, net, xn, y, k):
    "Many masks in one call."
    ev = WeightEvaluator(net.to(a.device), xn.to(a.device), y.to(a.device)); rng = np.random.default_rng(0)
    masks = np.stack([rng.permutation(ev.n) < k for _ in range(256)]); want = [ev.score(m) for m in masks[:4]]
    got = ev.batch(masks); torch.cuda.synchronize(); t = time.perf_counter(); ev.batch(masks)
    t = time.perf_counter()-t
    print(f'{torch.cuda.get_device_name()}: {len(masks)/t:,.0f} masks per second in one call; equal to single ones: '
          f'{np.abs(got[:4]-want).max() <= 1/len(y)}')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=2000); p.add_argument('--filter-images', type=int, default=256)
    p.add_argument('--budget', type=int, default=20_000); p.add_argument('--quick', action='store_true')
    p.add_argument('--full', action='store_true', help='100,000 moves of the published schedule')
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    a = p.parse_args()
    if a.quick: a.budget = min(a.budget, 2000)
    torch.set_num_threads(1); torch.manual_seed(0)
    found = mlp(a); wholes(a, *found)
    if a.device != 'cpu': many(a, *found[:4])
    filters(a)

if __name__ == '__main__': main()
