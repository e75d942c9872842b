"""Annealing as a search of the engine: exact sizes, counts per layer, moments, resuming, and networks of strangers."""
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy, mae
from fastai.vision.learner import vision_learner
from neuronprune import anneal_methods as M, models
from neuronprune.anneal_evaluators import ModuleEvaluator
from neuronprune.anneal_weights import WeightEvaluator
from neuronprune.core import kappa, methods, seed_everything
from neuronprune.data import get_dls
from neuronprune.masks import Mask
from neuronprune.pipeline import prune, rehearsed
from neuronprune.train import Rewind, fit, learner

@pytest.fixture(scope='module')
def dls(): return get_dls('digits')

def start(dls, lr=.1, **kw):
    with seed_everything(0): net = models.mlp((40, 20), size=8, bias=False)
    return learner(net, dls, lr=lr, **kw)

def run(learn, s=.9, **kw):
    return prune(learn, 'anneal', s, **{'budget': 60, 'fine_tune_epochs': 0, 'latency': False, **kw})

class Own(nn.Module):
    "Somebody's network: norms, a sum, nothing of the zoo."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.d, self.out = nn.BatchNorm2d(8), nn.Linear(8, 10)
    def forward(self, x):
        x = self.b(self.a(x)).relu()
        return self.out((x + self.d(self.c(x))).relu().mean((2, 3)))

def test_how_it_is_registered():
    m = methods()['anneal']
    assert (m.kind, m.unit, m.at, m.rewind, m.trains) == ('search', 'weight', 'init', 'init', False) and m.paper

@pytest.mark.parametrize('s', [.5, .9, .98])
def test_the_mask_has_the_size_asked_for(dls, s):
    res = run(start(dls), s); assert res.mask.counts() == (kappa(3560, s), 3560) and res.found.status == 'optimal'
    m = res.found.meta; assert m['evaluator'] == 'WeightEvaluator' and sum(m['layers'].values()) == kappa(3560, s)
    assert {k:int(v.sum()) for k,v in res.mask.items()} == m['layers'], 'the mask is the one that was found'

def test_the_search_looks_at_the_initial_weights_and_training_starts_there(dls):
    fresh = {k:v.clone() for k,v in start(dls).model.state_dict().items()}
    def searched(**kw):
        learn = start(dls, cbs=[Rewind(epochs=(1,))]); fit(learn, 2); return run(learn, .5, **kw), learn
    (a, la), (b, lb), c = searched(), searched(at=1), run(start(dls), .5)
    for learn,res in ((la, a), (lb, b)): # rewound whatever it looked at
        for k,v in res.mask.items(): assert torch.equal(learn.model.state_dict()[f'{k}.weight'], fresh[f'{k}.weight']*v)
    assert all(torch.equal(v, c.mask[k]) for k,v in a.mask.items()) and a.found.curve == c.found.curve
    assert b.found.curve != a.found.curve

def test_it_finds_more_than_chance(dls):
    res, args = run(start(dls), .9, budget=800, T0=.02), dict(fine_tune_epochs=0, latency=False)
    rand = prune(start(dls), 'bestof', .9, n=20, at='init', rewind='init', **args)
    assert res.found.meta['score'] > rand.found.curve[-1]['best'] + .05
    assert res.found.meta['held_out'] > .2

def test_the_score_is_that_of_the_images_said(dls):
    learn = start(dls); seen = []
    class Spy(WeightEvaluator):
        def __init__(self, model, x, y, *args, **kw): seen.append((x, y)); super().__init__(model, x, y, *args, **kw)
    known, M.evaluator = M.evaluator, lambda model, x, y, c, graph, objective, n_valid, held: Spy(
        model, x, y, c, objective=objective, n_valid=n_valid, held=held)
    try: res = run(learn, .5, n_valid=50)
    finally: M.evaluator = known
    (x, y), = seen; valid = torch.cat([b[0] for b in dls.valid])
    assert len(y) == 50 and ((x[:, None] == valid[None]).flatten(2).all(2).any(1)).all(), 'all from the validation set'
    with torch.no_grad(): right = float((learn.model.eval()(x).argmax(1) == y).double().mean())
    assert res.found.meta['score'] == pytest.approx(right)

@pytest.mark.parametrize('kw', [dict(allocation='snip'), dict(proposal='informed', look_every=20), dict(chains=2),
                                dict(objective='ce', T0=.02), dict(split='train', n_valid=200), dict(ladder=(1., 2.)),
                                dict(refresh_every=20, n_valid=60), dict(compat='released'), dict(scope='layer'),
                                dict(unit='channel', shrink=True), dict(keep='fc3')], ids=str)
def test_ways(dls, kw):
    res = run(start(dls), .5, **kw); layers = res.found.meta['layers']
    if kw.get('unit') == 'channel': assert sum(layers.values()) == 30; return
    assert res.mask.counts() == (1780, 3560)
    if 'scope' in kw: assert layers == dict(fc1=1280, fc2=400, fc3=100)
    if 'keep' in kw: assert res.mask['fc3'].all() and list(layers) == ['fc1', 'fc2']
    if 'allocation' in kw:
        like = prune(start(dls), 'snip', .5, at='init', fine_tune_epochs=0, latency=False, normalize=None).mask
        assert layers == {k:int(v.sum()) for k,v in like.items()}
        assert any((like[k] != v).any() for k,v in res.mask.items())

@pytest.mark.parametrize('unit', ['weight', 'channel'])
def test_a_network_of_somebody(dls, unit):
    with seed_everything(0): learn = learner(Own(), dls)
    res = run(learn, .5, unit=unit, budget=25, fine_tune_epochs=1, shrink=unit == 'channel')
    assert res.mask.sparsity == .5 and res.found.meta['evaluator'] == 'ModuleEvaluator'
    if unit == 'channel': assert res.model.a.out_channels == res.model.c.out_channels == 4

def test_a_vision_learner(dls):
    with seed_everything(0):
        learn = vision_learner(dls, small_resnet, n_out=10, pretrained=False, n_in=1, normalize=False,
                               loss_func=CrossEntropyLossFlat(), lin_ftrs=[8])
    with learn.no_bar(), learn.no_logging():
        res = run(learn, .5, unit='channel', at='trained', rewind='none', budget=5, n_valid=20)
    assert abs(res.mask.sparsity-.5) < .02 and res.found.meta['evaluator'] == 'ModuleEvaluator'

def small_resnet(pretrained=False):
    "ResNet-10: one block of ResNet-18 where that has two."
    from torchvision.models.resnet import BasicBlock, ResNet
    return ResNet(BasicBlock, [1, 1, 1, 1])

@pytest.mark.parametrize('real', [False, True])
def test_a_tabular_learner(real):
    from fastai.tabular.all import (Categorify, CategoryBlock, FillMissing, Normalize, RegressionBlock,
                                    TabularDataLoaders, tabular_learner)
    rng, n = np.random.default_rng(0), 160
    df = pd.DataFrame(dict(c=rng.choice(['x', 'y', 'z'], n), a=rng.normal(size=n), b=rng.normal(size=n)))
    df['t'] = df.a+df.b if real else np.where(df.a+df.b > 0, 'p', 'q')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['c'],
                                     cont_names=['a', 'b'], y_names='t', bs=32,
                                     y_block=RegressionBlock() if real else CategoryBlock())
    learn = tabular_learner(dls, layers=[20, 10], metrics=mae if real else accuracy, n_out=1 if real else 2)
    with learn.no_bar(), learn.no_logging(): res = run(learn, .5, at='trained', rewind='none', budget=15)
    assert res.mask.sparsity == .5 and res.found.meta['evaluator'] == ('_Tested' if real else 'ModuleEvaluator')
    if real: assert res.found.meta['score'] == pytest.approx(-res.report.pruned.loss, rel=1e-4)

class Killed(WeightEvaluator):
    left = 10**9
    def propose(self, *args):
        Killed.left -= 1
        if not Killed.left: raise KeyboardInterrupt
        return super().propose(*args)

@pytest.mark.parametrize('kw', [{}, dict(proposal='informed', look_every=30), dict(refresh_every=40, n_valid=60),
                                dict(chains=2)], ids=str)
def test_killed_and_called_again_it_ends_as_if_nothing_had_been(dls, tmp_path, monkeypatch, kw):
    monkeypatch.setattr(M, 'evaluator', lambda model, x, y, c, graph, objective, n_valid, held: Killed(
        model, x, y, c, n_valid=n_valid, held=held))
    make = lambda d: run(start(dls), .9, budget=100, fine_tune_epochs=1, folder=tmp_path/d, **kw)
    Killed.left = 10**9; whole = make('a'); Killed.left = 73
    with pytest.raises(KeyboardInterrupt): make('b')
    assert (tmp_path/'b/search.safetensors').exists()
    again = make('b'); assert again.found.curve == whole.found.curve
    assert again.found.evaluations == whole.found.evaluations
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k])

def test_killed_in_the_smaller_network_it_goes_on_there(dls, tmp_path, monkeypatch):
    "Channels have left after the first size; the second search is of what is left, by slopes of channels."
    left, real = [10**9], ModuleEvaluator.propose
    def propose(self, *args):
        left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
        return real(self, *args)
    monkeypatch.setattr(ModuleEvaluator, 'propose', propose)
    monkeypatch.setattr(M, 'evaluator', lambda model, x, y, c, graph, objective, n_valid, held: ModuleEvaluator(
        model, x, y, c, graph=graph, n_valid=n_valid, held=held))
    make = lambda d: prune(start(dls), 'anneal', sizes=[.6, .3], unit='channel', budget=100, proposal='informed',
                           look_every=30, fine_tune_epochs=1, latency=False, folder=tmp_path/d)
    whole = make('a'); n = 10**9-left[0]; left[0] = n-40
    with pytest.raises(KeyboardInterrupt): make('b')
    assert (tmp_path/'b/mask000.safetensors').exists() and (tmp_path/'b/search.safetensors').exists()
    left[0] = 10**9; again = make('b'); assert again.found.curve == whole.found.curve and 10**9-left[0] < n/2
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k])
    assert whole.model.fc1.out_features == whole.mask['fc1'].sum() < 40 == len(whole.found.mask['fc1'])

def test_without_a_folder_an_interruption_leaves_the_best_so_far(dls, monkeypatch):
    monkeypatch.setattr(M, 'evaluator', lambda model, x, y, c, graph, objective, n_valid, held: Killed(model, x, y, c))
    Killed.left = 73
    with pytest.warns(UserWarning, match="not finished, status 'interrupted'"): res = run(start(dls), .9, budget=100)
    Killed.left = 10**9; assert res.mask.counts()[0] == 356 and res.found.status == 'interrupted'

def test_what_an_earlier_call_has_removed_stays_away(dls):
    learn = start(dls); prune(learn, 'magnitude', .5, fine_tune_epochs=0, latency=False)
    old = Mask({k:learn.model.get_submodule(k).weight != 0 for k in ('fc1', 'fc2', 'fc3')}, 'weight')
    res = run(learn, .8, at='trained', rewind='none')
    assert res.mask.counts()[0] == 712 and all((v <= old[k]).all() for k,v in res.mask.items())

def test_a_rehearsal_has_the_size(dls):
    assert rehearsed(start(dls), 'anneal', sparsity=.9, fine_tune_epochs=0).counts()[0] == 356

@pytest.mark.parametrize('kw,said', [
    (dict(n_valid=10**6), 'n_valid=1000000'), (dict(split='test'), "split='test'"),
    (dict(allocation='x'), "allocation='x'"),
    (dict(allocation='bestof'), "allocation='bestof'"), (dict(chains=0), 'chains=0'), (dict(budget=-1), 'budget=-1'),
    (dict(T0=0.), 'T0=0'), (dict(T0=1e-3, T1=1e-2), 'T1=0.01'), (dict(objective='loss'), "objective='loss'"),
    (dict(compat='old'), "compat='old'"), (dict(at=3), '3'), (dict(propsal='informed'), "did you mean 'proposal'")],
                         ids=lambda o: o if isinstance(o, str) else '')
def test_wrong_calls(dls, kw, said):
    learn = start(dls); before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises((ValueError, TypeError, IndexError)) as e: run(learn, .5, **kw)
    assert said in str(e.value) and all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
