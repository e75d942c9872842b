"""Readers and column groups against the graph of random networks."""
import copy, pytest, torch, torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from hypothesis import given, settings
from torch import nn
from neuronprune.baselines import snip
from neuronprune.core import layers, tensors
from neuronprune.masks import Mask
from neuronprune.data import get_dls
from neuronprune.graph import trace
from neuronprune.inputs import batch_for, column_groups, own_input, readers, slices, traced
from neuronprune.lowrank import output_moments, pca
from neuronprune.mint import activations
from neuronprune.models import build
from neuronprune.provable import sensitivities
from neuronprune.surgery import apply, difference, shrink
from test_graph import KINDS, nets

def first_seen(ids):
    seen = {}
    return [seen.setdefault(o, len(seen)) for o in ids]

@settings(max_examples=15)
@given(nets([k for k in KINDS if k not in ('shuffle', 'pad', 'glu')]))       # those hard-code their widths
def test_any_column_group_can_be_cut_and_shrunk(m):
    g = trace(m, torch.rand(1, 2, 2, 2)); names, skipped = readers(g)
    assert (set(names) | set(skipped) >= set(layers(m)) and not set(names) & set(skipped)
            and all(g.layers[n]['groups'] == 1 for n in names))
    for n in names:
        ids = [o if o >= 0 else -1-i for i,o in enumerate(g.in_slots[n].tolist())]
        assert column_groups(g, n).tolist() == first_seen(ids) and not own_input(g, n).any()
    x, gr = torch.rand(6, 2, 2, 2), {n:column_groups(g, n) for n in names}
    mask = Mask({f'{n}:in':(v != v[-1]) | (v.max() == 0) for n,v in gr.items()}, 'channel', graph=g)
    assert difference(apply(copy.deepcopy(m), mask), shrink(m, mask, x), x) <= 1e-5

def test_first_layer_reads_the_input_and_own_lets_it_in():
    m = build('lenet5', 1, 10, 20); g = trace(m, torch.rand(1, 1, 20, 20))
    assert (readers(g)[0] == ['conv2', 'fc1', 'fc2', 'fc3']
            and readers(g, own=True)[0] == ['conv1', 'conv2', 'fc1', 'fc2', 'fc3'])
    assert column_groups(g, 'fc1').tolist() == torch.arange(16).repeat_interleave(4).tolist()

def test_an_input_that_is_concatenated_keeps_a_layer_out():
    class Both(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(7, 2), nn.Linear(2, 2)
        def forward(self, x): return self.c(self.b(torch.cat([self.a(x).relu(), x], 1)).relu())
    g = trace(Both(), torch.rand(1, 3))
    assert (readers(g)[0] == ['c'] and 'own input' in readers(g)[1]['b']
            and own_input(g, 'b').tolist() == [False]*4 + [True]*3)

def test_mixed_channels_are_columns_of_their_own():
    class Mixed(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 2)
        def forward(self, x): return self.b(self.a(x).view(-1, 2, 2).sum(2))
    m = Mixed(); g = trace(m, torch.rand(1, 3))
    assert readers(g)[0] == ['b'] and column_groups(g, 'b').tolist() == [0, 1]

def test_grouped_shared_and_repeated_layers_have_reasons():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.g, self.s, self.t, self.r, self.q, self.out = nn.Conv2d(1, 4, 1), nn.Conv2d(
                4, 4, 1, groups=2), *[nn.Conv2d(4, 4, 1) for _ in range(4)], nn.Conv2d(4, 2, 1)
            self.t.weight = self.s.weight
        def forward(self, x):
            return self.out(self.q(self.r(self.r(self.t(self.s(self.g(self.a(x)).relu()).relu()).relu()))).relu()).mean(
                (2, 3))
    names, why = readers(trace(Net(), torch.rand(1, 1, 2, 2)))
    assert (names == ['q', 'out'] and 'grouped' in why['g'] and 'shares' in why['s'] and 'shares' in why['t']
            and '2 times' in why['r'] and 'own input' in why['a'])

def test_traced():
    m = build('mlp', 1, 10, 8); g = traced(m, get_dls('digits')); assert traced(m, graph=g) is g
    with pytest.raises(ValueError, match='pass graph'): traced(m)
    with pytest.raises(ValueError, match='does not fit'): traced(build('lenet5', 1, 10, 20), graph=g)
    with pytest.raises(TypeError): traced('mlp', graph=g)
    with pytest.raises(TypeError, match="^graph='g': expected a Graph"): traced(m, graph='g')

C = nn.Conv2d
@pytest.mark.parametrize('other', [[C(2, 4, 3, padding=1), C(4, 4, 3)], [C(1, 4, 1, padding=0), C(4, 4, 3)], [C(
    1, 4, 3, padding=1), C(4, 4, 3, groups=2)], [C(1, 4, 3, padding=1), C(4, 6, 3)]], ids=str)
def test_every_shape_of_a_layer_counts(other):
    m = nn.Sequential(C(1, 4, 3, padding=1), C(4, 4, 3)); g = trace(m, torch.rand(1, 1, 6, 6))
    assert traced(m, graph=g) is g and traced(copy.deepcopy(m).double(), graph=g) is g
    with pytest.raises(ValueError, match='does not fit the model'): traced(nn.Sequential(*other), graph=g)

def test_a_graph_of_smaller_images_does_not_fit():
    small, large = (build('lenet300', 1, 10, n) for n in (8, 28))
    with pytest.raises(ValueError, match="layer 'fc1' does not fit"):
        traced(large, graph=trace(small, torch.rand(1, 1, 8, 8)))

@pytest.mark.parametrize('first', ['out', 'mid'])
def test_no_reader_shares_its_weight(first):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            [setattr(self, n, nn.Linear(4, 4)) for n in ([first] + [n for n in ('out', 'mid') if n != first])]
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4); self.mid.weight = self.out.weight
        def forward(self, x): return self.out(self.mid(self.b(self.a(x).relu()).relu()).relu())
    names, why = readers(trace(Tied(), torch.rand(1, 3)))
    assert (names == ['b'] and why['out'] == "it shares its weight with 'mid'"
            and why['mid'] == "it shares its weight with 'out'")

def test_unknown_layers_and_networks_without_readers():
    g = trace(nn.Sequential(nn.Linear(3, 2)), torch.rand(1, 3))
    for f in (column_groups, own_input):
        with pytest.raises(ValueError, match='layer'): f(g, 'nope')
    with pytest.raises(ValueError, match='no layer has inputs'): readers(g)

# Batches of several tensors

class Two(nn.Module):
    "A network and a shift of its answers: two inputs, the second without effect on the layers."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(),
                                 nn.Linear(6, 3))
    def forward(self, image, shift): return dict(logits=self.net(image)+shift)

@pytest.mark.parametrize('form', ['tuple', 'dict'])
def test_what_methods_see_in_a_batch_of_several_tensors(form):
    "Sensitivities, activations and moments are those of the network alone, in whatever slices."
    m, x, shift = Two(), torch.rand(23, 1, 4, 4), torch.rand(23, 3)
    xb = (x, shift) if form == 'tuple' else dict(shift=shift, image=x); inner = lambda k: f'net.{k}'
    a, b = sensitivities(m, xb, bs=5)['max'], sensitivities(m.net, x)['max']
    assert all(torch.allclose(a[inner(k)], v) for k,v in b.items())
    a, b = activations(m, xb, ins=['net.5'], outs=['net.0'], bs=5), activations(m.net, x, ins=['5'], outs=['0'])
    assert all(torch.allclose(a[inner(k)], v) for k,v in b.items())
    a, b = output_moments(m, xb, ['net.0', 'net.3'], bs=5), output_moments(m.net, x, ['0', '3'])
    assert all(a[inner(k)][0] == v[0] and torch.allclose(a[inner(k)][2], v[2]) for k,v in b.items())
    assert [len(o) for o in map(lambda s: tensors(s)[1], slices(xb, 10))] == [10, 10, 3]

def test_loaders_of_two_inputs():
    x, shift, y = torch.rand(60, 1, 4, 4), torch.rand(60, 3), torch.arange(60, dtype=torch.uint8) % 3; m = Two()
    dls = DataLoaders(*[DataLoader(list(zip(x, shift, y)), bs=16) for _ in range(2)], device=torch.device('cpu'))
    loss = lambda out, y: F.cross_entropy(out['logits'], y)
    (xb, sb), yb = batch_for(m.double(), dls, 'a method', n=40)
    assert xb.dtype == sb.dtype == torch.float64 and yb.dtype == torch.int64 and len(yb) == len(xb) == 40
    s = snip(m.float(), dls, n=40, loss_func=loss); assert list(s) == ['net.0', 'net.3', 'net.5'] and s.meta['n'] == 40
    assert pca(m, dls, n=40).meta['n'] == 40
