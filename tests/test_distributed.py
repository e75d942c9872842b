"""Two processes on one machine (gloo): what they decide, and what they have in the end, is the same.

One run of two processes makes everything that is looked at; they write what they have, and the tests compare."""
import os, socket, subprocess, sys
from pathlib import Path
import pytest, torch
from neuronprune.ranks import agreed, bare, n_ranks, ranked

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''
import sys, warnings; warnings.simplefilter('ignore')
import torch, torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from neuronprune import scoring
from neuronprune.core import generator, seed_everything
from neuronprune.energy_search import EnergyCallback, recalibrate
from neuronprune.graph import trace
from neuronprune.ranks import agreed, bare, ranked
from neuronprune.regularize import RegularizeCallback
from neuronprune.distill import DistillCallback
from neuronprune.retrain import held
from neuronprune.train import as_learner, fit, Rewind
from neuronprune.while_training import PruneCallback
dist.init_process_group('gloo'); rank, res = dist.get_rank(), {}
g = generator(0); X = torch.rand(256, 1, 8, 8, generator=g)
Y = ((X-.5).flatten(1) @ torch.randn(64, 4, generator=g)).argmax(1)

def net(norm=True):
    with seed_everything(rank): # the ranks begin with different weights; those of rank 0 count
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
                             nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12) if norm else nn.Identity(), nn.ReLU(),
                             nn.Flatten(), nn.Linear(192, 4))
def start(own=False, norm=True, **kw):
    "A learner; with `own` each rank has half of the images, and its loaders are not shared."
    part = slice(rank, None, 2) if own else slice(None)
    dl = lambda s, bs: DataLoader(TensorDataset(X[s], Y[s]), bs, shuffle=True, generator=torch.Generator())
    learn = as_learner(net(norm), dl(part, 32), dl(slice(None), 128), opt='sgd', lr=.05, **kw)
    if own: return learn
    learn.model.load_state_dict({k:agreed(v) for k,v in learn.model.state_dict().items()}); return learn
def state(learn, cb=None, **more):
    out = {f'w {k}':v for k,v in learn.model.state_dict().items()}
    out.update({f'held {k}':v for k,v in held(learn).items()})
    return {**out, **({f'mask {k}':v for k,v in cb.mask.items()} if cb is not None else {}), **more}
def trained(learn, cbs, n=3, split=True, **ddp):
    with ranked(learn, split, **ddp): fit(learn, n, cbs=cbs)
    return learn

for k in ('taylor', 'snip'): # scores of the images of this rank
    cb = PruneCallback(k, .5, n=64, per_epoch=2)
    res[k] = state(trained(start(own=True), cb, split=False), cb, seen=torch.tensor(cb.history))
cb = PruneCallback('taylor', .5, unit='channel', n=64, shrink='each')
graph = trace(net(), X[:4]); press = RegularizeCallback('group_lasso', 1e-3, graph)
with seed_everything(9): teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
res['cut'] = state(trained(start(own=True), [cb, press, DistillCallback(teacher)], split=False), cb)
cb = PruneCallback('magnitude', .7, unit='channel', shrink=True); res['shared'] = state(trained(start(), cb), cb)
for energy in ('margin', 'ising'):
    cb = EnergyCallback(energy, n_pop=4, lock_epoch=2, seed=1)
    learn = trained(start(), cb, n=4, find_unused_parameters=True)
    res[energy] = state(learn, cb, population=cb.search.states, energies=cb.search.energies, reason=cb.reason)
learn = start(own=True, cbs=[Rewind(epochs=(1,))]); trained(learn, [], 2, split=False)
res['snapshot'] = {f'w {k}':v for k,v in learn.rewind.states[1].items() if 'running' not in k and 'num' not in k}
res['recalibrated'] = {f'w {k}':v for k,v in recalibrate(learn, 50).model.state_dict().items()}
learn = start(norm=False); plain = learn.loss_func
learn.loss_func = lambda z, y: plain(z, y)*(float('inf') if rank and learn.__dict__.get('epoch') == 1 else 1.)
try: trained(learn, [], 3)
except ValueError as e: res['stopped'] = dict(why=str(e)[:60], epoch=learn.epoch)
scoring.agreed = lambda x: x # the control: without agreement the masks come apart
cb = PruneCallback('taylor', .5, n=64, per_epoch=2)
res['apart'] = state(trained(start(own=True), cb, split=False), cb)
torch.save(res, f'{sys.argv[1]}/{rank}.pt'); dist.destroy_process_group()
'''
PARTS = ['taylor', 'snip', 'cut', 'shared', 'margin', 'ising', 'snapshot', 'recalibrated']

def run_on_two(script, d):
    "What two processes of `script` leave in the folder `d`."
    (d/'script.py').write_text(script)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
           'MASTER_PORT': str(port),
           'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', str(d/'script.py'), str(d)], cwd=ROOT, text=True,
                           env={**env, 'RANK': str(i), 'LOCAL_RANK': str(i)}, stderr=subprocess.PIPE) for i in range(2)]
    try: errs = [p.communicate(timeout=300)[1] for p in ps]
    finally: [p.kill() for p in ps]
    assert [p.returncode for p in ps] == [0, 0], '\n\n'.join(errs)
    return [torch.load(d/f'{i}.pt', weights_only=True) for i in range(2)]

@pytest.fixture(scope='module')
def ranks(tmp_path_factory): return run_on_two(SCRIPT, tmp_path_factory.mktemp('ranks'))

def differ(a, b): return [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]

@pytest.mark.parametrize('part', PARTS)
def test_the_same_on_every_rank(ranks, part):
    a, b = (o[part] for o in ranks)
    assert list(a) == list(b) and len(a) > 3 and differ(a, b) == []
    assert not [k for k in a if 'module.' in k], 'names are those of the network, not of its wrapper'

@pytest.mark.parametrize('part', ['taylor', 'snip', 'cut', 'shared', 'margin'])
def test_masks_are_held(ranks, part):
    a = ranks[0][part]; gone = [(a[f'w {k[5:]}'], v) for k,v in a.items() if k.startswith('held ')]
    assert all(not w[~v].any() for w,v in gone) and (gone or part in ('cut', 'shared'))
    if not gone: assert len(a['w 0.weight']) < 8 or len(a['w 3.weight']) < 12

def test_a_loss_that_is_infinite_on_one_rank_stops_both(ranks):
    a, b = (o['stopped'] for o in ranks); assert a == b and 'the training loss is nan after epoch 2' in a['why']

def test_without_agreement_they_come_apart(ranks):
    "The control: the same run with scores that each rank keeps for itself."
    a, b = (o['apart'] for o in ranks); assert [k for k in differ(a, b) if k.startswith('mask ')]

def test_one_process_is_left_alone():
    x = torch.rand(3); net = torch.nn.Linear(2, 2)
    assert n_ranks() == 1 and agreed(x) is x and agreed(3.) == 3. and bare(net) is net
    with pytest.raises(TypeError, match='split'):
        with ranked(object(), split='no'): pass

CTX = '''
import sys, torch, torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastai.distributed import DistributedDL
from neuronprune.core import generator, seed_everything
from neuronprune.retrain import held
from neuronprune.train import as_learner, fit
from neuronprune.while_training import PruneCallback

def broadcast(self, t, rank): t = torch.tensor(t); dist.broadcast(t, rank); return t.tolist()
DistributedDL._broadcast = broadcast # fastai's moves the indices to a GPU, for nccl
g = generator(0); X = torch.rand(256, 1, 8, 8, generator=g)
Y = ((X-.5).flatten(1) @ torch.randn(64, 4, generator=g)).argmax(1); res = {}
for k,cb in dict(none=None, weights=PruneCallback('snip', .5, n=64, per_epoch=2),
                 channels=PruneCallback('taylor', .5, unit='channel', n=64, shrink='each')).items():
    with seed_everything(0): net = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 4))
    data = [DataLoader(TensorDataset(X, Y), bs, shuffle=bs == 32) for bs in (32, 128)]
    learn = as_learner(net, *data, opt='sgd', lr=.05)
    with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, 2, cbs=[cb] if cb else [])
    res[k] = {f'w {n}':v for n,v in learn.model.state_dict().items()}
    res[k].update({f'held {n}':v for n,v in held(learn).items()})
    if cb: res[k].update({f'mask {n}':v for n,v in cb.mask.items()})
torch.save(res, f'{sys.argv[1]}/{dist.get_rank()}.pt'); dist.destroy_process_group()
'''

@pytest.fixture(scope='module')
def in_context(tmp_path_factory):
    pytest.importorskip('accelerate', reason="fastai's distrib_ctx needs it")
    return run_on_two(CTX, tmp_path_factory.mktemp('context'))

@pytest.mark.parametrize('part', ['none', 'weights', 'channels'])
def test_in_fastais_own_context(in_context, part):
    "Weights and masks agree, under the network's own names, and the mask is held."
    a, b = (o[part] for o in in_context)
    assert list(a) == list(b) and differ(a, b) == [] and 'w 1.weight' in a
    if part == 'weights': assert sum(int((~v).sum()) for k,v in a.items() if k.startswith('held ')) == (64*30+30*4)//2
    if part == 'weights': assert all(not a[f'w {k[5:]}'][~v].any() for k,v in a.items() if k.startswith('held '))
    if part == 'channels': assert a['w 1.weight'].shape == (15, 64) and int(a['mask 1'].sum()) == 15
