"""Seconds to score VGG-7 and VGG-16 block by block (`mip`, variant='greedy') on ten 32-pixel images, one per class.

    python benchmarks/mip_greedy.py --models vgg7_256 vgg16_dgl --threads 2

Without `--data` the images are smoothed noise around ten templates. The heads are fresh or trained for `--epochs` on
`--n-train` images; the time is for scoring alone, heads given. `--data` is a folder of images with train/ and test/.
"""
import argparse, os, platform, resource, sys, time, warnings

def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='+', default=['vgg7_256', 'vgg7_bn', 'vgg16_dgl'],
                   help='names of the zoo; vgg7_256 is VGG-7 with half the widths, 64 to 256')
    p.add_argument('--aux', nargs='+', type=int, choices=(0, 1), default=[0, 1],
                   help='score_aux; VGG-16 is scored with 0 only')
    p.add_argument('--data', help='image folder such as CIFAR-10 with train/ and test/')
    p.add_argument('--n-train', type=int, default=1000, help='training images')
    p.add_argument('--epochs', type=int, default=0,
                   help='greedy training; 0 = fresh weights, batch norm statistics measured')
    p.add_argument('--lr', type=float, default=.05)
    p.add_argument('--time-limit', type=float, default=600, help='seconds per block')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--seed', type=int, default=0)
    return p.parse_args()

def noise(n_train, seed, bs=50):
    "DataLoaders of smoothed noise around one template per class."
    import torch, torch.nn.functional as F
    from fastai.data.core import DataLoader, DataLoaders
    g = torch.Generator().manual_seed(seed)
    smooth = lambda n: F.interpolate(torch.randn(n, 3, 8, 8, generator=g), size=32, mode='bilinear')
    base = smooth(10)
    def part(n): y = torch.arange(n) % 10; return list(zip(base[y] + .7*smooth(n), y))
    dls = DataLoaders(*(DataLoader(part(n), bs=bs, shuffle=i == 0, drop_last=i == 0)
                        for i,n in enumerate((n_train, 200))), device='cpu')
    dls.n_out, dls.c_in, dls.size = 10, 3, 32
    return dls

def network(name, seed):
    from torch import nn
    from neuronprune.core import seed_everything
    from neuronprune.models import VGG, build, vgg
    if name != 'vgg7_256': return build(name, 3, 10, 32, seed=seed)
    VGG[name] = (64, 'M', 128, 128, 'M', 256, 256, 'M')
    with seed_everything(seed): return vgg(name, 3, 10, 32, head=(512, 256), pool=nn.AvgPool2d, out_side=2)

def one_per_class(dls):
    import torch
    x, y = (torch.cat(o) for o in zip(*((b[0], b[1]) for b in dls.valid)))
    i = [int((y == k).nonzero()[0]) for k in range(10)]
    return x[i], y[i]

def main():
    a = options()
    for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[k] = str(a.threads)
    warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
    import torch
    from neuronprune.data import get_dls
    from neuronprune.mip import score
    from neuronprune.mip_greedy import Greedy, build_heads, fit_greedy
    torch.set_num_threads(a.threads)
    dls = get_dls(a.data, size=32, n_train=a.n_train, seed=a.seed) if a.data else noise(a.n_train, a.seed)
    batch = one_per_class(dls)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {a.threads} threads, torch {torch.__version__}; "
          f"{'images of ' + os.path.basename(os.path.normpath(a.data)) if a.data else 'smoothed noise'}, "
          f"{len(batch[1])} images, "
          + (f'greedy training {a.epochs} epochs on {a.n_train} images' if a.epochs else 'fresh weights and heads'))
    print(f"{'model':10}{'aux':>4}{'scores':>7}{'rows':>9}{'gates':>6}{'build s':>9}{'solve s':>9}"
          f"{'wall s':>8}{'CPU s':>8}{'<0.3':>6}{'dead':>6}{'MiB':>7}  status")
    for name in a.models:
        net = network(name, a.seed)
        if a.epochs: learn, heads = fit_greedy(net, dls, a.epochs, a.lr, seed=a.seed)
        else:
            heads = build_heads(net, batch[0], seed=a.seed); g = Greedy(net, heads).train()
            with torch.no_grad():
                for _,(x,_) in zip(range(20), dls.train): g(x)
        for aux in a.aux:
            if aux and name.startswith('vgg16'): continue
            wall, cpu = time.perf_counter(), time.process_time()
            s = score(net.eval(), batch=batch, variant='greedy', heads=heads.eval(), score_aux=bool(aux),
                      time_limit=a.time_limit)
            wall, cpu, parts = time.perf_counter()-wall, time.process_time()-cpu, s.meta['parts']
            size = {k:sum(m['size'][k] for m in parts) for k in ('scores', 'rows', 'gates')}
            secs = [sum(m[k] for m in parts) for k in ('build_secs', 'solve_secs')]
            print(f"{name:10}{aux:4}{size['scores']:7}{size['rows']:9}{size['gates']:6}{secs[0]:9.1f}{secs[1]:9.1f}"
                  f"{wall:8.1f}{cpu:8.1f}"
                  f"{sum(int((v < .3).sum()) for v in s.values()):6}{sum(s.meta['n_dead_on_batch'].values()):6}"
                  f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024:7}  {s.meta['status']}", flush=True)
            for m in parts:
                print(f"  {m['layer']:8}{m['size']['scores']:11}{m['size']['rows']:9}{m['size']['gates']:6}"
                      f"{m['build_secs']:9.1f}{m['solve_secs']:9.1f}  "
                      f"box x {m['shrunk']:g}, {m['status']}, gap {m['gap']:.1e}", flush=True)

if __name__ == '__main__': sys.exit(main())
