"""Times one epoch (training and validation) of MINT's MLP on MNIST, one CPU thread:
torchvision + fastai's default loader,
`get_dls` + `learner`, and a bare PyTorch loop over a resident float tensor. Runs are interleaved;
medians and ratios are printed.

    python benchmarks/data_fast_path.py --root /path/to/data --epochs 3
"""
import argparse, os, statistics, time, warnings
from functools import partial
warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
import torch, torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.learner import Learner
from torchvision import datasets, transforms
from neuronprune.data import get_dls
from neuronprune.datasets import stratified
from neuronprune.models import build
from neuronprune.train import learner

LR,MOMENTUM = .1,.9

def read(dls):
    "The data alone: every training and validation batch once."
    for dl in (dls.train, dls.valid):
        for _ in dl: pass

def published_way(root, bs, train, valid):
    """torchvision's data set with `ToTensor` and `Normalize` per image,
    fastai's default loader (`DataLoaders.from_dsets`) without workers."""
    tfm = transforms.Compose([transforms.ToTensor(), transforms.Normalize((.1307,), (.3081,))])
    ds = datasets.MNIST(root, train=True, download=False, transform=tfm)
    parts = [torch.utils.data.Subset(ds, o.tolist()) for o in (train, valid)]
    dls = DataLoaders.from_dsets(*parts, bs=bs, num_workers=0, drop_last=False)
    opt = lambda ps, lr, **kw: OptimWrapper(ps, torch.optim.SGD, lr=lr, momentum=MOMENTUM)
    learn = Learner(dls, build('mlp', seed=0), loss_func=CrossEntropyLossFlat(), opt_func=opt)
    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, LR)
    return epoch,partial(read, learn.dls)

def our_way(root, bs):
    "`get_dls` and `learner`."
    learn = learner(build('mlp', seed=0), get_dls('mnist', root=root, bs=bs, device='cpu'), lr=LR, momentum=MOMENTUM,
                    metrics=[])
    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, LR)
    return epoch,partial(read, learn.dls)

def bare_way(root, bs, train, valid):
    "A hand-written loop over float tensors that are normalised in advance."
    ds = datasets.MNIST(root, train=True, download=False)
    x,y,model = ((ds.data[:,None].float()/255) - .1307)/.3081,ds.targets,build('mlp', seed=0)
    xt,yt,xv,yv = x[train],y[train],x[valid],y[valid]
    opt = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    def epoch():
        model.train()
        for o in torch.randperm(len(yt)).split(bs):
            F.cross_entropy(model(xt.index_select(0, o)), yt.index_select(0, o)).backward()
            opt.step(); opt.zero_grad()
        model.eval()
        with torch.no_grad():
            for a,b in zip(xv.split(bs), yv.split(bs)): F.cross_entropy(model(a), b)
    def slices():
        for o in torch.randperm(len(yt)).split(bs): xt.index_select(0, o),yt.index_select(0, o)
        for _ in zip(xv.split(bs), yv.split(bs)): pass
    return epoch,slices

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--root', default=os.environ.get('NEURONPRUNE_DATA'), help='folder that holds MNIST/raw')
    p.add_argument('--epochs', type=int, default=3, help='interleaved repeats of each way')
    p.add_argument('--bs', type=int, default=256)
    a = p.parse_args()
    torch.set_num_threads(1)
    valid,train = stratified(datasets.MNIST(a.root, train=True, download=False).targets, 6000, 0)
    ways = {'torchvision + fastai loader':published_way(a.root, a.bs, train, valid),
            'get_dls + learner':our_way(a.root, a.bs), 'bare loop':bare_way(a.root, a.bs, train, valid)}
    print(f'one pass over MNIST (54,000 + 6,000 images), batch {a.bs}, one thread, median of {a.epochs} interleaved '
          'runs after a warm-up')
    for j,what in enumerate(('training epoch', 'batches alone')):
        secs = {k:[] for k in ways}
        for i in range(a.epochs+1):
            for k,f in ways.items():
                t,c = time.perf_counter(),time.process_time()
                f[j]()
                if i: secs[k].append((time.perf_counter()-t, time.process_time()-c))
        med = {k:[statistics.median(o) for o in zip(*v)] for k,v in secs.items()}
        ours = med['get_dls + learner']
        print(f"{what:30}{'wall s':>9}{'CPU s':>9}{'/ ours wall':>13}{'/ ours CPU':>12}")
        for k,(w,c) in med.items(): print(f'{k:30}{w:9.2f}{c:9.2f}{w/ours[0]:13.2f}{c/ours[1]:12.2f}')

if __name__ == '__main__': main()
