"""The energy search while training: what rests, the lock, interruptions, resuming, and the methods made of it."""
import copy, io, math, pickle, pytest, torch
from functools import partial
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.callback.schedule import lr_find
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.learner import vision_learner
from neuronprune import core, energy_search as S
from neuronprune.core import generator, methods
from neuronprune.data import get_dls
from neuronprune.energy import ce, energy_of
from neuronprune.energy_search import EnergyCallback, recalibrate
from neuronprune.evaluation import evaluate
from neuronprune.masks import Mask
from neuronprune.pipeline import prune
from neuronprune.retrain import held, hold
from neuronprune.scoring import weights_at
from neuronprune.surgery import apply
from neuronprune.train import as_learner, fit, learner

def net(c=6, seed=0):
    with core.seed_everything(seed):
        return nn.Sequential(nn.Conv2d(1, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2),
                             nn.Conv2d(c, 2*c, 3, padding=1), nn.BatchNorm2d(2*c), nn.ReLU(), nn.MaxPool2d(2),
                             nn.Flatten(), nn.Linear(8*c, 10))

def data(n=90, seed=0):
    x = torch.rand(n, 1, 8, 8, generator=generator(seed)); w = torch.randn(64, 10, generator=generator(9))
    return x, ((x.flatten(1)-.5) @ w).argmax(1)

def loaders(n=90, bs=32): # a last batch of 26
    return [DataLoader(TensorDataset(*data(m, s)), batch_size=bs, shuffle=not s) for s,m in enumerate((n, 40))]

def start(opt='sgd', **kw): return as_learner(net(), *loaders(), opt=opt, lr=kw.pop('lr', .05), **kw)
def state(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return set(a) == set(b) and all(torch.equal(v, b[k]) for k,v in a.items())
def clean(model):
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return not hooks and 'forward' not in vars(model) and not torch.overrides._get_current_function_mode_stack()

class Watch(Callback):
    "Before and after every step of the optimiser: the parameters, and which entries rest."
    order = 200
    def before_fit(self): self.rows, self.sizes, self.inside = [], [], []
    def after_pred(self):
        if not self.training: return
        self.sizes.append(len(self.yb[0])); e = self.learn.energy
        with torch.no_grad(): self.old = [p.detach().clone() for p in self.model.parameters()]
        rest = {id(p):v for p,v in e.resting}
        self.rest = [~rest[id(p)].expand_as(p) if id(p) in rest else torch.zeros_like(p).bool()
                     for p in self.model.parameters()]
    def after_batch(self):
        if not self.training: return
        self.rows.append([((a == b) | ~r).all() and not (a[~r] == b[~r]).all()
                          for a,b,r in zip(self.old, self.model.parameters(), self.rest)])
        self.inside.append(sum(int(r.sum()) for r in self.rest))

# 8. what rests does not move

@pytest.mark.parametrize('opt,kw', [('sgd', dict(wd=.1, lr=.05)), ('adam', dict(wd=.1, lr=.01)),
                                    ('adamw', dict(wd=.5, lr=.01)), ('adadelta', dict(wd=.01, lr=1.))])
def test_what_rests_is_bitwise_unchanged(opt, kw):
    learn = start(opt, **kw); fit(learn, 1) # momentum of all weights
    watch, cb = Watch(), EnergyCallback(lock_epoch=99, seed=1)
    fit(learn, 2, cbs=[cb, watch])
    assert len(watch.rows) == 6 and all(all(r) for r in watch.rows) and min(watch.inside) > 0
    assert watch.sizes[2] == 26 == watch.sizes[5], 'the short last batch is used'

@pytest.mark.parametrize('opt', ['sgd', 'adamw', 'adadelta'])
def test_after_the_lock_what_is_left_goes_on_moving(opt):
    "In the released program every step after the lock starts from the same old copy."
    learn, far = start(opt, wd=.01, lr=1. if opt == 'adadelta' else .01), []
    class Far(Callback):
        def after_epoch(self): far.append(state(self.model))
    cb = EnergyCallback(lock_epoch=1, seed=2); fit(learn, 5, cbs=[cb, Far()], schedule='flat')
    keep = cb.bits.keeps(cb.best); w = [o['4.weight'] for o in far]
    assert cb.reason == 'epoch' and all((o[~keep['4']] == 0).all() for o in w[1:])
    apart = [(o-w[1]).norm() for o in w[2:]]
    assert all((a[keep['4']] != b[keep['4']]).any() for a,b in zip(w, w[1:])) and apart[-1] > apart[0]
    assert set(held(learn)) and (held(learn)['4.weight'].flatten(1).any(1) == keep['4']).all()
    assert far[1]['1.num_batches_tracked'] > 0

def test_gradients_that_pile_up_move_nothing_that_rests():
    learn, watch = start(wd=.1), Watch()
    fit(learn, 2, cbs=[EnergyCallback(lock_epoch=9, seed=1), watch, GradientAccumulation(64)])
    stepped = [any(bool(o) for o in r) for r in watch.rows]
    assert any(stepped) and not all(stepped)

def test_a_shared_weight_is_read_by_whoever_reads_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.c = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.out = nn.Linear(8, 10); self.c.weight = self.b.weight
        def forward(self, x): return self.out(self.c(self.b(self.a(x.flatten(1)).relu()).relu()).relu())
    with core.seed_everything(0): model = Twice()
    cb = EnergyCallback(lock_epoch=9, tied=False); cb.begin(model, data()[0])
    rest = S._resting(model, cb.bits, torch.zeros(cb.bits.D).bool())
    assert not any(p is model.b.weight for p,_ in rest) and any(p is model.a.weight for p,_ in rest)

# 3. validation, scoring: no trace

def test_validation_is_of_the_best_and_changes_nothing():
    learn, cb = start(), EnergyCallback(lock_epoch=9, seed=1); learn.add_cb(cb); fit(learn, 1)
    before, sub = state(learn.model), copy.deepcopy(learn.model)
    got = learn.validate()
    want = evaluate(apply(sub, cb.mask), learn.dls.valid)
    assert same(before, state(learn.model)) and clean(learn.model)
    assert abs(got[0]-want.loss) < 1e-5 and abs(got[1]-want.accuracy) < 1e-6
    learn.get_preds(dl=learn.dls.valid); assert same(before, state(learn.model))

def test_batch_norm_counts_the_training_batches_and_no_others():
    learn = start(); fit(learn, 2, cbs=[EnergyCallback(lock_epoch=9, stop=True)])
    assert learn.model[1].num_batches_tracked == 6

def test_every_and_frac():
    learn, cb = start(), EnergyCallback(every=2, frac=.5, lock_epoch=9); seen = []
    real = cb.score; cb.score = lambda s, b: seen.append(len(cb.scorer.part(b[0][0]))) or real(s, b)
    fit(learn, 2, cbs=[cb])
    assert seen == [16, 13, 16] and cb.n_batches == 6 and cb.search.generation == 3

def test_energies_are_means_over_the_last_batches_of_the_epoch():
    "Against masked copies of the network, batch by batch."
    learn, cb = start(), EnergyCallback(batches=2, backend='loop', lock_epoch=9, empty=True); seen, fed = [], []
    class Fed(Callback):
        order = 1
        def before_batch(self): self.training and fed.append(self.xb[0])
    def score(states, batches):
        e = real(states, batches); nets = [copy.deepcopy(learn.model).train() for _ in states]
        for one,s in zip(nets, states): apply(one, cb.bits.mask(s))
        by = []
        for x,(y,) in batches:
            with torch.no_grad(): z = torch.stack([copy.deepcopy(one)(x) for one in nets])
            own = z[:, torch.arange(len(y)), y]
            by.append((z.scatter(2, y.expand(len(z), -1)[..., None], -math.inf).amax(2) - own).mean(1))
        assert torch.allclose(e, sum(by)/len(by), atol=1e-5)
        seen.append([x for x,_ in batches]); return e
    real = cb.score; cb.score = score
    fit(learn, 2, cbs=[cb, Fed()])
    assert [len(b) for b in seen] == [1, 2, 2, 1, 2, 2] and not cb.recent
    for i,b in enumerate(seen): assert all(torch.equal(x, o) for x,o in zip(b, fed[i+1-len(b):i+1]))

def test_one_batch_is_what_it_was():
    def old(self, states, batches):
        e = energy_of(self.scorer(states, batches[-1][0]), self.scorer.part(self.yb[0]), self.energy)
        return torch.where(S._emptied(self.bits, states, None), torch.inf, e)
    a, b = start(), start(); one, two = EnergyCallback(), EnergyCallback(); two.score = partial(old, two)
    for learn,cb in ((a, one), (b, two)): fit(learn, 2, cbs=[cb])
    assert one.curve() == two.curve() and same(state(a.model), state(b.model))

# 10. the lock

def scripted(energies, **kw):
    "A fit whose best energies are these."
    learn, todo = start(), iter(energies); cb = EnergyCallback(rescore='stale', min_diversity=0., **kw)
    cb.score = lambda s, batches: torch.full((len(s),), float(next(todo)))
    fit(learn, 6, cbs=[cb]); return cb

def test_patience_locks_and_a_repetition_does_not():
    falls = [20, 19, 18, 18, 17, 16, 16, *range(15, 0, -1)]
    assert scripted(falls, patience=3, min_steps=0, lock_epoch=99).reason is None
    still = scripted([5.]*20, patience=4, min_steps=0, lock_epoch=99)
    assert still.reason == 'patience' and still.search.generation == 5 and still.n_batches == 18
    assert scripted([5.]*20, patience=4, min_steps=9, lock_epoch=99).search.generation == 9
    assert scripted([5.]*20, patience=4).reason == 'epoch', 'half of the fit'

def test_collapse_locks():
    learn, cb = start(), EnergyCallback(op='de_xor', p_min=0., min_diversity=.9, lock_epoch=99)
    fit(learn, 1, cbs=[cb]); assert cb.reason == 'collapse' and cb.search.generation == 1

def test_stop_ends_the_fit_and_leaves_the_weights():
    learn, cb = start(), EnergyCallback(lock_epoch=1, stop=True); fit(learn, 4, cbs=[cb])
    assert len(learn.history) == 1 and not held(learn) and (learn.model[4].weight != 0).all()

def test_what_was_pruned_before_stays_pruned():
    learn = start(); prune(learn, 'magnitude', .3, unit='weight', fine_tune_epochs=0, latency=False)
    gone = {k:~v for k,v in held(learn).items()}; fit(learn, 2, cbs=[EnergyCallback(lock_epoch=1)])
    for k,v in gone.items(): assert not learn.model.get_parameter(k)[v].any() and not held(learn)[k][v].any()

# 12. resume

@pytest.mark.parametrize('kw', [{}, dict(energy='ising', ising=dict(kl_every=2)), dict(energy='ce', sparsity=.5),
                                dict(batches=3, every=2)])
def test_resumed_is_uninterrupted(kw):
    def run(learn, cb, epochs):
        for e in epochs: fit(learn, 1, schedule='flat', seed=e, cbs=[cb])
    whole, cb = start('adam', lr=.01), EnergyCallback(lock_epoch=3, **kw); run(whole, cb, range(5))
    half, c1 = start('adam', lr=.01), EnergyCallback(lock_epoch=3, **kw)
    for cut in (2, 4):
        half, c1 = start('adam', lr=.01), EnergyCallback(lock_epoch=3, **kw); run(half, c1, range(cut))
        saved = pickle.loads(pickle.dumps(c1.state_dict()))
        other, c2 = start('adam', lr=.01), EnergyCallback(lock_epoch=3, seed=5, **kw); c2.load_state_dict(saved)
        other.model.load_state_dict(half.model.state_dict()); other.create_opt()
        other.opt.load_state_dict(copy.deepcopy(half.opt.state_dict()))
        if held(half): hold(other, held(half))
        run(other, c2, range(cut, 5))
        assert c2.curve() == cb.curve() and c2.reason == cb.reason == 'epoch'
        assert same(state(whole.model), state(other.model))

# interruptions

class Break(Callback):
    def __init__(self, event, exc, at=4): self.event, self.exc, self.at, self.n = event, exc, at, 0
    order = 500
    def __call__(self, event):
        if event == self.event and self.training:
            self.n += 1
            if self.n == self.at: raise self.exc

@pytest.mark.parametrize('event', ['after_pred', 'before_backward', 'before_step', 'after_step', 'after_batch'])
@pytest.mark.parametrize('exc', [KeyboardInterrupt, CancelFitException, ValueError('x')])
def test_an_interruption_leaves_the_learner_clean(event, exc):
    learn, cb, ref = start(wd=.1), EnergyCallback(lock_epoch=9, seed=1), []
    class Keep(Callback):
        order = 90
        def after_pred(self):
            self.learn.before = [p.detach().clone() for p in self.model.parameters()]
            self.learn.rest = {id(p):v for p,v in cb.resting}
    try: fit(learn, 3, cbs=[cb, Keep(), Break(event, exc)])
    except (KeyboardInterrupt, ValueError): pass
    assert clean(learn.model) and not held(learn) and cb.search.generation == 4
    for p,old in zip(learn.model.parameters(), learn.before):
        if id(p) not in learn.rest: continue
        rest = ~learn.rest[id(p)].expand_as(p); assert torch.equal(p[rest], old[rest])
    assert isinstance(cb.mask, Mask) and cb.reason is None
    fit(learn, 1); fit(learn, 1, cbs=[cb]); assert cb.search.generation > 4

def test_interrupted_in_the_optimiser():
    learn, cb = start(wd=.1), EnergyCallback(lock_epoch=9, seed=1); fit(learn, 1, cbs=[cb])
    before, real = state(learn.model), learn.opt.opt.step
    def broken(*a, **k): raise KeyboardInterrupt
    learn.opt.opt.step = broken
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[cb])
    after = state(learn.model); assert clean(learn.model)
    assert all(torch.equal(v, after[k]) for k,v in before.items() if 'running' not in k and 'num' not in k)

def test_interrupted_while_scoring():
    learn, cb = start(), EnergyCallback(lock_epoch=9); fit(learn, 1, cbs=[cb]); n = cb.search.generation
    before = cb.search.state_dict(); cb.score = lambda s, xb: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[cb])
    assert cb.search.generation == n and torch.equal(cb.search.states, before['states']) and clean(learn.model)

def test_an_error_of_the_model_keeps_its_message():
    class Bad(Exception): pass
    learn = start(); learn.loss_func = lambda *a: (_ for _ in ()).throw(Bad()) if learn.__dict__.get('go') else (
        nn.functional.cross_entropy(*a))
    fit(learn, 1); learn.go = True
    with pytest.raises(Bad): fit(learn, 1, cbs=[EnergyCallback()])

def test_export_and_copies_hold_no_hooks(tmp_path):
    learn, cb = start(), EnergyCallback(lock_epoch=9); learn.add_cb(cb); fit(learn, 1)
    twin = copy.deepcopy(learn); assert clean(twin.model) and twin.energy.search.generation == cb.search.generation
    learn.path = tmp_path; learn.export('x.pkl'); assert clean(learn.model)
    buf = io.BytesIO(); torch.save(cb.state_dict(), buf)
    fit(learn, 1); assert cb.search.generation == 6

def test_the_learning_rate_finder_does_not_search():
    learn, cb = start(), EnergyCallback(); learn.add_cb(cb)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert cb.search is None

# batch norm

def test_recalibrated_is_the_mean_over_batches():
    learn = start(); fit(learn, 1); m, before = learn.model, state(learn.model)
    order = [g.get_state() for dl in learn.dls.loaders for g in vars(dl).values() if isinstance(g, torch.Generator)]
    rng = torch.get_rng_state(); modes = [o.training for o in m.modules()]
    recalibrate(learn, 2); after = state(m)
    assert torch.equal(rng, torch.get_rng_state()) and modes == [o.training for o in m.modules()]
    assert {k for k in before if not torch.equal(before[k], after[k])} == {
        f'{i}.{k}' for i in (1, 5) for k in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert m[1].num_batches_tracked == 2 and m[1].momentum == .1
    assert recalibrate(as_learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), *loaders())) is not None
    with pytest.raises(ValueError, match='n_batches=0'): recalibrate(learn, 0)

def test_statistics_are_anew_between_the_lock_and_the_next_validation(monkeypatch):
    seen, real = [], S.recalibrate
    monkeypatch.setattr(S, 'recalibrate', lambda learn: (seen.append((learn.energy.reason, learn.epoch)), real(learn)))
    learn = start(); fit(learn, 3, cbs=EnergyCallback(lock_epoch=1))
    assert len(seen) == 1 and seen[0][0] == 'epoch' and seen[0][1] <= 1

# other callbacks of fastai

class Bf16(MixedPrecision):
    "fastai's, which has the GPU in mind, on the CPU."
    def before_fit(self): super().before_fit(); self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.filterwarnings('ignore:CUDA is not available')
def test_mixed_precision():
    learn, watch, cb, seen = start(wd=.1), Watch(), EnergyCallback(lock_epoch=2, seed=1), []
    cb.energy = lambda z, y: seen.append((z.dtype, torch.is_autocast_enabled('cpu'))) or ce(z, y)
    fit(learn, 3, cbs=[cb, watch, Bf16('bf16')])
    assert set(seen) == {(torch.float32, True)}, 'scored as the network is trained, energies of single precision'
    assert cb.search.energies.dtype == torch.float32 and cb.reason == 'epoch'
    assert all(all(r) for r in watch.rows[:6]) and not torch.is_autocast_enabled('cpu') and clean(learn.model)

@pytest.mark.filterwarnings('ignore:CUDA is not available')
@pytest.mark.parametrize('why', ['patience', 'error'])
def test_mixed_precision_ends_with_the_fit(why):
    learn, cb = start(), EnergyCallback(lambda z, y: z.mean((1, 2))*0, stop=True, patience=1, min_steps=0)
    if why == 'error': cb.energy = lambda z, y: z.mean((1, 2))*math.nan
    try: fit(learn, 2, cbs=[cb, Bf16('bf16')])
    except ValueError as e: assert why == 'error' and 'all 8 are NaN' in str(e)
    assert cb.reason == (None if why == 'error' else why) and not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('mix,energy', [(MixUp, 'margin'), (CutMix, 'ce')])
def test_mixed_images(mix, energy):
    "Images are mixed before states see them; the label is that of the larger share."
    learn, watch, cb, seen = start(wd=.1), Watch(), EnergyCallback(energy, lock_epoch=2, seed=1), []
    learn.loss_func = CrossEntropyLossFlat()
    class See(Callback):
        order = 100
        def after_pred(self):
            if self.training: seen.append((self.xb[0], self.yb[0]))
    score = cb.score; cb.score = lambda states, batches: seen.append(batches[0]) or score(states, batches)
    fit(learn, 3, cbs=[cb, watch, mix(1.), See()])
    assert torch.equal(seen[0][0], seen[1][0]) and not seen[1][1].is_floating_point()
    assert all(all(r) for r in watch.rows[:6]) and isinstance(learn.loss_func, CrossEntropyLossFlat)
    assert cb.reason == 'epoch' and clean(learn.model)

def test_soft_labels():
    "Shares of the classes go with 'ce'; what the margin says to them is further below."
    x, y = data(); hot = torch.eye(10)[y]*.9 + .01
    dls = [DataLoader(TensorDataset(x, hot), batch_size=32)]*2
    learn = as_learner(net(), *dls, opt='sgd', lr=.05); learn.loss_func, learn.metrics = nn.CrossEntropyLoss(), []
    cb = EnergyCallback('ce', lock_epoch=1); learn.fit(2, cbs=cb)
    assert cb.reason == 'epoch' and clean(learn.model)

# other learners

def test_a_learner_of_fastai_and_its_vision_learner(tmp_path):
    dls = get_dls('digits', bs=128, n_train=300)
    def arch(pretrained=False):
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *net(4)[1:8], nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(8, 10))
    plain = Learner(dls, net(4), CrossEntropyLossFlat())
    make = lambda: vision_learner(dls, arch, n_out=10, pretrained=False, n_in=1, normalize=False,
                                  loss_func=CrossEntropyLossFlat(), lin_ftrs=[8])
    vis = make()
    for learn in (plain, vis):
        cb = EnergyCallback(lock_epoch=1, seed=0)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[cb])
        assert cb.reason == 'epoch' and clean(learn.model) and held(learn)
    with vis.no_bar(), vis.no_logging():
        vis = make()
        res = prune(vis, 'edropout', .5, epochs=1, fine_tune_epochs=1, latency=False)
    assert res.mask.sparsity == .5 and clean(vis.model)

# the methods

@pytest.mark.parametrize('name', ['edropout', 'ising'])
@pytest.mark.parametrize('kw', [dict(sparsity=.5), dict(sparsity=.3, shrink=True), dict(sizes=[.5, .3])])
def test_the_mask_has_the_size_asked_for(name, kw):
    model = net(8); res = prune(model, name, **kw, dls=loaders(), epochs=1, fine_tune_epochs=1, latency=False, seed=1)
    if 'sizes' in kw:
        like = prune(net(8), 'magnitude', **kw, dls=loaders(), unit='channel', fine_tune_epochs=0, latency=False).rows
        assert all(abs(a-b) < 130 for a,b in zip(res.rows.params_stored, like.params_stored)), 'within two channels'
    else: assert sum(int(v.sum()) for v in res.mask.values()) == core.kappa(24, kw['sparsity'])
    assert res.found.status == 'optimal' and res.found.evaluations == 8+2*9
    assert methods()[name].trains and res.found.curve[-1]['generation'] == 2

@pytest.mark.parametrize('name', ['edropout', 'ising'])
def test_a_threshold_takes_the_state_as_it_is(name, monkeypatch):
    import neuronprune.energy_methods as M
    seen, real = [], M._found
    monkeypatch.setattr(M, '_found', lambda task, cb, *a: seen.append(cb) or real(task, cb, *a))
    res = prune(net(8), name, threshold=.5, dls=loaders(), epochs=1, fine_tune_epochs=0, latency=False)
    keep = seen[-1].bits.keeps(seen[-1].best)
    assert seen[-1].search.sparsity is None and all(torch.equal(v, keep[k]) for k,v in res.mask.items())

def test_the_weights_of_the_search_are_kept():
    learn = start(); fit(learn, 1); old = state(learn.model)
    for at in ('trained', 'init'):
        l = start(); l.model.load_state_dict(old); l.rewind.vouch()
        res = prune(l, 'edropout', .5, at=at, epochs=1, fine_tune_epochs=0, latency=False)
        w, keep = l.model[4].weight, res.mask['4']
        assert (w[keep] != old['4.weight'][keep]).any() and (w[keep] != l.rewind.states[0]['4.weight'][keep]).any()
        assert len(l.history) == 1 and l.n_fits == 2
    with weights_at(learn, 'init'): assert torch.equal(learn.model[4].weight, learn.rewind.init['4.weight'])
    assert torch.equal(learn.model[4].weight, old['4.weight'])

class Stop(Exception): pass

@pytest.mark.parametrize('name,epochs,shrink', [('edropout', [0, 'end'], False), ('ising', [1], 'each')])
def test_a_folder_goes_on_bit_for_bit(tmp_path, name, epochs, shrink, monkeypatch):
    import neuronprune.energy_methods as E, neuronprune.search_training as M
    def run(folder):
        return prune(start('adam', lr=.01), name, .5, epochs=3, fine_tune_epochs=1, latency=False, shrink=shrink,
                     folder=tmp_path/str(folder))
    whole = run('whole'); real = M.fit
    for epoch in epochs:
        def broken(learn, *a, **kw):
            if kw['cbs'][0].epochs == epoch: kw['cbs'] = [*kw['cbs'], Break('after_step', KeyboardInterrupt, 2)]
            return real(learn, *a, **kw)
        with monkeypatch.context() as m:
            if epoch == 'end': m.setattr(E, 'recalibrate', lambda learn: (_ for _ in ()).throw(KeyboardInterrupt()))
            else: m.setattr(M, 'fit', broken)
            with pytest.raises(KeyboardInterrupt): run(epoch)
        again = run(epoch)
        assert same(state(whole.model), state(again.model)) and whole.found.curve == again.found.curve
        assert all(torch.equal(v, again.mask[k]) for k,v in whole.mask.items())
        assert [{k:v for k,v in r.items() if k != 'secs'} for r in whole.history] == again.history

def test_an_interruption_without_a_folder_keeps_the_best(monkeypatch):
    import neuronprune.search_training as M
    real = M.fit
    monkeypatch.setattr(M, 'fit', lambda l, *a, **kw: real(
        l, *a, **{**kw, 'cbs': [*kw['cbs'], Break('after_step', KeyboardInterrupt, 2)]}))
    with pytest.warns(UserWarning, match="status 'interrupted'"):
        res = prune(start(), 'edropout', .5, epochs=3, fine_tune_epochs=1, latency=False)
    assert res.report.status == 'interrupted' and res.mask.sparsity == .5 and res.found.evaluations == 17

def test_what_an_earlier_pruning_has_taken_stays_away():
    learn = start(); one = prune(learn, 'magnitude', .3, unit='channel', fine_tune_epochs=0, latency=False).mask
    two = prune(learn, 'edropout', .6, epochs=1, fine_tune_epochs=1, latency=False).mask
    assert all((two[k] <= one[k]).all() for k in one) and sum(int(v.sum()) for v in two.values()) == core.kappa(18, .6)
    start_ = start(); prune(start_, 'magnitude', .3, unit='channel', fine_tune_epochs=0, latency=False)
    res = prune(start_, 'edropout', .6, at='init', epochs=1, fine_tune_epochs=1, latency=False)
    assert all((res.mask[k] <= one[k]).all() for k in one)

def test_layers_without_bits_are_kept():
    res = prune(start(), 'edropout', .3, exclude='0', epochs=1, fine_tune_epochs=0, latency=False)
    assert res.mask['0'].all() and sum(int(v.sum()) for v in res.mask.values()) == core.kappa(18, .3)

def test_same_seed_same_bytes():
    a, b, c = (prune(start(), 'edropout', .5, epochs=1, fine_tune_epochs=1, latency=False, seed=s) for s in (3, 3, 4))
    assert same(state(a.model), state(b.model)) and not same(state(a.model), state(c.model))

@pytest.mark.parametrize('kw,words', [
    (dict(energy='margn'), "did you mean 'margin'"), (dict(every=0), 'every=0'), (dict(frac=0.), 'frac=0'),
    (dict(flipp=.1), "did you mean 'flip'"), (dict(flip=2.), 'flip=2'), (dict(n_pop=3), 'n_pop=3'),
    (dict(p0=0.), 'p0=0'), (dict(op='xor'), "op='xor'"), (dict(lock_epoch=0), 'lock_epoch=0'),
    (dict(batches=0), 'batches=0'), (dict(energy='ising', batches=2), 'batches=2: the Ising energy'),
    (dict(patience=0), 'patience=0'), (dict(backend='slice'), "did you mean 'sliced'"), (dict(bn='none'), "bn='none'"),
    (dict(sparsity=50), 'did you mean 0.5'), (dict(ising=dict(flor=1)), "did you mean 'floor'"),
    (dict(stop=1), 'stop')])
def test_wrong_settings_are_found_at_once(kw, words):
    with pytest.raises((ValueError, TypeError)) as e: EnergyCallback(**kw)
    assert words in str(e.value), str(e.value)

@pytest.mark.parametrize('kw,words', [
    (dict(unit='weight'), "expected 'channel'"), (dict(epochs=0), 'epochs=0'),
    (dict(search_args=dict(lrr=1)), 'search_args'),
    (dict(search_args=dict(schedule='flt')), "did you mean 'flat'"), (dict(exclude='convx'), 'no such layer'),
    (dict(floor=.1), "edropout: argument='floor'"), (dict(n_pop=2), 'n_pop=2'),
    (dict(batches=1.5), 'batches=1.5')])
def test_wrong_arguments_of_the_method(kw, words):
    learn = start(); before = state(learn.model)
    with pytest.raises((ValueError, TypeError)) as e: prune(learn, 'edropout', .5, **kw)
    assert words in str(e.value), str(e.value)
    assert same(before, state(learn.model))

def test_wrong_states_and_batches():
    cb = EnergyCallback()
    with pytest.raises(ValueError, match="no 'epochs'"): cb.load_state_dict({})
    with pytest.raises(ValueError, match='not begun'): cb.plot()
    learn = start(); learn.loss_func = lambda out, y: out.sum()*0 + 1.
    learn.dls.loaders[0] = [(torch.rand(8, 1, 8, 8), torch.rand(8, 10))]
    with pytest.raises(Exception, match="soft or mixed labels go with 'ce'"):
        Learner.fit(learn, 1, cbs=[EnergyCallback()])
    with pytest.raises(ValueError, match='no unit with a bit'):
        fit(as_learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), *loaders()), 1, cbs=[EnergyCallback()])

def test_a_state_without_a_layer_is_out_unless_asked_for():
    for empty in (False, True):
        learn, cb = start(), EnergyCallback(lock_epoch=9, p0=.05, empty=empty, seed=3); fit(learn, 1, cbs=[cb])
        for e,s in zip(cb.search.energies, cb.search.states):
            gone = not (s[:6].any() and s[6:].any()); assert empty or e.isinf() == gone
