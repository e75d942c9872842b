"""The whole flow by name: what `prune` promises for every method, and that it says what is wrong."""
import copy, os, subprocess, sys, warnings
import pytest, torch
from neuronprune.all import *
from neuronprune.core import generator, kappa, method
from neuronprune.masks import Mask, Scores
from neuronprune.scoring import score_with, split_args, weights_at
from neuronprune.pipeline import channel_table
import neuronprune.core as core

NAMES = list(methods())

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64)

@pytest.fixture(scope='module')
def few():
    "256 images to train convolutions on."
    return get_dls('digits', bs=64, n_train=256)

def start(dls, model='mlp', epochs=2, **kw):
    return fit(learner(build(model, dls.c_in, dls.n_out, 8, seed=0), dls, lr=.1, **kw), epochs)
def host(name): return 'vgg7_bn' if name in ('slimming', 'earlybird') else 'mlp'

@pytest.mark.parametrize('name', NAMES)
def test_every_method(dls, few, name):
    learn = start(few if name in ('mint', 'slimming', 'earlybird') else dls, host(name), epochs=1)
    res = prune(learn, name, .5, fine_tune_epochs=1, shrink=True)
    r = res.report
    assert r.method == name and r.before.n == r.tuned.n == 359 and r.seed == 0 and r.secs > 0
    assert learn.model is res.model and not any(m._forward_hooks for m in learn.model.modules())
    whole = res.mask.meta['of'] == 'units' and name != 'earlybird' # it lists the channels without a norm as kept
    got = res.mask.sparsity if whole else res.mask.meta['achieved']
    per_part = max(1, len(res.mask)) if res.mask.meta.get('scope') == 'layer' else 1
    total = sum(v.numel() for v in res.mask.values())
    smallest = total if res.mask.meta['of'] == 'units' else min(len(v.flatten()) for v in res.mask.values())
    drawn = .005 if res.mask.scale else 0 # sampled weights: the budget is met in expectation
    assert .5-per_part/min(smallest, total) - drawn - 1e-9 <= got <= .5 + drawn + 1e-9
    keep = {} if res.mask.unit == 'rank' else res.mask.expand(build(host(name), 1, 10, 8, seed=0))
    if res.mask.unit == 'weight' and r.params_after == r.params_before:
        assert all((dict(res.model.named_parameters())[k][~v] == 0).all() for k,v in keep.items())
    assert all(v.any() for v in res.mask.values())

def test_same_seed_same_bytes(dls):
    a, b = [prune(start(dls), 'snip', .8, fine_tune_epochs=2) for _ in range(2)]
    assert all(torch.equal(x, y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert a.report.tuned.k == b.report.tuned.k

@pytest.mark.parametrize('opt,kw', [('sgd', {}), ('sgd', dict(wd=1e-2)), ('adamw', dict(wd=1e-1)), ('adam', {})])
def test_zeros_survive_fine_tuning(dls, opt, kw):
    learn = fit(learner(build('mlp', 1, 10, 8, seed=0), dls, opt=opt, lr=.01, **kw), 2)
    res = prune(learn, 'magnitude', .7, fine_tune_epochs=2)
    dead = [p[~res.mask[n.removesuffix('.weight')]] for n,p in learn.model.named_parameters() if n.endswith('weight')]
    assert sum(map(len, dead)) == 185000-kappa(185000, .7) and all((d == 0).all() for d in dead)
    alive = learn.model.fc1.weight[res.mask['fc1']]
    assert (alive != 0).float().mean() > .99

def test_rounds_narrow_and_reach_the_budget(dls):
    seen = []
    @method('spy', unit='weight')
    def spy(model, dls=None, *, seed=0):
        seen.append(int(sum((p == 0).sum() for n,p in model.named_parameters() if n.endswith('weight'))))
        g = generator(seed+len(seen))
        return Scores({k:torch.rand(m.weight.shape, generator=g) for k,m in layers(model).items()}, 'weight',
                      method='spy')
    try: res = prune(start(dls), 'spy', .9, rounds=4, fine_tune_epochs=1)
    finally: core._registry.pop('spy')
    want = [0]+[185000-kappa(185000, s) for s in ratios(.9, 4)]
    assert seen == want[:4] and res.mask.counts() == (18500, 185000)

def test_rounds_of_a_network_budget_say_what_was_achieved(dls):
    "Each round keeps other channels; the mask is their intersection, and so is what it reports."
    turn = iter((2, 1))
    def slices(scores, sparsity=None, **kw):
        i = next(turn); keep = {k:torch.arange(len(v)) % 3 != i for k,v in scores.items()}
        return Mask(keep, 'channel', graph=scores.graph,
                    meta=dict(achieved=.1, of='network', layers=dict.fromkeys(keep, .1)))
    @method('slices', unit='channel', allocate=slices)
    def sliced(model, dls=None, *, graph=None, seed=0):
        return Scores({k:layers(model)[k].weight.abs().sum(1) for k in ('fc1', 'fc2')}, 'channel', graph=graph)
    try: res = prune(start(dls), 'slices', .5, rounds=2, fine_tune_epochs=0)
    finally: core._registry.pop('slices')
    left = {k:int(v.sum()) for k,v in res.mask.items()}
    small = shrink(build('mlp', 1, 10, 8, seed=0), res.mask, dls.valid.one_batch()[0])
    whole, rest = (sum(m.weight.numel() for m in layers(net).values()) for net in (build('mlp', 1, 10, 8), small))
    assert (left == {k:len(range(0, len(res.mask[k]), 3)) for k in left}
            and res.mask.meta['achieved'] == pytest.approx(1-rest/whole))
    assert res.mask.meta['layers'] == pytest.approx({k:1-left[k]/len(res.mask[k]) for k in left})

def test_a_training_left_early(dls, tmp_path):
    kept = start(dls, epochs=3, cbs=[Rewind(epochs=(1,))]).rewind.states[1]
    for _ in range(2): # trained, then read
        early = dense(dls, 'mlp', 3, lr=.1, stop=1, out=tmp_path)
        assert all(torch.equal(v, kept[k]) for k,v in early.model.state_dict().items()) and early.rewind.done == 1
    raw = dense(dls, 'mlp', 3, lr=.1, stop=0, out=tmp_path)
    assert (torch.equal(raw.model.fc1.weight, raw.rewind.init['fc1.weight'])
            and len(list((tmp_path/'dense').iterdir())) == 2)
    with pytest.raises(ValueError, match='stop=4: expected at most epochs=3'): dense(dls, 'mlp', 3, stop=4)

def test_shrink_keeps_the_function(few):
    masked = prune(start(few, 'vgg7_bn'), 'fpgm', .5, fine_tune_epochs=1, latency=False).model
    small = prune(start(few, 'vgg7_bn'), 'fpgm', .5, fine_tune_epochs=1, shrink=True, latency=False)
    xb = few.valid.one_batch()[0]
    assert difference(masked, small.model, xb) < 1e-5
    assert (small.report.params_after < .35*small.report.params_before
            and count_params(small.model) == small.report.params_after)

def test_training_goes_on_after_shrinking(dls):
    learn = start(dls)
    prune(learn, 'magnitude', .5, unit='channel', fine_tune_epochs=1, shrink=True)
    before = learn.model.fc1.weight.detach().clone()
    fit(learn, 1)
    assert not torch.equal(before, learn.model.fc1.weight)

def test_rewinding(dls):
    learn = start(dls); init = copy.deepcopy(learn.rewind.init)
    res = prune(learn, 'lth', .6, fine_tune_epochs=0)
    assert all(torch.equal(learn.model.get_parameter(f'{k}.weight')[v], init[f'{k}.weight'][v])
               for k,v in res.mask.items())
    assert torch.equal(learn.model.fc1.bias, init['fc1.bias'])
    learn = start(dls); trained = learn.model.fc1.weight.detach().clone()
    with weights_at(learn, 'init'): assert torch.equal(learn.model.fc1.weight, init['fc1.weight'])
    assert torch.equal(learn.model.fc1.weight, trained)

def test_group_scores_as_channels(dls):
    res = prune(start(dls), 'mint', .5, unit='channel', fine_tune_epochs=0, shrink=True, n_groups=(5, 5))
    assert res.mask.unit == 'channel' and res.model.fc2.out_features == 150 and 'fc3' not in res.mask

def test_frozen_model(dls):
    a, b = start(dls, epochs=1), start(dls, epochs=1)
    b.model.fc1.requires_grad_(False)
    x, y = [prune(l, 'magnitude', .5, unit='channel', fine_tune_epochs=0, shrink=True) for l in (a, b)]
    assert all(torch.equal(x.mask[k], y.mask[k]) for k in x.mask) and not y.model.fc1.weight.requires_grad

def test_result_files(dls, tmp_path):
    res = prune(start(dls), 'magnitude', .5, unit='channel', fine_tune_epochs=0, shrink=True)
    res.save(tmp_path/'run')
    code = f"""
from neuronprune.surgery import load
from neuronprune.masks import Mask, Scores
from neuronprune.report import Report
import neuronprune.models, pickle, torch
def no(*a, **k): raise RuntimeError('unpickled')
class No(pickle.Unpickler): __init__ = no # a class: torch imports modules at its first use, and some inherit from it
pickle.load = pickle.loads = torch.load = no; pickle.Unpickler = No
m = load({str(tmp_path/'run'/'model.safetensors')!r}); print(sum(p.numel() for p in m.parameters()))
print(Mask.load({str(tmp_path/'run'/'mask.safetensors')!r}).sparsity,
      Scores.load({str(tmp_path/'run'/'scores.safetensors')!r}).method,
      Report.load({str(tmp_path/'run'/'record.json')!r}).params_after)
"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True,
                         cwd=os.path.dirname(os.path.dirname(__file__))).stdout.split()
    assert out == [str(count_params(res.model)), '0.5', 'magnitude', str(res.report.params_after)]

@pytest.mark.parametrize('kw,words', [
    (dict(method='mnit', sparsity=.5), "did you mean 'mint'?"),
    (dict(method='magnitude', sparsity=90), 'did you mean 0.9?'), (dict(method='magnitude'), 'exactly one of the two'),
    (dict(method='magnitude', sparsity=.5, threshold=1.), 'exactly one of the two'),
    (dict(method='magnitude', sparsity=.5, nrom='l1'), "did you mean 'norm'?"),
    (dict(method='magnitude', sparsity=.5, rounds=0), 'rounds=0'),
    (dict(method='magnitude', sparsity=.5, fine_tune_epochs=-1), 'fine_tune_epochs=-1'),
    (dict(method='magnitude', sparsity=.5, unit='neuron'), "unit='neuron'"),
    (dict(method='magnitude', sparsity=.5, at='finished'), "'finished'"),
    (dict(method='slimming', sparsity=.5), 'atch norm')])
def test_messages(dls, kw, words):
    learn = start(dls, epochs=0); before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises((ValueError, TypeError)) as e: prune(learn, **kw)
    assert words in str(e.value), str(e.value)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_dense_cache(dls, tmp_path):
    a, b = dense(dls, 'mlp', 1, out=tmp_path), dense(dls, 'mlp', 1, out=tmp_path)
    c = dense(dls, 'mlp', 1, out=tmp_path, seed=1)
    assert len(list((tmp_path/'dense').glob('*.safetensors'))) == 2
    for x,y in ((a.model.state_dict(), b.model.state_dict()), (a.rewind.init, b.rewind.init)):
        assert all(torch.equal(x[k], y[k]) for k in x)
    assert curves(a).equals(curves(b)) and not torch.equal(a.model.fc1.weight, c.model.fc1.weight)
    assert (prune(a, 'random', .5, fine_tune_epochs=1).report.tuned.k
            == prune(b, 'random', .5, fine_tune_epochs=1).report.tuned.k)

def test_a_cached_network_belongs_to_its_snapshots(dls, tmp_path):
    "From the cache the weights have come from their initial ones by training; what is loaded over them has not."
    for _ in range(2): learn = dense(dls, 'mlp', 1, out=tmp_path)
    assert learn.rewind.belongs() and [o for o,_ in learn.rewind.known] == [learn.rewind.pair()]
    init = {k:v.clone() for k,v in learn.rewind.init.items()}
    res = prune(learn, 'lth', .5, fine_tune_epochs=0)
    assert res.mask.sparsity == .5 and all(torch.equal(p.cpu(), init[f'{k}.weight']*res.mask[k]) for k in res.mask
                                           for p in [learn.model.get_parameter(f'{k}.weight')])
    learn = dense(dls, 'mlp', 1, out=tmp_path); learn.model.load_state_dict(build('mlp', 1, 10, 8, seed=5).state_dict())
    with pytest.raises(ValueError, match='vouch'): prune(learn, 'lth', .5)

@pytest.mark.parametrize('name,kw', [('sipp', dict(variant='det')), ('sipp', dict(variant='hybrid')), ('magnitude', {}),
                                     ('mint', dict(n_per_class=9, n_groups=(5, 5)))])
@pytest.mark.parametrize('shrink', [False, True])
def test_the_record_counts_the_candidates_weights_as_masked(dls, name, kw, shrink):
    """Half of the weights was asked for; the others of a channel that dies are no candidate's doing.
    The parameters are those stored."""
    learn = start(dls, epochs=1)
    res = prune(learn, name, .5, fine_tune_epochs=0, latency=False, shrink=shrink, **kw); r = res.report
    kept = [v for k,v in res.mask.expand(build('mlp', 1, 10, 8)).items() if k.removesuffix('.weight') in res.mask]
    assert abs(r.weights_removed - (1-sum(int(v.sum()) for v in kept)/sum(v.numel() for v in kept))) < 1e-9
    assert abs(r.weights_removed-.5) < (1e-4 if r.unit == 'weight' else .03)
    if shrink: assert r.params_after == sum(p.numel() for p in learn.model.parameters())

def test_channel_table_counts(dls):
    learn = start(dls, epochs=1); net = build('mlp', 1, 10, 8, seed=0)
    res = prune(learn, 'magnitude', .97, fine_tune_epochs=0)
    t = channel_table(res, net).set_index('layer')
    rows = ~res.mask['fc2'].any(1)
    assert t.without_inputs['fc2'] == int(rows.sum())
    assert t.unread_or_dropped['fc2'] >= int((~res.mask['fc3'].any(0)).sum())

def test_snip_goes_in_rounds_by_itself(dls):
    one, three = [prune(start(dls), 'snip', .9, rounds=r, fine_tune_epochs=0) for r in (1, 3)]
    assert one.mask.counts() == three.mask.counts() == (18500, 185000)
    assert any(not torch.equal(one.mask[k], three.mask[k]) for k in one.mask) and three.report.extra['rounds'] == 3

@pytest.mark.parametrize('kw,words', [
    (dict(lr='0.1'), 'lr='), (dict(lr=-1), 'lr=-1'), (dict(fit_args={'schedul': 'flat'}), "did you mean 'schedule'?"),
    (dict(fit_args={'schedule': 'bogus'}), 'bogus'), (dict(fit_args={'lr': .1}), 'fit_args'),
    (dict(fit_args='flat'), 'fit_args'),
    (dict(rewind='initial'), "rewind='initial'"), (dict(at='Init'), "at='Init'"), (dict(at=3), 'epoch 3')])
def test_nothing_changes_before_all_is_checked(dls, kw, words):
    learn = start(dls, epochs=1); before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises((ValueError, TypeError)) as e: prune(learn, 'lth', .5, fine_tune_epochs=1, **kw)
    assert words in str(e.value), str(e.value)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_a_network_that_cannot_be_cut_is_found_out_before_it_is_changed(dls):
    class Rigid(torch.nn.Module):
        def __init__(self): super().__init__(); self.conv,self.fc = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(144, 10)
        def forward(self, x): return self.fc(self.conv(x).relu().view(-1, 144))
    learn = fit(learner(Rigid(), dls, lr=.05), 1); before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match="no channel of this model can be removed.*'conv'"):
        prune(learn, 'magnitude', .5, unit='channel', shrink=True)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert prune(learn, 'magnitude', .5, fine_tune_epochs=0, shrink=True).mask.sparsity == .5

def test_plain_fastai_learner(dls):
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    learn = Learner(dls, build('mlp', 1, 10, 8, seed=0), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        res = prune(learn, 'magnitude', .5, unit='channel', fine_tune_epochs=1, shrink=True)
    assert res.report.params_after < .5*res.report.params_before
    with pytest.raises(ValueError, match='learner'): prune(learn, 'lth', .5)
    with pytest.raises(TypeError, match='learn: expected a Learner'): prune(learn.model, 'magnitude', .5)

def test_layer_scope_treats_tied_layers_alike():
    dls = get_dls('digits', size=16)
    learn = learner(build('resnet20', 1, 10, 16, seed=0), dls)
    frame = prune(learn, 'fpgm', .5, fine_tune_epochs=0).mask.frame()
    assert frame['removed, %'].between(30, 70).all(), frame.to_string()

def test_ties_go_as_a_whole():
    dls = get_dls('digits', size=16); learn = learner(build('resnet20', 1, 10, 16, seed=0), dls)
    res = prune(learn, 'mint', .5, unit='channel', fine_tune_epochs=0, shrink=True, n_per_class=20, n_groups=(4, 4))
    assert res.model.conv1.out_channels < 16 and 'conv1' in res.mask

def test_batches_that_do_not_fit_are_explained(dls):
    with pytest.raises(ValueError, match='labels from 0 to 9, but the network has 5 outputs'):
        fit(learner(build('mlp', 1, 5, 8), dls), 1)
    with pytest.raises(ValueError, match='cannot digest a batch of shape'):
        fit(learner(build('mlp', 1, 10, 16), dls), 1)
    with pytest.raises(ValueError, match='cannot digest a batch of shape'): evaluate(build('mlp', 1, 10, 16), dls.test)
    with pytest.raises(TypeError, match='dls: expected fastai DataLoaders'): learner(build('mlp', 1, 10, 8), None)

def test_reparametrised_layers_are_named(dls):
    learn = start(dls, epochs=0); torch.nn.utils.prune.random_unstructured(learn.model.fc1, 'weight', .5)
    with pytest.raises(ValueError, match="'fc1' is reparametrised; make it plain first"): prune(learn, 'magnitude', .5)

# ---- rounds, calls one after the other, interruptions

def test_rounds_of_channels_do_not_collapse(dls):
    "Means that count what is gone would spare the layers that lost most, down to one channel of another."
    def pruned(rounds):
        learn = fit(learner(build('lenet300', dls.c_in, dls.n_out, 8, seed=0), dls, lr=.1), 5)
        return prune(learn, 'magnitude', .8, unit='channel', rounds=rounds, fine_tune_epochs=2)
    one, three = pruned(1), pruned(3)
    assert {k:int(v.sum()) for k,v in three.mask.items()}.keys() == one.mask.units.keys()
    for k,v in one.mask.items(): assert abs(int(three.mask[k].sum())-int(v.sum())) <= .15*len(v)
    assert three.report.tuned.k > one.report.tuned.k - 15

@pytest.mark.parametrize('unit', ['weight', 'channel'])
def test_zeros_survive_every_later_training(dls, unit):
    learn = start(dls, epochs=1); res = prune(learn, 'magnitude', .6, unit=unit, fine_tune_epochs=1)
    zeros = {k:~v for k,v in res.mask.expand(learn.model).items()}
    fit(learn, 1); learn.fit(1)
    assert (all(not p[zeros[n]].any() for n,p in learn.model.named_parameters() if n in zeros)
            and not any(p.grad_fn for p in learn.model.parameters()))
    learn.remove_cb(learn.pruned); fit(learn, 1)
    assert any(p[zeros[n]].any() for n,p in learn.model.named_parameters() if n in zeros)

def test_zeros_inside_a_shrunken_network_stay(dls):
    learn = start(dls, epochs=1); prune(learn, 'magnitude', .8, fine_tune_epochs=1, shrink=True)
    zeros = {n:p == 0 for n,p in learn.model.named_parameters() if n.endswith('weight')}
    assert sum(int(z.sum()) for z in zeros.values()) > 100
    fit(learn, 1); assert all(not dict(learn.model.named_parameters())[n][z].any() for n,z in zeros.items())

@pytest.mark.parametrize('unit', ['weight', 'channel'])
@pytest.mark.parametrize('more', [.8, .3])
def test_a_second_call_goes_on_from_the_first(dls, unit, more):
    learn = start(dls, epochs=1); a = prune(learn, 'magnitude', .5, unit=unit, fine_tune_epochs=1)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); b = prune(learn, 'magnitude', more, unit=unit, fine_tune_epochs=1)
    said = [str(o.message) for o in w if 'have gone in an earlier call' in str(o.message)]
    assert all((b.mask[k] <= v).all() for k,v in a.mask.items()) and len(said) == (more < .5)
    if more > .5: assert b.mask.sparsity == pytest.approx(more, abs=.002)
    else: assert all(torch.equal(b.mask[k], v) for k,v in a.mask.items())
    r = b.report
    assert (r.extra['gone_before'] == a.mask.sparsity and r.params_removed >= a.report.params_removed > .3
            and r.macs_removed > .3)
    assert r.units_removed == b.mask.sparsity and r.weights_removed >= a.report.weights_removed-1e-9

def test_another_unit_in_the_second_call_revives_nothing(dls):
    learn = start(dls, epochs=1); a = prune(learn, 'magnitude', .7, fine_tune_epochs=0)
    prune(learn, 'magnitude', .3, unit='channel', fine_tune_epochs=1)
    assert all(not learn.model.get_submodule(k).weight[~v].any() for k,v in a.mask.items())
    res = prune(learn, 'magnitude', .9, fine_tune_epochs=1)
    assert all((res.mask[k] <= v).all() for k,v in a.mask.items())

def test_what_pruning_of_another_moment_left(dls):
    "Scores of the initial weights, a rewind, and the zeros of an earlier call."
    learn = start(dls, epochs=1); a = prune(learn, 'magnitude', .5, fine_tune_epochs=0)
    b = prune(learn, 'snip', .7, fine_tune_epochs=1)
    assert all((b.mask[k] <= v).all() and not learn.model.get_submodule(k).weight[~v].any() for k,v in a.mask.items())

def scored(status, gap=.25):
    def f(model, dls=None, *, seed=0):
        return Scores({k:m.weight.detach().abs() for k,m in layers(model).items()}, 'weight', method='late',
                      meta=dict(status=status, gap=gap))
    return f

def test_interrupted_scores_stop_the_run(dls):
    learn = start(dls, epochs=1); before = copy.deepcopy(learn.model.state_dict())
    method('late', unit='weight')(scored('interrupted'))
    try:
        with pytest.raises(KeyboardInterrupt, match='nothing was cut'): prune(learn, 'late', .5)
    finally: core._registry.pop('late')
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and not hasattr(learn, 'pruned')

def test_scores_that_are_not_final_say_so(dls):
    method('late', unit='weight')(scored('inexact'))
    try:
        with pytest.warns(UserWarning, match="status 'inexact', gap 0.25"):
            r = prune(start(dls, epochs=1), 'late', .5, fine_tune_epochs=0).report
    finally: core._registry.pop('late')
    assert (r.status, r.gap) == ('inexact', .25) and ('cost of scoring', 'status') in r.to_frame().index
    assert prune(start(dls, epochs=0), 'random', .5, fine_tune_epochs=0).report.status is None

@pytest.mark.parametrize('where', ['shrink', 'plan', 'measure'])
def test_a_finished_training_is_not_lost(dls, where, monkeypatch):
    learn = start(dls, epochs=1); calls = []
    def fails(f, first):
        def g(*a, **kw):
            calls.append(1)
            if len(calls) > first: raise SurgeryError('broken') if where == 'shrink' else RuntimeError('broken')
            return f(*a, **kw)
        return g
    import neuronprune.pipeline as pl
    if where == 'measure': monkeypatch.setattr(pl.Report, 'measure', fails(pl.Report.measure, 0))
    else: monkeypatch.setattr(pl.surgery, where, fails(getattr(pl.surgery, where), 1 if where == 'shrink' else 0))
    with pytest.warns(UserWarning, match='failed after the fine-tuning, .*broken'):
        res = prune(learn, 'magnitude', .5, unit='channel', fine_tune_epochs=1, shrink=True)
    r = res.report
    assert r.method == 'magnitude' and r.tuned.k == evaluate(learn, dls.loaders[2]).k and r.before.n == 359
    if where != 'measure':
        assert (learn.model.fc1.out_features == 500 and not learn.model.fc1.weight[~res.mask['fc1']].any()
                and r.params_removed > .3)
        fit(learn, 1); assert not learn.model.fc1.weight[~res.mask['fc1']].any()

# ---- the learner's own loss, labels and inputs

@pytest.mark.parametrize('name', ['snip', 'taylor'])
def test_scores_are_those_of_the_learners_loss(dls, name):
    w = torch.ones(10); w[0] = 100.; f = torch.nn.CrossEntropyLoss(weight=w)
    got = [prune(start(dls, epochs=1, loss_func=o), name, .5, fine_tune_epochs=0, **kw).scores
           for o,kw in ((f, {}), (None, dict(loss_func=f)), (None, {}))]
    learn = start(dls, epochs=1, loss_func=f)
    own = prune(learn, name, .5, fine_tune_epochs=0, loss_func=torch.nn.CrossEntropyLoss()).scores
    plain = got[2]; assert any(not torch.equal(got[0][k], plain[k]) for k in plain)
    assert any(not torch.equal(own[k], got[0][k]) for k in own) # the argument has the last word

@pytest.mark.parametrize('dt', [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dls, dt):
    pairs = lambda dl: [(x, y.to(dt)) for b in dl for x,y in zip(*b)]
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    own = DataLoaders(*(DataLoader(pairs(dl), bs=64) for dl in (dls.valid, dls.valid)))
    learn = fit(learner(build('mlp', 1, 10, 8, seed=0), own, loss_func=torch.nn.CrossEntropyLoss()), 1)
    res = prune(learn, 'magnitude', .5, fine_tune_epochs=1)
    assert res.report.tuned.n == len(pairs(dls.valid))

@pytest.mark.parametrize('target',
                         [lambda y: y.float(), lambda y: torch.eye(10)[y], lambda y: y.view(-1, 1, 1).expand(-1, 4, 4)])
def test_what_is_no_classification_is_refused_before_anything_changes(dls, target):
    from fastai.data.core import DataLoaders
    b = [(x, target(y)) for x,y in dls.valid]
    learn = learner(build('mlp', 1, 10, 8, seed=0), DataLoaders(b, b), loss_func=torch.nn.MSELoss())
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(TypeError, match='dls: labels yb'): prune(learn, 'magnitude', .5)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

@pytest.mark.parametrize('kw,words',
                         [(dict(shrink='no'), 'shrink'), (dict(seed='a'), "seed='a'"), (dict(latency=1), 'latency')])
def test_flags_are_checked(dls, kw, words):
    with pytest.raises((TypeError, ValueError), match=words): prune(start(dls, epochs=0), 'magnitude', .5, **kw)
