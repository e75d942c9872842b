"""ThiNet against its definition, written out."""
import copy, pytest, torch, torch.nn.functional as F
import numpy as np
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.allocate import allocate
from neuronprune.core import generator, methods
from neuronprune.criteria import contributions, greedy_order, thinet
from neuronprune.data import calib_batch, get_dls
from neuronprune.graph import trace
from neuronprune.inputs import column_groups
from neuronprune.models import build
from neuronprune.surgery import apply, difference, shrink

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64)

def greedy(X):
    "The definition: try every channel at every step, on the features themselves."
    T, left = [], list(range(X.shape[1]))
    while left:
        j = min(left, key=lambda j: round(float((X[:, T+[j]].sum(1)**2).sum()), 9)); T.append(j); left.remove(j)
    return T

@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12))
def test_greedy_order_is_the_definition(seed, c, m):
    X = np.random.default_rng(seed).integers(-3, 4, (m, c)).astype(float)      # whole numbers: ties are exact
    assert greedy_order(X.T @ X).tolist() == greedy(X)

def test_greedy_orders_are_nested_and_complete():
    X = np.random.default_rng(0).normal(size=(50, 300))
    assert sorted(greedy_order(X.T @ X).tolist()) == list(range(300))

def test_orthogonal_contributions_go_by_size(): assert greedy_order(np.diag([3., 1, 2, 0])).tolist() == [3, 1, 2, 0]

CONVS = [dict(), dict(padding=1), dict(stride=2, padding=(1, 0)), dict(dilation=2, padding=2),
         dict(padding='same', dilation=(1, 2)), dict(padding=1, padding_mode='circular'),
         dict(padding=1, padding_mode='replicate')]
@pytest.mark.parametrize('kw', CONVS)
def test_contributions_one_channel_at_a_time(kw):
    m, x = nn.Conv2d(3, 4, (3, 2), **kw), torch.randn(5, 3, 7, 8); size = tuple(m(x).shape[2:]); gen = generator(0)
    place, chan = torch.randint(size[0]*size[1], (5, 9), generator=gen), torch.randint(4, (5, 9), generator=gen)
    X = contributions(m, x, place, chan, size)
    for j in range(3):
        only = torch.zeros_like(x); only[:, j] = x[:, j]
        y = (m(only) - m.bias.view(-1, 1, 1)).flatten(2)[torch.arange(5)[:, None], chan, place]
        assert torch.allclose(X[:, j], y.flatten().double(), atol=1e-5)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_taps_of_half_precision_are_summed_in_float32(dtype):
    m, x, gen = nn.Conv2d(64, 4, 3).to(dtype), torch.randn(5, 64, 6, 6).to(dtype), generator(0)
    at = [torch.randint(o, (5, 9), generator=gen) for o in (16, 4)]
    assert torch.equal(contributions(m, x, *at, (4, 4)), contributions(m.float(), x.float(), *at, (4, 4)))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dls, dtype):
    m = build('mlp', 1, 10, 8, seed=0).to(dtype); g = trace(build('mlp', 1, 10, 8), torch.rand(1, 1, 8, 8))
    full = copy.deepcopy(m).float()
    s, want = thinet(m, dls, graph=g), thinet(full, dls, graph=g)
    assert {p.dtype for p in m.parameters()} == {dtype} and list(s) == list(want)
    for k,v in want.items(): assert np.corrcoef(s[k], v)[0, 1] > .98

def fully_convolutional():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                             nn.Flatten(), nn.Linear(4, 10))

@pytest.mark.parametrize('size', [6, 12])
def test_a_graph_of_images_of_another_size_is_refused(dls, size):
    m = fully_convolutional()
    with pytest.raises(ValueError, match=rf"graph: .*layer '2' has {(size-4)**2} positions there and 16 for images of "
                                         r"shape \(1, 8, 8\)"):
        thinet(m, dls, n=20, graph=trace(m, torch.rand(1, 1, size, size)))
    assert not any(o._forward_hooks for o in m.modules())
    a, b = thinet(m, dls, n=20, graph=trace(m, torch.rand(1, 1, 8, 8))), thinet(m, dls, n=20)
    assert all(torch.equal(v, b[k]) for k,v in a.items())

def test_contributions_of_other_layers():
    gen = generator(0)
    for m,x in ((nn.Linear(6, 4), torch.randn(5, 6)), (nn.Linear(6, 4, bias=False), torch.randn(5, 3, 6)),
                (nn.Conv1d(2, 4, 3, padding=1), torch.randn(5, 2, 6)),
                (nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 1)), torch.randn(5, 2, 3, 4, 4))):
        y = m(x).detach(); lin = isinstance(m, nn.Linear)
        rest = y.reshape(5, -1, 4).transpose(1, 2) if lin else y.flatten(2)
        place, chan = torch.randint(rest.shape[2], (5, 7), generator=gen), torch.randint(4, (5, 7), generator=gen)
        X = contributions(m, x, place, chan, () if lin else tuple(y.shape[2:])).sum(1).view(5, 7)
        if m.bias is not None: X = X + m.bias.detach()[chan]
        assert torch.allclose(X.float(), rest[torch.arange(5)[:, None], chan, place], atol=1e-5)

def slow_scores(model, dls, layer, n, n_positions, seed, names, graph):
    "ThiNet of one layer by F.unfold and loops, with the same draws."
    xb, _ = calib_batch(dls, None, n, split='train', seed=seed); gen, drawn, seen = generator(seed), {}, {}
    for k in names:
        drawn[k] = [torch.randint(o, (n, n_positions), generator=gen)
                    for o in (graph.layers[k]['positions'], graph.layers[k]['n_out'])]
    m = model.get_submodule(layer); h = m.register_forward_pre_hook(lambda m, inp: seen.update(x=inp[0]))
    w = m.weight.detach()
    with torch.no_grad(): copy_mode = model.training; model.eval()(xb); model.train(copy_mode); h.remove()
    x, groups, rows = seen['x'], column_groups(graph, layer), []
    for i in range(n):
        for p,o in zip(*[t[i].tolist() for t in drawn[layer]]):
            if isinstance(m, nn.Linear): row = w[o]*x[i]
            else:
                row = (w[o].flatten(1)*F.unfold(x[i:i+1], m.kernel_size, m.dilation, m.padding,
                                                m.stride)[0, :, p].view(m.in_channels, -1)).sum(1)
            rows.append([float(row[groups == g].sum()) for g in range(int(groups.max())+1)])
    order = greedy(np.array(rows)); c = len(order)
    return torch.tensor([order.index(g)/c for g in groups.tolist()], dtype=torch.float64)

def test_scores_by_loops():
    dls = get_dls('digits', size=20, bs=64); m = build('lenet5', 1, 10, 20, seed=0)
    g = trace(m, torch.rand(1, 1, 20, 20)); s = thinet(m, dls, n=70, n_positions=3, seed=2)
    names = [k[:-3] for k in s]; assert names == ['conv2', 'fc1', 'fc2', 'fc3']
    for k in ('conv2', 'fc1'): assert torch.equal(slow_scores(m, dls, k, 70, 3, 2, names, g), s[f'{k}:in'])

def test_a_channel_that_contributes_nothing_goes_first_and_the_largest_last(dls):
    m = build('mlp', 1, 10, 8, seed=0); m.fc2.weight.data[:, 7] = 0; m.fc2.weight.data[:, 9] *= 1000
    # after a few dead units of the random network
    s = thinet(m, dls, n=100)['fc2:in']; assert s[7] < .2 and s.argmax() == 9
    r = thinet(m, dls, n=100, compat='released')['fc2:in']; assert torch.allclose(r, 1-1/500-s)

def test_default_is_ten_images_of_each_class(dls):
    s = thinet(build('mlp', 1, 10, 8), dls)
    assert s.meta['n'] == 100
    assert s.meta['n_positions'] == 10
    assert methods()['thinet'].allocate['scope'] == 'layer'

def test_hooks_and_modes_are_left_as_found(dls):
    m = build('mlp', 1, 10, 8).train(); m.fc1.eval(); modes = {k:o.training for k,o in m.named_modules()}
    thinet(m, dls, n=20)
    assert (modes == {k:o.training for k,o in m.named_modules()}
            and not any(o._forward_hooks or o._forward_pre_hooks for o in m.modules()))
    m.fc2.weight.data[0, 0] = float('nan')
    with pytest.raises(ValueError, match='fc2.weight'): thinet(m, dls, n=20)
    assert not any(o._forward_hooks for o in m.modules())

def test_batches_do_not_matter(dls, monkeypatch):
    import neuronprune.criteria as c
    m = build('mlp', 1, 10, 8, seed=0); a = thinet(m, dls, n=100); f = c._grams
    monkeypatch.setattr(c, '_grams', lambda *o: f(*o, bs=7)); b = thinet(m, dls, n=100)
    assert all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('name', ('resnet20', 'densenet22'))
def test_wirings_can_be_cut(name):
    dls = get_dls('digits', bs=64, size=8); m = build(name, 1, 10, 8, seed=0); s = thinet(m, dls, n=16, n_positions=2)
    x = torch.rand(4, 1, 8, 8); mask = allocate(s, .4, scope='layer', normalize=None)
    assert (difference(apply(copy.deepcopy(m), mask), shrink(m, mask, x), x) <= 1e-5
            and all(v.any() for v in mask.values()))

def test_grouped_layers_are_skipped():
    m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(),
                      nn.Linear(64, 10))
    s = thinet(m, get_dls('digits', bs=64), n=20)
    assert list(s) == ['5:in'] and 'grouped' in s.skipped['2'] and 'own input' in s.skipped['0']

def test_bad_arguments(dls):
    m = build('mlp', 1, 10, 8)
    for kw,what in ((dict(compat='paper'), 'compat'), (dict(n_positions=0), 'n_positions'), (dict(n=0), 'n'),
                    (dict(n=10**6), 'n=1000000'), (dict(split='all'), 'split')):
        with pytest.raises(ValueError, match=what): thinet(m, dls, **kw)
    with pytest.raises(ValueError, match='dls'): thinet(m)
    with pytest.raises(ValueError, match='digest'):
        thinet(m, get_dls('digits', size=10), graph=trace(m, torch.rand(1, 1, 8, 8)))
    for G in (np.ones((2, 3)), np.full((2, 2), np.nan), np.ones(3)):
        with pytest.raises(ValueError, match='G'): greedy_order(G)
