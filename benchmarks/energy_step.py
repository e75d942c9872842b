"""A plain training step beside a step of the energy search: S states scored, then a training step of one of them.

python benchmarks/energy_step.py                  ResNet-18, 3x32x32, batches of 32, S = 8, every back-end
python benchmarks/energy_step.py --quick          a batch of 8, one round, without vmap
python benchmarks/energy_step.py --device cuda    wall seconds of a graphics card, the work waited for
python benchmarks/energy_step.py --layout tied    states that `shrink` could cut

All in turns in one process; ratios of medians to the plain step."""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, statistics, time
import torch
from torch import nn
from neuronprune.energy_backends import BACKENDS, Scorer
from neuronprune.energy_units import bits_of
from neuronprune.graph import trace
from neuronprune.models import build

GOALS = {('sliced', 1.): 1.8, ('sliced', .25): 1., ('loop', 1.): 3.7, ('locked', 1.): .6}

def clock(f, device):
    "CPU seconds of a call, or wall seconds where the work is done elsewhere."
    wait, now = (torch.cuda.synchronize, time.perf_counter) if device == 'cuda' else (lambda: None, time.process_time)
    wait(); t = now(); f(); wait()
    return now()-t

def cases(a, model, bits, xb, yb):
    "Name -> what is timed."
    opt, loss = torch.optim.Adadelta(model.parameters()), nn.CrossEntropyLoss()
    rng = torch.Generator().manual_seed(1)
    def trained(z): opt.zero_grad(); loss(z, yb).backward(); opt.step()
    def states(): return torch.rand(a.states, bits.D, generator=rng) < a.density
    def search(name, frac):
        score = Scorer(model, bits, backend=name, frac=frac); score.tested.update(BACKENDS)
        def f(step):
            s = states(); score(s, xb)
            if step: trained(score.step(s[0], xb, 'sliced' if name == 'sliced' else 'loop'))
        return f
    res, fixed = {('plain', 1.): lambda: trained(model(xb))}, states()[0]
    for name in a.backends:
        for frac in a.fracs:
            f = search(name, frac)
            res[name, frac] = lambda f=f: f(True)
            res[f'{name}, scoring only', frac] = lambda f=f: f(False)
    for name in ('sliced', 'loop'):
        score = Scorer(model, bits, backend=name); score.tested.add(name)
        res['locked' if name == 'sliced' else 'locked, dense', 1.] = (
            lambda name=name, score=score: trained(score.step(fixed, xb, name)))
    return res

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='resnet18'); p.add_argument('--size', type=int, default=32)
    p.add_argument('--bs', type=int, default=32); p.add_argument('--states', type=int, default=8)
    p.add_argument('--density', type=float, default=.5); p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--layout', default='independent', choices=['independent', 'tied'])
    p.add_argument('--backends', nargs='+', default=list(BACKENDS), choices=list(BACKENDS))
    p.add_argument('--fracs', nargs='+', type=float, default=[1., .25])
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda']); p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    if a.quick: a.bs, a.rounds, a.backends = min(a.bs, 8), 1, [k for k in a.backends if k != 'vmap']
    torch.set_num_threads(1); torch.manual_seed(0)
    xb, yb = torch.rand(a.bs, 3, a.size, a.size), torch.randint(0, 10, (a.bs,))
    model = build(a.model, 3, 10, a.size, seed=0); bits = bits_of(model, trace(model, xb), tied=a.layout == 'tied')
    model, xb, yb = model.to(a.device).train(), xb.to(a.device), yb.to(a.device)
    todo, secs = cases(a, model, bits, xb, yb), {}
    if a.device == 'cuda': [f() for f in todo.values()] # kernels are loaded and tuned
    for _ in range(a.rounds): # in turns, so that a busy machine slows all
        for k,f in todo.items(): secs.setdefault(k, []).append(clock(f, a.device))
    base = statistics.median(secs['plain', 1.])
    where = torch.cuda.get_device_name() if a.device == 'cuda' else f'one thread, load {os.getloadavg()[0]:.1f}'
    print(f'{a.model}, 3x{a.size}x{a.size}, batches of {a.bs}, S={a.states}, {bits.D} {a.layout} bits, '
          f'density {a.density:g}, torch {torch.__version__}, {where}')
    print(f"{'':24s} {'part':>5} {'seconds':>8} {'ratio':>6} {'goal':>5}")
    for (name,frac),v in secs.items():
        t, goal = statistics.median(v), GOALS.get((name, frac), '')
        print(f'{name:24s} {frac:5.2f} {t:8.3f} {t/base:6.2f} {goal:>5}', flush=True)

if __name__ == '__main__': main()
