"""Training: masks hold, rewinds are exact, seeds are kept, intervals agree with SciPy, errors can be read."""
import copy, random, warnings
from functools import partial
import pytest, torch
from torch import nn
from fastai.callback.core import Callback, event
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest
from neuronprune.allocate import allocate
from neuronprune.core import layers
from neuronprune.masks import Mask, Scores
from neuronprune.graph import trace
from neuronprune.train import Rewind, fit, learner, schedule_lr
from neuronprune.evaluation import curves, evaluate, wilson
from neuronprune.retrain import (MaskCallback, fine_tune, held, hold, keep_tensors, sink,
                                 rebind, rewind_to, sign_weights)

EVENTS = [o for o in vars(event) if o.startswith(('before_', 'after_')) and o != 'after_create']

def data(n=96, seed=0, bs=16):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 4, 4, generator=g); y = (x.flatten(1)[:, :3]).argmax(1)
    mk = lambda a, b, **kw: DataLoader(list(zip(x[a:b], y[a:b])), bs=bs, **kw)
    return DataLoaders(mk(0, 2*n//3, shuffle=True), mk(2*n//3, n), device=torch.device('cpu'))

def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(),
                         nn.Linear(8, 3))

def random_mask(model, density=.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Mask({k:torch.rand(m.weight.shape, generator=g) < density for k,m in layers(model).items()}, 'weight')

def revived(model, mask): return sum(int(torch.count_nonzero(m.weight[~mask[k]])) for k,m in layers(model).items())

class Watch(MaskCallback):
    "Looks after every batch, when the real callback has done its work."
    order = 90
    def __init__(self, mask): super().__init__(mask); self.most = 0
    def before_fit(self): pass
    def after_step(self): self.most = max(self.most, revived(self.model, self.mask))
    def after_fit(self): pass

def test_batch_norms_that_never_move_are_named_once():
    frozen = net(); frozen[1].momentum = 0.
    learn = learner(frozen, data()); said = lambda w: [str(o.message) for o in w if 'momentum=0' in str(o.message)]
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        fit(learn, 1); fine_tune(learn, random_mask(frozen), 1); fit(learner(net(), data()), 1)
    assert len(said(w)) == 1 and "the batch norms '1' have momentum=0" in said(w)[0]
    assert torch.equal(frozen[1].running_mean, torch.zeros(6))

@pytest.mark.parametrize('opt,kw',
                         [('sgd', dict(momentum=.9, wd=1e-2)), ('sgd', dict(momentum=.9, nesterov=True, wd=0.)),
                          ('adamw', dict(wd=.1)), ('adam', dict(wd=1e-2)), ('rmsprop', dict(wd=0.)),
                          ('adadelta', dict(wd=1e-4))])
@pytest.mark.parametrize('dense_first', [False, True])
def test_masked_weights_stay_exactly_zero(opt, kw, dense_first):
    torch.manual_seed(0)
    learn = learner(net(), data(), opt, lr=.05 if opt == 'sgd' else None, **kw)
    if dense_first: fit(learn, 1)
    mask = random_mask(learn.model); watch = Watch(mask)
    fine_tune(learn, mask, 2, cbs=[watch])
    assert watch.most == 0 and revived(learn.model, mask) == 0
    assert all(torch.count_nonzero(m.weight[mask[k]]) for k,m in layers(learn.model).items())
    fit(learn, 1); learn.fit(1)
    assert revived(learn.model, mask) == 0
    learn.remove_cb(learn.pruned); fit(learn, 1)
    assert revived(learn.model, mask) > 0

def test_channel_mask_takes_norm_and_bias_along():
    learn = fit(learner(net(), data(), wd=1e-2), 1)
    graph = trace(learn.model, torch.randn(2, 1, 4, 4))
    mask = Mask({'0': torch.tensor([1, 0, 1, 1, 0, 1]).bool()}, 'channel', graph=graph)
    fine_tune(learn, mask, 2)
    for i in (1, 4):
        assert not learn.model[0].weight[i].any() and learn.model[0].bias[i] == 0
        assert learn.model[1].weight[i] == 0 and learn.model[1].bias[i] == 0

def test_mask_that_does_not_fit_is_refused():
    m = net()
    with pytest.raises(ValueError, match='no such parameter'): keep_tensors(m, {'9.weight': torch.ones(1).bool()})
    with pytest.raises(ValueError, match='shape'): keep_tensors(m, {'0.weight': torch.ones(1).bool()})

class Tape(Callback):
    "Writes down every event; `visitor`, if any, comes before the third batch and goes after it."
    order = 70
    def __init__(self, tape, tag, visitor=None):
        self.tape, self.tag, self.visitor = tape, tag, visitor
        for e in EVENTS: setattr(self, e, partial(self.note, e))
    def note(self, e):
        self.tape.append((self.tag, e))
        if self.visitor and self.train_iter == 2 and e == 'before_batch': self.learn.add_cb(self.visitor)
        if self.visitor and self.train_iter == 3 and e == 'after_batch':
            self.learn.remove_cb(self.visitor); self.visitor = None

def test_the_learner_calls_and_computes_what_fastais_does():
    def run(make):
        tape, dls = [], data(); torch.manual_seed(0)
        learn = make(net(), dls, Tape(tape, 'resident', Tape(tape, 'visitor')))
        torch.manual_seed(1); dls.train.rng = random.Random(1)
        with learn.no_bar(), learn.no_logging(): learn.fit(2); learn.validate()
        return tape, {k:v.clone() for k,v in learn.model.state_dict().items()}, learn.recorder.values
    opt = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, weight_decay=1e-3, foreach=True)
    tape, state, values = run(lambda m, dls, cb: learner(m, dls, 'sgd', lr=.1, wd=1e-3, cbs=cb))
    tape0, state0, values0 = run(
        lambda m, dls, cb: Learner(dls, m, CrossEntropyLossFlat(), metrics=accuracy, lr=.1, opt_func=opt, cbs=cb))
    assert tape == tape0 and len(tape) > 100 and tape.count(('visitor', 'after_step')) == 1
    assert all(torch.equal(v, state[k]) for k,v in state0.items())
    assert [list(o) for o in values] == [list(o) for o in values0]

def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

def test_same_seed_same_bytes_and_no_global_seeding():
    def run(seed, junk):
        random.seed(junk); torch.manual_seed(junk)
        learn = learner(nn.Sequential(nn.Dropout(.2), net()), data(), seed=seed)
        found = torch.get_rng_state(), random.getstate()
        fit(fit(learn, 2), 1)
        assert torch.equal(found[0], torch.get_rng_state()) and found[1] == random.getstate()
        return state(learn)
    assert same(run(3, 1), run(3, 2))
    assert not same(run(3, 1), run(4, 1))

def test_rewinding_restores_bytes_and_resets_the_optimiser():
    learn = learner(net(), data(), cbs=[Rewind(epochs=(1, 2))]); start = state(learn)
    fit(learn, 1); one = state(learn); fit(learn, 2)
    assert same(state(rewind_to(learn, 1)), one) and learn.opt is None
    fit(learn, 1); assert not same(state(learn), one)
    assert same(state(rewind_to(learn, 'init')), start)
    mask = random_mask(learn.model)
    rewind_to(learn, 'init', mask)
    assert revived(learn.model, mask) == 0
    for k,m in layers(learn.model).items(): assert torch.equal(m.weight[mask[k]], start[f'{k}.weight'][mask[k]])
    rewind_to(learn, 'none')
    with pytest.raises(ValueError, match='learner'): rewind_to(learn, 7)
    learn.validate()
    assert learn.rewind.done == 0

def test_rewinding_without_snapshot_names_learner():
    from fastai.learner import Learner
    plain = Learner(data(), net(), loss_func=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='learner'): rewind_to(plain, 'init')

def test_sign_rewind():
    m = net(); init = state(learner(m, data())); s = sign_weights(m, init)
    for k in layers(m):
        w, w0 = s[f'{k}.weight'], init[f'{k}.weight']
        assert torch.equal(w.sign(), w0.sign()) and torch.allclose(w.abs(), w0.std(correction=0).expand_as(w))
    assert torch.equal(s['0.bias'], init['0.bias'])

@settings(max_examples=100)
@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([.8, .95, .99]))
def test_wilson_agrees_with_scipy(n, f, level):
    k = round(f*n); ci = binomtest(k, n).proportion_ci(level, method='wilson')
    assert wilson(k, n, level) == pytest.approx((ci.low, ci.high), abs=1e-9)

def test_evaluate_counts_and_leaves_the_model():
    model, dls = net(), data(); model[1].eval()
    for p in model[0].parameters(): p.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    e = evaluate(model, dls.valid)
    x, y = map(torch.cat, zip(*dls.valid))
    out = copy.deepcopy(model).eval()(x)
    assert (e.k, e.n) == (int((out.argmax(1) == y).sum()), len(y))
    assert e.loss == pytest.approx(nn.functional.cross_entropy(out, y).item(), rel=1e-5)
    assert model.training and not model[1].training and not model[0].weight.requires_grad
    assert same(before, model.state_dict())

def test_top5_is_torch_topk():
    torch.manual_seed(0); model, x, y = nn.Linear(3, 12), torch.randn(200, 3), torch.randint(0, 12, (200,))
    e = evaluate(model, [(x[:150], y[:150]), (x[150:], y[150:])])
    assert (e.k5 == int((model(x).topk(5).indices == y[:, None]).any(1).sum()) and e.k < e.k5 < 200
            and e.top5 == e.k5/200)
    assert evaluate(nn.Linear(3, 4), [(x, y % 4)]).top5 == 1, 'four classes: always among five'

def test_evaluate_refuses():
    m = nn.Linear(2, 3); x = torch.randn(4, 2)
    for batch, text in (([], 'no batches'), ([(x, torch.tensor([0, 1, 2, 3]))], 'out of range'),
                        ([(x, torch.tensor([0, 1, 2, -1]))], 'out of range'),
                        ([(x*float('nan'), torch.tensor([0, 1, 2, 0]))], 'NaN')):
        with pytest.raises(ValueError, match=text): evaluate(m, batch)
    with pytest.raises(TypeError): evaluate(m, [(x, torch.rand(4))])
    with pytest.raises(TypeError): evaluate('model', [])

def test_exploding_training_is_named():
    deep = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r'lr=1e\+25'): fit(learner(deep, data()), 2, lr=1e25)

@pytest.mark.parametrize('kw,text', [(dict(schedule='steps'), "did you mean 'step'"),
                                     (dict(schedule='step'), 'milestones'), (dict(milestones=(1,)), 'milestones'),
                                     (dict(lr=0.), 'lr=0'), (dict(lr=float('nan')), 'lr=nan'),
                                     (dict(warmup=1), 'warmup'), (dict(epochs=-1), 'epochs=-1')])
def test_fit_refuses(kw, text):
    with pytest.raises(ValueError, match=text): fit(learner(net(), data()), **{**dict(epochs=1), **kw})

def test_schedule_reaches_the_optimiser():
    seen = []
    class See(MaskCallback):
        def __init__(self): super().__init__({})
        def after_step(self): seen.append(self.opt.hypers[-1]['lr'])
    fit(learner(net(), data()), 3, .1, schedule='step', milestones=(1, 2), cbs=[See()])
    assert [seen[i] for i in (0, 3, 4, 7, 8, 11)] == pytest.approx([.1, .1, .01, .01, .001, .001])
    seen.clear(); fit(learner(net(), data()), 3, .1, schedule='step', milestones=(1, 2), start_epoch=2, cbs=[See()])
    assert seen == pytest.approx([.001]*4)

def test_curves_and_quiet(capsys):
    learn = learner(net(), data()); fit(learn, 2); fit(learn, 1)
    df = curves(learn)
    assert list(df.columns) == ['fit', 'epoch', 'train_loss', 'valid_loss', 'accuracy'] and list(df.epoch) == [1, 2, 3]
    assert capsys.readouterr().out == ''

@pytest.mark.parametrize('opt,key', [('sgd', 'momentum_buffer'), ('adamw', 'exp_avg_sq')])
@pytest.mark.parametrize('by_module', [False, True])
def test_rebind_slices_optimiser_and_snapshots(opt, key, by_module):
    learn = fit(learner(net(), data(), opt), 1); old = learn.model
    keep = torch.tensor([0, 3]); taps = torch.tensor([0, 1, 2, 3, 12, 13, 14, 15])
    small = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(),
                          nn.Linear(8, 3))
    index = {**{f'0.{o}': (keep,) for o in ('weight', 'bias')},
             **{f'1.{o}': (keep,) for o in ('weight', 'bias', 'running_mean', 'running_var')}, '4.weight': (None, taps)}
    if by_module: index = {'0': (keep, None), '1': (keep, None), '4': (None, taps)}
    buf = learn.opt.opt.state[old[4].weight][key].clone()
    rebind(learn, small, index)
    assert torch.equal(learn.opt.opt.state[small[4].weight][key], buf[:, taps])
    assert learn.rewind.init['4.weight'].shape == (8, 8)
    before = small[0].weight.detach().clone(); fit(learn, 1)
    assert not torch.equal(before, small[0].weight)
    rebind(learn, net())
    with pytest.raises(ValueError, match='learner'): rewind_to(learn)

def test_sunk_units_lose_ties():
    "A removed unit that ties with a living one at zero goes first, whatever the weights said."
    s = Scores({'a': torch.tensor([[0.,0.],[0.,1.]])}, 'weight', tiebreak={'a': torch.tensor([[3.,1.],[2.,0.]])})
    mask = Mask({'a': torch.tensor([[False,True],[True,True]])}, 'weight')
    assert allocate(sink(s, mask), .25)['a'].tolist() == [[False,True],[True,True]]
    assert allocate(s, .25)['a'].tolist() == [[True,False],[True,True]]

# ---- what is pruned stays pruned

def test_other_weights_under_a_held_mask_are_zeroed_with_a_warning():
    learn = learner(net(), data()); mask = random_mask(learn.model); fine_tune(learn, mask, 1)
    with warnings.catch_warnings(): warnings.simplefilter('error', UserWarning); fit(learn, 1)
    learn.model.load_state_dict(net(3).state_dict())
    with pytest.warns(UserWarning, match='remove_cb'): fit(learn, 1)
    assert revived(learn.model, mask) == 0

def test_a_new_mask_takes_the_place_of_the_old_one():
    learn = learner(net(), data()); a, b = random_mask(learn.model, seed=0), random_mask(learn.model, seed=1)
    fine_tune(learn, a, 1); fine_tune(learn, b, 1)
    assert (revived(learn.model, b) == 0 < revived(learn.model, a)
            and len([o for o in learn.cbs if isinstance(o, MaskCallback)]) == 1)
    rewind_to(learn); assert held(learn) == {} and learn.model[0].weight.all()
    hold(learn, a); hold(learn, None); assert not hasattr(learn, 'pruned') or not held(learn)

@pytest.mark.parametrize('mask', [None, 5, 'x'])
def test_a_mask_is_asked_for(mask):
    with pytest.raises(TypeError, match='^mask.*: expected a Mask'): fine_tune(learner(net(), data()), mask, 1)
    if mask is not None:
        with pytest.raises(TypeError, match='^mask.*: expected a Mask'): MaskCallback(mask)

def test_export_keeps_zeros_and_outputs(tmp_path):
    from fastai.learner import load_learner
    learn = learner(net(), data()); mask = random_mask(learn.model); fine_tune(learn, mask, 1)
    learn.export(tmp_path/'e.pkl'); assert len(learn.dls.train) > 0
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); back = load_learner(tmp_path/'e.pkl')
    x = torch.randn(4, 1, 4, 4); assert torch.equal(back.model.eval()(x), learn.model.eval()(x))
    back.dls = data(); back.fit(1); assert revived(back.model, mask) == 0

# ---- whose snapshot is it?

def test_snapshots_belong_to_weights_trained_from_them(tmp_path):
    learn = learner(net(), data()); fit(learn, 1); assert learn.rewind.belongs()
    learn.save(tmp_path/'one'); fit(learn, 1); learn.load(tmp_path/'one', weights_only=True)
    assert learn.rewind.belongs()
    fine_tune(learn, random_mask(learn.model), 1); assert learn.rewind.belongs() and learn.rewind.init is not None
    other = learner(net(5), data()); other.load(tmp_path/'one', weights_only=True)
    assert not other.rewind.belongs() and other.rewind.init is None
    with pytest.raises(ValueError, match='have not come from this learner'): rewind_to(other)
    # training or saving does not make it so
    other.save(tmp_path/'two'); fit(other, 1); assert not other.rewind.belongs()
    other.rewind.vouch(); rewind_to(other); assert other.rewind.belongs()

@pytest.mark.parametrize('way', ['state dict', 'one layer'])
def test_weights_from_elsewhere_are_noticed(way):
    learn = fit(learner(net(), data()), 1); foreign = net(7).state_dict()
    learn.model.load_state_dict(foreign if way == 'state dict'
                                else {**learn.model.state_dict(), '4.weight': foreign['4.weight']})
    assert not learn.rewind.belongs()

def test_an_interrupted_fit_is_training():
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.iter == 1: raise KeyboardInterrupt
    learn = learner(net(), data())
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[Stop()])
    assert learn.rewind.belongs(); rewind_to(learn); assert torch.equal(learn.model[0].weight.cpu(), net()[0].weight)

# ---- batches of every form

class Two(nn.Module):
    def __init__(self): super().__init__(); torch.manual_seed(0); self.a, self.b = nn.Linear(16, 3), nn.Linear(4, 3)
    def forward(self, a, b): return self.a(a.flatten(1)) + self.b(b)

def items(n, f):
    g = torch.Generator().manual_seed(0); x, z = torch.randn(n, 1, 4, 4, generator=g), torch.randn(n, 4, generator=g)
    return [f(*o) for o in zip(x, z, x.mean((1, 2, 3)).gt(0).long())]

def loaders(f): return DataLoaders(DataLoader(items(24, f), bs=8, shuffle=True), DataLoader(items(16, f), bs=8))

def test_two_inputs_as_a_tuple_and_by_name():
    a = fit(learner(Two(), loaders(lambda x, z, y: (x, z, y))), 2)
    b = fit(learner(Two(), loaders(lambda x, z, y: (dict(b=z, a=x), y))), 2)
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))
    assert evaluate(a, a.dls.valid) == evaluate(b, b.dls.valid)

def test_outputs_of_several_tensors_go_to_the_learners_loss():
    class Out(Two):
        def __init__(self, form): super().__init__(); self.form = form
        def forward(self, a, b):
            o = super().forward(a, b); return (o, o.exp()) if self.form is tuple else dict(hidden=o.exp(), logits=o)
    plain = learner(Two(), loaders(lambda *o: o)); want = evaluate(plain, plain.dls.valid)
    for form, loss in ((tuple, lambda o, y: nn.functional.cross_entropy(o[0], y)),
                       (dict, lambda o, y: nn.functional.cross_entropy(o['logits'], y))):
        learn = learner(Out(form), loaders(lambda *o: o), loss_func=loss, metrics=[])
        assert evaluate(learn, learn.dls.valid) == want
        fit(learn, 1); assert evaluate(learn, learn.dls.valid) != want
        with pytest.raises(ValueError, match='dls: the loss'): fit(learner(Out(form), loaders(lambda *o: o)), 1)

@pytest.mark.parametrize('dt', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dt):
    dls = loaders(lambda x, z, y: (x, y.to(dt))); learn = learner(net(), dls, loss_func=nn.CrossEntropyLoss())
    fit(learn, 1)
    ref = fit(learner(net(), loaders(lambda x, z, y: (x, y)), loss_func=nn.CrossEntropyLoss()), 1)
    assert evaluate(learn, dls.valid) == evaluate(ref, ref.dls.valid)

@pytest.mark.parametrize('f,said', [(lambda x, z, y: dict(x=x, y=y), "dls: a batch is a dict with 'x', 'y'"),
                                    (lambda x, z, y: x, 'dls: a batch is a Tensor')])
def test_batches_that_are_no_pairs_are_refused(f, said):
    dls = loaders(f)
    for call in (lambda: fit(learner(net(), dls), 1), lambda: evaluate(net(), dls.valid)):
        with pytest.raises(ValueError, match=said): call()

@pytest.mark.parametrize(
    'f', [lambda x, z, y: (x, y.float()), lambda x, z, y: (x, x), lambda x, z, y: (x, torch.eye(3)[y].long())])
def test_what_is_no_classification_is_refused_before_it_is_trained(f):
    learn = learner(net(), loaders(f)); before = copy.deepcopy(learn.model.state_dict())
    if f(*items(1, lambda *o: o)[0])[1].ndim != 1 or f(*items(1, lambda *o: o)[0])[1].is_floating_point():
        with pytest.raises(ValueError, match='dls: the (loss|metric)'): fit(learn, 1)
    with pytest.raises(TypeError, match='dls: labels yb'): evaluate(learn, learn.dls.valid)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    # a regression trains
    reg = learner(net(), loaders(lambda x, z, y: (x, torch.eye(3)[y])), loss_func=nn.MSELoss(), metrics=[]); fit(reg, 1)
