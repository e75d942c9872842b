"""Pruning within a fit: against cuts made by hand, in every kind of fit, with masks and with physical cuts."""
import copy, json, warnings
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from neuronprune.allocate import allocate, ratios
from neuronprune.core import layers, method, methods, seed_everything, _registry
from neuronprune.data import get_dls
from neuronprune.masks import Scores
from neuronprune.graph import trace
from neuronprune.report import Report
from neuronprune.retrain import held, hold
from neuronprune.surgery import apply, difference
from neuronprune.train import as_learner, fit
from neuronprune.while_training import PruneCallback, cut_steps, sparsities

def conv(seed=0):
    with seed_everything(seed):
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                             nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
                             nn.Flatten(), nn.Linear(48, 10))
def net(seed=0):
    with seed_everything(seed): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def data(n=128):
    dls = get_dls('digits', bs=n); return [torch.as_tensor(o).as_subclass(torch.Tensor) for o in dls.one_batch()]
X, Y = data()

def loaders(): return [DataLoader(TensorDataset(X, Y), batch_size=32, shuffle=o, generator=torch.Generator())
                       for o in (True, False)]
def start(model=None, **kw): return as_learner(model or conv(), *loaders(), **{**dict(opt='sgd', lr=.05), **kw})

def plain(model=None, **kw):
    "A learner of fastai's own, with its own optimiser and loaders."
    return Learner(get_dls('digits', bs=32, n_train=128), model or conv(), loss_func=CrossEntropyLossFlat(),
                   opt_func=Adam, metrics=accuracy, **kw)

def quiet(learn, f='fit', *args, seed=0, **kw):
    with seed_everything(seed), learn.no_bar(), learn.no_logging(): getattr(learn, f)(*args, **kw)
    return learn

def alive(learn, cb):
    "How many weights outside the mask are not zero."
    named = {**dict(learn.model.named_parameters()), **dict(learn.model.named_buffers())}
    return sum(int((named[k][~v] != 0).sum()) for k,v in cb.mask.expand(learn.model).items())

class Bf16(MixedPrecision):
    "fastai's, which has the GPU in mind, on the CPU."
    def before_fit(self): super().before_fit(); self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

# the schedule

@pytest.mark.parametrize('schedule', ['cubic', 'geometric', 'linear'])
@pytest.mark.parametrize('initial', [0., .3])
def test_sparsities(schedule, initial):
    s = sparsities(.8, 5, schedule, initial)
    assert s == sorted(s) and s[-1] == .8 and s[0] > initial
    if schedule == 'cubic': # Zhu & Gupta, equation 1
        assert s == pytest.approx([.8 + (initial-.8)*(1-i/5)**3 for i in range(1, 6)])
    if not initial: assert s == ratios(.8, 5, schedule)

@pytest.mark.parametrize('n,start_,end,gap', [(10, 0, .75, 3), (100, .1, .9, 7), (8, .5, 1., 100), (3, 0, .01, 1),
                                              (21, 0, 1., 21/4)])
def test_cut_steps(n, start_, end, gap):
    t = cut_steps(n, start_, end, gap)
    assert t == sorted(set(t)) and t[-1] == max(1, round(end*n)) and t[0] > round(start_*n)
    assert all(b-a <= gap+1 for a,b in zip([round(start_*n), *t], t))

@pytest.mark.parametrize('kw,steps', [(dict(), [4, 8, 12]), (dict(every=5), [5, 10, 12]),
                                      (dict(per_epoch=2), [2, 4, 6, 8, 10, 12]),
                                      (dict(start=.25, end=1., initial=.1), [4, 8, 12, 16])])
def test_when(kw, steps):
    cb = PruneCallback('magnitude', .6, **kw); fit(start(), 4, cbs=cb)
    assert [t for t,_ in cb.history] == steps
    want = [kw['initial']] if 'initial' in kw else []
    want += sparsities(.6, len(steps)-len(want), 'cubic', kw.get('initial', 0.))
    assert [s for _,s in cb.history] == pytest.approx(want, abs=2e-3)

# what is cut

def test_every_cut_is_the_one_made_by_hand():
    "Score, allocate, zero, at the same steps in a plain loop of torch's."
    cb, learn = PruneCallback('magnitude', .7, every=3, end=1., scope='layer'), start(net())
    fit(learn, 2, schedule='flat', cbs=cb)
    model, ref = net(), start(net()); seen = []
    class See(Callback):
        def before_batch(self): self.training and seen.append((self.xb[0], self.yb[0]))
    fit(ref, 2, schedule='flat', cbs=See())
    opt, mask, (todo, n) = torch.optim.SGD(model.parameters(), .05, momentum=.9), None, ([3, 6, 8], 3)
    for t,(x, y) in enumerate(seen, 1):
        loss = nn.functional.cross_entropy(model(x), y); opt.zero_grad(); loss.backward(); opt.step()
        if mask: apply(model, mask)
        if t in todo:
            s = sparsities(.7, n)[todo.index(t)]; new = allocate(methods()['magnitude'](model, None), s, scope='layer')
            mask = new if mask is None else new & mask; apply(model, mask)
    assert all(torch.equal(cb.mask[k], mask[k]) for k in mask)
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(model.parameters(), learn.model.parameters()))

def test_scores_that_do_not_change_end_where_one_cut_would():
    fixed = Scores({'0': torch.arange(8.)**2, '4': 10.+torch.arange(12.)}, 'channel')
    @method('fixed', unit='channel', paper='none')
    def f(model, dls=None, *, graph=None, seed=0, progress=False):
        "Fixed scores."
        fixed.graph = graph; return fixed
    try:
        cb = PruneCallback('fixed', .5, every=1); fit(start(), 2, cbs=cb); one = allocate(fixed, .5)
        assert len(cb.history) == 6 and all(torch.equal(cb.mask[k], one[k]) for k in one)
    finally: _registry.pop('fixed')

KINDS = [('magnitude', dict()), ('magnitude', dict(unit='channel', norm='l2')), ('taylor', dict(n_per_class=4)),
         ('snip', dict(scope='layer', n_per_class=4)), ('fpgm', {}), ('slimming', {}), ('random', {}),
         ('mint', dict(n_groups=(4, 4), n_per_class=4)), ('wanda', {}), ('lamp', {}), ('thinet', dict(n=64)),
         ('sipp', {}), ('movement', {}), ('obd', dict(n=64))]

@pytest.mark.parametrize('name,args', KINDS)
def test_by_the_name_of_any_method(name, args):
    "Zeros are held, the mask only tightens, and the same seed gives the same."
    states = []
    for _ in range(2):
        seen = []
        class Seen(PruneCallback):
            def cut(self, *a): super().cut(*a); seen.append({k:v.clone() for k,v in self.mask.items()})
        learn, cb = start(), Seen(name, .5, seed=3, end=.5, **args)
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); fit(learn, 4, cbs=cb)
        assert alive(learn, cb) == 0 and len(seen) == 2 and held(learn)
        assert cb.mask.sparsity == pytest.approx(.5, abs=.1)
        assert all((b[k] <= a[k]).all() for a,b in zip(seen, seen[1:]) for k in a)
        states.append(learn.model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k,v in states[0].items())

def test_the_fit_does_not_notice():
    "Cuts that remove nothing change nothing: order, dropout and momentum are those of a fit without."
    def dropped():
        m = net(); m.insert(2, nn.Dropout(.3)); return m
    one, two = start(dropped()), start(dropped())
    fit(one, 2); fit(two, 2, cbs=PruneCallback('taylor', 0., every=1, n_per_class=4))
    assert all(map(torch.equal, one.model.parameters(), two.model.parameters()))

def test_what_went_before_stays_gone():
    learn = start(net()); first = allocate(methods()['random'](learn.model, None), .3); hold(learn, first)
    cb = PruneCallback('magnitude', .6); fit(learn, 2, cbs=cb)
    assert all(not cb.mask[k][~first[k]].any() for k in first) and cb.mask.sparsity == pytest.approx(.6, abs=.01)

# fits of every kind

@pytest.mark.filterwarnings('ignore:CUDA is not available')
@pytest.mark.parametrize('f,args', [('fit', (3,)), ('fit_one_cycle', (3, 1e-2)), ('fit_flat_cos', (3,)),
                                    ('fine_tune', (3,))])
@pytest.mark.parametrize('shrink', [False, True, 'each'])
def test_in_fastais_own_learner(f, args, shrink):
    learn = plain(splitter=lambda m: [list(m[:8].parameters()), list(m[8:].parameters())])
    cb = PruneCallback('magnitude', .5, unit='channel', shrink=shrink)
    quiet(learn, f, *args, cbs=[cb, GradientClip(1.)])
    assert cb.mask.sparsity == .5 and len(cb.history) == 3 and not learn.opt.frozen_idx
    if not shrink: assert alive(learn, cb) == 0
    else:
        widths = [len(m.weight) for m in layers(learn.model).values()]
        assert sum(widths) == 20, 'half of 20 channels, and the output'
        assert {p for g in learn.opt.param_lists for p in g} == set(learn.model.parameters()) or shrink is True
    before = learn.model[0].weight.clone(); quiet(learn, 'fit', 1, 1e-2)
    assert not torch.equal(before, learn.model[0].weight) and (shrink or alive(learn, cb) == 0)

@pytest.mark.filterwarnings('ignore:CUDA is not available')
@pytest.mark.parametrize('shrink', [False, 'each'])
@pytest.mark.parametrize('cb', [lambda: Bf16('bf16'), lambda: GradientAccumulation(64), lambda: GradientClip(.1)])
def test_beside_other_callbacks(cb, shrink):
    learn, p = start(), PruneCallback('taylor', .5, n_per_class=4, shrink=shrink, every=3)
    fit(learn, 3, cbs=[cb(), p])
    assert p.mask.sparsity == .5 and not torch.is_autocast_enabled('cpu') and (shrink or alive(learn, p) == 0)

def test_hooks_do_not_see_the_cut():
    "Statistics of activations have one entry per batch, also of the network that was cut."
    learn, stats = plain(), ActivationStats()
    quiet(learn, 'fit', 2, cbs=[stats, PruneCallback('taylor', .5, n_per_class=4, shrink='each', every=2)])
    assert len(stats.stats) == 8 and len(learn.model[0].weight) < 8
    assert all(m is o for m,o in zip(stats.modules, [m for m in learn.model if list(m.parameters())]))
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_not_while_a_rate_is_looked_for():
    learn, cb = plain(), PruneCallback('magnitude', .5); learn.add_cb(cb)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=5)
    assert cb.mask is None
    learn.get_preds(); quiet(learn, 'fit', 2); assert cb.mask.sparsity == pytest.approx(.5, abs=.01)

def test_frozen_fits_are_passed_over():
    learn = plain(splitter=lambda m: [list(m[:8].parameters()), list(m[8:].parameters())])
    cb = PruneCallback('magnitude', .5); learn.add_cb(cb); learn.freeze(); quiet(learn, 'fit', 2)
    assert cb.mask is None
    learn.unfreeze(); quiet(learn, 'fit', 2); assert cb.mask.sparsity == pytest.approx(.5, abs=.01)

# fits that end early

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_interrupted(error):
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.train_iter == 9: raise error('stop')
    learn, cb = start(net()), PruneCallback('magnitude', .8); learn.add_cb(cb)
    with pytest.raises(error): fit(learn, 4, cbs=Stop())
    assert len(cb.history) == 2 and alive(learn, cb) == 0 and held(learn)
    fit(learn, 4)
    assert cb.mask.sparsity == pytest.approx(.8, abs=.01) and alive(learn, cb) == 0 and len(cb.history) == 5

@pytest.mark.parametrize('shrink', [False, True])
def test_stopped_early(shrink):
    learn, cb = start(), PruneCallback('magnitude', .5, unit='channel', shrink=shrink)
    with pytest.warns(UserWarning, match='before sparsity=0.5 was reached'):
        fit(learn, 8, cbs=[cb, EarlyStoppingCallback('valid_loss', patience=1, min_delta=1e9)])
    assert len(cb.history) == 2 and alive(learn, cb) == 0 and len(learn.model[0].weight) == 8
    fit(learn, 4, cbs=cb); assert cb.mask.sparsity == .5
    assert (len(learn.model[0].weight) < 8) == shrink

def test_the_best_weights_do_not_bring_anything_back(tmp_path):
    learn = plain(); learn.path = tmp_path; cb = PruneCallback('magnitude', .8)
    quiet(learn, 'fit', 3, cbs=[cb, SaveModelCallback('valid_loss')]); assert alive(learn, cb) == 0
    with pytest.raises(ValueError, match='SaveModelCallback'):
        cb = PruneCallback('magnitude', .5, unit='channel', shrink='each')
        quiet(plain(), 'fit', 2, cbs=[SaveModelCallback(), cb])

def test_a_callback_is_for_one_schedule():
    learn, cb = start(), PruneCallback('magnitude', .5); fit(learn, 2, cbs=cb); mask = cb.mask
    fit(learn, 2, cbs=cb); assert cb.mask is mask and alive(learn, cb) == 0
    cb = PruneCallback('magnitude', .5)
    stop = EarlyStoppingCallback('valid_loss', patience=0, min_delta=1e9)
    with pytest.warns(UserWarning): fit(learn, 4, cbs=[cb, stop])
    with pytest.raises(ValueError, match='another learner'): fit(start(), 2, cbs=cb)

# physical cuts

def test_cut_and_masked_are_the_same_training():
    "Without batch norm a network that is cut trains like one whose channels are held at zero."
    a, b = start(net()), start(net())
    one, two = (PruneCallback('magnitude', .6, unit='channel', every=3, shrink=o) for o in ('each', False))
    fit(a, 4, cbs=one); fit(b, 4, cbs=two)
    assert all(torch.equal(one.mask[k], two.mask[k]) for k in one.mask)
    assert difference(a.model, b.model, X) < 1e-5 and len(a.model[1].weight) == 7

@pytest.mark.parametrize('own', [False, True])
def test_momentum_and_rates_are_carried_over(own):
    "Of torch's optimiser in fastai's wrapper, and of fastai's own."
    learn = plain() if own else start(opt='adam', lr=1e-3); key = 'grad_avg' if own else 'exp_avg'
    slots = lambda: (learn.opt if own else learn.opt.opt).state; seen = []
    class See(PruneCallback):
        def cut(self, *a):
            now = lambda: (slots()[self.learn.model[4].weight][key].clone(), [dict(h) for h in self.learn.opt.hypers])
            old = now(); super().cut(*a); seen.append((old, now(), [self.mask[k] for k in '04']))
    cb = See('magnitude', .5, unit='channel', shrink='each')
    quiet(learn, 'fit', 2, 3e-3, wd=.02, cbs=cb) if own else fit(learn, 2, cbs=cb)
    (old, hypers), (new, now), (rows, cols) = seen[0]
    assert torch.equal(old[cols][:, rows], new) and hypers == now and len(new) < len(old)

def test_rank_of_shrink_and_report(tmp_path):
    "The zeros leave at the end; the record says what was asked and what is left."
    learn, cb = start(), PruneCallback('fpgm', .5, shrink=True, per_epoch=2); fit(learn, 3, cbs=cb)
    r = cb.report(latency=False); r.save(tmp_path/'r.json'); back = Report.load(tmp_path/'r.json')
    n = sum(p.numel() for p in learn.model.parameters())
    assert r.params_after == n < r.params_before and r.units_removed == .5 and r.tuned.n == 128 and r.method == 'fpgm'
    assert back.extra['schedule'] == 'cubic' and len(back.extra['cuts']) == len(cb.history)
    with pytest.raises(ValueError, match='nothing has been cut'): PruneCallback('fpgm', .5).report()

def test_a_cut_computes_what_its_mask_says():
    "The network right after each cut is the one before it, masked."
    seen = []
    class See(PruneCallback):
        def cut(self, *a):
            old, before = copy.deepcopy(self.learn.model), self.mask
            super().cut(*a)
            if before is None: seen.append(difference(apply(old, self.mask), self.learn.model, X[:16]))
    learn = start(); fit(learn, 2, cbs=See('taylor', .5, n_per_class=4, shrink='each', end=1.))
    assert len(seen) == 1 and seen[0] < 1e-5 and sum(len(m.weight) for m in layers(learn.model).values()) == 20

# wrong from the start

@pytest.mark.parametrize('cb,match', [(lambda: PruneCallback('slimming', .5), 'batch norm'),
                                      (lambda: PruneCallback('mag_increase', .5), 'init'),
                                      (lambda: PruneCallback('taylor', .5, n_per_class=1000), 'n_per_class')])
def test_what_cannot_work_is_said_before_the_first_step(cb, match):
    learn = Learner(get_dls('digits', bs=32, n_train=128), net(), loss_func=CrossEntropyLossFlat()); seen = []
    class See(Callback):
        def before_batch(self): seen.append(1)
    with pytest.raises(ValueError, match=match): quiet(learn, 'fit', 1, cbs=[See(), cb()])
    assert not seen and learn.model[1].weight.all()
