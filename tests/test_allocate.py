"""Budgets are met exactly, edges hold, and equal questions get equal answers; checked against a slow allocator."""
import math, warnings
from fractions import Fraction
import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from neuronprune.allocate import allocate, ratios, weights_left
from neuronprune.core import generator, kappa, layers
from neuronprune.masks import Mask, Scores
from neuronprune.graph import trace
from neuronprune.inputs import readers
from neuronprune.models import build
from neuronprune.surgery import shrink
from neuronprune.retrain import narrow, sink
from test_graph import X, nets, partition

def quiet(*a, **kw):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return allocate(*a, **kw)

sparsities = st.one_of(st.sampled_from([0, .1, .25, .5, .9, .99]), st.floats(0, 1, exclude_max=True))
same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
gone = lambda m: sum(int((~v).sum()) for v in m.values())

@st.composite
def scores(draw, unit=None, ties=True):
    "One to four layers; values repeat often when `ties`."
    unit = unit or draw(st.sampled_from(['weight', 'channel', 'group'])); vals, labels, cost = {}, {}, {}
    gen = generator(draw(st.integers(0, 2**20)))
    for k in range(draw(st.integers(1, 4))):
        shape = draw(st.tuples(*[st.integers(1, 6)]*{'weight': 2, 'channel': 1, 'group': 2}[unit])); k = f'l{k}'
        vals[k] = (torch.randint(0, 4, shape, generator=gen).float() if ties and draw(st.booleans())
                   else torch.rand(shape, generator=gen))
        cost[k] = torch.randint(1, 9, shape, generator=gen)
        if unit == 'group': labels[k] = tuple(torch.arange(n) for n in shape)
    return Scores(vals, unit, labels=labels, cost=cost)

@settings(max_examples=150)
@given(scores(), sparsities, st.sampled_from(['global', 'layer']), st.sampled_from([None, 'auto', 'mean', 'max']))
def test_removes_exactly_as_many_as_asked(sc, s, scope, normalize):
    mask = quiet(sc, s, scope=scope, normalize=normalize, of='units')
    assert (list(mask) == list(sc) and all(mask[k].shape == sc[k].shape and mask[k].dtype == torch.bool for k in sc)
            and mask.unit == sc.unit)
    rows = lambda v: len(v) if sc.unit == 'group' else 1
    if scope == 'global':
        n, safe = sum(v.numel() for v in sc.values()), sum(map(rows, sc.values()))
        assert (gone(mask) == min(n-kappa(n, s), n-safe)
                and math.isclose(mask.meta['achieved'], gone(mask)/n, abs_tol=1e-12))
    else:
        assert all(int((~mask[k]).sum()) == min(v.numel()-kappa(v.numel(), s), v.numel()-rows(v)) for k,v in sc.items())
    for k,v in mask.items(): assert (v if sc.unit == 'group' else v.view(1, -1)).any(1).all()

@settings(max_examples=100)
@given(scores(ties=True), sparsities, st.sampled_from(['global', 'layer']))
def test_matches_a_slow_allocator(sc, s, scope):
    "Remove one by one the lowest (score, position), skipping what must stay."
    mask = quiet(sc, s, scope=scope, normalize=None, of='units')
    units = [(v.flatten()[i].item(), j, i, k) for j,(k,v) in enumerate(sc.items()) for i in range(v.numel())]
    row = lambda k, i: (k, i//sc[k].shape[1]) if sc.unit == 'group' else (k, 0)
    best, safe = {}, set()
    for u in sorted(units): best[row(u[3], u[2])] = u[1:]
    for part in ([units] if scope == 'global' else [[u for u in units if u[3] == k] for k in sc]):
        budget, want = len(part)-kappa(len(part), s), set()
        for v,j,i,k in sorted(part):
            if len(want) < budget and best[row(k, i)] != (j, i, k): want.add((k, i))
        assert want == {(k, i) for _,_,i,k in part if not mask[k].flatten()[i]}

@settings(max_examples=80)
@given(scores(), sparsities, st.sampled_from(['params', 'macs']))
def test_budgets_in_parameters_are_reached_from_below(sc, s, of):
    if of == 'macs': sc.cost, sc.graph = sc.cost, Positions({k:dict(positions=3+i) for i,k in enumerate(sc)})
    mask = quiet(sc, s, of=of, tied=False); pos = lambda k: 1 if of == 'params' else sc.graph.layers[k]['positions']
    cost = {k:sc.cost[k]*pos(k) for k in sc}; total = sum(int(v.sum()) for v in cost.values())
    spent = sum(int(cost[k][~mask[k]].sum()) for k in sc)
    want = total*Fraction(str(float(s))); assert spent <= want
    rows = {k:(v if sc.unit == 'group' else v.view(1, -1)) for k,v in mask.items()}
    if any((v.sum(1) > 1).any() for v in rows.values()): assert want-spent < max(int(v.max()) for v in cost.values())
    assert math.isclose(mask.meta['achieved'], spent/total, abs_tol=1e-9)

class Positions:
    def __init__(self, layers): self.layers = layers

@settings(max_examples=80)
@given(scores(), sparsities, sparsities, st.data())
def test_more_sparsity_removes_a_superset(sc, s, t, data):
    if s > t: s, t = t, s
    kw = dict(of='units', normalize=data.draw(st.sampled_from([None, 'mean'])), min_keep=data.draw(st.integers(1, 3)),
              caps=data.draw(st.sampled_from([None, .3, .75])))
    a, b = quiet(sc, s, **kw), quiet(sc, t, **kw)
    assert all((b[k] <= a[k]).all() for k in sc)
    rows = lambda m, k: m[k] if sc.unit == 'group' else m[k].view(1, -1)
    for k in sc: assert (rows(b, k).sum(1) >= min(kw['min_keep'], rows(b, k).shape[1])).all()
    if kw['caps']: assert all(int(v.sum()) >= kappa(v.numel(), kw['caps']) for v in b.values())

@settings(max_examples=80)
@given(scores('channel'), sparsities, st.lists(st.integers(-20, 20), min_size=4, max_size=4))
def test_scaling_a_layer_changes_nothing_when_normalised(sc, s, powers):
    scaled = Scores({k:v*2.**p for (k,v),p in zip(sc.items(), powers)}, 'channel')
    assert same(quiet(sc, s), quiet(scaled, s)) and same(quiet(sc, s, scope='layer'), quiet(scaled, s, scope='layer'))
    assert same(quiet(sc, s), quiet(sc, s, normalize='mean'))

@settings(max_examples=60)
@given(scores('weight'), sparsities, st.integers(1, 5), st.sampled_from(['global', 'layer']))
def test_round_to(sc, s, r, scope):
    mask, plain = quiet(sc, s, round_to=r, scope=scope), quiet(sc, s, scope=scope)
    for k,v in mask.items():
        assert int(v.sum())%r == 0 or v.all(); assert (v >= plain[k]).all() and int(v.sum())-int(plain[k].sum()) < r
    if r == 1: assert same(mask, plain)

@settings(max_examples=60)
@given(scores(), st.floats(-1, 5), st.booleans())
def test_threshold(sc, t, layer):
    mask = quiet(sc, threshold=t, scope='layer' if layer else 'global')
    for k,v in sc.items():
        low, rows = v.double() < t, mask[k] if sc.unit == 'group' else mask[k].view(1, -1)
        assert (mask[k] >= ~low).all() and rows.any(1).all()
        low = low if sc.unit == 'group' else low.view(1, -1); assert (rows.sum(1) == (~low).sum(1).clamp(min=1)).all()
    assert same(mask, quiet(Scores({k:v for k,v in sc.items()}, sc.unit, labels=sc.labels), threshold=t))

T = torch.tensor
def test_equal_scores_go_first_index_first():
    sc = Scores({'b': torch.ones(3), 'a': torch.ones(3)}, 'channel')
    assert [[*v] for v in allocate(sc, .5).values()] == [[False, False, True], [False, True, True]]
    assert same(allocate(sc, .5), allocate(sc, .5)) and gone(allocate(sc, 0)) == 0 and gone(quiet(sc, .99)) == 4
    zero = Scores({'a': torch.zeros(4)}, 'channel')
    assert allocate(zero, .5)['a'].tolist() == [False, False, True, True]

def test_keep_patterns_and_caps():
    sc = Scores({k:torch.rand(4) for k in ('layer1.a', 'layer1.b', 'layer2.a')}, 'channel')
    assert (all(allocate(sc, .2, keep=['layer1*'])[k].all() for k in ('layer1.a', 'layer1.b'))
            and gone(allocate(sc, .2, keep=['*.a'])) == 2)
    assert (int(quiet(sc, .7, caps={'layer2.a': .25})['layer2.a'].sum()) == 3
            and allocate(sc, .3, caps={'layer1.b': 0})['layer1.b'].all())
    assert all(quiet(sc, .9, keep=['*'])[k].all() for k in sc)
    with pytest.warns(UserWarning, match='out of reach'): allocate(sc, .9, keep=['layer1*'])
    with warnings.catch_warnings():
        warnings.simplefilter('error'); allocate(sc, .75); allocate(sc, .3, keep=['layer1.a'])

sc = Scores({'a': torch.rand(4), 'b': torch.rand(4)}, 'channel')
@pytest.mark.parametrize('kw,err,said', [
    (dict(sparsity=50), ValueError, 'did you mean 0.5?'), (dict(sparsity=1.), ValueError, '[0, 1)'),
    (dict(sparsity=True), TypeError, 'got bool'), (dict(sparsity='.5'), TypeError, 'got str'),
    (dict(sparsity=float('nan')), ValueError, 'sparsity=nan'), (dict(), ValueError, 'exactly one of the two'),
    (dict(sparsity=.5, threshold=.1), ValueError, 'exactly one'),
    (dict(scope='layers'), ValueError, "did you mean 'layer'?"),
    (dict(of='parameters'), ValueError, "expected one of 'units', 'params', 'macs'"),
    (dict(normalize='l2'), ValueError, 'normalize='),
    (dict(reduce='avg'), ValueError, "reduce='avg'"), (dict(round_to=0), ValueError, 'round_to=0'),
    (dict(min_keep=0), ValueError, 'min_keep=0'), (dict(min_keep=1.5), TypeError, 'min_keep'),
    (dict(keep=['c']), ValueError, "keep='c'"), (dict(caps={'c': .5}), ValueError, "caps='c'"),
    (dict(caps=90), ValueError, 'did you mean 0.9?'),
    (dict(caps={'a': 1.1}), ValueError, "caps['a']=1.1: expected a fraction in [0, 1]"),
    (dict(caps=-.1), ValueError, 'caps['),
    (dict(keep=3), TypeError, 'keep: expected an Iterable, names or patterns of layers, got int'),
    (dict(keep=['a', 3]), TypeError, 'keep: expected a str'), (dict(caps='half'), TypeError, 'caps['),
    (dict(caps={3: .5}), ValueError, 'caps=3'),
    (dict(of='params'), ValueError, 'cost of a channel'), (dict(of='macs'), ValueError, 'trace(model, xb)')])
def test_errors(kw, err, said):
    with pytest.raises(err) as e:
        allocate(sc, **({'sparsity': .5} if kw and not {'sparsity', 'threshold'} & set(kw) else {}) | kw)
    assert said in str(e.value)

@pytest.mark.parametrize('bad', [float('nan'), '0.1', True])
def test_thresholds_are_checked(bad):
    with pytest.raises((ValueError, TypeError), match='threshold'): allocate(sc, threshold=bad)

def test_a_single_name_for_keep():
    assert allocate(Scores({'fc1': torch.zeros(4), 'fc2': torch.ones(4)}, 'channel'), .2, keep='fc1',
                    normalize=None)['fc1'].all()

# ---- caps, second keys, and what cannot be reached

@st.composite
def questions(draw):
    "Scores with many equal values, perhaps a second key, caps of some layers, and how the budget is counted."
    sc = draw(scores(ties=True)); gen = generator(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        sc = Scores(dict(sc), sc.unit, labels=sc.labels, cost=sc.cost,
                    tiebreak={k:torch.randint(0, 3, v.shape, generator=gen) for k,v in sc.items()})
    caps = draw(st.one_of(st.none(), st.sampled_from([0, .2, .5, .8, 1]),
                          st.fixed_dictionaries({}, optional={k:st.sampled_from([0, .3, .6, .9, 1.]) for k in sc})))
    return sc, dict(caps=caps, of=draw(st.sampled_from(['units', 'params'])),
                    scope=draw(st.sampled_from(['global', 'layer'])), min_keep=draw(st.integers(1, 2)), normalize=None)

def slowly(sc, s, caps, of, scope, min_keep, normalize):
    "(removed (layer, index), is the request out of reach?) one unit at a time, in whole numbers."
    caps = caps if isinstance(caps, dict) else dict.fromkeys(sc, caps)
    cost = {(k, i):1 if of == 'units' else int(c) for k,v in sc.items()
            for i,c in enumerate(sc.cost[k].expand(v.shape).flatten())}
    place = {u:(float(sc[u[0]].flatten()[u[1]]), float(sc.tiebreak[u[0]].flatten()[u[1]]) if sc.tiebreak else 0,
                list(sc).index(u[0]), u[1]) for u in cost}
    row = lambda u: (u[0], u[1]//sc[u[0]].shape[1] if sc.unit == 'group' else 0)
    order, safe = sorted(cost, key=place.get), set()
    for r in {row(u) for u in cost}: safe |= set([u for u in order if row(u) == r][-min_keep:])
    share = lambda us, s: Fraction(str(s))*sum(cost[u] for u in us)
    def fill(us, budget):
        took, spent = [], 0
        for u in us:
            if spent+cost[u] > budget: return took, spent, True
            took.append(u); spent += cost[u]
        return took, spent, False
    for k in sc:
        if caps.get(k) is None or caps[k] == 1: continue
        mine = [u for u in order if u[0] == k]; free = [u for u in mine if u not in safe]
        safe |= set(free) - set(fill(free, share(mine, caps[k]))[0])
    removed, short = set(), False
    for part in [order] if scope == 'global' else [[u for u in order if u[0] == k] for k in sc]:
        took, spent, full = fill([u for u in part if u not in safe], share(part, s)); removed |= set(took)
        short |= not full and any(spent+cost[u] <= share(part, s) for u in part if u in safe)
    return removed, short, cost

@settings(max_examples=200)
@given(questions(), sparsities)
def test_matches_a_slow_allocator_with_caps_and_second_keys(q, s):
    sc, kw = q; want, short, cost = slowly(sc, s, **kw)
    with warnings.catch_warnings(record=True) as w: warnings.simplefilter('always'); mask = allocate(sc, s, **kw)
    assert {(k, i) for k,v in mask.items() for i in (~v.flatten()).nonzero()[:,0].tolist()} == want
    assert len(w) == short and all(f'sparsity {s}' in str(o.message)
                                   and f"{mask.meta['achieved']:.4g} achieved" in str(o.message) for o in w)
    total = lambda us: sum(cost[u] for u in us)
    assert mask.meta['achieved'] == total(want)/total(cost) and list(mask.meta['layers']) == list(sc)
    for k,got in mask.meta['layers'].items():
        cap = kw['caps'].get(k, 1) if isinstance(kw['caps'], dict) else 1 if kw['caps'] is None else kw['caps']
        assert got == total(u for u in want if u[0] == k)/total(u for u in cost if u[0] == k) and got <= cap + 1e-12

@settings(max_examples=100)
@given(scores('group', ties=False), sparsities)
def test_one_more_block_would_exceed_the_target(sc, s):
    "With nothing in the way: below the target, and the next block in the order does not fit in."
    big = {k:torch.cat([v, torch.full((len(v), 1), 99.)], 1) for k,v in sc.items()} # the block that each row keeps
    cost = {k:torch.cat([sc.cost[k], torch.zeros(len(v), 1, dtype=int)], 1) for k,v in sc.items()}
    sc = Scores(big, 'group', labels={k:tuple(map(torch.arange, v.shape)) for k,v in big.items()}, cost=cost)
    with warnings.catch_warnings(): warnings.simplefilter('error'); mask = allocate(sc, s)
    flat = lambda d: torch.cat([v.flatten() for v in d.values()])
    spent, total, left = int(flat(cost)[~flat(mask)].sum()), int(flat(cost).sum()), flat(mask) & (flat(cost) > 0)
    nxt = int(flat(cost)[left][flat(sc)[left].argmin()]) if left.any() else math.inf
    assert spent <= total*Fraction(str(s)) < spent+nxt and mask.meta['of'] == 'params'

def blocks(n=3, rows=4, cols=5, **kw):
    "Equal blocks, each layer's scores above the one before."
    lab = (torch.arange(rows), torch.arange(cols)); ramp = torch.arange(rows*cols).view(rows, cols).float()
    return Scores({f'l{i}':ramp+i*rows*cols for i in range(n)}, 'group', labels={f'l{i}':lab for i in range(n)},
                  cost={f'l{i}':torch.tensor(10) for i in range(n)}, **kw)

def test_what_a_capped_layer_cannot_give_the_next_ones_give():
    got = lambda **kw: list(allocate(blocks(), .5, **kw).meta['layers'].values())
    assert (got() == got(caps=1) == [.8, .7, 0] and got(caps=.6) == [.6, .6, .3]
            and got(caps=dict(l0=.3)) == [.3, .8, .4] and got(caps=dict(l0=0, l1=1.)) == [0, .8, .7])

def test_a_cap_counts_what_can_go():
    "Block 3 is the last of its row and stays; the cap of one half is filled with the next block of the other row."
    sc = Scores({'a': T([[1., 2, 3], [10, 11, 12]])}, 'group', labels={'a': (torch.arange(2), torch.arange(3))})
    assert quiet(sc, .6, caps=.5)['a'].tolist() == [[False, False, True], [False, True, True]]

@pytest.mark.parametrize('of', ['units', 'params', 'macs'])
@pytest.mark.parametrize('scope', ['global', 'layer'])
@pytest.mark.parametrize('kw', [dict(caps=.5), dict(keep=['l0', 'l1'], caps=.5), dict(min_keep=3)], ids=str)
def test_out_of_reach_is_said(of, scope, kw):
    sc = blocks(); sc.graph = Positions({k:dict(positions=3) for k in sc})
    with pytest.warns(UserWarning,
                      match=rf"sparsity 0.7 of the {of} \(scope='{scope}'\) is out of reach, 0.\d+ achieved") as w:
        mask = allocate(sc, .7, of=of, scope=scope, **kw)
    assert len(w) == 1 and f"{mask.meta['achieved']:.4g} achieved" in str(w[0].message) and mask.meta['achieved'] < .55

def test_a_layer_spared_on_purpose_is_no_surprise():
    with warnings.catch_warnings():
        warnings.simplefilter('error'); mask = allocate(blocks(), .5, scope='layer', keep=['l0', 'l2'])
    assert list(mask.meta['layers'].values()) == [0, .5, 0]

def test_the_second_key_decides_between_equals_only():
    lab = {'a': (torch.arange(2), torch.arange(3))}; tb = {'a': T([[.3, .1, .4], [.2, .6, .5]])}
    assert (allocate(Scores({'a': torch.zeros(2, 3)}, 'group', labels=lab, tiebreak=tb), .5)['a'].tolist()
            == [[False, False, True], [False, True, True]])
    v = torch.tensor([[1., 2, 9], [3, 4, 9]])
    assert same(allocate(Scores({'a': v}, 'group', labels=lab, tiebreak=tb), .5),
                allocate(Scores({'a': v}, 'group', labels=lab), .5))

# ---- ties

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)
    def forward(self, x): h = self.a(x).relu(); return self.d(self.c((self.b(h) + h).relu()).relu())
g = trace(Residual(), torch.rand(1, 3))

@pytest.mark.parametrize('reduce,f', [('mean', np.mean), ('sum', np.sum), ('max', np.max), ('min', np.min)])
def test_ties_rank_by_the_reduced_score(reduce, f):
    a, b = np.array([[1., 6, 3, 5], [4., 0, 3.5, 1]])
    sc = Scores({'a': T(a), 'b': T(b), 'c': T([9., 9, 9])}, 'channel', graph=g)
    mask = allocate(sc, .3, reduce=reduce, normalize=None); order = np.argsort(f([a, b], 0), kind='stable')
    assert (torch.equal(mask['a'], mask['b']) and set((~mask['a']).nonzero()[:,0].tolist()) == set(order[:2])
            and mask.counts() == (5, 7) and mask['c'].all())
    assert mask.sparsity == 2/7

def test_achieved_counts_a_tie_once():
    mask = allocate(Scores({k:torch.rand(n) for k,n in dict(a=4, b=4, c=3).items()}, 'channel', graph=g), .3,
                    keep=['c'])
    assert mask.counts() == (5, 7) and mask.sparsity == mask.meta['achieved'] == 2/7

def test_untied_layers_are_independent():
    sc = Scores({'a': T([1., 2, 3, 4]), 'b': T([8., 1.5, 1, 9])}, 'channel', graph=g)
    mask = allocate(sc, .5, tied=False, normalize=None)
    assert (mask['a'].tolist() == [False, False, True, True] and mask['b'].tolist() == [True, False, False, True]
            and mask.counts() == (4, 8))
    assert same(mask, allocate(Scores(sc.units, 'channel'), .5, normalize=None))

@settings(max_examples=40)
@given(nets(), sparsities, st.sampled_from(['global', 'layer']), st.booleans(), st.integers(0, 99))
def test_tied_masks_of_random_networks(model, s, scope, rounded, seed):
    g = trace(model, X); gen = generator(seed)
    assume(g.removable)
    sc = Scores({k:torch.rand(g.layers[k]['n_out'], generator=gen) for k in g.removable}, 'channel', graph=g)
    mask = quiet(sc, s, scope=scope, round_to=2 if rounded else 1); kept, n = mask.counts()
    state = {}
    for k,v in mask.items():
        assert v.any()
        for b,o in zip(g.out_slots[k].tolist(), v.tolist()): assert state.setdefault(b, o) == o
    assert n == len(state) and kept == sum(state.values())
    if scope == 'global' and not rounded:
        assert (n-kept <= n-kappa(n, s)
                and (n-kept == n-kappa(n, s) or any(len(set(g.out_slots[k][v].tolist())) == 1 for k,v in mask.items())))
        if s <= .3 and all(len(set(o.tolist())) > 5 for k,o in g.out_slots.items() if k in sc):
            assert n-kept == n-kappa(n, s)
    if rounded:
        for k,v in mask.items(): left = len(set(g.out_slots[k][v].tolist())); assert left%2 == 0 or v.all()

def test_cost_of_a_tie_is_the_sum_of_its_members():
    sc = Scores({'a': T([1., 2, 3, 4]), 'b': T([1., 2, 3, 4]), 'c': T([9., 9, 9])}, 'channel', graph=g)
    for s,want in ((6/40, 0), (7/40, 1), (13/40, 1), (14/40, 2), (20/40, 2), (21/40, 3)):
        mask = quiet(sc, s, of='params', normalize=None)
        assert int((~mask['a']).sum()) == want and mask.meta['achieved'] == 7*want/40

def test_inputs_of_a_consumer():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(16, 2)); g = trace(net, torch.rand(1, 1, 2, 2))
    sc = Scores({'2:in': torch.arange(16.)}, 'channel', graph=g)
    mask = allocate(sc, .5); assert mask['2:in'].tolist() == [False]*8+[True]*8 and mask.meta['achieved'] == .5
    assert same(allocate(sc, .5, tied=False), mask)

def test_inputs_that_hang_together_count_once():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(16, 2)); g = trace(net, torch.rand(1, 1, 2, 2))
    assert allocate(Scores({'2:in': torch.arange(16.)}, 'channel', graph=g), .5).counts() == (2, 4)
    both = allocate(Scores({'0': torch.arange(4.), '2:in': torch.arange(16.)}, 'channel', graph=g), .5)
    assert both.counts() == (2, 4) and both.sparsity == both.meta['achieved']

def test_caps_of_tied_layers_count_their_own_weights():
    sc = Scores({'a': T([1., 2, 3, 4]), 'b': T([1., 2, 3, 4]), 'c': T([9., 9, 9])}, 'channel', graph=g)
    for caps,n in ((dict(a=.5), 2), (dict(b=.25), 1), (dict(a=.5, b=.25), 1), (dict(a=.2), 0)):
        assert int((~quiet(sc, .6, of='params', normalize=None, caps=caps)['a']).sum()) == n
    assert quiet(sc, .6, of='params', normalize=None, caps=dict(a=.5)).meta['layers'] == dict(a=.5, b=.5, c=2/3)

# ---- the whole network's weights

def slow_network(order, sizes, goal):
    """Channels (layer, unit) one by one in `order` from an MLP with these widths (inputs first, outputs last);
    the rule in plain words."""
    kept = list(sizes); left = lambda w: sum(a*b for a,b in zip(w, w[1:]))
    stopped, end = set(), len(order)
    for i,(l,_) in enumerate(order):
        if i >= end: break
        if l in stopped: continue
        less = [n-(j == l) for j,n in enumerate(kept)]
        if left(less) >= goal: kept = less; continue
        if left(kept) <= 1.005*goal: break
        stopped.add(l); later = [j for j in range(i+1, end) if order[j][0] == l]
        if later: end = later[0]
    return kept

@settings(max_examples=60)
@given(st.lists(st.integers(2, 40), min_size=4, max_size=5), st.floats(.02, .9), st.sampled_from(['global', 'layer']),
       st.integers(0, 999))
def test_weights_of_the_network_against_one_at_a_time(sizes, s, scope, seed):
    net = nn.Sequential(*[o for a,b in zip(sizes, sizes[1:]) for o in (nn.Linear(a, b), nn.ReLU())][:-1])
    sc = Scores({str(2*l):torch.rand(n, generator=generator(seed+l)) for l,n in enumerate(sizes[1:-1])}, 'channel',
                graph=trace(net, torch.rand(2, sizes[0])))
    units = [(l+1, u, float(v)) for l,k in enumerate(sc) for u,v in enumerate(sc[k].double())]
    best = {l:max((v, u) for k,u,v in units if k == l)[1] for l in range(1, len(sizes)-1)} # min_keep
    rank = {(l, u):sum(w < v for k,_,w in units if k == l) for l,u,v in units}
    key = (lambda o: o[2]) if scope == 'global' else (lambda o: (Fraction(rank[o[:2]]+1, sizes[o[0]]), o[2]))
    order = [o[:2] for o in sorted(units, key=key) if o[1] != best[o[0]]]
    goal = kappa(sum(a*b for a,b in zip(sizes, sizes[1:])), s)
    mask = quiet(sc, s, of='network', scope=scope, normalize=None)
    assert [int(v.sum()) for v in mask.values()] == slow_network(order, sizes, goal)[1:-1]

def test_layers_with_fine_channels_fill_the_budget():
    net = nn.Sequential(nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 400), nn.ReLU(), nn.Linear(400, 40))
    g = trace(net, torch.rand(2, 784))
    # thirty of the second for one of the first
    sc = Scores({'0': torch.arange(30.)*10, '2': torch.arange(400.)/3}, 'channel', graph=g)
    mask = allocate(sc, .5, of='network', normalize=None); a, b = (int(v.sum()) for v in mask.values())
    left, goal = 784*a+a*b+40*b, kappa(784*30+12000+16000, .5)
    assert goal <= left <= 1.005*goal and 784*a+a*(b+2)+40*(b+2) > 1.005*goal

def tied_scores(g, names, seed, ins=False):
    gen = generator(seed); size = lambda k: g.layers[k]['n_in' if ins else 'n_out']
    return Scores({f'{k}:in' if ins else k:torch.rand(size(k), generator=gen) for k in names}, 'channel', graph=g)

def cut_weights(model, mask, x):
    "Weights of the linear and convolution layers once the mask's channels have been cut."
    return sum(m.weight.numel() for m in layers(shrink(model, mask, x)).values())

CUTTABLE = ['seq', 'add', 'proj', 'cat', 'gate', 'dw', 'prelu']

@settings(max_examples=30)
@given(nets(CUTTABLE), st.booleans(), st.floats(.1, .95), st.integers(0, 99))
def test_weights_left_are_those_of_the_shrunken_network(model, ins, s, seed):
    g = trace(model, X); names = readers(g)[0] if ins else g.removable
    mask = quiet(tied_scores(g, names, seed, ins), s)
    assert weights_left(g, mask) == cut_weights(model, mask, X)

def separable(*widths):
    "Pointwise and depthwise convolutions in turn, two depthwise ones in a row between the first pair."
    C, ms = nn.Conv2d, [nn.Conv2d(2, widths[0], 3, padding=1)]
    for i,(a,b) in enumerate(zip(widths, widths[1:])):
        ms += [nn.ReLU(), *[C(a, a, 3, padding=1, groups=a) for _ in range(2 if i == 0 else 1)], nn.BatchNorm2d(a),
               nn.ReLU(), C(a, b, 1)]
    return nn.Sequential(*ms, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3)).eval()

@pytest.mark.parametrize('ins', [False, True])
@pytest.mark.parametrize('s', [.2, .9])
def test_weights_left_go_through_depthwise_layers(ins, s):
    for model,x in ((separable(6, 8, 5), X), (build('mobilenet_v3_small', 3, 10, 16, seed=0).eval(),
                                              torch.randn(2, 3, 16, 16, generator=generator(0)))):
        g = trace(model, x); sc = tied_scores(g, readers(g)[0] if ins else g.removable, 0, ins); mask = quiet(sc, s)
        assert weights_left(g, mask) == cut_weights(model, mask, x)
        half = quiet(sc, s, of='network'); left = cut_weights(model, half, x)
        assert left >= kappa(weights_left(g, {}), s) and half.meta['achieved'] == 1-left/weights_left(g, {})

def test_weights_left_of_an_untied_depthwise_mask():
    "A channel dropped behind the depthwise layer is read by nobody; one dropped before it leaves a row with a bias."
    m = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    g = trace(m, torch.rand(1, 2, 5, 5)); three = torch.arange(4) > 0
    assert (weights_left(g, {'1': three}) == weights_left(g, {'0': three, '1': three}) == 3*2 + 3*9 + 3*2
            and weights_left(g, {'0': three}) == 3*2 + 4*9 + 4*2)

def test_a_layer_keeps_its_first_channel():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(6, 2)
        def forward(self, x): return self.c(torch.cat([self.a(x), self.b(x)], 1).relu())
    m, x = Cat(), torch.rand(4, 3); g = trace(m, x)
    for mask in ({'c:in': torch.arange(6) > 2}, {'a': torch.zeros(2).bool()},
                 {'a': torch.zeros(2).bool(), 'b': torch.arange(4) > 1}):
        mask = Mask(mask, 'channel', graph=g); assert weights_left(g, mask) == cut_weights(m, mask, x)

def safe_atoms(atom, value, cost, caps, min_keep, keep):
    """Atoms that must stay: spared, the best of a key, and what is left once a layer has lost as much as its
    cap lets go."""
    safe = {a for k,ids in atom.items() if k in keep for a in ids}
    for ids in atom.values(): safe |= set(sorted(set(ids), key=value.get)[-min_keep:])
    for k,ids in atom.items():
        if k not in caps: continue
        free, room = [a for a in sorted(set(ids), key=value.get) if a not in safe], caps[k]*cost[k]*len(ids)
        while free and (c := cost[k]*ids.count(free[0])) <= room*(1+1e-12): room -= c; free.pop(0)
        safe |= set(free)
    return safe

@settings(max_examples=40)
@given(nets(CUTTABLE), st.booleans(), st.floats(.05, .9), st.sampled_from(['global', 'layer']), st.data())
def test_promises_of_a_budget_of_the_network(model, ins, s, scope, data):
    g = trace(model, X); sc = tied_scores(g, readers(g)[0] if ins else g.removable, data.draw(st.integers(0, 99)), ins)
    layer = lambda k: k.removesuffix(':in')
    caps, keep, min_keep = data.draw(
        st.fixed_dictionaries({}, optional={layer(k):st.sampled_from([.3, .6]) for k in sc})), data.draw(
        st.sets(st.sampled_from([layer(k) for k in sc]), max_size=1)), data.draw(st.integers(1, 2))
    mask = quiet(sc, s, of='network', scope=scope, normalize=None, caps=caps, keep=keep, min_keep=min_keep)
    total = weights_left(g, {}); goal, left = kappa(total, s), cut_weights(model, mask, X)
    assert left >= goal and mask.meta['achieved'] == 1-left/total
    for k,v in mask.items():
        assert (k not in sc
                or ((v.all() or layer(k) not in keep) and mask.meta['layers'][k] <= caps.get(layer(k), 1)+1e-12))
    atom = {k:(g.in_slots[layer(k)] if ins else g.out_slots[k]).tolist() for k in sc}; members = {}
    for k,ids in atom.items():
        assert len({a for a,o in zip(ids, mask[k].tolist()) if o}) >= min(min_keep, len(set(ids)))
        for i,a in enumerate(ids): members.setdefault(a, []).append((k, i))
    value = {a:np.mean([float(sc[k][i]) for k,i in o]) for a,o in members.items()}
    gone = {a for a,o in members.items() if not mask[o[0][0]][o[0][1]]}
    safe = safe_atoms(atom, value, {k:g.layers[layer(k)]['weights']/len(sc[k]) for k in sc},
                      {k:caps[layer(k)] for k in sc if layer(k) in caps}, min_keep, {k for k in sc if layer(k) in keep})
    assert not gone & safe
    if left <= 1.005*goal: return
    parts = {a:frozenset(p) for p in partition(atom.values()) for a in p}
    rank = {a:(sum(value[b] < value[a] for b in parts[a])+1)/len(parts[a]) for a in members}
    order = sorted(set(members) - safe - gone, key=value.get if scope == 'global' else lambda a: (rank[a], value[a]))
    place = {a:i for i,a in enumerate(order)}
    def overshoots(a):
        units = {k:v.clone() for k,v in mask.items()}
        for k,v in units.items(): v[(g.in_slots[layer(k)] if ins else g.out_slots[k]) == a] = False
        return weights_left(g, units) < goal
    queues = [[a for a in order if parts[a] == p] for p in set(parts.values())]; queues = [q for q in queues if q]
    stopped = [overshoots(q[0]) for q in queues]
    bound = min([place[q[1]] for q,o in zip(queues, stopped) if o and len(q) > 1], default=len(order))
    assert all(o or place[q[0]] > bound for q,o in zip(queues, stopped))

def test_budgets_of_the_network_are_not_nested():
    net = nn.Sequential(nn.Linear(20, 3), nn.ReLU(), nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))
    g = trace(net, torch.rand(2, 20)); found = []
    for seed in range(8):
        sc = tied_scores(g, ['0', '2'], seed); masks = [quiet(sc, i/40, of='network') for i in range(1, 32)]
        found.append(any((b[k] & ~a[k]).any() for a,b in zip(masks, masks[1:]) for k in sc))
    assert any(found)

def test_ranks_are_counted_in_units():
    sc = Scores({'a': torch.rand(4)}, 'rank'); assert allocate(sc, .5).counts() == (2, 4)
    for of in ('params', 'macs', 'network'):
        with pytest.raises(ValueError, match=f"of='{of}'.*lowrank.cut"): allocate(sc, .5, of=of)

# ---- rounds

@settings(max_examples=80)
@given(sparsities, st.integers(1, 12), st.sampled_from(['geometric', 'linear', 'cubic']))
def test_ratios_rise_to_the_end(s, n, schedule):
    r = ratios(s, n, schedule)
    assert len(r) == n and r[-1] == s and all(0 <= o < 1 for o in r) and all(a <= b + 1e-12 for a,b in zip(r, r[1:]))
    if schedule == 'geometric' and s < .99:
        d = [1, *[1-o for o in r]]; assert np.allclose([b/a for a,b in zip(d, d[1:])], (1-s)**(1/n))
    if schedule == 'linear': assert np.allclose(np.diff([0, *r]), s/n)

@pytest.mark.parametrize(
    'call', [lambda: ratios(90, 3), lambda: ratios(.5, 0), lambda: ratios(.5, 2, 'exp'), lambda: ratios(.5, 2.5)])
def test_ratios_check(call):
    with pytest.raises((ValueError, TypeError)): call()

def test_a_tie_with_unscored_members_has_the_same_layers_at_every_sparsity():
    class Residual(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        def forward(self, x): h = self.a(x).relu(); return self.c((self.b(h) + h).relu())
    g = trace(Residual(), torch.rand(1, 3))
    sc = Scores({'b': torch.arange(6.)}, 'channel', graph=g)
    little, much = allocate(sc, 0.), allocate(sc, .5)
    assert list(little) == list(much) == ['b', 'a'] and torch.equal(much['a'], much['b']) and little['a'].all()
    assert (little & much).counts() == much.counts() == (3, 6)

# ---- rounds

def in_rounds(sc, steps, **kw):
    "The mask after one cut per sparsity of `steps`, each from the same scores."
    mask = None
    for s in steps: mask = narrow(quiet(sink(sc, mask), s, **kw), mask)
    return mask

@settings(max_examples=150)
@given(scores(), st.lists(sparsities, min_size=2, max_size=4).map(sorted), st.sampled_from(['global', 'layer']),
       st.sampled_from(['units', 'params']), st.data())
def test_rounds_of_the_same_scores_give_the_mask_of_one(sc, steps, scope, of, data):
    if data.draw(st.booleans()):
        sc.tiebreak = {k:torch.rand(v.shape, generator=generator(len(steps))) for k,v in sc.items()}
    if data.draw(st.booleans()): sc.units = {k:v-.5 for k,v in sc.items()}
    kw = dict(scope=scope, of=of, normalize=data.draw(st.sampled_from(['auto', None, 'mean', 'max'])),
              caps=data.draw(st.sampled_from([None, .6])),
              min_keep=data.draw(st.integers(1, 2)), round_to=data.draw(st.sampled_from([1, 1, 2])))
    a, b = in_rounds(sc, steps, **kw), quiet(sc, steps[-1], **kw)
    assert same(a, b) and a.meta['achieved'] == b.meta['achieved'] and a.meta['layers'] == b.meta['layers']

@settings(max_examples=30)
@given(nets(), st.lists(sparsities, min_size=2, max_size=3).map(sorted), st.sampled_from(['global', 'layer']),
       st.sampled_from(['units', 'params', 'macs']),
       st.booleans(), st.sampled_from(['auto', None, 'max']), st.integers(0, 99))
def test_rounds_of_tied_channels_give_the_mask_of_one(model, steps, scope, of, tied, normalize, seed):
    g = trace(model, X); assume(g.removable); gen = generator(seed)
    sc = Scores({k:torch.rand(g.layers[k]['n_out'], generator=gen)+k.count('1') for k in g.removable}, 'channel',
                graph=g)
    kw = dict(scope=scope, of=of, tied=tied, normalize=normalize)
    assert same(in_rounds(sc, steps, **kw), quiet(sc, steps[-1], **kw))

@settings(max_examples=20)
@given(nets(), st.lists(sparsities, min_size=2, max_size=3).map(sorted), st.integers(0, 99))
def test_rounds_of_a_budget_of_the_network_leave_its_weights(model, steps, seed):
    """Not the same mask, a channel that is too large for one budget is not for the next;
    but never more weights than one channel beside it."""
    g = trace(model, X); assume(g.removable); gen = generator(seed)
    sc = Scores({k:torch.rand(g.layers[k]['n_out'], generator=gen) for k in g.removable}, 'channel', graph=g)
    a, b = in_rounds(sc, steps, of='network'), quiet(sc, steps[-1], of='network')
    first = quiet(sc, steps[0], of='network')
    assert all((a[k] <= first[k]).all() for k in first)
    assert math.isclose(a.meta['achieved'], 1-weights_left(g, a)/weights_left(g, {}), abs_tol=1e-12)
    if same(first, quiet(sc, 0., of='network')): assert same(a, in_rounds(sc, steps[1:], of='network'))
    assert not same(a, first) or same(b, first) or b.meta['achieved'] >= a.meta['achieved']

def test_what_is_gone_counts_in_no_mean():
    """Scores of dead units are worth nothing: 0 or 1000, the survivors are ranked the same,
    at the scale their layer had."""
    live = {'a': torch.tensor([1., 2, 3, 4]), 'b': torch.tensor([10., 20, 30, 40])}
    first = allocate(Scores(live, 'channel'), .25)
    assert [v.tolist() for v in first.values()] == [[False, True, True, True]]*2
    for dead in (0., 1000.):
        sc = Scores({k:torch.where(first[k], v*t, dead) for (k,v),t in zip(live.items(), (1, 7))}, 'channel')
        assert same(allocate(sink(sc, first), .5), allocate(Scores(live, 'channel'), .5))
    # no scale known: the mean of the survivors, 4.5 and 27.5
    bare = Mask({'a': torch.tensor([0, 0, 1, 1]).bool(), 'b': torch.ones(4).bool()}, 'channel')
    sc = sink(Scores({'a': torch.tensor([9., 9, 3, 6]), 'b': torch.tensor([20., 25, 30, 35])}, 'channel'), bare)
    assert [v.tolist() for v in allocate(sc, .375).values()] == [[False, False, False, True], [True]*4]

def test_what_is_gone_stays_gone_whatever_is_asked():
    sc = Scores({'a': torch.tensor([1., 2, 3, 4]), 'b': torch.tensor([5., 6, 7, 8])}, 'channel')
    gone = Mask({'a': torch.tensor([1, 0, 0, 0]).bool(), 'b': torch.ones(4).bool()}, 'channel')
    for kw in (dict(sparsity=.1), dict(threshold=0.), dict(sparsity=.1, scope='layer'), dict(sparsity=0, min_keep=3),
               dict(sparsity=0, keep='a'), dict(sparsity=.1, caps=.2), dict(sparsity=0, round_to=4)):
        assert same(quiet(sink(sc, gone), **kw), gone), kw
    w = Scores({k:v.view(2, 2) for k,v in sc.items()}, 'weight')
    gone = Mask({k:v.view(2, 2) for k,v in gone.items()}, 'weight')
    for kw in (dict(sparsity=.1), dict(threshold=0.), dict(sparsity=.1, scope='layer'), dict(sparsity=0, min_keep=3),
               dict(sparsity=0, keep='a')):
        assert same(quiet(sink(w, gone), **kw), gone), kw

def test_sunk_scores_are_saved_whole(tmp_path):
    sc = Scores({'a': torch.tensor([1., 2, 3, 4])}, 'channel'); sc = sink(sc, allocate(sc, .5)); sc.save(tmp_path/'s')
    back = Scores.load(tmp_path/'s')
    assert torch.equal(back.gone['a'], sc.gone['a']) and same(allocate(back, .75), allocate(sc, .75))

# ---- weights by the million

@settings(max_examples=250)
@given(scores('weight'), st.one_of(sparsities, st.just(None)), st.sampled_from(['global', 'layer']), st.data())
def test_selection_and_ranking_give_the_same_mask(sc, s, scope, data):
    "caps=1 caps nothing, but takes the way of the general case."
    sc.cost = {}
    sc.units = {k:v.to(data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])))
                for k,v in sc.items()}
    if data.draw(st.booleans()):
        sc.tiebreak = {k:torch.randint(0, 3, v.shape, generator=generator(7)).float() for k,v in sc.items()}
    if data.draw(st.booleans()):
        sc = sink(sc, Mask({k:torch.rand(v.shape, generator=generator(3)) > .3 for k,v in sc.items()}, 'weight'))
    kw = dict(sparsity=s, scope=scope, min_keep=data.draw(st.integers(1, 3)),
              keep=data.draw(st.sampled_from([(), 'l0', '*'])), of=data.draw(st.sampled_from(['units', 'params'])))
    if s is None: kw['threshold'] = data.draw(st.floats(-1, 3))
    with warnings.catch_warnings(record=True) as w1: warnings.simplefilter('always'); a = allocate(sc, **kw)
    with warnings.catch_warnings(record=True) as w2: warnings.simplefilter('always'); b = allocate(sc, caps=1., **kw)
    assert same(a, b) and a.meta == b.meta and [str(o.message) for o in w1] == [str(o.message) for o in w2]

def test_selection_costs_no_copy_in_double_precision():
    v = {f'l{i}':torch.rand(500, 1000, generator=generator(i)) for i in range(4)}; sc = Scores(v, 'weight')
    allocate(sc, .8)
    mask = allocate(sc, .8); flat = torch.cat([o.flatten() for o in v.values()])
    assert gone(mask) == 1_600_000 and torch.equal(torch.cat([o.flatten() for o in mask.values()]),
                                                   flat > flat.kthvalue(1_600_000).values)
