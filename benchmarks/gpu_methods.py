"""Every registered method on one small network, per device: seconds and peak memory of its scores or its search,
the accuracy after two epochs of fine-tuning, and on how many of its units the mask agrees with that of the CPU.

python benchmarks/gpu_methods.py                          the CPU, and the first graphics card if there is one
python benchmarks/gpu_methods.py --devices cuda --bs 256  another device, another batch
python benchmarks/gpu_methods.py --quick                  short scoring, no fine-tuning: does everything run?
python benchmarks/gpu_methods.py --methods mip taylor     some of them"""
import argparse, time, warnings
import pandas as pd, torch
from neuronprune.core import methods
from neuronprune.data import get_dls
from neuronprune.models import build
from neuronprune.pipeline import prune
from neuronprune.scoring import arguments
from neuronprune.train import fit, learner

SHORT = dict(n_per_class=1, n=64, epochs=1, budget=50, n_pop=4, n_trials=4, min_steps=0) # by the names of arguments

def cell(name, device, a, dense):
    "One method on one device: what is measured, and its mask."
    dls = get_dls('digits', bs=a.bs, device=device)
    learn = learner(build('vgg7_bn', 1, 10, 8, seed=0) if a.model == 'vgg7_bn' else net(), dls)
    learn.model.load_state_dict(dense); learn.rewind.vouch()
    m = methods()[name]; own = arguments(m.fn)
    small = {**{k:v for k,v in SHORT.items() if k in own}, **m.quick}
    if {'n', 'n_per_class'} <= set(small): small.pop('n')
    start = time.perf_counter()
    res = prune(learn, name, .5, fine_tune_epochs=0 if a.quick else 2, latency=False, **(small if a.quick else {}))
    r = res.report
    return dict(method=name, device=device, unit=res.mask.unit, secs=r.secs, peak_mib=r.peak_mib,
                whole=time.perf_counter()-start, accuracy=r.final.accuracy), res.mask

def net():
    "Two convolutions with batch norms and a linear layer."
    from torch import nn
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(128, 10))

def agreement(mask, other):
    "Share of the units on which two masks agree; None without the other."
    if other is None or set(mask) != set(other): return None
    same = [(v.cpu() == other[k].cpu()).float().flatten() for k,v in mask.items()]
    return float(torch.cat(same).mean())

def trained(a):
    "The state dict all cells start from, trained on the CPU."
    learn = learner(build('vgg7_bn', 1, 10, 8, seed=0) if a.model == 'vgg7_bn' else net(), get_dls('digits', bs=64))
    fit(learn, 1 if a.quick else 6)
    return {k:v.clone() for k,v in learn.model.state_dict().items()}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--devices', nargs='+', default=['cpu'] + ['cuda']*torch.cuda.is_available())
    p.add_argument('--methods', nargs='+', default=list(methods())); p.add_argument('--bs', type=int, default=64)
    p.add_argument('--model', choices=['small', 'vgg7_bn'], default='small')
    p.add_argument('--quick', action='store_true'); a = p.parse_args()
    dense, rows = trained(a), []
    for name in a.methods:
        first = None
        for device in a.devices:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore'); row, mask = cell(name, device, a, dense)
                row['agrees'] = agreement(mask, first); first = mask if first is None else first
            except Exception as e: row = dict(method=name, device=device, error=f'{type(e).__name__}: {e}'[:90])
            rows.append(row); print(*row.values(), flush=True)
    print('\n' + pd.DataFrame(rows).to_string(index=False, float_format='%.3g', na_rep='–'))

if __name__ == '__main__': main()
