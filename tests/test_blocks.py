"""Groups, parents and blocks: against the wiring, brute force over the weights, and MINT's published accounting."""
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.blocks import (block_cost, block_labels, block_layers, block_mean, check_groups, dead_units,
                                group_index, parent_of)
from neuronprune.core import generator, layers
from neuronprune.masks import Mask
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.costs import accounting, memory
from test_graph import Net, X, nets

def feats(n, width, seed=0): return torch.randn(n, width, generator=generator(seed))

# Groups

@settings(max_examples=120)
@given(st.integers(1, 300), st.data(), st.sampled_from(['contiguous', 'random']), st.integers(0, 9))
def test_groups_are_balanced(width, data, grouping, seed):
    n = data.draw(st.integers(1, width)); idx = group_index(width, n, grouping, seed); size = idx.bincount()
    assert (idx.dtype == torch.int64 and idx.shape == (width,) and len(size) == n and size.min() >= 1
            and size.max()-size.min() <= 1)
    if grouping == 'contiguous': assert torch.equal(idx, idx.sort().values)
    assert torch.equal(idx, group_index(width, n, grouping, seed))

@settings(max_examples=30)
@given(st.integers(1, 25), st.data(), st.integers(0, 5))
def test_kmeans_leaves_no_group_empty(width, data, seed):
    "Duplicate and constant columns included; groups are numbered by first appearance, the same each time."
    n, kinds = data.draw(st.integers(1, width)), data.draw(st.lists(st.integers(0, 3), min_size=width, max_size=width))
    x = feats(6, 4, seed)[:, kinds]*data.draw(st.sampled_from([0., 1., 1e-3, 1e4]))
    idx = group_index(width, n, 'kmeans', seed, features=x)
    assert (idx.dtype == torch.int64 and idx.unique().tolist() == list(range(n))
            and torch.equal(idx, group_index(width, n, 'kmeans', seed, features=x)))
    first = [idx.tolist().index(g) for g in range(n)]; assert first == sorted(first)

def test_kmeans_finds_units_that_behave_alike():
    kinds = torch.tensor([2, 0, 0, 1, 2, 1, 1, 0]); x = feats(50, 3, 1)[:, kinds] + .05*feats(50, 8, 2)
    idx = group_index(8, 3, 'kmeans', 0, features=x)
    assert (torch.equal(idx, torch.tensor([0, 1, 1, 2, 0, 2, 2, 1]))
            and torch.equal(idx, group_index(8, 3, 'kmeans', 5, features=x.double())))
    alone = group_index(8, 8, 'kmeans', features=x); assert alone.tolist() == list(range(8))
    assert torch.equal(group_index(8, 3, 'kmeans', features=100*x + 7), idx), 'a common shift and scale change nothing'

@pytest.mark.parametrize('kw,err,said', [
    (dict(n_groups=9), ValueError, "n_groups=9: layer 'fc2' has only 8 units"),
    (dict(n_groups=0), ValueError, 'n_groups=0'), (dict(n_groups=2.), TypeError, 'whole number'),
    (dict(grouping='kmean'), ValueError, "did you mean 'kmeans'?"),
    (dict(grouping='kmeans'), ValueError, "features: got None for layer 'fc2'"),
    (dict(grouping='kmeans', features=feats(5, 7)), ValueError, 'got shape (5, 7)'),
    (dict(grouping='kmeans', features=feats(5, 8)[:0]), ValueError, "[n, 8]"),
    (dict(grouping='kmeans', features=feats(5, 8)/0), ValueError, 'NaN'),
    (dict(grouping='random', seed=.5), TypeError, 'seed')])
def test_group_errors(kw, err, said):
    with pytest.raises(err) as e: group_index(**dict(dict(width=8, n_groups=3, layer='fc2'), **kw))
    assert said in str(e.value)

def test_pairs_are_checked():
    assert check_groups(None) is None and check_groups([3, 4]) == (3, 4) and check_groups((np.int64(3), 4)) == (3, 4)
    for bad,err in ((20, TypeError), ((20,), TypeError), ('ab', TypeError), ((2, .5), TypeError),
                    ((2, True), TypeError), ((0, 2), ValueError)):
        with pytest.raises(err, match='n_groups'): check_groups(bad)

# Parents

conv = lambda *a, **k: nn.Conv2d(*a, **k)
NETS = dict(
    flatten=(Net(lambda s, x: s.fc(s.a(x).flatten(1)), a=conv(2, 3, 1), fc=nn.Linear(3*16, 2)), 'fc',
             np.arange(48)//16),
    residual=(Net(lambda s, x: s.c(F.relu(s.b(h := F.relu(s.a(x))) + h)), a=conv(2, 3, 1), b=conv(3, 3, 1),
                  c=conv(3, 2, 1)), 'c', np.arange(3)),
    concat=(Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(2, 3, 1), b=conv(2, 2, 1), c=conv(5, 2, 1)),
            'c', np.arange(5)),
    twice=(Net(lambda s, x: s.c(torch.cat([h := s.a(x), h], 1)), a=conv(2, 3, 1), c=conv(6, 2, 1)), 'c',
           np.arange(6) % 3),
    sum_and_part=(Net(lambda s, x: s.c(torch.cat([h := s.a(x), h + s.b(x)], 1)), a=conv(2, 3, 1), b=conv(2, 3, 1),
                      c=conv(6, 2, 1)), 'c', np.arange(6)),
    input_too=(Net(lambda s, x: s.c(torch.cat([s.a(x), x], 1)), a=conv(2, 3, 1), c=conv(5, 2, 1)), 'c', np.arange(5)),
    padded=(Net(lambda s, x: s.c(s.b(h := s.a(x)) + F.pad(h, (0, 0, 0, 0, 1, 1))), a=conv(2, 2, 1), b=conv(2, 4, 1),
                c=conv(4, 2, 1)), 'c', np.arange(4)),
    shuffled=(Net(lambda s, x: s.c(s.a(x)[:, [2, 0, 2, 1]]), a=conv(2, 3, 1), c=conv(4, 2, 1)), 'c',
              np.array([0, 1, 0, 2])))
XI = torch.randn(2, 2, 4, 4, generator=generator(0))

@pytest.mark.parametrize('name', NETS)
def test_parents_of_known_wirings(name):
    net, layer, want = NETS[name]; g = trace(net, XI)
    assert np.array_equal(parent_of(g, layer), want), g.producers
    assert parent_of(g, 'a').tolist() == [0, 1], 'the input: every column for itself'

@settings(max_examples=25)
@given(nets())
def test_columns_share_a_parent_when_the_same_channels_reach_them(model):
    g = trace(model, X)
    for n in g.layers:
        p, reach = parent_of(g, n).tolist(), [frozenset() for _ in range(g.layers[n]['n_in'])]
        for q,(slot,chan) in g.sources.get(n, {}).items():
            for s,c in zip(slot.tolist(), chan.tolist()): reach[s] |= {(q, c)}
        keys = [r or i for i,r in enumerate(reach)]
        assert p == [list(dict.fromkeys(keys)).index(k) for k in keys]

@pytest.fixture(scope='module')
def resnet56(): return trace(build('resnet56', 3, 10, 8, seed=0), torch.rand(1, 3, 8, 8))

def test_true_producers_in_resnet56(resnet56):
    """Option-A shortcuts: the parent is the tensor after the sum, as wide as the reader's input,
    whatever layer stands before it."""
    g = resnet56; names = list(g.layers)
    for n in names[1:-1]: assert torch.equal(parent_of(g, n), torch.arange(g.layers[n]['n_in'])), n
    many = [n for n in names if len(g.producers[n]) > 1]
    assert len(many) == 27 and max(len(g.producers[n]) for n in names) > 10

# Which layers

def test_layers_with_blocks():
    shared = nn.Linear(6, 6)
    tied = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    tied[4].weight = shared.weight
    names, why = block_layers(trace(tied, torch.rand(1, 3)))
    assert names == ['6'] and 'shares its weight' in why['2'] and "network's input" in why['0']
    twice = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), shared, nn.ReLU(), shared)
    names, why = block_layers(trace(twice, torch.rand(1, 6)))
    assert names == ['2'] and 'used 2 times' in why['4']
    dw = nn.Sequential(conv(2, 4, 1), conv(4, 4, 3, groups=4), conv(4, 4, 1, groups=2), conv(4, 2, 1))
    names, why = block_layers(trace(dw, XI))
    assert names == ['3'] and 'grouped' in why['1'] and 'grouped' in why['2']

def test_chosen_layers():
    g = trace(build('mlp', size=8, seed=0), torch.rand(1, 1, 8, 8))
    assert (block_layers(g)[0] == ['fc2', 'fc3'] and block_layers(g, ['fc3', 'fc2'])[0] == ['fc2', 'fc3']
            and block_layers(g, 'fc2') == (['fc2'], {**block_layers(g)[1], 'fc3': 'not chosen'}))
    for bad,said in ((['fc1'], "'fc1' has no blocks"), (['fc4'], "layers='fc4'"), ([], 'at least one of')):
        with pytest.raises(ValueError, match=said): block_layers(g, bad)
    with pytest.raises(ValueError, match='no layer has blocks'):
        block_layers(trace(nn.Sequential(nn.Linear(3, 2)), torch.rand(1, 3)))

# Blocks

@settings(max_examples=20)
@given(nets(['seq', 'add', 'cat', 'dw', 'proj', 'pad']), st.sampled_from(['contiguous', 'random', 'kmeans']),
       st.integers(0, 20), st.data())
def test_blocks_tile_the_weight_matrix(model, grouping, seed, data):
    g = trace(model, X); lay = layers(model)
    for n in [n for n in g.layers if g.layers[n]['groups'] == 1]:
        n_out, n_par = g.layers[n]['n_out'], int(parent_of(g, n).max())+1
        pair = data.draw(st.tuples(st.integers(1, n_par), st.integers(1, n_out)))
        child, parent, column = block_labels(g, n, pair, grouping, seed, feats(5, n_par), feats(5, n_out))
        assert (len(child) == n_out and len(parent) == n_par and len(column) == g.layers[n]['n_in']
                and parent.unique().tolist() == list(range(pair[0])))
        assert child.unique().tolist() == list(range(n_out if n in g.outputs else pair[1]))
        labels, w = (child, parent[column]), lay[n].weight.detach()
        cost, mean = block_cost(labels, w[0,0].numel()), block_mean(w, labels)
        for k in range(cost.shape[0]):
            for j in range(cost.shape[1]):
                block = w[child == k][:, parent[column] == j]
                assert block.numel() == cost[k, j] and abs(block.double().mean() - mean[k, j]) < 1e-9
        keep = torch.rand(cost.shape, generator=generator(seed)) < .5
        m = Mask({n: keep}, 'group', labels={n: labels}, graph=g).expand(model)[f'{n}.weight']
        assert int(m.sum()) == int(cost[keep].sum())

def test_labels_by_default_and_by_seed():
    g = trace(build('mlp', size=8, seed=0), torch.rand(1, 1, 8, 8)); count = lambda o: len(o.unique())
    child, parent, column = block_labels(g, 'fc2')
    assert (count(child), count(parent)) == (20, 20) and torch.equal(column, torch.arange(500))
    child, parent, _ = block_labels(g, 'fc3', (7, 3))
    assert (count(child), count(parent)) == (10, 7), 'one child group per class'
    same, other = (block_labels(g, 'fc2', (9, 9), 'random', s) for s in (0, 1))
    assert all(torch.equal(a, b) for a,b in zip(same, block_labels(g, 'fc2', (9, 9), 'random', 0)))
    assert not torch.equal(same[0], other[0]) and not torch.equal(same[1], other[1])
    for pair,said in (((501, 2), "layer 'fc2:in' has only 500"), ((2, 301), "layer 'fc2' has only 300")):
        with pytest.raises(ValueError, match=said): block_labels(g, 'fc2', pair)
    with pytest.raises(ValueError, match='activations'): block_labels(g, 'fc2', (2, 2), 'kmeans')

def test_each_channel_by_itself(resnet56):
    g = resnet56
    for n in block_layers(g)[0]:
        child, parent, column = block_labels(g, n, 'each')
        assert (child.tolist() == list(range(g.layers[n]['n_out']))
                and parent.tolist() == list(range(len(parent))) == list(range(int(column.max())+1)))
    with pytest.raises(TypeError, match="'each'"): check_groups('every')

def test_dead_units():
    keep = torch.tensor([[True, False, False], [False, False, False]])
    lab = {'fc': (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2, 2]))}
    assert (dead_units(Mask({'fc': keep}, 'group', labels=lab)).to_dict('records')
            == [dict(layer='fc', children=3, dead_children=1, parents=4, dead_parents=3)])
    for bad,err in ((Mask({'fc': torch.tensor([True])}, 'weight'), ValueError), (keep, TypeError)):
        with pytest.raises(err, match='mask'): dead_units(bad)

# The accounting of MINT's tables, on our zoo

def first_zero(model, names, kept):
    "A weight mask that keeps the fraction `kept` of the named layers, the last weights of each."
    ws = {n:layers(model)[n].weight for n in names}; total = sum(w.numel() for w in ws.values())
    left, res = round(total*(1-kept)), {}
    for n,w in ws.items(): k = min(left, w.numel()); left -= k; res[n] = (torch.arange(w.numel()) >= k).view(w.shape)
    return Mask(res, 'weight')

@pytest.mark.parametrize('name,dense,kept,masked,total,pruned', [
    ('vgg16_mint', [0, 1, 2, 3, 14], [15.035583], 14_712_832, 14_977_728, [83.46]),
    ('resnet56', [0, 15, 19, 37, 53, 55], [43.363957], 785_664, 848_944, [52.41]),
    ('resnet50', [0, 53], [53.2144, 46.6939, 46.02], 23_445_504, 25_502_912, [43.01, 49.00, 49.62])])
def test_published_percentages_on_our_networks(name, dense, kept, masked, total, pruned, monkeypatch):
    # 100 MB need not be deflated for this
    monkeypatch.setattr('neuronprune.costs._npz_bytes', lambda w, compressed=True: 0)
    model = build(name, 3, 1000 if name == 'resnet50' else 10, 224 if name == 'resnet50' else 32, seed=0)
    names = list(layers(model)); part = [n for i,n in enumerate(names) if i not in dense]
    assert len(names) == {'vgg16_mint': 15, 'resnet56': 56, 'resnet50': 54}[name]
    for k,p in zip(kept, pruned):
        t = accounting(model, first_zero(model, part, k/100))
        assert (t.weights['masked layers'] == masked and t.weights['network'] == total
                and t.zeros['masked layers'] == t.zeros['network'])
        assert (100*t.pruned['masked layers'] == pytest.approx(100-k, abs=1e-4)
                and 100*t.pruned['network'] == pytest.approx(p, abs=.011))
        assert t.dense['network'] == total*4/2**20

def test_mlp_of_the_paper():
    "fc2 alone is 150,000 weights, 0.537 MiB as a compressed file; 96.2 % random blocks of it about 0.024."
    model = build('mlp', 1, 10, 28, seed=0); lay = layers(model)
    assert {k:m.weight.numel() for k,m in lay.items()} == dict(fc1=392_000, fc2=150_000, fc3=3_000)
    assert sum(p.numel() for p in model.parameters()) == 545_810
    with torch.no_grad(): lay['fc2'].weight.copy_(.04*torch.randn(300, 500, generator=generator(0)))
    assert memory(lay['fc2']) == pytest.approx(.53699, abs=.002)
    g = trace(model, torch.rand(1, 1, 28, 28)); child, parent, column = block_labels(g, 'fc2', (250, 100))
    s = torch.rand(100, 250, generator=generator(1))
    mask = Mask({'fc2': s > s.flatten().quantile(.9621)}, 'group', labels={'fc2': (child, parent[column])})
    t = accounting(model, mask)
    assert (t.pruned['fc2'] == pytest.approx(.9621, abs=1e-4) and t.csr_npz['fc2'] == pytest.approx(.0241, abs=.002)
            and list(t.index) == ['fc2', 'masked layers', 'network'])
