"""Wrong calls: each is answered with a `ValueError` or `TypeError` that names the argument, before anything is changed.

The calls stand in `wrong_calls.txt`, one a line: a call, and what the message has to name.
The calls of `right_calls.txt` pass."""
import ast, contextlib, inspect, io, json, math, os, re, struct, warnings
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.metrics import accuracy
from neuronprune import (analysis, anneal as annealing, anneal_evaluators, baselines, blocks, core, costs, criteria,
                         data, draws, energy, energy_ising, energy_units, evaluation, graph as graph_,
                         latency as latency_, lowrank, mint as mint_, mip as mip_, models, pipeline, posttraining,
                         provable, provable_bounds, report as report_, retrain, sampling,
                         sensitivity as sensitivity_, shown, surgery, train, trainability)
from neuronprune.anneal_filters import FilterEvaluator
from neuronprune.all import *
from neuronprune.analysis import (attack, calibration, ece, fine_tuned, one_shot, paired, plot_reliability,
                                  plot_robustness, plot_study, reliability, robustness, summary)
from neuronprune.budget import sizes
from neuronprune.parameters import check_values, complete
from neuronprune.core import check_type, generator, seed_everything
from neuronprune.door import check_call
from neuronprune.provable import calib_size
from neuronprune.surgery import apply, difference, plan, shrink
from neuronprune.train import Rewind
from neuronprune.energy_search import EnergyCallback
from neuronprune.evaluation import Evaluation
from neuronprune.retrain import MaskCallback, rebind, rewind_to
from neuronprune.distill import DistillCallback
from neuronprune.regularize import RegularizeCallback
from neuronprune.while_training import PruneCallback

HERE = Path(__file__).parent
nan, inf = math.nan, math.inf

class Two(nn.Module):
    "A network that returns a tuple."
    def __init__(self): super().__init__(); self.fc = nn.Linear(64, 10)
    def forward(self, x): o = self.fc(x.flatten(1)); return o, o

class Namespaced(Two):
    "A network whose outputs nobody can list."
    def forward(self, x): return SimpleNamespace(logits=super().forward(x)[0])

class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True: yield torch.zeros(1, 8, 8), 0

def net(): return build('mlp', 1, 10, 8, seed=0)
def cnn():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(128, 10))
def chain(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
def eights():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))
def other(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def weight_normed(): return nn.Sequential(nn.Flatten(), torch.nn.utils.weight_norm(nn.Linear(64, 10)))
tuple_net, namespaced = Two, Namespaced

def loaders(f):
    "Loaders of 64 digits whose items `f(x, y)` makes."
    items = [f(x, int(y)) for x,y in zip(xb, yb)]
    return DataLoaders(*[DataLoader(items, bs=16) for _ in range(3)])
def dict_dls(): return loaders(lambda x,y: dict(x=x, y=y))
def float_dls(): return loaders(lambda x,y: (x, float(y)))
def twod_dls(): return loaders(lambda x,y: (x, torch.tensor([y, y])))
def single(): return torch.utils.data.DataLoader(list(zip(xb, yb)), batch_size=16)
def endless(): return DataLoaders(*[torch.utils.data.DataLoader(Endless(), batch_size=4) for _ in range(2)])

def L(m=None, d=None, **kw): return learner(net() if m is None else m, dls if d is None else d, **kw)

dls = get_dls('digits', size=8, bs=64, n_train=256)
xb, yb = calib_batch(dls, n=32)
g = trace(net(), xb)
learn0 = L()
SW, SC, SG = (methods()['random'](net(), dls, graph=g, unit=u) for u in ('weight', 'channel', 'group'))
MW, MC = allocate(SW, .5), allocate(SC, .5)
study_df = one_shot(learn0, {'a': MW}).assign(seed=0)
table_ev = annealing.TableEvaluator(lambda m: float(m.sum()), 4)
T = None # a folder of broken files, see `files`

def tensors_file(path, header, **tensors):
    "A safetensors file of ours with this text as its header."
    from safetensors.torch import save_file
    save_file(tensors or {'unit/a': torch.ones(2, dtype=torch.bool)}, path, {'neuronprune': header})

def spec_file(path, spec, state): tensors_file(path, json.dumps(dict(kind='model', spec=spec, factored={})), **state)

@pytest.fixture(scope='module', autouse=True)
def files(tmp_path_factory):
    "Broken files of every kind, in the folder `T`."
    global T; T = str(d := tmp_path_factory.mktemp('files'))
    state = {k:v.clone() for k,v in net().state_dict().items()}
    own = dict(kind='Mask', unit='weight', keys=['a'], meta={}, own={}, graph=None)
    for k,h in dict(badjson='{bad', listjson='[1]', nokeys=json.dumps(dict(kind='Mask')),
                    missing=json.dumps({**own, 'keys': ['zz']}), own=json.dumps({**own, 'own': {'zz': 1}})).items():
        tensors_file(d/f'{k}.st', h)
    (d/'dir').mkdir(); (d/'text.st').write_text('<html>no</html>'); (d/'empty.st').write_bytes(b'')
    (d/'broken.json').write_text('{'); (d/'list.json').write_text('[]')
    for k,spec in dict(spec2='mlp', spec3=dict(name='mlp', bogus=1),
                       spec5=dict(name='lenet300', c_in=1, n_out=10, size=8)).items():
        spec_file(d/f'{k}.st', spec, state)
    spec_file(d/'spec4.st', dict(name='mlp', c_in=1, n_out=10, size=8), {f'../{k}':v for k,v in state.items()})
    surgery.save(cnn(), d/'cnn.st'); surgery.save(net(), d/'model.st'); MW.save(d/'mask.st'); SW.save(d/'scores.st')
    rec = report_.Report(method='random', before=Evaluation(5, 9)); rec.save(d/'rec.json')
    r = json.loads((d/'rec.json').read_text())
    for k,b in dict(rec_k1={'k': 9}, rec_type='abc').items(): (d/f'{k}.json').write_text(json.dumps({**r, 'before': b}))
    for k,text in dict(tag='grid: !!python/object/apply:os.system [a]', bad='grid: [', empty='',
                       base='base: 5').items():
        (d/f'g_{k}.yml').write_text(text)

def ca(**kw):
    "A run that ends at once."
    p = {**dict(model='lenet300', sizes=[.5], epochs=0, fine_tune_epochs=0, out=f'{T}/ca'), **kw}
    return job('magnitude', **p).run(p['out'])

def fake_rows():
    "Rows as `study` gives them."
    same = dict(dataset='digits', model='lenet300', method='magnitude', dense_k=300, dense_n=360, tuned_n=360,
                dense_accuracy=.9, dense_top5=1., dense_loss=.1, layers='{"fc1": 5}', dense_layers='{"fc1": 9}')
    return pd.DataFrame([dict(same, name=n, seed=s, step=i, density=.5/(i+1), params_density=.5/(i+1),
                              macs_density=.5/(i+1), tuned_k=290-i, tuned_accuracy=.8, tuned_top5=.9, tuned_loss=.2)
                         for n in ('a', 'b') for s in (0, 1) for i in range(2)])
rows = fake_rows()

def table(name):
    "(call, what its message has to name) of every line."
    return [tuple(o.strip() for o in l.split(' # ')) for l in (HERE/name).read_text(encoding='utf-8').splitlines()
            if l.strip() and not l.startswith('##')]

def quietly(call):
    "The value of a call, without its bars and warnings."
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        return eval(call, globals())

@pytest.mark.parametrize('call,names', table('wrong_calls.txt'))
def test_wrong_call(call, names):
    with pytest.raises((TypeError, ValueError)) as e: quietly(call)
    assert type(e.value).__module__ in ('builtins', 'neuronprune.core', 'neuronprune.files'), (
        f'a foreign error: {type(e.value)}')
    assert re.search(names, str(e.value)), str(e.value)

@pytest.mark.parametrize('call', [o[0] for o in table('right_calls.txt')])
def test_right_call(call): quietly(call)

class Junk:
    "Nothing that any argument could be."
    def __repr__(self): return 'Junk()'

def spoilt(call):
    "(call, argument) with `Junk()` in the place of every argument in turn, those left at their defaults included."
    e = ast.parse(call, mode='eval').body
    if not isinstance(e, ast.Call): return
    f = eval(ast.unparse(e.func), globals()); ps = inspect.signature(getattr(f, 'fn', f)).parameters
    given = {**dict(zip([k for k,p in ps.items() if p.kind == p.POSITIONAL_OR_KEYWORD], e.args)),
             **{k.arg:k.value for k in e.keywords}}
    for k in [*(k for k,p in ps.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)),
              *(k for k in given if k not in ps)]:
        rest = [f'{n}={ast.unparse(v)}' for n,v in given.items() if n != k]
        yield f"{ast.unparse(e.func)}({', '.join([*rest, f'{k}=Junk()'])})", k

@pytest.mark.parametrize('call', [o[0] for o in table('right_calls.txt')])
def test_what_cannot_be_meant_is_named(call):
    for wrong,k in spoilt(call):
        with pytest.raises((TypeError, ValueError)) as e: quietly(wrong)
        assert re.search(rf'(?<![a-z_]){k}(?![a-z_])', str(e.value)), f'{wrong}: {e.value}'
