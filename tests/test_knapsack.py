"Budgets: brute force over all choices, costs as the counters count them, and the whole way through `prune`."
import itertools, math
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.allocate import allocate
from neuronprune.core import methods
from neuronprune.costs import count_macs, count_params
from neuronprune.data import get_dls
from neuronprune.forms import unpacked
from neuronprune.graph import trace
from neuronprune.knapsack import Bill, Choice, _prices, _relaxed, _setting, _timed, _widened, bill_of, choices, solve
from neuronprune.latency import LatencyTable, _ratio, in_turns, latency_table, lookup
from neuronprune.masks import Scores
from neuronprune.models import build
from neuronprune.pipeline import prune
from neuronprune.sensitivity import Sensitivity, facts, together
from neuronprune.surgery import shrink
from neuronprune.train import fit, learner


class Wired(nn.Module):
    "A concatenation, a tie, a depthwise layer, a convolution that is flattened, norms with and without parameters."
    def __init__(self):
        super().__init__()
        conv = lambda i, o, **kw: nn.Conv2d(i, o, 3, padding=1, **kw)
        self.a, self.b, self.c, self.d = conv(1, 6), conv(1, 5, bias=False), conv(11, 6), conv(6, 6, groups=6)
        self.na, self.nc, self.nd = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)
        self.e, self.f, self.g = conv(6, 4, bias=False), nn.Linear(4*16, 7), nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x):
        h = self.na(self.a(x)).relu()
        t = self.nc(self.c(torch.cat([h, self.b(x).relu()], 1))).relu() + h
        return self.g(self.f(self.e(self.nd(self.d(t)).relu()).relu().flatten(1)).relu())*self.scale


def wired(seed=0):
    torch.manual_seed(seed); net, xb = Wired().eval(), torch.rand(3, 1, 4, 4)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine: nn.init.uniform_(m.weight, .5, 1.5); nn.init.normal_(m.bias)
    return net, xb, trace(net, xb)


class Patches(nn.Module):
    "Two pre-norm blocks on patches, with a position table and a class token; `unpacked`, it has heads to cut."
    def __init__(self, d=16):
        super().__init__()
        self.embed, self.head = nn.Linear(4, d), nn.Linear(d, 3)
        self.position, self.first = (nn.Parameter(torch.randn(*s, d)) for s in ((5,), (1, 1)))
        block = nn.TransformerEncoderLayer(d, 4, 12, dropout=0., batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(d), enable_nested_tensor=False)
    def forward(self, x):
        x = self.embed(x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(1, 3))
        return self.head(self.blocks(torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)+self.position)[:, 0])


class Words(nn.Module):
    "An output layer that shares its weight with the embedding, two layers with one, a scale for every channel."
    def __init__(self, d=10, words=7):
        super().__init__()
        self.emb, self.norm, self.out = nn.Embedding(words, d), nn.LayerNorm(d), nn.Linear(d, words, bias=False)
        self.a, self.b, self.gamma = nn.Linear(d, 12), nn.Linear(12, d), nn.Parameter(torch.rand(d))
        self.c = nn.Linear(d, 12); self.out.weight, self.c.weight = self.emb.weight, self.a.weight
    def forward(self, x):
        x = self.emb(x); return self.out(self.norm(x+self.gamma*self.b(self.a(x).relu()+self.c(x).tanh())))


def made_up(scores, net, xb, seed, steps=(.2, .5, .8)):
    "A `Sensitivity` with random rising curves."
    draw, rows, tied = np.random.default_rng(seed), [], {}
    for keys in together(scores):
        n = len(scores.graph.out_slots[keys[0]].unique()); tied[keys[0]] = keys
        losses = np.sort(draw.random(len(steps)))
        rows += [dict(layer=keys[0], sparsity=s, kept=k, units=n, error=v)
                 for s,v in zip(steps, losses) if (k := n-int(n*s)) < n]
    return Sensitivity(pd.DataFrame(rows), tied, {}, None, facts(net, xb, scores.graph))


def setting(seed=0):
    net, xb, g = wired(seed)
    scores = methods()['random'](net, None, graph=g, unit='channel', seed=seed)
    return net, xb, g, scores, made_up(scores, net, xb, seed)


def measured(of, net, xb): return count_params(net) if of == 'params' else count_macs(net, xb)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(.2, .95))
def test_solver_finds_what_brute_force_finds(seed, n, share):
    draw = np.random.default_rng(seed); sizes = draw.integers(2, 5, n)
    curves = [np.r_[0, np.cumsum(draw.random(k-1))] for k in sizes]
    offer = [Choice(str(i), [str(i)], np.arange(k), np.arange(k, 0, -1), v)
             for i,(k,v) in enumerate(zip(sizes, curves))]
    widths = [np.sort(draw.integers(1, 30, k))[::-1].astype(float) for k in sizes]
    bill = Bill(float(draw.integers(0, 20)), [w*draw.integers(0, 5) for w in widths])
    for t,u in itertools.combinations(range(n), 2):
        if draw.random() < .7: bill.pairs[t, u] = np.outer(widths[t], widths[u])*draw.random()
    every = list(itertools.product(*map(range, sizes)))
    cost, loss = [np.array([f(p) for p in every]) for f in
                  (bill.total, lambda p: sum(o.loss[i] for o,i in zip(offer, p)))]
    limit = cost.min() + share*(cost.max()-cost.min())
    bound, extra = _relaxed(bill, offer, limit, 9.) # true of every choice within the budget
    assert all(v >= bound+max(e[i] for e,i in zip(extra, p))-1e-6 for p,c,v in zip(every, cost, loss) if c <= limit)
    picked, how = solve(bill, offer, limit, gap=0.)
    assert bill.total(picked) <= limit*(1+1e-9) and how['status'] == 'optimal'
    assert how['loss'] == pytest.approx(loss[cost <= limit].min(), abs=1e-6)
    assert how['cost'] == pytest.approx(bill.total(picked))
    assert not any(bill.total([*picked[:t], i-1, *picked[t+1:]]) <= limit for t,i in enumerate(picked) if i)


def test_a_budget_below_everything_takes_the_narrowest():
    offer = [Choice('a', ['a'], np.arange(3), np.array([3, 1]), np.array([0., 1]))]
    picked, how = solve(Bill(10., [np.array([6., 2])]), offer, 5.)
    assert picked == [1] and how['status'] == 'infeasible' and how['cost'] == 12


def test_out_of_time_there_is_a_choice_and_an_honest_gap():
    draw = np.random.default_rng(0); n = 12; widths = np.arange(30., 10, -1)
    offer = [Choice(str(i), [str(i)], np.arange(30), widths.astype(int), np.cumsum(draw.random(20))) for i in range(n)]
    bill = Bill(0., [np.zeros(20)]*n, {(t, t+1):np.outer(widths, widths) for t in range(n-1)})
    limit = .5*bill.total([0]*n); picked, how = solve(bill, offer, limit, time_limit=0.)
    assert how['status'] == 'time_limit' and bill.total(picked) <= limit
    best = solve(bill, offer, limit)[1]
    assert best['status'] == 'optimal' and best['gap'] <= .001
    assert (1-how['gap'])*how['loss'] <= best['loss'] <= how['loss']


def test_what_is_left_of_a_budget_is_spent():
    "Where losses are equal the wider choice is taken, as far as the budget goes."
    offer = [Choice(k, [k], np.arange(3), np.array([3, 2, 1]), np.zeros(3)) for k in 'ab']
    bill = Bill(0., [np.array([3., 2, 1])]*2)
    assert _widened(bill, offer, [2, 2], 6.) == [0, 0] and bill.total(_widened(bill, offer, [2, 2], 5.)) == 5
    assert solve(bill, offer, 5.)[1]['cost'] == 5


def of_kind(kind):
    if kind == 'wired': return setting()
    torch.manual_seed(0)
    net, xb = ((unpacked(Patches()), torch.rand(3, 1, 4, 4)) if kind == 'patches' else
               (Words(), torch.randint(7, (3, 5))))
    g = trace(net.eval(), xb); scores = methods()['random'](net, None, graph=g, unit='channel', seed=0)
    return net, xb, g, scores, made_up(scores, net, xb, 0)

@pytest.mark.parametrize('of', ['params', 'macs'])
@pytest.mark.parametrize('kind', ['wired', 'patches', 'words'])
def test_every_choice_costs_what_the_shrunk_network_has(of, kind):
    "Concatenation, ties, depthwise layers and a flattened one; heads, trunk, tables; a shared weight; random choices."
    net, xb, g, scores, s = of_kind(kind)
    assert len(together(scores)) == dict(wired=4, patches=5, words=1)[kind]
    ids, order, was, parts, _ = _setting(scores, 'mean', 'mean')
    offer = choices(scores, s, order, was, parts, {}, 1, 1, ())
    bill = bill_of(scores, offer, _prices(g, of), s.facts['norms' if of == 'params' else 'heads'], s.facts[of])
    assert bill.total([0]*len(offer)) == measured(of, net, xb)
    draw = np.random.default_rng(1)
    from neuronprune.knapsack import _mask_of
    for _ in range(12):
        picked = [int(draw.integers(len(o.kept))) for o in offer]
        mask = _mask_of(scores, ids, was, offer, picked)
        assert measured(of, shrink(net, mask, xb), xb) == round(bill.total(picked))


@pytest.mark.parametrize('of', ['params', 'macs'])
@pytest.mark.parametrize('seed', [0, 1])
def test_allocation_is_the_best_of_all(of, seed):
    "Brute force over the masks of every combination of measured widths, counted on shrunk networks by the formulas."
    net, xb, g, scores, s = setting(seed)
    mask = allocate(scores, .5, scope='budget', of=of, sensitivity=s)
    b, whole = mask.meta['budget'], measured(of, net, xb)
    left = measured(of, shrink(net, mask, xb), xb)
    assert left == round(b['cost']) <= b['limit'] == whole/2 and mask.meta['achieved'] == pytest.approx(1-left/whole)
    ids, order, was, parts, _ = _setting(scores, 'mean', 'mean')
    offer = choices(scores, s, order, was, parts, {}, 1, 1, ())
    curves = {o.name:dict(zip(o.kept.tolist(), o.loss)) for o in offer}
    assert b['loss'] == pytest.approx(sum(curves[k][n] for k,(n,_) in b['widths'].items()))
    bill = bill_of(scores, offer, _prices(g, of), s.facts['norms' if of == 'params' else 'heads'], s.facts[of])
    few = [range(0, len(o.kept), max(1, len(o.kept)//4)) for o in offer]
    best = min(sum(o.loss[i] for o,i in zip(offer, p)) for p in itertools.product(*few) if bill.total(p) <= b['limit'])
    assert b['loss'] <= best*1.01 + 1e-9


def test_masks_keep_the_best_scores_and_ties_together():
    net, xb, g, scores, s = setting()
    mask = allocate(scores, .4, scope='budget', of='macs', sensitivity=s)
    assert torch.equal(mask['a'], mask['c']) and torch.equal(mask['a'], mask['d']) and mask.meta['scope'] == 'budget'
    for k in ('b', 'e', 'f'):
        assert not (~mask[k]).any() or scores[k][mask[k]].min() >= scores[k][~mask[k]].max()
    assert mask.counts()[0] == sum(n for n,_ in mask.meta['budget']['widths'].values())


def test_widths_in_eights_caps_and_spared_layers():
    net, xb = build('resnet20', 1, 10, 8, seed=0), torch.rand(4, 1, 8, 8); g = trace(net, xb)
    scores = methods()['magnitude'](net, None, graph=g, unit='channel')
    s = made_up(scores, net, xb, 0, steps=[i/10 for i in range(1, 10)])
    kw = dict(scope='budget', of='macs', sensitivity=s)
    mask = allocate(scores, .5, round_to=8, keep='layer3.0.conv1', caps={'layer2.0.conv1': .25}, **kw)
    kept = {k:n for k,(n,_) in mask.meta['budget']['widths'].items()}
    assert all(n % 8 == 0 for n in kept.values()) and int(mask['layer2.0.conv1'].sum()) >= 24
    assert mask['layer3.0.conv1'].all() and 'layer3.0.conv1' not in kept
    assert count_macs(shrink(net, mask, xb), xb) <= .5*count_macs(net, xb)
    with pytest.warns(UserWarning, match="scope='budget'\\) is out of reach"): few = allocate(scores, .999, **kw)
    assert few.meta['budget']['status'] == 'infeasible' and few.meta['achieved'] < .999
    assert allocate(scores, .9, min_keep=5, **kw)['layer1.0.conv1'].sum() >= 5


def test_what_has_gone_stays_gone():
    net, xb, g, scores, s = setting()
    first = allocate(scores, .3, scope='budget', of='macs', sensitivity=s)
    from neuronprune.retrain import sink
    second = allocate(sink(scores, first), .6, scope='budget', of='macs', sensitivity=s)
    assert all((first[k] | ~second[k]).all() for k in second)
    assert count_macs(shrink(net, second, xb), xb) == round(second.meta['budget']['cost'])
    assert second.meta['achieved'] >= .6


WRONG = [(dict(sensitivity=None), 'sensitivity=None'), (dict(of='units'), "of='units'"),
         (dict(of='latency'), 'latencies=None'), (dict(sparsity=None), 'sparsity=None'),
         (dict(sparsity=50), 'did you mean 0.5'), (dict(threshold=.1), 'threshold=0.1'),
         (dict(pattern='2:4'), "pattern='2:4'"), (dict(tied=False), 'tied=False'), (dict(scope='layer'), 'sensitivity'),
         (dict(keep='zz'), "keep='zz'"), (dict(keep='*'), 'no layer may be narrowed'), (dict(caps={'zz': .1}), 'caps'),
         (dict(sensitivity=5), 'sensitivity'), (dict(latencies=5), 'latencies'), (dict(round_to=0), 'round_to')]

@pytest.mark.parametrize('kw,says', WRONG)
def test_wrong_calls(kw, says):
    net, xb, g, scores, s = setting()
    with pytest.raises((ValueError, TypeError), match=says):
        allocate(scores, **{**dict(sparsity=.5, scope='budget', of='macs', sensitivity=s), **kw})


def test_wrong_scores():
    net, xb, g, scores, s = setting(); kw = dict(sparsity=.5, scope='budget', sensitivity=s)
    for sc,says in ((methods()['random'](net, None, graph=g, unit='weight'), "unit='weight'"),
                    (Scores(dict(scores), 'channel'), 'no graph'),
                    (Scores({'e:in': torch.rand(6)}, 'channel', graph=g), 'inputs')):
        with pytest.raises(ValueError, match=f"scope='budget': .*{says}"): allocate(sc, **kw)
    part = replace(s, rows=s.rows[s.rows.layer != 'e'], tied={k:v for k,v in s.tied.items() if k != 'e'})
    for status in ('interrupted', 'optimal'):
        with pytest.raises(ValueError, match="sensitivity: 'e' was not measured"):
            allocate(scores, .5, scope='budget', of='macs', sensitivity=replace(part, status=status))


# Milliseconds

def fake_table(net, xb, g, cost):
    "A table whose clock says what `cost` (rows, columns) says of each layer, and nothing else."
    layers = {n:(np.arange(1, l['n_out']+1), np.arange(1, l['n_in']+1),
                 cost(np.arange(1, l['n_out']+1)[:, None], np.arange(1, l['n_in']+1)[None]))
              for n,l in g.layers.items()}
    t = LatencyTable(layers, dict.fromkeys(layers, 1), 0., model=net, xb=xb,
                     record=dict(shares=[i/10 for i in range(1, 11)], clock='wall'))
    t.ms = t.predict(net); return t


def test_a_budget_of_milliseconds_is_moved_until_it_is_measured(monkeypatch):
    "The clock is 30 % slower on cut networks than the table believes; what is measured must fit all the same."
    net, xb = build('lenet300', 1, 10, 8, seed=0), torch.rand(8, 1, 8, 8); g = trace(net, xb)
    scores = methods()['magnitude'](net, None, graph=g, unit='channel')
    s = made_up(scores, net, xb, 0, steps=[i/10 for i in range(1, 10)])
    t = fake_table(net, xb, g, lambda r, c: r*c/1000)
    asked = []
    def measure(self, mask, n=15): asked.append(1); return 1.3*self.predict(shrink(net, mask, xb))
    monkeypatch.setattr(LatencyTable, 'measure', measure)
    mask = allocate(scores, .5, scope='budget', of='latency', sensitivity=s, latencies=t)
    b = mask.meta['budget']
    assert b['measured'] == pytest.approx(t.ms/2, rel=.05) and 2 <= len(asked) <= 6
    assert b['record']['shares'] and mask.meta['achieved'] == pytest.approx(1-b['measured']/t.ms)
    assert b['measured'] == pytest.approx(1.3*t.predict(shrink(net, mask, xb)))


def test_limits_close_in_on_a_budget_in_steps_and_equals_are_the_slowest():
    "A clock that jumps: 4 units measure 10, 5 measure 7, all below 4 measure 2; loss falls with the units up to 3."
    class Steps: measure = lambda self, units: {5:7., 4:4.8}.get(units, 10. if units > 5 else 2.)
    asked = []
    def run(limit):
        u = int(limit); asked.append(u); return [u], dict(loss=max(0., 3-u), cost=float(u), status='optimal')
    picked, how = _timed(run, lambda p: p[0], Steps(), 5.)
    assert picked == [4] and how['measured'] == 4.8 and len(asked) <= 6
    picked, how = _timed(run, lambda p: p[0], Steps(), 9.) # 4 and 5 lose nothing: the one that uses more of the budget
    assert picked == [5] and how['measured'] == 7.


def test_a_ratio_is_measured_until_it_is_sure():
    slow, fast = (nn.Sequential(*[nn.Linear(256, 256) for _ in range(k)]) for k in (8, 2)); xb = torch.rand(64, 256)
    assert .15 < _ratio(slow, fast, xb, 15, 3., 'thread') < .4
    assert _ratio(slow, fast, xb, 1, 0., 'wall') > 0 # no time at all


def test_lookup_is_bilinear():
    outs, ins = np.array([2, 4, 8]), np.array([1, 3]); ms = 1 + 2*outs[:, None] + 3*ins[None] + .5*outs[:, None]*ins
    r, c = np.meshgrid(np.arange(2, 9), np.arange(1, 4), indexing='ij')
    assert np.allclose(lookup((outs, ins, ms), r, c), 1 + 2*r + 3*c + .5*r*c)
    assert lookup((outs, ins, ms), np.array(1), np.array(9)) == ms[0, 1] # the nearest outside


def test_a_table_knows_its_layers_and_its_machine():
    net, xb, g = wired(); before = {k:v.clone() for k,v in net.state_dict().items()}
    t = latency_table(net, xb, g, shares=[.5, 1.], n=2)
    assert list(t.layers) == list(g.layers) and t.record['batch'] == 3
    assert t.record['threads'] == torch.get_num_threads()
    outs, ins, ms = t.layers['c']
    assert outs.tolist() == [3, 6] and ins.tolist() == [6, 11] and ms.shape == (2, 2) and (ms > 0).all()
    assert t.layers['a'][1].tolist() == [1] and t.layers['d'][1].tolist() == [6] # the images; depthwise
    assert t.layers['g'][0].tolist() == [3] # the output
    assert t.fit[1] >= 0 and t.predict(net) == pytest.approx(t.ms, rel=t.record['residual']+1e-6)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and len(t.frame()) == len(g.layers)
    assert t.plot().axes and 'residual' in repr(t)


def test_in_turns_tells_a_slow_network_from_a_fast_one():
    torch.manual_seed(0)
    slow, fast, xb = nn.Sequential(*[nn.Linear(400, 400) for _ in range(9)]), nn.Linear(400, 400), torch.rand(64, 400)
    a, b = in_turns([slow, fast], xb, 5, clock='thread')
    assert a > 2*b


# The engine

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64)


def trained(dls):
    learn = learner(build('lenet300', 1, 10, 8, seed=0), dls, lr=.1); fit(learn, 1, seed=0)
    return learn


@pytest.mark.parametrize('kw', [dict(), dict(rounds=2), dict(shrink=True), dict(sizes=[.7, .4]),
                                dict(sizes=[.7, .4], start='dense'), dict(sizes=[.7, .4], shrink=False)])
def test_prune_measures_what_is_missing(dls, kw):
    learn, given = trained(dls), kw.get('sizes')
    whole = count_params(learn.model)
    res = prune(learn, 'magnitude', None if given else .6, scope='budget', of='params', fine_tune_epochs=1,
                latency=False, **kw)
    b = res.mask.meta['budget']
    assert b['whole'] == whole and b['status'] == 'optimal' and res.mask.unit == 'channel'
    assert .95*.4*whole <= count_params(shrink(learn.model, res.mask, dls.valid.one_batch()[0])
                                        if kw.get('shrink') is False or not (given or kw.get('shrink')) else
                                        res.model) <= .4*whole


def test_prune_to_milliseconds_and_wrong_calls(dls):
    res = prune(trained(dls), 'magnitude', .2, scope='budget', of='latency', fine_tune_epochs=0, latency=False)
    assert res.mask.meta['budget']['record']['batch'] == 64 and 'measured' in res.mask.meta['budget']
    with pytest.raises(ValueError, match="scope='budget': bestof searches"):
        prune(trained(dls), 'bestof', .5, scope='budget')


def test_a_chain_goes_on_where_it_was(dls, tmp_path):
    "Interrupted after its first size and taken up again, it ends where it would have ended."
    kw = dict(sizes=[.7, .4], scope='budget', fine_tune_epochs=1, latency=False)
    whole = prune(trained(dls), 'magnitude', folder=tmp_path/'whole', **kw)
    import neuronprune.pipeline as mod
    one = mod._one_size
    def late(chain, i, folder):
        if i: raise KeyboardInterrupt
        return one(chain, i, folder)
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(mod, '_one_size', late); prune(trained(dls), 'magnitude', folder=tmp_path/'part', **kw)
    again = prune(trained(dls), 'magnitude', folder=tmp_path/'part', **kw)
    assert all(torch.equal(whole.mask[k], again.mask[k]) for k in whole.mask)


def test_a_study_takes_it(dls):
    from neuronprune.parameters import check_values, complete
    p = check_values(complete(dict(method='magnitude', model='lenet300', scope='budget', of='macs', sparsity=.5)))
    assert p['scope'] == 'budget'
    with pytest.raises(ValueError, match='scope'): check_values(complete(dict(scope='budgt')))
