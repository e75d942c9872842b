"""Which bit switches what: numbers of bits, masks and back, the accountings against surgery and the published table."""
import copy
import pytest, torch, torch.nn.functional as F, torchvision
from torch import nn
from neuronprune.applying import apply
from neuronprune.core import generator, layers
from neuronprune.costs import count_macs, count_params
from neuronprune.energy_units import Bits, bits_of, reference_units, shortcuts
from neuronprune.graph import trace
from neuronprune.masks import Mask, Scores
from neuronprune.models import build
from neuronprune.surgery import shrink

class Foreign(nn.Module):
    "Two branches that are concatenated, one of them depthwise; convolutions without batch norm, a pooled sum."
    def __init__(self, w=6):
        super().__init__()
        self.stem, self.left, self.deep = nn.Conv2d(3, w, 3, padding=1), nn.Conv2d(w, w, 1), nn.Conv2d(w, w, 3, 1, 1,
                                                                                                     groups=w)
        self.point, self.join, self.bn = nn.Conv2d(w, 4, 1), nn.Conv2d(w+4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.again, self.hidden, self.out = nn.Conv2d(8, 8, 1, bias=False), nn.Linear(8*4, 5), nn.Linear(5, 3)
    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        x = torch.cat([F.leaky_relu(self.left(x), .1), self.point(self.deep(x)).relu()], 1)
        x = self.bn(self.join(x)); x += self.again(x.relu())
        x = F.max_pool2d(x, 4)
        return self.out(torch.tanh(self.hidden(x.view(x.size(0), -1))))

class Res(nn.Module):
    "A small residual network in torchvision's spelling."
    def __init__(self, w=(4, 6), n_out=3):
        super().__init__()
        from torchvision.models.resnet import BasicBlock
        self.conv1, self.bn1 = nn.Conv2d(3, w[0], 3, 1, 1, bias=False), nn.BatchNorm2d(w[0])
        down = nn.Sequential(nn.Conv2d(w[0], w[1], 1, 2, bias=False), nn.BatchNorm2d(w[1]))
        self.layer1, self.layer2 = BasicBlock(w[0], w[0]), BasicBlock(w[0], w[1], 2, down)
        self.fc = nn.Linear(w[1], n_out)
    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))

def randomised(model, seed=0):
    "Biases, norms and their statistics at random, so that nothing is hidden by a zero or a one."
    gen = generator(seed)
    with torch.no_grad():
        for m in model.modules():
            if getattr(m, 'bias', None) is not None: m.bias.copy_(.3*torch.randn(m.bias.shape, generator=gen))
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(.3*torch.randn(m.running_mean.shape, generator=gen))
                m.running_var.copy_(.5+torch.rand(m.running_var.shape, generator=gen))
                if m.affine: m.weight.copy_(1+.3*torch.randn(m.weight.shape, generator=gen))
    return model

NETS = dict(
    mlp=(mlp, (3, 2, 2)), res=(Res, (3, 8, 8)), foreign=(Foreign, (3, 8, 8)),
    resnet20=(lambda: build('resnet20', 3, 10, 8, seed=0), (3, 8, 8)),
    vgg=(lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(True), nn.MaxPool2d(2),
                               nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True), nn.MaxPool2d(2),
                               nn.Flatten(), nn.Linear(24, 7), nn.ReLU(True), nn.Dropout(), nn.Linear(7, 3)),
         (3, 8, 8)))

def made(name):
    torch.manual_seed(0)
    model, shape = NETS[name]; model = randomised(model()).eval()
    x = torch.randn(12, *shape, generator=generator(0))
    return model, x, trace(model, x)

@pytest.fixture(scope='module')
def nets():
    cache = {}
    def get(name):
        if name not in cache: cache[name] = made(name)
        return cache[name]
    return get

both = pytest.mark.parametrize('tied', [True, False])
each = pytest.mark.parametrize('name', NETS)

def drawn(bits, n, seed, p=.5): return torch.rand(n, bits.D, generator=generator(seed)) < p

def nowhere_empty(bits, states):
    "States with a bit in every part, and everything that reaches a layer not lost."
    states = states.clone()
    for s in bits.slices.values(): states[:, s.start] = True
    return states

# Numbers

def test_resnet18_has_the_bits_of_the_specification():
    net = torchvision.models.resnet18(num_classes=10); g = trace(net, torch.rand(1, 3, 32, 32))
    tied, free = bits_of(net, g), bits_of(net, g, tied=False)
    assert (tied.D, free.D) == (2880, 5312)
    assert not any(k.startswith('fc') and k != 'fc:in' for k in free.columns) and 'fc:in' in free.columns
    assert free.retained(torch.ones(5312).bool())['params'] == count_params(net)
    # the reference: a filter its taps and one, a shortcut's norm one, an input of the last layer one per class
    whole = sum(m.weight[0].numel()*len(m.weight)+len(m.weight) for n,m in layers(net).items() if n != 'fc')
    assert free.cost.sum() == whole + 896 + 512*10

@pytest.mark.parametrize('name,classes,D', [('resnet18', False, 6208), ('resnet34', False, 9920),
                                            ('resnet50', False, 32448), ('resnet101', False, 58560),
                                            ('alexnet', True, 18662), ('squeezenet1_1', True, 3558)])
def test_the_published_table(name, classes, D):
    with torch.device('meta'): net = torchvision.models.get_model(name, num_classes=102)
    assert reference_units(net, classes)['D'] == D

def test_both_stems_have_the_same_bits():
    with torch.device('meta'): small, full = (build('resnet18', 3, 10, s) for s in (32, 224))
    assert reference_units(small) == reference_units(full)

def test_shortcuts_are_found_by_name():
    assert shortcuts(Res()) == ['layer2.downsample.0', 'layer2.downsample.1'] and shortcuts(mlp()) == []

def test_identity_shortcuts_and_outputs_have_no_bit(nets):
    model, _, g = nets('res'); free = bits_of(model, g, tied=False)
    assert list(free.columns) == ['conv1', 'layer1.conv1', 'layer1.conv2', 'layer2.conv1', 'layer2.conv2',
                                  'layer2.downsample.0', 'fc:in']
    assert free.D == 4+4+4+6+6+6+6 and bits_of(model, g).D == 4+4+6+6

def test_a_hidden_neuron_is_not_counted_twice(nets):
    model, _, g = nets('mlp')
    assert bits_of(model, g, tied=False).D == bits_of(model, g).D == 12

# Masks

@each
@both
def test_a_state_is_a_mask_and_back(nets, name, tied):
    model, x, g = nets(name); bits = bits_of(model, g, tied=tied)
    for s in drawn(bits, 2, 1):
        m = bits.mask(s); assert torch.equal(bits.state(m), s) and m.tied == tied
        apply(copy.deepcopy(model), m)
    assert bits.slices and max(o.stop for o in bits.slices.values()) == bits.D == len(bits)
    used = torch.cat(list(bits.columns.values())).unique()
    assert torch.equal(used, torch.arange(bits.D)), 'every bit switches something'

@each
def test_parameters_of_the_shrunken_network(nets, name):
    "Oracle 9: what is counted is what surgery leaves."
    model, x, g = nets(name); bits = bits_of(model, g)
    states = nowhere_empty(bits, drawn(bits, 2, 2, .6)); left = bits.retained(states)
    for i,s in enumerate(states):
        small = shrink(model, bits.mask(s), x[:2])
        assert count_params(small) == left['params'][i]
        assert abs(left['R_struct'][i]/100*count_params(model) - count_params(small)) < 1e-6
        assert count_macs(small, x) == left['macs'][i]

# Accounting

@each
@both
def test_everything_kept_is_100_and_nothing_grows_without_a_bit(nets, name, tied):
    model, _, g = nets(name); bits = bits_of(model, g, tied=tied)
    one = bits.retained(torch.ones(bits.D).bool())
    assert one['R_ref'] == one['R_struct'] == 100 and one['density'] == 1 and one['params'] == count_params(model)
    s, order = torch.zeros(bits.D, dtype=torch.bool), torch.randperm(bits.D, generator=generator(0))
    chain = [s]
    for part in order.chunk(6): s = s.clone(); s[part] = True; chain.append(s)
    left = bits.retained(torch.stack(chain))
    for k in ('R_ref', 'R_struct', 'params', 'macs', 'density'): assert (left[k].diff() >= 0).all(), k
    assert left['R_ref'].diff().min() > 0 and left['R_ref'][0] == 0

def test_population_and_single_state_agree(nets):
    model, _, g = nets('foreign'); bits = bits_of(model, g, tied=False); states = drawn(bits, 6, 3)
    many = bits.retained(states)
    for i,s in enumerate(states): assert bits.retained(s) == {k:v[i].item() for k,v in many.items()}
    for k,v in bits.keeps(states).items(): assert torch.equal(v[2], bits.keeps(states[2])[k])

def test_a_sum_keeps_what_one_branch_has_lost(nets):
    model, _, g = nets('res'); bits = bits_of(model, g, tied=False)
    s = torch.ones(bits.D).bool(); s[bits.slices['layer1.conv2']] = False
    live = bits.live(s)
    assert not live['layer1.bn2'].any() and live['layer2.conv1'].all() and live['layer2.downsample.0'].all()
    s[bits.slices['conv1']] = False
    assert not bits.live(s)['layer2.conv1'].any()

def test_live_is_what_the_expanded_mask_says(nets):
    model, _, g = nets('res'); bits = bits_of(model, g, tied=False)
    for state in drawn(bits, 15, 4):
        keep, live = bits.mask(state).expand(model), bits.live(state)
        for n in ('bn1', 'layer1.bn2', 'layer2.downsample.1'):
            want = keep.get(f'{n}.weight', torch.ones(live[n].shape[1], dtype=torch.bool))
            assert not (want & ~live[n][0]).any(), 'the mask may know more: what nobody reads'

@pytest.mark.parametrize('name', ['layer1.bn2', 'layer2.bn2'])
def test_a_norm_before_a_sum_in_place_hears_its_own_convolution_only(nets, name):
    "Otherwise a dropped filter would go on emitting its norm's shift (defect 5 of the released program)."
    _, _, g = nets('res')
    assert list(g.sources[name]) == [name.replace('bn', 'conv')]

def test_repaired_states_have_no_emptied_part(nets):
    model, _, g = nets('res'); bits = bits_of(model, g, tied=False); states = drawn(bits, 20, 5, .1)
    for n in (1, 3, 99):
        fixed = bits.repaired(states, n, generator(0))
        assert torch.equal(fixed, bits.repaired(states, n, generator(0))) and (fixed | ~states).all()
        for s in bits.slices.values():
            old, new = states[:, s].sum(1), fixed[:, s].sum(1)
            assert torch.equal(new, old.clamp(min=min(n, s.stop-s.start)))

# Exclusions and mistakes

def test_excluded_layers_have_no_bits(nets):
    model, _, g = nets('res')
    free = bits_of(model, g, tied=False, exclude=('conv1', 'layer2.*'))
    assert list(free.slices) == ['layer1.conv1', 'layer1.conv2', 'fc:in']
    tied = bits_of(model, g, exclude='conv1')
    assert list(tied.slices) == ['layer1.conv1', 'layer2.conv1', 'layer2.conv2'], 'what is tied to it stays with it'

@pytest.mark.parametrize('call,error,words', [
    (lambda b, m, g: b.mask(torch.ones(3).bool()), ValueError, r'state: shape \(3,\); expected \[12\]'),
    (lambda b, m, g: b.mask(torch.ones(2, 12).bool()), ValueError, 'expected one state'),
    (lambda b, m, g: b.keeps(torch.ones(12)), TypeError, 'torch.float32; expected torch.bool'),
    (lambda b, m, g: b.keeps([True]*12), TypeError, 'state: expected a Tensor'),
    (lambda b, m, g: b.retained(torch.ones(0, 12).bool()), ValueError, 'state: shape'),
    (lambda b, m, g: b.state(Scores({'1': torch.rand(7)}, 'channel')), TypeError, 'mask: expected a Mask'),
    (lambda b, m, g: b.state(Mask({'1': torch.ones(7, 12).bool()}, 'weight')), ValueError, "unit='weight'"),
    (lambda b, m, g: b.state(Mask({'1': torch.ones(6).bool()}, 'channel')), ValueError, '6 channels; expected 7'),
    (lambda b, m, g: bits_of(m, g, exclude='fc9'), ValueError, "exclude='fc9'"),
    (lambda b, m, g: bits_of(m, g, exclude='*'), ValueError, 'no unit with a bit'),
    (lambda b, m, g: bits_of(m, m), TypeError, 'graph'),
    (lambda b, m, g: bits_of(m, g, tied=1), TypeError, 'tied')])
def test_mistakes(nets, call, error, words):
    model, _, g = nets('mlp')
    with pytest.raises(error, match=words): call(bits_of(model, g), model, g)

def test_frame_says_what_is_where(nets):
    model, _, g = nets('res'); bits = bits_of(model, g); s = torch.zeros(bits.D).bool()
    s[bits.slices['layer1.conv1']] = True
    f = bits.frame(s)
    assert f.bits.sum() == bits.D and f['kept, %'].tolist() == [0, 100, 0, 0]
    assert f['layers'][0] == 'conv1, layer1.conv2' and isinstance(bits, Bits) and 'tied bits' in repr(bits)
