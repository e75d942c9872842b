"""Penalties while training: against autograd, against closed forms, and beside what else may happen in a fit."""
import pytest, torch
from torch import nn
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from neuronprune.core import generator, seed_everything
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.regularize import PENALTIES, RegularizeCallback, SlimmingCallback
from neuronprune.train import as_learner, fit
from neuronprune.while_training import PruneCallback
from test_while_training import conv, loaders, start

def penalty(model, name, graph):
    "The penalty itself, written down once more: sum of |gamma|, or of sqrt(n)·norm over bundles of rows."
    if name == 'slimming':
        return sum(m.weight.abs().sum() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    rows = {}
    for k in graph.removable:
        w = model.get_submodule(k).weight
        for i,o in enumerate(graph.out_slots[k].tolist()): rows.setdefault(o, []).append(w[i])
    flat = [torch.cat([r.flatten() for r in o]) for o in rows.values()]
    return sum(len(o)**.5*o.norm() for o in flat)

class Keep(RegularizeCallback):
    "Keeps the gradients before and after."
    def before_step(self):
        get = lambda: {k:p.grad.clone() for k,p in self.model.named_parameters() if p.grad is not None}
        self.before = get(); super().before_step(); self.after = get(); self.steps = getattr(self, 'steps', 0)+1

@pytest.mark.parametrize('name', sorted(PENALTIES))
@pytest.mark.parametrize('net', ['resnet20', 'plain'])
def test_subgradients_are_those_of_autograd(name, net):
    "Residual blocks tie channels: they are one group, and each is counted once."
    model = (conv() if net == 'plain' else build(net, 1, 10, 8, seed=0)).double()
    graph = trace(model, torch.rand(2, 1, 8, 8).double())
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, -1., 1., generator=generator(m.num_features))
    ps, grads = PENALTIES[name](model, graph)
    want = torch.autograd.grad(penalty(model, name, graph), ps)
    assert all(torch.allclose(a, b.to(a.dtype), atol=1e-5) for a,b in zip(want, grads()))
    assert bool(graph.ties) == (net == 'resnet20')

@pytest.mark.parametrize('name', sorted(PENALTIES))
def test_added_once_per_step(name):
    "With gradients of two batches accumulated, and clipped before."
    learn = start(); graph = trace(learn.model, torch.rand(2, 1, 8, 8)) if name == 'group_lasso' else None
    cb = Keep(name, .1, graph)
    learn.fit(1, cbs=[cb, GradientAccumulation(64), GradientClip(.5)])
    assert cb.steps == 2, 'four batches of 32'
    model = conv(); ref = PENALTIES[name](learn.model, graph)
    names = {id(p):k for k,p in learn.model.named_parameters()}
    total = torch.stack([g.norm() for g in cb.before.values()]).norm()
    assert total <= .5+1e-4, 'what was clipped is the loss alone'
    assert {k for k in cb.before if not torch.equal(cb.before[k], cb.after[k])} == {names[id(p)] for p in ref[0]}

def test_zero_rows_stay_zero():
    "The subgradient at the corner is 0, not nan."
    m = nn.Sequential(nn.Linear(4, 3)); m[0].weight.data[1] = 0
    g, = PENALTIES['group_lasso'](m, None)[1]()
    assert torch.isfinite(g).all() and not g[1].any() and g[0].norm() == pytest.approx(4**.5, abs=1e-5)

def test_a_shared_weight_counts_once():
    a = nn.Linear(6, 6); m = nn.Sequential(a, nn.ReLU(), nn.Linear(6, 6)); m[2].weight = a.weight
    assert len(PENALTIES['group_lasso'](m, None)[0]) == 1
    bn = nn.BatchNorm1d(6); two = nn.Sequential(a, bn, nn.ReLU(), bn)
    assert len(PENALTIES['slimming'](two, None)[0]) == 1

def test_frozen_weights_are_left_alone():
    learn = start(); learn.model[1].weight.requires_grad_(False); before = learn.model[1].weight.clone()
    fit(learn, 1, cbs=RegularizeCallback('slimming', 1.)); assert torch.equal(before, learn.model[1].weight)

def test_a_weight_that_changes():
    seen, learn = [], start()
    fit(learn, 2, cbs=RegularizeCallback('slimming', lambda x: seen.append(x) or 0.))
    assert seen == sorted(seen) and len(seen) == 8 and seen[0] == 0 and seen[-1] < 1
    fit(plain := start(), 2); assert all(map(torch.equal, plain.model.parameters(), learn.model.parameters()))
    with pytest.raises(ValueError, match='weight=-1'): fit(start(), 1, cbs=RegularizeCallback('slimming', lambda x: -1))

def test_channels_go_to_zero_together():
    "Heavier penalties leave fewer channels, and those of both layers of a tie at once."
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = (nn.Linear(*o, bias=False) for o in ((64, 12), (64, 12), (12, 10)))
        def forward(self, x): x = x.flatten(1); return self.out((self.a(x)+self.b(x)).relu())
    left = []
    for lam in (0., 3e-3, 2e-2):
        with seed_everything(0): model = Block()
        learn = as_learner(model, *loaders(), opt='sgd', lr=.1); graph = trace(model, torch.rand(2, 1, 8, 8))
        fit(learn, 20, cbs=RegularizeCallback('group_lasso', lam, graph))
        a, b = (m.weight.norm(dim=1) < .15 for m in (model.a, model.b))
        assert torch.equal(a, b) or not lam; left.append(int((~a).sum()))
    assert left[0] == 12 > left[1] > left[2]

def test_follows_a_network_that_is_cut():
    learn = start(); graph = trace(learn.model, torch.rand(2, 1, 8, 8)); cb = Keep('group_lasso', .1, graph)
    fit(learn, 3, cbs=[PruneCallback('magnitude', .5, unit='channel', shrink='each', end=.5), cb])
    assert cb.after['0.weight'].shape == learn.model[0].weight.shape and len(learn.model[0].weight) < 8
    assert not torch.equal(cb.before['0.weight'], cb.after['0.weight'])

def test_slimming_of_any_learner():
    "fastai's own learner, with its own optimiser; the penalty by the name of its paper."
    x = start(); one, two = (Learner(x.dls, conv(), loss_func=x.loss_func) for _ in range(2))
    for learn,lam in ((one, 0.), (two, .05)):
        with seed_everything(0), learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=SlimmingCallback(lam))
    assert two.model[1].weight.abs().sum() < one.model[1].weight.abs().sum()
