"""All back-ends compute the same, leave no trace, and the sliced one has the gradients of the masked network."""
import copy, random, warnings
import numpy as np, pytest, torch, torch.nn.functional as F, torchvision
from torch import nn
from neuronprune import energy_backends, energy_sliced
from neuronprune.applying import apply
from neuronprune.core import generator
from neuronprune.energy_backends import BACKENDS, Scorer
from neuronprune.energy_sliced import Narrow, Unsliceable, _Live, _Sliced, _dense
from neuronprune.energy_units import bits_of
from neuronprune.graph import trace
from test_energy_units import NETS, drawn, nets # noqa: F401

FAST = ('sliced', 'fold', 'vmap')
each, both = pytest.mark.parametrize('name', NETS), pytest.mark.parametrize('bn', ['batch', 'running'])

def emptied(bits, n, seed):
    "Random states of all densities, in each of which some parts are emptied."
    gen = generator(seed); states = torch.rand(n, bits.D, generator=gen) < torch.rand(n, 1, generator=gen)
    for row in states:
        for s in bits.slices.values():
            if torch.rand(1, generator=gen) < .2: row[s] = False
    return states

def close(a, b, tol=1e-5): return bool(((a-b).abs().amax((-2, -1)) <= tol*b.abs().amax((-2, -1)).clamp(min=1)).all())

def scorer(model, bits, backend, **kw):
    res = Scorer(model, bits, backend=backend, **kw); res.tested.update(BACKENDS) # no fallback that would hide a fault
    return res

# The same logits (oracle 6)

@each
@both
@pytest.mark.parametrize('tied', [False, True])
def test_all_compute_the_same_also_with_emptied_layers(nets, name, bn, tied):
    model, x, g = nets(name); bits = bits_of(model, g, tied=tied)
    states = emptied(bits, 30 if name != 'resnet20' else 3, 1)
    want = scorer(model, bits, 'loop', bn=bn)(states, x)
    assert want.shape == (len(states), len(x), 10 if name == 'resnet20' else 3) and torch.isfinite(want).all()
    for k in FAST:
        if k != 'sliced' and tied: continue
        assert close(scorer(model, bits, k, bn=bn)(states, x), want), k

def test_two_hundred_states_with_emptied_layers(nets):
    model, x, g = nets('res'); bits = bits_of(model, g, tied=False); states = emptied(bits, 200, 2)
    loop, sliced = (scorer(model, bits, k)(states, x[:4]) for k in ('loop', 'sliced'))
    assert close(sliced, loop)

@each
def test_the_loop_is_the_masked_network(nets, name):
    "With running statistics; a state means what its mask means."
    model, x, g = nets(name); bits = bits_of(model, g, tied=False)
    for s in emptied(bits, 12 if name != 'resnet20' else 2, 3):
        want = apply(copy.deepcopy(model), bits.mask(s)).eval()(x)
        assert close(scorer(model, bits, 'loop', bn='running')(s, x), want[None])

def test_nothing_left_is_the_last_bias(nets):
    model, x, g = nets('res'); bits = bits_of(model, g, tied=False)
    for k in BACKENDS:
        z = scorer(model, bits, k)(torch.zeros(1, bits.D).bool(), x)
        assert torch.allclose(z, model.fc.bias.expand_as(z), atol=1e-6), k

def test_dropped_filters_emit_no_shift(nets):
    "Defect 5: a dropped filter's norm has a shift."
    model, x, g = nets('res'); bits = bits_of(model, g, tied=False); model = copy.deepcopy(model)
    s = torch.ones(1, bits.D).bool(); s[:, bits.slices['layer1.conv2']] = False
    for k in BACKENDS:
        sc = scorer(model, bits, k); z = sc(s, x)
        with torch.no_grad(): model.layer1.bn2.bias.add_(5)
        assert torch.equal(sc(s, x), z), k

@pytest.mark.parametrize('name,size', [('squeezenet1_1', 32), ('mobilenet_v3_small', 32)])
def test_networks_of_torchvision(name, size):
    "Fire modules with concatenation; depthwise convolutions with gates."
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, size, size, generator=generator(0))
    bits = bits_of(model, trace(model, x), tied=False); s = drawn(bits, 2, 0, .6)
    want = scorer(model, bits, 'loop', bn='running')(s, x)
    assert close(scorer(model, bits, 'sliced', bn='running')(s, x)/want.abs().max(), want/want.abs().max())

# Gradients

@each
@pytest.mark.parametrize('train', [True, False])
def test_gradients_of_sliced_are_those_of_the_masked_network(nets, name, train):
    model, x, g = nets(name); model = copy.deepcopy(model).train(train); bits = bits_of(model, g, tied=False)
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    y = torch.arange(len(x)) % 3
    for s in emptied(bits, 1 if name == 'resnet20' else 3, 4):
        got = {}
        for k in ('loop', 'sliced'):
            net = copy.deepcopy(model); sc = scorer(net, bits, k)
            F.cross_entropy(sc.step(s, x), y).backward()
            got[k] = {n:p.grad if p.grad is not None else torch.zeros_like(p) for n,p in net.named_parameters()}, net
        (a, one), (b, two) = got['loop'], got['sliced']
        top = max(v.abs().max() for v in a.values())
        assert max((a[n]-b[n]).abs().max() for n in a) <= 1e-5*max(top, 1)
        for k,v in bits.keeps(s).items():
            n, _, cut = k.partition(':')
            for h in (a, b): assert not (h[f'{n}.weight'][:, ~v] if cut else h[f'{n}.weight'][~v]).any()
        for (n,p),(_,q) in zip(one.named_buffers(), two.named_buffers()): assert torch.allclose(p, q, atol=1e-6), n

def test_running_statistics_move_where_something_arrives(nets):
    model, x, g = nets('res'); bits = bits_of(model, g, tied=False)
    s = torch.ones(bits.D).bool(); s[bits.slices['conv1'].start] = False
    for k in ('sliced', 'loop'):
        net = copy.deepcopy(model).train(); old = net.bn1.running_mean.clone(); scorer(net, bits, k).step(s, x)
        assert ((net.bn1.running_mean != old) == bits.live(s)['bn1'][0]).all() and net.bn1.num_batches_tracked == 1

# No trace (oracle 7)

def everything(model):
    return ({k:v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
            [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()], torch.get_rng_state(),
            np.random.get_state()[1].tolist(), random.getstate())

def unchanged(a, b):
    assert all(torch.equal(v, b[0][k]) for k,v in a[0].items()) and list(a[0]) == list(b[0])
    assert a[1:4] == b[1:4] and torch.equal(a[4], b[4]) and a[5:] == b[5:]

@pytest.mark.parametrize('backend', ['auto', *BACKENDS])
@both
def test_no_trace(nets, backend, bn):
    model, x, g = nets('vgg'); bits = bits_of(model, g, tied=False)
    model = copy.deepcopy(model).train(); model[1].eval()
    before = everything(model); Scorer(model, bits, backend=backend, bn=bn)(drawn(bits, 3, 0), x)
    unchanged(before, everything(model))

@pytest.mark.parametrize('backend', BACKENDS)
def test_no_trace_after_an_exception(nets, backend, monkeypatch):
    model, x, g = nets('res'); model = copy.deepcopy(model).train(); bits = bits_of(model, g, tied=False)
    calls, own = [], F.adaptive_avg_pool2d
    def fails(*a): calls.append(torch.rand(1)); raise KeyboardInterrupt
    before = everything(model); monkeypatch.setattr(F, 'adaptive_avg_pool2d', fails)
    with pytest.raises(KeyboardInterrupt): scorer(model, bits, backend)(drawn(bits, 2, 0), x)
    assert calls; unchanged(before, everything(model)); monkeypatch.setattr(F, 'adaptive_avg_pool2d', own)
    assert torch.isfinite(scorer(model, bits, backend)(drawn(bits, 2, 0), x)).all()

def test_scoring_twice_is_the_same_and_no_graph_is_kept(nets):
    model, x, g = nets('vgg'); bits = bits_of(model, g); sc = Scorer(copy.deepcopy(model).train(), bits)
    s = drawn(bits, 3, 5); a, b = sc(s, x), sc(s, x)
    assert torch.equal(a, b) and not a.requires_grad

# Pitfalls

def test_one_example_with_maps_of_one_pixel(nets):
    "A batch norm of one number per channel has no statistics: the running ones are used."
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.rand(1, 3, 3, 3); bits = bits_of(model, trace(model, x)); s = drawn(bits, 4, 0)
    want = scorer(model, bits, 'loop', bn='running')(s, x)
    for k in BACKENDS: assert close(scorer(model, bits, k)(s, x), want), k

def test_norms_without_scale_or_statistics():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.na = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)
            self.b, self.nb = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)
            self.c, self.nc, self.fc = nn.Conv2d(5, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.Linear(4, 2)
            self.act = nn.PReLU(4)
        def forward(self, x):
            x = self.nc(self.c(self.nb(self.b(self.na(self.a(x)).relu())).relu()))
            return self.fc(self.act(x).mean((2, 3)))
    model = Odd().eval()
    with torch.no_grad():
        model.na.running_mean.add_(.3); model.nc.bias.add_(.2); model.nb.bias.add_(.1)
    x = torch.randn(6, 3, 9, 9); bits = bits_of(model, trace(model, x), tied=False); s = emptied(bits, 20, 1)
    for bn in ('batch', 'running'):
        want = scorer(model, bits, 'loop', bn=bn)(s, x)
        assert close(scorer(model, bits, 'sliced', bn=bn)(s, x), want), bn
    for one in s[:3]:
        want = apply(copy.deepcopy(model), bits.mask(one))(x)[None]
        assert close(scorer(model, bits, 'loop', bn='running')(one, x), want)

class Strange(nn.Module):
    "Operations that have no rule, a layer used twice, a grouped convolution, a gate."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.twice, self.c = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 3, padding='same', padding_mode='reflect')
        self.gate, self.d, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(6, 4, 1), nn.Linear(8, 2)
    def forward(self, x):
        x = torch.sigmoid(self.a(x)) - .1                # a dropped channel is not zero here
        x = self.b(F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1])
        x = self.twice(self.twice(x).relu()).roll(1, 2)
        y = self.c(x); y = y*torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        z = self.d(x).transpose(1, 2).transpose(1, 2)
        return self.fc(torch.cat([y, z], 1).amax(dim=(-1, -2)))

@pytest.mark.parametrize('grad', [False, True])
def test_a_strange_network_is_right(grad):
    torch.manual_seed(1)
    model = Strange().eval(); x = torch.randn(5, 3, 8, 8); g = trace(model, x)
    bits = bits_of(model, g, tied=False); s = emptied(bits, 25, 1)
    assert 'b' in bits.slices and 'twice' not in bits.slices
    if not grad:
        want = scorer(model, bits, 'loop')(s, x)
        for k in FAST: assert close(scorer(model, bits, k)(s, x), want), k
    else:
        for one in s[:5]:
            a, b = (torch.autograd.grad(scorer(model, bits, k).step(one, x).square().sum(), model.parameters(),
                                        allow_unused=True) for k in ('loop', 'sliced'))
            for p,q in zip(a, b): assert torch.allclose(p, torch.zeros_like(p) if q is None else q, atol=1e-5)

def test_what_cannot_be_followed_falls_back_and_says_so():
    class Put(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        def forward(self, x): x = self.a(x); x.clamp_(min=0); return self.b(x.mean((2, 3)))
    model = Put(); x = torch.rand(4, 3, 6, 6); bits = bits_of(model, trace(model, x)); s = drawn(bits, 3, 0)
    want = Scorer(model, bits, backend='loop')(s, x)
    with pytest.warns(UserWarning, match='clamp_'): Scorer(model, bits, backend='sliced')(torch.ones(1, 4).bool(), x)
    with pytest.warns(UserWarning, match="backend='sliced': Unsliceable: clamp_ .*the dense loop is used instead"):
        sc = Scorer(model, bits, backend='sliced'); assert torch.equal(sc(s, x), want)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(sc(s, x), want), 'said once'
        sc.step(s[0], x).sum().backward(); auto = Scorer(model, bits); assert close(auto(s, x), want)
    assert 'sliced' in auto.refused and 'sliced' not in next(iter(auto.timed.values()))

def test_a_back_end_that_computes_something_else_is_refused(nets, monkeypatch):
    model, x, g = nets('mlp'); bits = bits_of(model, g)
    monkeypatch.setitem(energy_backends.BACKENDS, 'fold', lambda *a: energy_sliced._loop(*a)*1.1)
    with pytest.warns(UserWarning, match="backend='fold': its logits differ from the loop's by 0.1"):
        z = Scorer(model, bits, backend='fold')(drawn(bits, 2, 0), x)
    assert torch.equal(z, Scorer(model, bits, backend='loop')(drawn(bits, 2, 0), x))

def test_narrow_tensors():
    n = Narrow(torch.ones(2, 2, 3), _Live(torch.tensor([0, 3])), 1, 5)
    assert n.shape == (2, 5, 3) and n.ndim == 3 and len(n) == 2 and isinstance(n, torch.Tensor)
    with pytest.raises(Unsliceable): n.sin()
    with _Sliced({}, {}, None):
        assert n.shape == (2, 5, 3) and n.size(1) == 5 and not isinstance(n.sigmoid(), Narrow)
        held = n; n += torch.ones(2, 5, 3)
        assert held is n and torch.equal(_dense(held)[:, 3], torch.full((2, 3), 2.)), 'who holds it sees the sum'
        assert isinstance(n.relu(), Narrow) and n.flatten(1).shape == (2, 15) and (n+1).shape == n.shape

def test_shared_tensors_after_a_sum_in_place():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        def forward(self, x):
            h = self.a(x); old = h; h += self.b(x)
            return self.fc((h.relu() + old).mean((2, 3)))
    model = Keeps(); x = torch.rand(4, 3, 5, 5)
    bits = bits_of(model, trace(model, x), tied=False); s = emptied(bits, 20, 0)
    assert close(scorer(model, bits, 'sliced')(s, x), scorer(model, bits, 'loop')(s, x))

# The scorer

def test_equal_rows_are_scored_once(nets, monkeypatch):
    model, x, g = nets('mlp'); bits = bits_of(model, g); s = drawn(bits, 3, 0)
    seen, own = [], energy_sliced._loop
    def counting(m, keep, *a): seen.append(len(keep['1'])); return own(m, keep, *a)
    monkeypatch.setitem(energy_backends.BACKENDS, 'loop', counting)
    z = Scorer(model, bits, backend='loop')(s[[2, 0, 2, 1, 0]], x)
    assert seen == [3] and torch.equal(z[0], z[2]) and torch.equal(z[1], z[4]) and not torch.equal(z[0], z[1])
    assert torch.equal(z[3], Scorer(model, bits, backend='loop')(s[1], x)[0])

def test_a_part_of_the_batch(nets):
    model, x, g = nets('res'); bits = bits_of(model, g); s, y = drawn(bits, 2, 0), torch.arange(len(x))
    sc = Scorer(model, bits, backend='sliced', frac=.25, bn='running')
    assert sc(s, x).shape == (2, 3, 3) and sc.part(y).tolist() == [0, 1, 2]
    assert close(sc(s, x), Scorer(model, bits, backend='loop', bn='running')(s, x)[:, :3])
    assert Scorer(model, bits, frac=.01).part(y).tolist() == [0]

@pytest.mark.parametrize('backend', BACKENDS)
def test_half_precision_by_autocast(nets, backend):
    "Where vmap takes no autocast, it is refused."
    model, x, g = nets('res'); bits = bits_of(model, g); s = drawn(bits, 2, 0, .75)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore' if backend == 'vmap' else 'error')
        a, b = (Scorer(model, bits, backend=backend, dtype=d)(s, x) for d in (None, torch.bfloat16))
    assert b.dtype == torch.float32 and 0 < (a-b).abs().max() <= .1*a.abs().max()

def test_auto_measures_once_per_shape(nets, monkeypatch):
    model, x, g = nets('mlp'); bits = bits_of(model, g); sc = Scorer(model, bits); n = []
    own = energy_backends._clock
    monkeypatch.setattr(energy_backends, '_clock', lambda f, d: n.append(1) or own(f, d))
    sc(drawn(bits, 4, 0), x); first = len(n); sc(drawn(bits, 4, 1), x)
    assert len(n) == first >= 4 and len(sc.timed) == 1
    sc(drawn(bits, 4, 0), x[:5]); assert len(sc.timed) == 2 and not sc.refused
    monkeypatch.setattr(energy_backends, '_clock', lambda f, d: next(costs)); costs = iter([9, 9, 1, 9, *[9]*9])
    sc(drawn(bits, 5, 0), x)
    assert sc.choose(energy_sliced._vectors(bits, drawn(bits, 5, 0)), x, 5) == 'fold'
    n = len(sc.timed); sc(drawn(bits, 1, 0).expand(5, -1), x)
    assert len(sc.timed) == n, 'equal rows measure nothing new'

def test_inputs_of_several_tensors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.fc = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(5, 2)
        def forward(self, u, v): return self.fc((self.a(u) + self.b(v)).relu())
    model = Two(); xb = (torch.rand(6, 3), torch.rand(6, 2)); bits = bits_of(model, trace(model, xb), tied=False)
    s = emptied(bits, 10, 0); want = scorer(model, bits, 'loop')(s, xb)
    for k in FAST: assert close(scorer(model, bits, k)(s, xb), want), k
    assert Scorer(model, bits, frac=.5)(s, xb).shape == (10, 3, 2)

@pytest.mark.parametrize('call,error,words', [
    (lambda m, b, x: Scorer(m, b, backend='slice'), ValueError, "backend='slice'.*did you mean 'sliced'"),
    (lambda m, b, x: Scorer(m, b, bn='eval'), ValueError, "bn='eval'"),
    (lambda m, b, x: Scorer(m, b, frac=0.), ValueError, 'frac=0'),
    (lambda m, b, x: Scorer(m, b, frac=25), ValueError, 'did you mean 0.25'),
    (lambda m, b, x: Scorer(m, b, dtype=torch.float64), ValueError, 'dtype='),
    (lambda m, b, x: Scorer(m, m), TypeError, 'bits: expected a Bits'),
    (lambda m, b, x: Scorer(3, b), TypeError, 'model: expected an nn.Module'),
    (lambda m, b, x: Scorer(m, b)(torch.ones(2, 3).bool(), x), ValueError, 'state: shape'),
    (lambda m, b, x: Scorer(m, b)(torch.ones(2, b.D), x), TypeError, 'expected torch.bool'),
    (lambda m, b, x: Scorer(m, b)(torch.ones(2, b.D).bool(), x[:0]), ValueError, 'batch is empty'),
    (lambda m, b, x: Scorer(m, b)(torch.ones(2, b.D).bool(), x[:, :1]), ValueError, 'cannot digest'),
    (lambda m, b, x: Scorer(m, b).step(torch.ones(2, b.D).bool(), x), ValueError, 'expected one state'),
    (lambda m, b, x: Scorer(m, b).step(torch.ones(b.D).bool(), x, 'fold'), ValueError, "backend='fold'")])
def test_mistakes(nets, call, error, words):
    model, x, g = nets('mlp')
    with pytest.raises(error, match=words): call(model, bits_of(model, g), x)
