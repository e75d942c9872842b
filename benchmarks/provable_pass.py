"""CPU seconds of the sensitivity pass, of the allocations and of a cut,
each against a straightforward implementation in the same run.

python benchmarks/provable_pass.py   LeNet-300-100 and LeNet-5 on artificial images of MNIST's kind, and ResNet-56
python benchmarks/provable_pass.py --root DATA     real MNIST images
python benchmarks/provable_pass.py --device cuda   the pass on a graphics card,
against the loop on one core of the same machine
python benchmarks/provable_pass.py --threads 2     for ResNet-56 with two threads (wall seconds)"""
import os, sys
if '--threads' not in sys.argv: os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, copy, statistics, time
import numpy as np, torch, torch.nn.functional as F
from torch import nn
from neuronprune.core import layers
from neuronprune.data import calib_batch, get_dls, preset
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.provable import pfp, sensitivities, sipp, sipp_cut
from neuronprune.provable_allocate import equalise, predicted_error, spread, spread_cvxpy, _row_table

def loop(m, a, reduce, bs=4):
    """The definition, filter by filter, in mini-batches of `bs` points:
    shares of every weight at every position of one filter at a time."""
    res = torch.zeros(m.weight.shape)
    halves = [a.clamp(min=0), (-a).clamp(min=0)] if (a < 0).any() else [a]
    for h in halves:
        for x in h.split(bs):
            cols = (x[..., None] if isinstance(m, nn.Linear)
                    else F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride))
            for o in range(len(m.weight)):
                for side in (1, -1):
                    w = (side*m.weight[o].detach().flatten()).clamp(min=0)
                    terms = w[None, :, None]*cols; z = terms.sum(1, keepdim=True)
                    g = torch.where(z > torch.finfo(z.dtype).eps, terms/z, 0.)
                    g = (g.amax(2) if reduce == 'max' else g.mean(2)).amax(0)
                    res[o] = torch.maximum(res[o], g.view(res[o].shape))
    return res

def timed(f, repeat=3):
    "(result, median CPU seconds, median wall seconds)"
    cpu, wall = [], []
    for _ in range(repeat):
        w, c = time.perf_counter(), time.process_time(); r = f()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        cpu.append(time.process_time()-c); wall.append(time.perf_counter()-w)
    return r, statistics.median(cpu), statistics.median(wall)

def images(root, n, size):
    if root is not None:
        return calib_batch(get_dls('mnist', root=root, size=size, **preset('provable', 'mnist')), n=n, split='valid')[0]
    x = torch.zeros(n, 1, 28, 28); g = torch.Generator().manual_seed(0)
    x[:, :, 6:22, 6:22] = (torch.rand(n, 1, 16, 16, generator=g)-.4).clamp(min=0); x = (x-.13)/.31
    return x if size is None else F.interpolate(x, size, mode='bilinear')

def inputs(model, xb):
    seen = {}
    hooks = [m.register_forward_pre_hook(lambda _, i, k=k: seen.update({k:i[0].detach()}))
             for k,m in layers(model).items()]
    with torch.no_grad(): model.eval()(xb)
    for h in hooks: h.remove()
    return seen

def against_loop(name, xb, device):
    model = build(name, 1, 10, xb.shape[-1], seed=0); seen = inputs(model, xb); there = copy.deepcopy(model).to(device)
    x = xb.to(device)
    for reduce in ('max', 'mean'):
        ref, slow, slow_wall = timed(lambda: {k:loop(m, seen[k], reduce) for k,m in layers(model).items()}, 1)
        fast, cpu, wall = timed(lambda: sensitivities(there, x, (reduce,))[reduce])
        worst = max(float(((fast[k]-v).abs()/v.abs().clamp(min=1e-3)).max()) for k,v in ref.items())
        print(f'{name:12} {len(xb)} images, {reduce:4}: loop {slow:7.3f} s, pass {cpu:6.3f} s CPU {wall:6.3f} s wall '
              f'on {device}, ratio {slow/cpu:6.1f} CPU {slow_wall/wall:6.1f} wall, largest relative difference '
              f'{worst:.1g}')
    _, both, _ = timed(lambda: sensitivities(there, x, ('max', 'mean')))
    print(f'{name:12} both reductions in one pass: {both:6.3f} s CPU')

def allocations(xb):
    model = build('lenet300', seed=0); dl = [(xb, torch.zeros(len(xb), dtype=torch.long))]
    class One: train = valid = dl; loaders = [dl, dl]
    found = sensitivities(model, xb)['max']
    from neuronprune.masks import Scores
    from neuronprune.provable import _input_scores, _logs, _sampling_row
    g, own = trace(model, xb[:1]), layers(model); logs = _logs(g, list(own), 1e-12)
    sc = Scores(found, 'weight', graph=g, labels={k:(_sampling_row(m.weight), torch.tensor(
        [3*logs[k]])) for k,m in own.items()}, meta=dict(variant='rand', c=3., seed=0), method='sipp')
    table = _row_table(sc); cat = lambda f: np.concatenate([f(s, l) for s,l in table.values()])
    alpha, weight, room = (cat(lambda s, l: 2*l*s.sum(1)), cat(lambda s, l: np.full(len(s), 2/len(s))),
                           cat(lambda s, l: (s > 0).sum(1)))
    b = .05*sum(room)
    y, slow, _ = timed(lambda: spread_cvxpy(alpha, weight, room, b), 1)
    x, fast, _ = timed(lambda: spread(alpha, weight, room, b), 9)
    v = [float(weight @ predicted_error(o, alpha)) for o in (x, y)]
    print(f'allocation of {len(alpha)} rows: cvxpy {1e3*slow:.1f} ms, ours {1e3*fast:.2f} ms, ratio {slow/fast:.0f}, '
          f'objectives {v[0]:.6g} and {v[1]:.6g} (relative difference {abs(v[0]/v[1]-1):.1g})')
    det = Scores(found, 'weight', meta=dict(variant='det'), method='sipp')
    p = Scores({f'{k}:in':_input_scores(own[k], v) for k,v in found.items()}, 'channel', graph=g,
               meta=dict(variant='det', seed=0, c=3., logs=logs), method='pfp')
    hyb = Scores(found, 'weight', graph=g, labels=sc.labels, meta=dict(variant='hybrid', c=3., seed=0), method='sipp')
    for what, f in (('SiPP det', lambda: sipp_cut(det, .9)), ('SiPP rand', lambda: sipp_cut(sc, .9)),
                    ('SiPP hybrid', lambda: sipp_cut(hyb, .9)), ('PFP', lambda: equalise(p, .9))):
        print(f'{what:12} one ratio of LeNet-300-100: {1e3*timed(f, 5)[1]:.1f} ms')

def resnet(device, n=256):
    model, x = (build('resnet56', 3, 10, 32, seed=0).to(device),
                torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device))
    _, cpu, wall = timed(lambda: sensitivities(model, x), 1)
    print(f'resnet56, {n} images of 32×32, max: {cpu:.1f} s CPU, {wall:.1f} s wall on {device}, '
          f'{torch.get_num_threads()} thread(s)')

if __name__ == '__main__':
    p = argparse.ArgumentParser(); p.add_argument('--root'); p.add_argument('--device', default='cpu')
    p.add_argument('--threads', type=int, default=1); o = p.parse_args()
    torch.set_num_threads(o.threads)
    print(f'torch {torch.__version__}, load {os.getloadavg()[0]:.1f}')
    if o.threads == 1:
        against_loop('lenet300', images(o.root, 448, None), o.device)
        against_loop('lenet5_conv', images(o.root, 64, 32), o.device)
        allocations(images(o.root, 415, None))
    resnet(o.device)
