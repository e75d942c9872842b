"""What every registered method promises; methods that come later are covered as soon as their module exists."""
import copy, importlib.util, inspect, math, random, pytest, torch
import numpy as np
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn
from neuronprune import core
from neuronprune.core import check_choice, layers, methods
from neuronprune.masks import Mask, Scores
from neuronprune.allocate import allocate
from neuronprune.data import get_dls
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.surgery import apply, difference, shrink
from test_graph import found

ALL = [k for k in methods() if k in core._registry or importlib.util.find_spec(f'neuronprune.{core._modules[k]}')]
HERE = [k for k in ALL if methods()[k].kind == 'score']
SEARCHES = sorted({*ALL} - {*HERE})
each = pytest.mark.parametrize('name', HERE)
BATCH_NORM = ('slimming',) # methods that look at batch norms

def test_table_names_modules_and_some_exist(): assert HERE and 'mint' in HERE and set(HERE) <= set(methods())

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64)

def network(name):
    if name in BATCH_NORM: m = build('vgg7_bn', 1, 10, 8, seed=0).train()
    else:
        with core.seed_everything(0):
            m = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(),
                              nn.Linear(20, 10))
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d):
            nn.init.uniform_(o.weight, .5, 1.5, generator=core.generator(o.num_features))
            nn.init.normal_(o.bias, generator=core.generator(1))
    m[-1].bias.requires_grad_(False); next(iter(layers(m).values())).eval()
    return m

def call(name, model, dls, **kw):
    "The method with small sizes where it has them, and the initial weights where it wants them."
    fn = methods()[name].fn; own = inspect.signature(fn).parameters
    small = dict(n_per_class=1 if name == 'mip' else 8) if 'n_per_class' in own else dict(n=64) if 'n' in own else {}
    small |= dict(n_groups=(4, 4)) if 'n_groups' in own else {}
    if 'init' in own and isinstance(model, nn.Module):
        small |= dict(init={k:v + .01*torch.randn(v.shape, generator=core.generator(5)) if v.is_floating_point() else v
                            for k,v in model.state_dict().items()})
    return methods()[name](model, dls, **({k:v for k,v in dict(seed=0).items() if k in own} | small | kw))

@pytest.fixture(scope='module')
def results(dls):
    cache = {}
    def get(name):
        if name not in cache:
            model = network(name)
            before, rng = found(model), (torch.get_rng_state().tolist(), random.getstate(),
                                         np.random.get_state()[1].tolist())
            res = call(name, model, dls)
            cache[name] = res, model, before == found(
                model), rng == (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        return cache[name]
    return get

@each
def test_description(name):
    m = methods()[name]
    assert (m.name == name and m.unit in core.UNITS and m.fn.__doc__ and m.paper
            and (callable(m.allocate) or isinstance(m.allocate, dict)))
    assert m.at in ('init', 'trained') or isinstance(m.at, int)
    assert m.rewind in ('none', 'init', 'sign') or isinstance(m.rewind, int)
    own = inspect.signature(m.fn).parameters
    assert (list(own)[:2] == ['model', 'dls'] and all(p.kind == p.KEYWORD_ONLY for p in list(own.values())[2:])
            and 'seed' in own and 'progress' in own and 'graph' in own)
    if isinstance(m.allocate, dict): assert set(m.allocate) <= set(inspect.signature(allocate).parameters)

@each
def test_result(name, results):
    res, model, *_ = results(name); lay = layers(model)
    assert isinstance(res, (Scores, Mask)) and res.unit == methods()[name].unit
    for k,v in res.items():
        n = k.removesuffix(':in'); w = lay[n].weight
        assert torch.isfinite(v).all() and v.device.type == 'cpu' and not v.requires_grad and v.numel() > 0
        if res.unit == 'weight': assert v.shape == w.shape
        if res.unit == 'channel': assert len(v) == w.shape[1 if k != n else 0]
        if res.unit == 'group': assert tuple(map(len, res.labels[n])) == w.shape[:2] and v.ndim == 2
        if res.unit == 'rank':
            assert (v.shape == (min(w.flatten(1).shape),) and (v[:-1] >= v[1:]).all()
                    and res.cost[k] == sum(w.flatten(1).shape))
    if isinstance(res, Scores):
        assert res.method == name and res.secs >= 0 and all(isinstance(o, str) for o in res.skipped.values())
        assert {k.removesuffix(':in') for k in res} | set(res.skipped) >= set(lay) and not set(res) & set(res.skipped)
        assert len(torch.cat([v.flatten().double() for v in res.values()]).unique()) > 1
    if res.unit == 'channel':
        assert res.graph is not None and not {k for k in res if not k.endswith(':in')} & set(res.graph.fixed)

@each
def test_same_seed_same_bytes(name, results, dls):
    a, model, *_ = results(name)
    torch.rand(3); random.random(); np.random.rand()
    b = call(name, network(name), dls)
    assert list(a) == list(b) and all(v.numpy().tobytes() == b[k].numpy().tobytes() for k,v in a.items())
    assert all(torch.equal(x, y) for k in a.labels for x,y in zip(a.labels[k], b.labels[k]))

@each
def test_model_and_random_state_left_as_found(name, results):
    _, model, same, rng = results(name)
    assert same, 'the model changed'
    assert rng, 'the global random state changed'

@each
def test_gradients_of_the_user_survive(name, dls):
    model = network(name).requires_grad_(True); model(torch.rand(4, 1, 8, 8)).sum().backward()
    before = {k:p.grad.clone() for k,p in model.named_parameters()}
    call(name, model, dls)
    assert all(torch.equal(p.grad, before[k]) for k,p in model.named_parameters())

@each
def test_allocates_applies_saves(name, results, dls, tmp_path):
    res, model, *_ = results(name); m = methods()[name]; xb = next(iter(dls.valid))[0][:8]
    mask = (res if isinstance(res, Mask) else m.allocate(res, .5) if callable(m.allocate)
            else allocate(res, .5, **m.allocate))
    assert 0 < mask.sparsity < 1
    if m.unit in ('channel', 'rank') or isinstance(res, Scores) and res.graph is not None:
        assert difference(apply(copy.deepcopy(model), mask), shrink(model, mask, xb), xb) <= 1e-5
    res.save(tmp_path/'r'); back = type(res).load(tmp_path/'r')
    assert list(back) == list(res) and all(torch.equal(v, back[k]) for k,v in res.items()) and back.unit == res.unit

@each
def test_graph_can_be_passed(name, results, dls):
    if 'graph' not in inspect.signature(methods()[name].fn).parameters: pytest.skip('takes no graph')
    a, model, *_ = results(name); b = call(name, network(name), dls, graph=trace(network(name), torch.rand(1, 1, 8, 8)))
    assert all(torch.equal(v, b[k]) for k,v in a.items())

@each
def test_nan_weights_are_refused(name, dls):
    model = network(name)
    for m in layers(model).values(): m.weight.data.view(-1)[0] = float('nan')
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.weight.data[0] = float('nan')
    if name == 'random': pytest.skip('does not look at weights')
    with pytest.raises(ValueError): call(name, model, dls)

def loaders(x, y, c=10): 
    dls = DataLoaders(*[DataLoader(list(zip(x, y)), bs=16, num_workers=0) for _ in range(2)]); dls.c = dls.n_out = c
    return dls

NEED = [k for k in HERE if 'data' in methods()[k].needs]
LABELS = [k for k in NEED if 'labels' in methods()[k].needs]

@pytest.mark.parametrize('name', NEED)
def test_plain_fastai_loaders_work(name):
    gen = core.generator(0)
    call(name, network(name), loaders(torch.rand(200, 1, 8, 8, generator=gen), torch.arange(200)%10))

@pytest.mark.parametrize('name,label', [(k, o) for k in LABELS for o in (10, -1)])
def test_labels_out_of_range_are_refused(name, label):
    y = torch.arange(200)%10; y[::2] = label
    with pytest.raises(ValueError): call(name, network(name), loaders(torch.rand(200, 1, 8, 8), y))

@pytest.mark.parametrize('name', NEED)
def test_bad_loaders_are_refused(name):
    with pytest.raises(ValueError, match='empty'):
        call(name, network(name), loaders(torch.rand(0, 1, 8, 8), torch.zeros(0).long()))
    with pytest.raises(ValueError, match='NaN'):
        call(name, network(name), loaders(torch.full((200, 1, 8, 8), float('nan')), torch.arange(200)%10))
    with pytest.raises(ValueError, match='dls'): call(name, network(name), None)

@pytest.mark.parametrize('name', NEED)
def test_images_of_another_size_are_refused(name):
    with pytest.raises(ValueError, match='shape|digest'):
        call(name, network(name), loaders(torch.rand(200, 1, 5, 5), torch.arange(200)%10))

@pytest.mark.parametrize('name', HERE)
def test_a_model_without_layers_is_refused(name, dls):
    with pytest.raises(ValueError): call(name, nn.Sequential(nn.Flatten()), dls)

@pytest.mark.parametrize('name', HERE)
def test_what_is_no_model_is_refused(name, dls):
    with pytest.raises(TypeError): call(name, 'mlp', dls)

@pytest.mark.parametrize('name', [k for k in HERE if 'init' in inspect.signature(methods()[k].fn).parameters])
def test_missing_initial_weights_name_learner(name, dls):
    if methods()[name].rewind == 'none' and methods()[name].at != 'init': pytest.skip('initial weights are optional')
    try: call(name, network(name), dls, init=None)
    except ValueError as e: assert 'learner' in str(e) or 'init' in str(e)

def test_the_frame_lists_all_that_exist():
    if len(ALL) == len(methods()): assert set(methods().frame().method) == {*ALL}

@pytest.mark.parametrize('name', SEARCHES)
def test_a_search_has_the_arguments_of_one(name):
    m = methods()[name]; own = inspect.signature(m.fn).parameters
    assert list(own)[0] == 'task' and all(p.kind == p.KEYWORD_ONLY for p in list(own.values())[1:])
    assert {'state', 'keep', 'seed', 'progress'} <= set(own) and m.fn.__doc__ and m.paper and m.unit in core.UNITS
    assert m.trains == ('training' in m.needs) and set(m.allocate) <= set(inspect.signature(allocate).parameters)
