"""Sampled weights: probabilities by their formulas, budgets, unbiasedness, and what stays untouched."""
import copy, math, pytest, torch, warnings
import numpy as np
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.allocate import allocate
from neuronprune.core import generator, kappa
from neuronprune.masks import Mask, Scores
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.sampling import _targets, cut, probabilities, sampling, uniform
from neuronprune.surgery import apply, difference, shrink
from neuronprune.retrain import sink

def net(seed=0): return build('mlp', 1, 10, 8, seed=seed)
def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed); return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))
def scale_of(mask): return torch.cat([v.flatten() for v in mask.scale.values()])

# Probabilities

@given(st.lists(st.lists(st.sampled_from([0., 1., -2., .5, -.25]), min_size=4, max_size=4), min_size=1, max_size=3))
def test_probabilities_are_their_formulas(w):
    for row,u,l1,l2,mix,rel in zip(w, *[probabilities(torch.tensor(w), *o).tolist()
                                        for o in (['uniform'], ['l1'], ['l2'], ['l1+l2'], ['l1+l2', 'released'])]):
        a, b = [abs(o) for o in row], [o*o for o in row]; sa, sb = sum(a) or 1, sum(b) or 1
        assert l1 == pytest.approx([o/sa for o in a]) and l2 == pytest.approx([o/sb for o in b])
        assert (mix == pytest.approx([(o/sa+p/sb)/2 for o,p in zip(a, b)])
                and rel == pytest.approx([(o+p)/((sa+sb) if any(row) else 1) for o,p in zip(a, b)]))
        assert u == pytest.approx([(o > 0)/(sum(p > 0 for p in a) or 1) for o in a])

def test_rows_are_those_of_the_outputs():
    for s in ((3, 4, 2, 2), (3, 5), (2, 3, 4)):
        q = probabilities(torch.randn(s, generator=generator(0)), 'l1')
        assert q.shape == s and q.dtype == torch.float64 and np.allclose(q.flatten(1).sum(1), 1)

def test_tiny_and_huge_weights():
    w = torch.tensor([[1., -3.]], dtype=torch.float64)
    for s in (1e-200, 1e-30, 1e30, 1e200): assert probabilities(w*s, 'l2')[0].tolist() == pytest.approx([.1, .9])

@pytest.mark.parametrize('bad', (float('nan'), float('inf')))
def test_bad_weights_name_the_layer(bad):
    m = net(); m.fc2.weight.data[0, 0] = bad
    for f in (uniform, sampling):
        with pytest.raises(ValueError, match='fc2.weight'): f(m)

def test_bad_options():
    with pytest.raises(ValueError, match="norm='uniform'"): sampling(net(), norm='uniform')
    with pytest.raises(ValueError, match="l1\\+l2"): sampling(net(), norm='l2', compat='released')
    with pytest.raises(ValueError, match='compat'): sampling(net(), norm='l1+l2', compat='paper')
    with pytest.raises(ValueError, match='unit'): uniform(net(), unit='group')
    with pytest.raises(ValueError, match='seed'): sampling(net(), seed=-1)

def test_shared_weights_are_scaled_once():
    m = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)); m[2].weight = m[0].weight
    s = sampling(m)
    assert all(list(o) == ['0'] and o.skipped == {'2': "it shares its weight with '0'"} for o in (s, uniform(m)))
    w = m[0].weight.detach().clone(); mask = cut(s, .5); apply(m, mask)
    assert torch.allclose(m[2].weight, w*mask.scale['0'])

# Budgets

@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=12), st.floats(0, 1))
def test_targets(rows, share):
    width = np.array([a for a,_ in rows]); nnz = np.array([min(o) for o in rows]); budget = round(share*width.sum())
    t = _targets(width, nnz, budget); lo = np.minimum(nnz, 1)
    assert (t >= lo).all() and (t <= nnz).all() and t.sum() == min(max(budget, lo.sum()), nnz.sum())
    free = (t > lo) & (t < nnz)                       # rows that no limit holds have one density, to one weight
    if free.any():
        r = t[free]/width[free]; assert (r.max()-r.min()) <= 1/width[free].min() + 1/width[free].max() + 1e-9

@pytest.mark.parametrize('sparsity', (.1, .5, .9, .99))
def test_the_expected_number_is_the_budget(sparsity):
    m = net(); s = sampling(m, norm='l2'); n = sum(v.numel() for v in s.values()); mask = cut(s, sparsity)
    assert abs((1-mask.meta['expected'])*n - kappa(n, sparsity)) <= 2
    assert (mask.meta['achieved'] == pytest.approx(mask.sparsity) and abs(mask.sparsity-sparsity) < .02
            and mask.meta['requested'] == sparsity)
    assert mask.meta['layers'] == pytest.approx({k:1-v.float().mean().item() for k,v in mask.items()})

def test_every_layer_and_neuron_loses_the_same_share():
    got = np.mean([[float(v.float().mean()) for v in cut(uniform(net()), .7, seed=i).values()] for i in range(20)],
                  axis=0)
    assert np.allclose(got, .3, atol=.01)

def test_the_mean_number_over_seeds():
    s = sampling(small(), norm='l1'); n = sum(v.numel() for v in s.values())
    kept = [cut(s, .5, seed=i).counts()[0] for i in range(400)]
    assert abs(np.mean(kept)-kappa(n, .5)) < 4*np.std(kept)/20 + 1 and len(set(kept)) > 1

def test_a_budget_below_one_weight_per_neuron_warns_and_keeps_one():
    with pytest.warns(UserWarning, match='sampling: sparsity 0.95 is out of reach, 0.875 achieved'):
        mask = cut(sampling(small()), .95)
    assert all((v.sum(1) == 1).all() for v in mask.values())

@given(st.data())
@settings(max_examples=60)
def test_no_layer_is_emptied_and_a_missed_budget_warns(data):
    """Random zeros, whole rows and layers of them: what can be drawn is drawn, every layer keeps a weight,
    and a warning stands where the budget cannot be met."""
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=1, max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    norm, sparsity = (data.draw(st.sampled_from(['uniform', 'l1', 'l2'])),
                      data.draw(st.sampled_from([.1, .3, .5, .8, .95])))
    ws = {str(i):torch.tensor(rng.uniform(.5, 1, o)*(rng.random(o) < rng.choice([0, .3, 1])
                                                     *rng.choice([0, 1, 1], (o[0], 1)))) for i,o in enumerate(shapes)}
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        mask = cut(Scores({k:probabilities(w, norm) for k,w in ws.items()}, 'weight', method='sampling'), sparsity)
    budget = kappa(sum(w.numel() for w in ws.values()), sparsity)
    rows = sum(int((w != 0).any(1).sum()) for w in ws.values())
    bare, alive = sum(not w.any() for w in ws.values()), sum(int((w != 0).sum()) for w in ws.values())
    if budget == sum(w.numel() for w in ws.values()): return
    assert (all(v.any() for v in mask.values())
            and all(int(mask[k].sum()) == 1 if not w.any() else not mask[k][w == 0].any() for k,w in ws.items()))
    assert bool(got) == (not rows+bare <= budget <= alive+bare)
    for o in got: assert f'{sparsity} is out of reach, {mask.sparsity:.4g} achieved' in str(o.message)

def test_a_layer_of_zeros_keeps_what_it_had():
    m = small(); m[3].weight.data.zero_(); first = cut(sampling(m), .5); was = first['3'].nonzero().tolist()
    one = sink(sampling(m), Mask({'1':first['1'], '3':torch.zeros(3, 6, dtype=torch.bool).index_put(
        (torch.tensor(2), torch.tensor(4)), torch.tensor(True))}, 'weight'))
    assert was == [[0, 0]] and cut(one, .6)['3'].nonzero().tolist() == [[2, 4]]

# What a mask does

@pytest.mark.parametrize('norm', ('uniform', 'l1', 'l2', 'l1+l2'))
@pytest.mark.parametrize('sparsity', (.1, .4, .8))
def test_unbiased(norm, sparsity):
    gen = generator(1); w = (.2+.8*torch.rand(6, 8, generator=gen))*torch.randn(6, 8, generator=gen).sign()
    # 2,000 independent copies of the layer
    s = Scores({'a': probabilities(w.repeat(2000, 1), norm)}, 'weight', method='sampling')
    f = cut(s, sparsity).scale['a'].view(2000, 6, 8).double()
    z = (f.mean(0)-1)/(f.std(0)/2000**.5).clamp(min=1e-9)
    assert z.abs().max() < 4

def test_apply_multiplies_the_factors_in():
    m = net(); w = {k:v.detach().clone() for k,v in m.named_parameters()}; mask = cut(sampling(m), .6); apply(m, mask)
    for k,v in m.named_parameters():
        if k.endswith('weight'):
            f = mask.scale[k[:-7]]
            assert torch.allclose(v, w[k]*f) and torch.equal(v != 0, mask[k[:-7]]) and (v*w[k] >= 0).all()
        else: assert torch.equal(v, w[k])

def test_zeros_stay_zero_and_full_rows_stay_exact():
    m = small(); m[1].weight.data[:, 3:] = 0; w = m[1].weight.detach().clone()
    with pytest.warns(UserWarning, match='uniform: sparsity 0.35 is out of reach, 0.5 achieved'):
        mask = cut(uniform(m), .35) # each row has only three non-zeros
    assert torch.equal(mask['1'], w != 0) and (mask.scale['1'][w != 0] == 1).all()

def test_sparsity_zero_is_bit_identical():
    m = net(); before = copy.deepcopy(m.state_dict()); m.fc1.weight.data[0, 0] = 0.; before['fc1.weight'][0, 0] = 0.
    mask = cut(uniform(m), 0); assert mask.scale == {} and mask.sparsity == 0 and mask.meta['achieved'] == 0
    apply(m, mask); assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

def test_seeds():
    m = net(); a, b, c = cut(sampling(m, seed=1), .5), cut(sampling(m, seed=1), .5), cut(sampling(m, seed=2), .5)
    assert (torch.equal(scale_of(a), scale_of(b)) and not torch.equal(scale_of(a), scale_of(c))
            and torch.equal(scale_of(cut(sampling(m, seed=2), .5, seed=1)), scale_of(a)))

def test_cut_twice_is_the_same_and_leaves_the_scores(): 
    s = sampling(net()); before = {k:v.clone() for k,v in s.items()}; a, b = cut(s, .2), cut(s, .2); cut(s, .9)
    assert torch.equal(scale_of(a), scale_of(b)) and all(torch.equal(v, before[k]) for k,v in s.items())

def test_saved_mask_comes_back(tmp_path):
    mask = cut(sampling(small()), .5); mask.save(tmp_path/'m'); back = Mask.load(tmp_path/'m')
    assert torch.equal(scale_of(back), scale_of(mask)) and back.meta == mask.meta

def test_shrunk_network_is_scaled_once():
    m = build('lenet5', 1, 10, 20, seed=0); x = torch.rand(8, 1, 20, 20); g = trace(m, x)
    mask = cut(sampling(m, graph=g), .9)
    assert difference(apply(copy.deepcopy(m), mask), shrink(m, mask, x), x) <= 1e-5

def test_a_second_round_prunes_what_is_left():
    m = net(); first = cut(sampling(m), .5); apply(m, first); second = cut(sampling(m), .8)
    assert all((second[k] <= first[k]).all() for k in first) and abs(second.sparsity-.8) < .02

def test_random_is_not_reweighed_but_uniform_is():
    mask = cut(uniform(net()), .7); f = scale_of(mask)
    assert set(mask.scale) and f[f > 0].mean() > 2 and abs(f.mean()-1) < .01

# Channels

def test_uniform_channels():
    m = build('lenet5', 1, 10, 20); g = trace(m, torch.rand(1, 1, 20, 20)); s = uniform(m, unit='channel', graph=g)
    mask = cut(s, .5)
    assert (list(s) == ['conv2:in', 'fc1:in', 'fc2:in', 'fc3:in'] and 'own input' in s.skipped['conv1']
            and mask.scale == {} and not mask.meta.get('draws'))
    assert (s['fc1:in'].view(16, 4).std(1).max() == 0
            and [round(float(v.float().mean()), 6) for v in mask.values()] == [.5]*4)
    assert not torch.equal(uniform(m, unit='channel', graph=g, seed=1)['fc3:in'], s['fc3:in'])

def test_residual_channels_share_one_draw():
    m = build('resnet20', 1, 10, 8); g = trace(m, torch.rand(1, 1, 8, 8)); s = uniform(m, unit='channel', graph=g)
    seen = {}
    for k,v in s.items():
        for b,u in zip(g.in_slots[k[:-3]].tolist(), v.tolist()): assert seen.setdefault(b, u) == u
    x = torch.rand(4, 1, 8, 8); mask = cut(s, .4)
    assert difference(apply(copy.deepcopy(m), mask), shrink(m, mask, x), x) <= 1e-5

def test_channel_scores_of_other_methods_are_refused():
    m = net(); s = sampling(m, graph=trace(m, torch.rand(1, 1, 8, 8))).to_channels()
    with pytest.raises(ValueError, match="unit='channel'"): cut(s, .5)
    with pytest.raises(TypeError, match='scores'): cut(Mask.ones_like(s), .5)
    with pytest.raises(ValueError, match='sparsity'): cut(sampling(m), 1.)
