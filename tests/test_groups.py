"Grouped convolutions cut whole or evenly: by hand, behind shuffles and gates, twice, and from a file."
import copy, pytest, torch
from torch import nn
from neuronprune.allocate import allocate, weights_left
from neuronprune.core import feed, generator, layers, seed_everything
from neuronprune.graph import trace
from neuronprune.groups import evenly, held, met
from neuronprune.masks import Mask, Scores
from neuronprune.retrain import _slice
from neuronprune.surgery import apply, difference, load, plan, save, shrink

C = nn.Conv2d
def x(seed=1, n=2): return torch.randn(n, 3, 5, 5, generator=generator(seed))
def line(*mods, seed=0):
    with seed_everything(seed):
        m = nn.Sequential(*(o() if isinstance(o, type) else o for o in mods)).eval()
        for n,p in m.named_parameters(): nn.init.normal_(p, std=.5)
        for b in m.buffers():
            if b.is_floating_point(): b.copy_(torch.rand_like(b)+.5)
    return m
def scored(m, g, seed=0, unit='channel'):
    gen = generator(seed)
    if unit == 'channel': units = {n:torch.rand(len(g.out_slots[n]), generator=gen) for n in g.removable}
    else: units = {n:torch.rand(l.weight.shape, generator=gen) for n,l in layers(m).items()}
    return Scores(units, unit, graph=g)
def checked(m, mask, xb=None):
    small = shrink(m, mask, x() if xb is None else xb)
    assert difference(apply(copy.deepcopy(m), mask), small, x(7, 3)) < 1e-5
    return small

class Shuffle(nn.Module):
    def __init__(self, g): super().__init__(); self.g = g
    def forward(self, x): n, c, h, w = x.shape; return x.view(n, self.g, c//self.g, h, w).transpose(1, 2).reshape(n, c,
            h, w)
class Gate(nn.Module):
    "Squeeze and excite."
    def __init__(self, c=12): super().__init__(); self.a, self.b = C(c, 4, 1), C(4, c, 1)
    def forward(self, x): return x*self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

NETS = dict(
    resnext=lambda: line(C(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), C(12, 12, 3, groups=3), nn.BatchNorm2d(12),
        nn.ReLU(), C(12, 5, 1)),
    wider=lambda: line(C(3, 8, 1), nn.ReLU(), C(8, 24, 3, groups=4), nn.ReLU(), C(24, 5, 1)),
    gated=lambda: line(C(3, 12, 1), nn.ReLU(), C(12, 12, 3, groups=4), nn.ReLU(), Gate(), C(12, 5, 1)),
    two=lambda: line(C(3, 12, 1), nn.ReLU(), C(12, 12, 1, groups=2), nn.ReLU(), C(12, 12, 1, groups=3), nn.ReLU(), C(12,
        5, 1)),
    shuffled=lambda: line(C(3, 12, 1), nn.ReLU(), C(12, 12, 1, groups=2), Shuffle(2), nn.ReLU(), C(12, 12, 3, groups=2),
        nn.ReLU(), C(12, 5, 1)),
    multiplier=lambda: line(C(3, 6, 1), nn.ReLU(), C(6, 12, 3, groups=6), nn.ReLU(), C(12, 5, 1)),
    narrowing=lambda: line(C(3, 12, 1), nn.ReLU(), C(12, 4, 3, groups=4), nn.ReLU(), C(4, 5, 1)),
    depthwise=lambda: line(C(3, 6, 1), nn.ReLU(), C(6, 6, 3, groups=6), nn.ReLU(), C(6, 5, 1)),
    sequence=lambda: nn.Sequential(nn.Flatten(2), line(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=2),
        nn.ReLU(), nn.Conv1d(8, 2, 1))))

@pytest.mark.parametrize('how', ['even', 'whole'])
@pytest.mark.parametrize('name', NETS)
def test_masked_is_shrunk(name, how, tmp_path):
    m = NETS[name](); g = trace(m, x(), groups=how)
    if name in ('shuffled', 'two') and how == 'whole': # every group meets every other
        assert g.removable == [] and "its channels can only go all together" in g.fixed['0']; return
    small = checked(m, allocate(scored(m, g), .5, scope='layer'))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in m.parameters())
    for n,l in layers(small).items():
        y = l.weight
        assert (len(y), y.shape[1]*l.groups, l.out_channels % l.groups) == (l.out_channels, l.in_channels, 0)
    save(small, tmp_path/'m'); again = load(tmp_path/'m', NETS[name]())
    assert torch.equal(again(x(3)), small(x(3)))
    g2 = trace(small, x(), groups=how) # a second cut, then back from a file into the first network
    tiny = checked(small, allocate(scored(small, g2, 1), .5, scope='layer')) if g2.removable else small
    save(tiny, tmp_path/'t'); assert torch.equal(load(tmp_path/'t', NETS[name]())(x(3)), tiny(x(3)))

@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('unit', ['weight', 'untied'])
def test_other_masks(name, unit):
    m = NETS[name](); g = trace(m, x())
    sc = scored(m, g, 2, 'weight' if unit == 'weight' else 'channel')
    checked(m, allocate(sc, .6, **({} if unit == 'weight' else dict(tied=False))))

def test_whole_groups_by_hand():
    m = NETS['wider'](); g = trace(m, x(), groups='whole'); keep = torch.tensor([1, 0, 1, 1]).bool()
    ins, outs = keep.repeat_interleave(2), keep.repeat_interleave(6)
    small = shrink(m, Mask({'0': ins, '2': outs}, 'channel', graph=g), x())
    hand = line(C(3, 6, 1), nn.ReLU(), C(6, 18, 3, groups=3), nn.ReLU(), C(18, 5, 1)); s = m.state_dict()
    hand.load_state_dict({'0.weight': s['0.weight'][ins], '0.bias': s['0.bias'][ins], '2.weight': s['2.weight'][outs],
                          '2.bias': s['2.bias'][outs], '4.weight': s['4.weight'][:, outs], '4.bias': s['4.bias']})
    assert torch.equal(small(x(2)), hand(x(2))) and small[2].groups == 3

def test_an_even_cut_by_hand():
    m = NETS['wider'](); g = trace(m, x())
    ins, outs = torch.tensor([1, 0]*4).bool(), torch.tensor([1, 0, 0, 1, 1, 0]*4).bool()
    small = shrink(m, Mask({'0': ins, '2': outs}, 'channel', graph=g), x())
    hand = line(C(3, 4, 1), nn.ReLU(), C(4, 12, 3, groups=4), nn.ReLU(), C(12, 5, 1)); s = m.state_dict()
    hand.load_state_dict({'0.weight': s['0.weight'][ins], '0.bias': s['0.bias'][ins], '2.weight': s['2.weight'][outs][:,
        [0]],
                          '2.bias': s['2.bias'][outs], '4.weight': s['4.weight'][:, outs], '4.bias': s['4.bias']})
    assert torch.equal(small(x(2)), hand(x(2))) and (small[2].groups, small[2].in_channels) == (4, 4)

@pytest.mark.parametrize('groups,i,o', [(2, 3, 4), (3, 1, 2), (4, 2, 1), (5, 1, 1)])
def test_numbers_that_meet(groups, i, o):
    l = dict(groups=groups, n_in=groups*i, n_out=groups*o); whole, even = met(l, 'whole'), met(l, 'even')
    assert whole[0].bincount().tolist() == [i]*groups and whole[1].bincount().tolist() == [o]*groups
    if evenly(l, 'even'): assert even[0].bincount().tolist() == [groups]*i and even[1].bincount().tolist() == [groups]*o
    else: assert [v.tolist() for v in even] == [v.tolist() for v in whole] and min(i, o) == 1
    for keep in torch.cartesian_prod(*[torch.tensor([0, 1])]*groups).bool() if groups > 1 else ():
        if keep.any(): assert held(groups, groups*i, keep.repeat_interleave(i).nonzero()[:,0]) == (int(keep.sum()),
                None)

@pytest.mark.parametrize('how', ['even', 'whole'])
@pytest.mark.parametrize('name', ['resnext', 'wider', 'two', 'multiplier', 'narrowing', 'depthwise'])
def test_weights_are_counted_as_they_are_cut(name, how):
    m = NETS[name](); g = trace(m, x(), groups=how)
    if not g.removable: pytest.skip('nothing to cut')
    mask = allocate(scored(m, g), .4, scope='layer'); small = shrink(m, mask, x())
    assert weights_left(g, dict(mask)) == sum(l.weight.numel() for l in layers(small).values())

def test_the_argument_is_checked():
    with pytest.raises(ValueError, match="groups='half'"): trace(NETS['wider'](), x(), groups='half')

def test_own_forwards_in_groups():
    class Centred(C):
        def forward(self, x): return self._conv_forward(x, self.weight-self.weight.mean((1, 2, 3), keepdim=True),
                self.bias)
    m = line(C(3, 12, 1), nn.ReLU(), Centred(12, 12, 3, groups=3), nn.ReLU(), C(12, 5, 1))
    g = trace(m, x()); assert g.removable == ['2'] and 'no input can be cut' in g.fixed['0']
    checked(m, allocate(scored(m, g), .5))
    g = trace(m, x(), groups='whole'); assert not evenly(g.layers['2'], 'whole')

def test_a_gate_takes_whole_groups_through_the_hidden_mean():
    m = NETS['gated'](); g = trace(m, x(), groups='whole')
    assert len(g.out_slots['2'].unique()) == 4 and torch.equal(g.out_slots['2'], g.out_slots['4.b'])

@pytest.mark.parametrize('how', ['even', 'whole'])
def test_what_an_optimiser_remembers_is_cut_with_the_plan(how):
    m = NETS['wider'](); g = trace(m, x(), groups=how); mask = allocate(scored(m, g), .5, scope='layer')
    small, cuts = shrink(m, mask, x()), plan(m, mask, x())
    for n,p in m.named_parameters(): assert torch.equal(_slice(p.detach(), n, cuts), small.get_parameter(n).detach())
