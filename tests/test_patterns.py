"N:M patterns: against a loop over runs, through `allocate` and through `prune`."
from itertools import product
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.allocate import allocate
from neuronprune.data import get_dls
from neuronprune.masks import Scores
from neuronprune.models import build
from neuronprune.patterns import best_of, pattern_of, semi_structured
from neuronprune.pipeline import prune
from neuronprune.train import fit, learner


def by_hand(v, n, m, gone, second):
    "The same, one run at a time with Python's sort."
    res = torch.zeros(v.shape, dtype=torch.bool)
    for o,k,*at in product(range(v.shape[0]), range(v.shape[1]//m), *map(range, v.shape[2:])):
        ids = [(o, k*m+i, *at) for i in range(m)]
        ids.sort(key=lambda i: (not gone[i], float(v[i]), float(second[i]), i))
        for i in ids[m-n:]: res[i] = not gone[i]
    return res


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)]),
       st.sampled_from([(), (2,), (3, 2)]), st.sampled_from([0., .3, .8]))
def test_best_of_is_the_sort_of_every_run(seed, nm, taps, p):
    g, (n, m) = torch.Generator().manual_seed(seed), nm
    v = torch.randint(0, 4, (3, 2*m, *taps), generator=g).float() # many ties
    second, gone = torch.randint(0, 3, v.shape, generator=g), torch.rand(v.shape, generator=g) < p
    assert torch.equal(best_of(v, n, m, gone, second), by_hand(v, n, m, gone, second))
    none = torch.zeros_like(gone)
    assert torch.equal(best_of(v, n, m), by_hand(v, n, m, none, torch.zeros_like(v)))


def test_allocate_exact_on_all_that_divides():
    rnd = lambda *s: torch.rand(*s, generator=torch.Generator().manual_seed(len(s)))
    sc = Scores({'conv': rnd(4, 8, 3, 3), 'fc': rnd(5, 12), 'odd': rnd(3, 6)}, 'weight')
    mask = allocate(sc, pattern='2:4')
    assert (mask['conv'].movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert (mask['fc'].unflatten(-1, (-1, 4)).sum(-1) == 2).all() and mask['odd'].all()
    assert mask.meta['layers'] == dict(conv=.5, fc=.5, odd=0.) and mask.meta['pattern'] == '2:4'
    assert mask.meta['skipped'] == {'odd': '6 inputs are no multiple of 4'}
    n = sum(o.numel() for o in mask.values())
    assert mask.meta['achieved'] == pytest.approx((144+30)/n)
    same = allocate(sc, .5, pattern='2:4')
    assert all(torch.equal(mask[k], same[k]) for k in mask)
    assert allocate(sc, pattern='2:4', keep='fc')['fc'].all()


def test_what_has_gone_stays_gone():
    sc = Scores({'a': torch.tensor([[9., 8, 7, 6]])}, 'weight', gone={'a': torch.tensor([[True, True, True, False]])})
    assert allocate(sc, pattern='2:4')['a'].tolist() == [[False, False, False, True]]


@pytest.mark.parametrize('kw,says', [
    (dict(pattern='4:2'), "pattern='4:2': expected 'N:M' with 0 < N < M"), (dict(pattern='24'), "pattern='24'"),
    (dict(pattern='2:4', sparsity=.6), "sparsity=0.6: pattern='2:4' removes 0.5"),
    (dict(pattern='2:4', threshold=.1), 'threshold'), (dict(pattern='2:4', caps=.5), 'caps'),
    (dict(pattern='2:4', round_to=2), 'round_to'), (dict(pattern='2:7'), r'multiples of 7; got a \(2, 8\)')])
def test_bad_calls(kw, says):
    with pytest.raises(ValueError, match=says): allocate(Scores({'a': torch.rand(2, 8)}, 'weight'), **kw)


def test_channels_have_no_pattern():
    with pytest.raises(ValueError, match="is of weights; got scores of unit 'channel'"):
        allocate(Scores({'a': torch.rand(8)}, 'channel'), pattern='2:4')
    with pytest.raises(TypeError, match='pattern'): pattern_of(24)


def test_prune_holds_the_pattern_through_training():
    learn = fit(learner(build('lenet300', 1, 10, 8, seed=0), get_dls('digits', bs=64, device='cpu')), 4)
    res = prune(learn, 'magnitude', .5, pattern='2:4', fine_tune_epochs=1)
    for k in ('fc1', 'fc2', 'fc3'):
        w = res.model.get_submodule(k).weight
        assert (w.unflatten(1, (-1, 4)) != 0).sum(-1).max() <= 2 and (w != 0).float().mean() > .49
    assert res.rows.tuned_k.item() > .8*res.rows.tuned_n.item()


@pytest.mark.skipif(torch.cuda.is_available(), reason='what is said without a card')
def test_no_card_is_said():
    with pytest.raises(ValueError, match='expected a CUDA device of capability 8.0'): semi_structured(nn.Linear(64, 16))


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason='needs a card')
def test_semi_structured_multiplies_the_same():
    net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 48)).cuda()
    for l in (net[0], net[2]): l.weight.data *= best_of(l.weight.detach().abs().cpu(), 2, 4).cuda()
    x = torch.randn(64, 128, device='cuda'); new, names = semi_structured(net)
    assert names == ['0', '2']
    torch.testing.assert_close(new(x.half()).float(), net(x), atol=2e-2, rtol=2e-2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0., .1, .5, .77, .99]))
def test_scope_output_takes_the_lowest_of_every_row(seed, s):
    g = torch.Generator().manual_seed(seed)
    v, gone = torch.randint(0, 5, (4, 3, 2), generator=g).float(), torch.rand(4, 3, 2, generator=g) < .2
    got = allocate(Scores({'a': v}, 'weight', gone={'a': gone}), s, scope='output')['a'].flatten(1)
    for row, was, kept in zip(v.flatten(1), gone.flatten(1), got):
        order = sorted(range(6), key=lambda i: (not was[i], float(row[i]), i))
        out = set(order[:int(6*s)]) | set(was.nonzero().flatten().tolist())
        assert kept.tolist() == [i not in out for i in range(6)]


def test_scope_output_is_for_weights():
    with pytest.raises(ValueError, match="scope='output'.*got unit='channel'"):
        allocate(Scores({'a': torch.rand(8)}, 'channel'), .5, scope='output')
    with pytest.raises(ValueError, match='round_to'):
        allocate(Scores({'a': torch.rand(2, 8)}, 'weight'), .5, scope='output', round_to=2)
