"Sensitivities: against copies cut one by one, for every unit, with the model left as it was."
import math
import numpy as np, pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from neuronprune.allocate import allocate
from neuronprune.core import copied, methods
from neuronprune.costs import count_macs, count_params
from neuronprune.data import get_dls
from neuronprune.evaluation import evaluate
from neuronprune.graph import trace
from neuronprune.masks import Mask, Scores
from neuronprune.models import build
from neuronprune.sensitivity import BY, facts, narrowed, sensitivity, together
from neuronprune.surgery import apply
from neuronprune.train import fit, learner


class Tied(nn.Module):
    "A residual block between two convolutions, with norms."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 3)
        self.na, self.nc, self.fc = nn.BatchNorm2d(6), nn.BatchNorm2d(5), nn.Linear(5, 10)
    def forward(self, x):
        h = self.na(self.a(x)).relu()
        return self.fc(self.nc(self.c((h + self.b(h)).relu())).relu().mean((2, 3)))


@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=32)


@pytest.fixture(scope='module')
def learn(dls):
    torch.manual_seed(0)
    res = learner(Tied(), dls, lr=.05); fit(res, 1, seed=0)
    return res


def scores_of(learn, unit='channel', **kw):
    xb, _ = learn.dls.valid.one_batch()
    return methods()['random'](learn.model, learn.dls, graph=trace(learn.model, xb), unit=unit, **kw)


def by_hand(learn, scores, keys, s, batches):
    "(output error, right answers) of a copy in which only `keys` are cut, from the definitions."
    mask = narrowed(allocate(scores, s, scope='layer'), keys)
    cut, errors, k = apply(copied(learn.model), mask).eval(), [], 0
    learn.model.eval()
    with torch.no_grad():
        for x,y in batches:
            a, b = learn.model(x).double(), cut(x).double()
            errors.append(float(((a-b)**2).sum()/(a**2).sum())); k += int((b.argmax(1) == y).sum())
    return np.mean(errors), k


@pytest.mark.parametrize('unit', ['channel', 'weight', 'group'])
def test_each_point_is_that_of_a_copy(learn, unit):
    scores = scores_of(learn, unit)
    s = sensitivity(learn, scores, [.3, .6], n=None)
    batches = [(x, y) for x,y in learn.dls.valid]
    assert [k for k in s.tied] == [k[0] for k in together(allocate(scores, .3, scope='layer'))]
    for r in s.rows.itertuples():
        error, k = by_hand(learn, scores, s.tied[r.layer], r.sparsity, batches)
        assert r.error == pytest.approx(error, rel=1e-5) and r.k == k and r.n == sum(len(y) for _,y in batches)
        assert r.error_lo <= r.error <= r.error_hi and r.lo <= r.accuracy <= r.hi
    assert s.whole == evaluate(learn, learn.dls.valid)


def test_ties_are_cut_together(learn):
    s = sensitivity(learn, scores_of(learn), [.5], n=64)
    assert s.tied == {'a': ['a', 'b'], 'c': ['c']} and list(s.rows.units) == [6, 5]
    assert list(s.fixed) == ['fc'] and 'output' in s.fixed['fc']
    df = s.frame()
    assert list(df.tied_to)[:2] == ['b', '–'] and list(df.cannot_be_cut)[:2] == ['–', '–']
    assert df.cannot_be_cut.iloc[-1] == s.fixed['fc'] and math.isnan(df.error.iloc[-1])


def test_the_model_is_as_it_was(learn):
    scores = scores_of(learn); learn.model.train(); learn.model.fc.eval()
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    modes = [m.training for m in learn.model.modules()]
    sensitivity(learn, scores, [.2, .8], n=64)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert modes == [m.training for m in learn.model.modules()]


def test_cuts_that_fail_leave_the_model_as_it_was(learn, monkeypatch):
    import neuronprune.sensitivity as mod
    scores, before = scores_of(learn), {k:v.clone() for k,v in learn.model.state_dict().items()}
    calls, outputs = [], mod._outputs
    def broken(*args):
        calls.append(1)
        if len(calls) == 3: raise RuntimeError('broken')
        return outputs(*args)
    monkeypatch.setattr(mod, '_outputs', broken)
    with pytest.raises(RuntimeError, match='broken'): sensitivity(learn, scores, [.5, .8], n=64)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())


def test_interrupted_keeps_what_was_measured(learn, monkeypatch):
    import neuronprune.sensitivity as mod
    whole = sensitivity(learn, scores_of(learn), [.5, .8], n=64)
    calls, outputs = [], mod._outputs
    def late(*args):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return outputs(*args)
    monkeypatch.setattr(mod, '_outputs', late)
    s = sensitivity(learn, scores_of(learn), [.5, .8], n=64)
    assert s.status == 'interrupted' and s.rows.equals(whole.rows[:2]) and 'interrupted' in repr(s)


def test_curves_rise_and_start_at_nothing(learn):
    for by in BY:
        s = sensitivity(learn, scores_of(learn), n=64, by=by)
        for k in s.tied:
            kept, loss = s.curve(k)
            assert loss[0] == 0 and (np.diff(loss) >= 0).all() and (np.diff(kept) < 0).all() and kept[0] == s.rows[
                s.rows.layer == k].units.iloc[0]
            d = s.rows[s.rows.layer == k]
            own = dict(error=d.error, kl=d.kl, loss=d.loss-s.whole.loss, accuracy=s.whole.accuracy-d.accuracy)[by]
            assert loss[-1] == pytest.approx(max(0, own.max()))


def test_the_divergence_is_that_of_the_class_probabilities(learn):
    sc = scores_of(learn); s = sensitivity(learn, sc, [.6], n=None, by='kl')
    m = allocate(sc, .6, scope='layer'); keys = s.tied[s.rows.layer[0]]
    x = torch.cat([xb for xb,_ in learn.dls.valid]); net = learn.model.eval()
    cut = apply(copied(net), narrowed(m, keys))
    with torch.no_grad(): p, q = (o(x).double().log_softmax(1) for o in (net, cut))
    want = torch.nn.functional.kl_div(q, p, log_target=True, reduction='batchmean')
    assert s.rows.kl[0] == pytest.approx(float(want), rel=1e-4) and s.curve(keys[0])[1][1] == s.rows.kl[0] > 0


def test_a_layer_of_one_unit_cannot_be_cut_and_is_not_robust():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.ReLU(), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 10))
    xb = torch.rand(16, 1, 8, 8); sc = methods()['magnitude'](net, None, graph=trace(net, xb), unit='channel')
    s = sensitivity(net, sc, [.5], xb=xb)
    assert list(s.rows.layer) == ['3'] and 'of its 1 units none goes' in s.fixed['1']
    spared = sensitivity(net, sc, [.5], xb=xb, keep=('3',))
    assert len(spared.rows) == 0 and 'of its 8 units none goes' in spared.fixed['3']


def test_inputs_of_other_forms_and_targets():
    "Two inputs by name, an output dictionary, targets that are numbers: the output error is all that is left."
    class Both(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)
        def forward(self, x, z): return dict(y=self.c((self.a(x)+self.b(z)).relu()))
    torch.manual_seed(1); net, xb = Both(), dict(x=torch.rand(20, 4), z=torch.rand(20, 3))
    sc = methods()['magnitude'](net, None, graph=trace(net, xb), unit='channel')
    s = sensitivity(net, sc, [.5], xb=xb, bs=5)
    assert s.whole is None and s.rows.k.isna().all() and len(s.rows) == 1 and 0 < s.rows.error[0] < 9
    rows = [(xb['x'][i], xb['z'][i], torch.rand(2)) for i in range(20)]
    class Plain(Both):
        def forward(self, x, z): return super().forward(x, z)['y']
    plain = Plain(); plain.load_state_dict(net.state_dict())
    t = sensitivity(plain, sc, [.5], dl=DataLoader(rows, batch_size=5))
    assert t.rows.error[0] == pytest.approx(s.rows.error[0], rel=1e-6) and t.whole is None
    with pytest.raises(ValueError, match="by='loss': needs class numbers"):
        sensitivity(plain, sc, [.5], dl=DataLoader(rows, batch_size=5), by='loss')


def test_facts_are_what_the_counters_say():
    net, xb = build('resnet20', 1, 10, 8, seed=0), torch.rand(2, 1, 8, 8)
    f = facts(net, xb, trace(net, xb))
    assert (f['params'], f['macs']) == (count_params(net), count_macs(net, xb)) and set(f['norms'].values()) == {2}


def test_plots(learn):
    s = sensitivity(learn, scores_of(learn), [.3, .6], n=64)
    ax = s.plot().axes[0]
    assert len(ax.containers) == 2 and [o.get_text() for o in ax.get_legend().get_texts()] == ['a and 1 tied', 'c']
    assert s.plot(layers='c', by='accuracy').axes[0].get_ylabel() == 'accuracy, %'
    net, xb = build('resnet20', 1, 10, 8, seed=0), torch.rand(8, 1, 8, 8)
    sc = methods()['magnitude'](net, None, graph=trace(net, xb), unit='channel')
    many = sensitivity(net, sc, [.5], xb=xb).plot().axes[0]
    assert 'cannot be cut' in [o.get_text() for o in many.texts]
    assert [o.get_text() for o in many.get_yticklabels()][-1] == 'fc' and many.images


@pytest.mark.parametrize('kw,says', [
    (dict(sparsities=[.5, .2]), 'sparsities=.*ascending'), (dict(sparsities=[]), 'sparsities'),
    (dict(sparsities=[50]), r'sparsities.*did you mean 0.5'), (dict(by='f1'), "by='f1'"),
    (dict(xb=torch.rand(2, 1, 8, 8), dl=[(1, 2)]), 'dl'), (dict(scope='global'), 'scope'), (dict(n=0), 'n=0')])
def test_wrong_calls(learn, kw, says):
    with pytest.raises((ValueError, TypeError), match=says): sensitivity(learn, scores_of(learn), **kw)


def test_wrong_models_and_scores(learn):
    sc = scores_of(learn)
    with pytest.raises(ValueError, match='a model has no data'): sensitivity(learn.model, sc)
    with pytest.raises(ValueError, match='ranks'): sensitivity(learn, Scores({'fc': torch.rand(5)}, 'rank'))
    empty = DataLoader(TensorDataset(torch.rand(0, 1, 8, 8), torch.zeros(0).long()))
    with pytest.raises(ValueError, match='dl: no batches'): sensitivity(learn.model, sc, dl=empty)
    bad = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.full((4,), 77)))
    with pytest.raises(ValueError, match='out of range'): sensitivity(learn.model, sc, dl=bad)
