"""Lists of sizes, the budgets they stand for, and which of them are trained."""
import math
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from neuronprune.budget import budget, check_sizes, size_list, sizes, trained_steps
from neuronprune.core import layers
from neuronprune.models import build
from neuronprune.report import count_params

def test_harmonic_sizes_of_the_paper():
    want = [.442, .274, .195, .150, .121, .101, .086, .075, .066, .059, .053, .049]
    assert [round(o, 3) for o in sizes('harmonic', lo=.05, count=.8)] == want

@pytest.mark.parametrize('kind,f', [
    ('geometric', lambda hi, lo, n: np.geomspace(hi, lo, n)), ('linear', lambda hi, lo, n: np.linspace(hi, lo, n)),
    ('cubic', lambda hi, lo, n: [lo+(hi-lo)*(1-i/(n-1))**3 for i in range(n)]),
    ('harmonic2', lambda hi, lo, n: [hi*i**(-math.log(hi/lo)/math.log(n)) for i in range(1, n+1)])])
def test_sizes_between_two_ends(kind, f):
    for hi,lo,n in [(.85, .15, 58), (.5, .02, 15), (1., .9, 2)]:
        assert np.allclose(sizes(kind, hi, lo, n), f(hi, lo, n), atol=1e-9)

def test_pieces_follow_each_other():
    plan = [dict(kind='manual', values=[.99, .855]), dict(hi=.85, lo=.15, count=58),
            dict(kind='linear', hi=.132, lo=.02, count=9)]
    ds = size_list(plan)
    assert len(ds) == 69 and ds[:3] == [.99, .855, .85] and ds[59:61] == [.15, .132] and ds[-1] == .02
    assert size_list([.5, .2]) == [.5, .2] and size_list(dict(hi=.5, lo=.1, count=1)) == [.5]

@pytest.mark.parametrize('kw,words', [
    (dict(kind='geometrc', hi=.5, lo=.1, count=3), "did you mean 'geometric'"), (dict(hi=.5, lo=.1), 'count=None'),
    (dict(hi=.1, lo=.5, count=3), 'descending'), (dict(hi=50, lo=.1, count=3), 'did you mean 0.5'),
    (dict(kind='manual', values=[]), 'empty'),
    (dict(kind='harmonic', lo=.05, count=0), 'count=0'), (dict(kind='manual', values=[.5, .5]), 'descending'),
    (dict(kind='manual', values=[.5, 0.]), 'keeps nothing'), (dict(kind='manual', values=[.5], hi=.9), 'hi=0.9')])
def test_bad_sizes(kw, words):
    with pytest.raises(ValueError, match=words): sizes(**kw)

@pytest.mark.parametrize('name', ['lenet300', 'lenet5_conv', 'resnet20'])
def test_budget_is_the_specified_number(name):
    net = build(name, 3, 10, 32); size, n = count_params(net), sum(m.weight.numel() for m in layers(net).values())
    for kr in (.97, .5, .25, .125, .0625): assert budget(net, kr) == min(int((kr-1)*size+n), n)
    assert budget(net, 1.) == n
    least = (size-n+len(layers(net)))/size
    assert budget(net, math.ceil(least*1e9)/1e9) == len(layers(net))
    with pytest.raises(ValueError, match=f'expected at least {math.ceil(1e6*least)/1e6:g}'): budget(net, least*.999)

def test_budget_counts_decimals():
    assert [budget(torch.nn.Linear(10, 10, bias=False), d) for d in (.29, .57, .58)] == [29, 57, 58] # not 28, 56, 57

@given(st.integers(1, 80), st.data())
def test_trained_sizes_end_pieces_of_equal_length(n, data):
    k = data.draw(st.integers(1, n)); got = trained_steps(n, k)
    lengths = np.diff([-1, *got])
    assert len(got) == k and got[-1] == n-1 and lengths.min() >= lengths.max()-1 >= 0
    assert list(lengths) == sorted(lengths, reverse=True)

def test_trained_sizes_by_hand():
    assert trained_steps(69, 23) == list(range(2, 69, 3)) and trained_steps(3, 0) == [] and trained_steps(2) == [0, 1]
    with pytest.raises(ValueError, match='fine_tunes=3'): trained_steps(2, 3)
