"""Masked = shrunk, with everything random that could hide a mistake; on the zoo, on random networks, for every unit."""
import copy, math, warnings
import pytest, torch, torch.nn.functional as F
from hypothesis import Phase, assume, given, settings, strategies as st
from torch import nn
from neuronprune import surgery
from neuronprune.allocate import allocate
from neuronprune.core import UnsupportedLayerError, generator, layers
from neuronprune.masks import Mask, Scores
from neuronprune.graph import trace
from neuronprune.models import build
from neuronprune.surgery import (Factored, GroupedLinear, SurgeryError, apply, difference, factorise, merge, plan,
                                 shrink)
from neuronprune.retrain import keep_tensors
from test_graph import KINDS, Net, X, found, nets

size_of = lambda m: sum(p.numel() for p in m.parameters())
def quiet(*a, **kw):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return allocate(*a, **kw)

def randomise(model, xb, seed=0):
    "Random biases, batch-norm parameters and running statistics (around those of `xb`, so that signals survive)."
    gen = generator(seed); norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in model.modules():
        if getattr(m, 'bias', None) is not None: m.bias.data.copy_(.1*torch.randn(m.bias.shape, generator=gen))
    for m in norms: m.momentum = 1.
    with torch.no_grad(), torch.random.fork_rng(): model.train()(xb)
    for m in norms:
        m.momentum = .1
        if m.affine: m.weight.data.copy_(1+.3*torch.randn(m.weight.shape, generator=gen))
        m.running_mean += .3*m.running_var.sqrt()*torch.randn(m.running_mean.shape, generator=gen)
        m.running_var *= .5+torch.rand(m.running_var.shape, generator=gen)
    return model.eval()

def random_scores(model, g, unit, seed=1, names=None):
    gen, lay = generator(seed), layers(model); rnd = lambda *s: torch.rand(*s, generator=gen)
    if unit == 'channel': return Scores({k:rnd(g.layers[k]['n_out']) for k in names or g.removable}, 'channel', graph=g)
    if unit == ':in':
        return Scores({f'{k}:in':rnd(l['n_in']) for k,l in g.layers.items() if l['groups'] == 1}, 'channel', graph=g)
    if unit == 'weight': return Scores({k:rnd(*lay[k].weight.shape) for k in g.layers}, 'weight', graph=g)
    keys = [k for k,l in g.layers.items() if l['groups'] == 1]
    lab = {k:tuple(torch.arange(n)*min(n, 4)//n for n in lay[k].weight.shape[:2]) for k in keys}
    return Scores({k:rnd(*[int(o.max())+1 for o in lab[k]]) for k in keys}, 'group', graph=g, labels=lab)

def check(model, mask, xb, smaller=True):
    "The shrunken model equals the masked one, by our own comparison; returns it."
    before, lay = found(model), layers(model)
    small, masked = shrink(model, mask, xb), apply(copy.deepcopy(model), mask)
    assert found(model) == before and small is not model
    with torch.no_grad(): y, z, s = (m.eval()(xb) for m in (copy.deepcopy(model), masked, small))
    assert s.shape == y.shape and torch.isfinite(s).all() and (z-s).abs().max() <= 1e-5*z.abs().max()
    if smaller:
        assert size_of(small) < size_of(model) and (y-z).abs().max() > 1e-4*y.abs().max() and z.std(0).max() > 1e-6
    return small

ZOO = dict(mlp=8, lenet5=16, vgg7_bn=8, vgg16_dgl=32, resnet20=8, resnet50=16, densenet22=8, squeezenet1_1=16,
           mobilenet_v3_small=16, basiccnn=19, wrn16_8=8)

@pytest.fixture(scope='module')
def zoo():
    cache = {}
    def get(name):
        if name not in cache:
            m, xb = (build(name, 3, 10, ZOO[name], seed=0),
                     torch.randn(6, 3, ZOO[name], ZOO[name], generator=generator(0)))
            m = randomise(m, xb); cache[name] = m, xb, trace(m, xb)
        return cache[name]
    return get

@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('name', ZOO)
def test_masked_is_shrunk_on_the_zoo(zoo, name, tied):
    model, xb, g = zoo(name); mask = quiet(random_scores(model, g, 'channel'), .5, tied=tied)
    assert set(g.fixed) <= {'fc', 'fc2', 'fc3', 'classifier', 'classifier.1', 'classifier.3'} and len(g.outputs) == 1
    small = check(model, mask, xb)
    if tied:
        for k,m in layers(small).items():
            assert m.weight.shape[0] == (int(mask[k].sum()) if k in mask else g.layers[k]['n_out'])
    assert difference(small, small, xb) == 0 and not small.training

@pytest.mark.parametrize('name', ['lenet5', pytest.param('vgg16_dgl', marks=pytest.mark.slow), 'resnet20',
                                  'mobilenet_v3_small', 'densenet22'])
@pytest.mark.parametrize('unit', [':in', 'weight', 'group'])
def test_other_units_on_the_zoo(zoo, name, unit):
    model, xb, g = zoo(name); names = [k for k in g.removable][:3]
    mask = quiet(random_scores(model, g, unit), dict(weight=.995, group=.8).get(unit, .5))
    small = check(model, mask, xb, smaller=False)
    assert size_of(small) < size_of(model) or unit != ':in'

@pytest.mark.parametrize('name', ['lenet5', 'resnet20', 'squeezenet1_1'])
def test_a_mask_on_some_layers_only(zoo, name):
    model, xb, g = zoo(name); loose = [k for k in g.removable if not any(k in t for t in g.ties)][:2]
    check(model, quiet(random_scores(model, g, 'channel', names=loose), .5), xb)

def test_frozen_models_shrink_the_same(zoo):
    model, xb, g = zoo('resnet20'); mask = quiet(random_scores(model, g, 'channel'), .5)
    a, b = shrink(model, mask, xb), shrink(copy.deepcopy(model).requires_grad_(False), mask, xb)
    assert all(torch.equal(p, b.state_dict()[k]) for k,p in a.state_dict().items())

def test_frozen_models_stay_frozen(zoo):
    model, xb, g = zoo('resnet20'); frozen = copy.deepcopy(model); frozen.requires_grad_(False)
    frozen.fc.requires_grad_(True)
    small = shrink(frozen, quiet(random_scores(model, g, 'channel'), .5), xb)
    assert [k for k,p in small.named_parameters() if p.requires_grad] == ['fc.weight', 'fc.bias']

@pytest.mark.parametrize('name', ['resnet20', 'mobilenet_v3_small', 'vgg16_dgl'])
def test_the_small_model_trains(zoo, name):
    model, xb, g = zoo(name); small = shrink(model, quiet(random_scores(model, g, 'channel'), .5), xb).train()
    before = copy.deepcopy(small.state_dict())
    opt = torch.optim.SGD(small.parameters(), .1)
    F.cross_entropy(small(xb), torch.arange(len(xb))).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape and torch.isfinite(p.grad).all()
               for p in small.parameters())
    opt.step(); assert all((p != before[k]).any() for k,p in small.named_parameters() if p.ndim > 1)
    for m in small.modules():
        if isinstance(m, nn.Linear): assert (m.out_features, m.in_features) == m.weight.shape
        if isinstance(m, nn.Conv2d): assert (m.out_channels, m.in_channels//m.groups) == m.weight.shape[:2]
        if isinstance(m, nn.BatchNorm2d): assert m.num_features == len(m.running_mean)

def test_shrinking_twice(zoo):
    model, xb, g = zoo('densenet22'); small = model
    for _ in range(2): g = trace(small, xb); small = check(small, quiet(random_scores(small, g, 'channel'), .3), xb)

# ---- random networks

@settings(max_examples=40)
@given(nets([k for k in KINDS if k not in ('shuffle', 'pad', 'glu')]),
       st.sampled_from(['channel', ':in', 'weight', 'group']), st.booleans(), st.floats(.1, .95), st.integers(0, 99))
def test_masked_is_shrunk_on_random_networks(model, unit, tied, s, seed):
    g = trace(model, X); assume(g.removable)
    check(model, quiet(random_scores(model, g, unit, seed), s, tied=tied), X, smaller=False)

@settings(max_examples=40, derandomize=True, phases=[Phase.generate])
@given(nets(['glu', 'seq', 'add', 'proj']), st.sampled_from(['channel', 'weight']), st.floats(.1, .95),
       st.integers(0, 99))
def test_masked_is_shrunk_where_channels_of_one_layer_meet(model, unit, s, seed):
    g = trace(model, X); assume(g.removable)
    check(model, quiet(random_scores(model, g, unit, seed), s), X, smaller=False)

@settings(max_examples=25)
@given(nets(['seq', 'add', 'dw', 'proj', 'cat']), st.floats(.3, .8), st.integers(0, 99))
def test_tied_masks_shrink_to_what_they_keep(model, s, seed):
    g = trace(model, X); mask = quiet(random_scores(model, g, 'channel', seed), s)
    small = check(model, mask, X, smaller=False)
    assert all(len(layers(small)[k].weight) == int(v.sum()) for k,v in mask.items())

@settings(max_examples=25)
@given(nets(), st.floats(.2, .8), st.integers(0, 99))
def test_hard_wired_networks_shrink_or_say_so(model, s, seed):
    g = trace(model, X); mask = quiet(random_scores(model, g, 'channel', seed), s)
    try: check(model, mask, X, smaller=False)
    except SurgeryError as e: assert 'cannot run' in str(e) or 'differ by' in str(e)

# ---- constants: channels that read nothing

def shot(model, g, unit, p, seed):
    "A mask that keeps each block or weight with probability `p`, so that whole rows and columns die."
    sc = random_scores(model, g, unit, seed)
    return Mask({k:v < p for k,v in sc.items()}, sc.unit, graph=g, labels=sc.labels)

@settings(max_examples=40)
@given(nets([k for k in KINDS if k not in ('shuffle', 'pad', 'glu')]), st.sampled_from(['weight', 'group']),
       st.floats(.05, .6), st.integers(0, 99))
def test_dead_children_on_random_networks(model, unit, p, seed):
    model = randomise(model, X, seed); g = trace(model, X); assume(g.removable)
    check(model, shot(model, g, unit, p, seed), X, smaller=False)

@pytest.mark.parametrize('p', [.15, .4])
@pytest.mark.parametrize('name', ['mlp', 'lenet5', 'vgg7_bn', 'resnet20', 'densenet22', 'mobilenet_v3_small'])
def test_dead_children_on_the_zoo(zoo, name, p):
    model, xb, g = zoo(name); mask = shot(model, g, 'group', p, 3)
    small = check(model, mask, xb, smaller=False)
    assert size_of(small) < size_of(model) or p > .2

def rows(model, **empty):
    "A weight mask: the named layers lose these rows."
    res = {k:torch.ones_like(layers(model)[k].weight).bool() for k in empty}
    for k,o in empty.items(): res[k][o] = False
    return Mask(res, 'weight')

def made(seed, *ms):
    "A chain with weights, biases and norm statistics that depend on the seed only."
    m = nn.Sequential(*ms)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for o in m.modules(): getattr(o, 'reset_parameters', lambda: None)()
    return m
widths = lambda m: [tuple(o.weight.shape[:2]) for o in layers(m).values()]
IMG = torch.randn(8, 2, 5, 5, generator=generator(3))
def chain(second, norm=True, act=nn.LeakyReLU, bias=None):
    m = randomise(made(0, nn.Conv2d(2, 4, 1), *([nn.BatchNorm2d(4)] if norm else []), act(), second, nn.ReLU(),
                       nn.AdaptiveAvgPool2d(2), nn.Flatten(), L(12, 3)).eval().requires_grad_(False), IMG)
    if bias is not None: m[0].bias[:2] = torch.tensor(bias)
    return m

@pytest.mark.parametrize('second,goes', [(nn.Conv2d(4, 3, 3), True), (nn.Conv2d(4, 3, 1, stride=2), True), (nn.Conv2d(
    4, 3, 3, padding=1), False), (nn.Conv2d(4, 3, 3, padding='same'), False),
    (nn.Conv2d(4, 3, 3, padding='valid'), True), (nn.Conv2d(4, 3, 3, padding=1, padding_mode='reflect'), True),
                                         (nn.Conv2d(4, 3, 3, padding=(0, 1), padding_mode='circular'), True),
    (nn.Conv2d(4, 3, 3, bias=False), False)], ids=str)
def test_a_constant_goes_where_its_reader_can_take_it_over(second, goes):
    with torch.no_grad(): m = chain(second)
    small = check(m, rows(m, **{'0': [0, 1]}), IMG, smaller=goes)
    assert widths(small)[:2] == ([(2, 2), (3, 2)] if goes else [(4, 2), (3, 4)])

@pytest.mark.parametrize('second', [nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 3, bias=False)], ids=str)
def test_a_constant_zero_always_goes(second):
    with torch.no_grad(): m = chain(second, norm=False, act=nn.ReLU, bias=[-.5, .5])
    small = check(m, rows(m, **{'0': [0, 1]}), IMG); assert widths(small)[:2] == [(3, 2), (3, 3)]

def test_constants_add_up_through_norm_and_flatten():
    with torch.no_grad():
        m = randomise(made(1, nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Flatten(),
                           nn.Linear(36, 3)).eval().requires_grad_(False), IMG)
    small = check(m, rows(m, **{'0': [1, 3]}), IMG)
    v = F.leaky_relu((m[0].bias-m[1].running_mean)/(m[1].running_var+m[1].eps).sqrt()*m[1].weight+m[1].bias)
    W = m[4].weight.view(3, 4, 9).sum(2)
    assert (widths(small) == [(2, 2), (3, 18)]
            and torch.allclose(small[4].bias, m[4].bias + W[:, 1]*v[1] + W[:, 3]*v[3], atol=1e-5))

def test_what_reads_constants_only_is_a_constant():
    m = made(2, L(3, 4), nn.Tanh(), L(4, 4), nn.LeakyReLU(), L(4, 4), nn.LeakyReLU(), L(4, 2)).requires_grad_(False)
    x = torch.randn(6, 3)
    mask = rows(m, **{'0': [0, 1], '2': []}); mask['2'][1:3, 2:] = False # rows 1 and 2 read the two constants alone
    assert widths(check(m, mask, x)) == [(2, 3), (2, 2), (4, 2), (2, 4)]

class Sum(nn.Module):
    def __init__(self, inner=False):
        super().__init__(); self.a, self.b, self.c, self.inner = L(3, 3), L(3, 3), L(3, 2), inner
        with torch.no_grad(): self.a.bias.fill_(.7); self.b.bias.fill_(.4)
    def forward(self, x): h = F.leaky_relu(self.a(x)); return self.c(F.leaky_relu(self.b(h) + (h if self.inner else x)))

def test_a_sum_is_constant_only_if_all_of_it_is():
    x = torch.randn(6, 3); plain, inner = Sum(), Sum(True)
    assert widths(check(plain, rows(plain, b=[0, 1]), x, smaller=False)) == [(3, 3), (3, 3), (2, 3)], (
        'the image comes through the shortcut')
    assert widths(check(inner, rows(inner, b=[0, 1]), x, smaller=False)) == [(3, 3), (3, 3), (2, 3)]
    assert widths(check(inner, rows(inner, a=[0], b=[0, 1]), x)) == [(2, 3), (2, 2), (2, 2)]

def test_a_unit_that_happens_to_be_silent_stays():
    m = made(3, L(3, 4), nn.ReLU(), L(4, 2)).requires_grad_(False); m[0].bias[0] = -100; x = torch.rand(6, 3)
    assert (widths(shrink(m, rows(m, **{'0': []}), x)) == [(4, 3), (2, 4)]
            and widths(shrink(m, rows(m, **{'0': [1]}), x)) == [(3, 3), (2, 3)])

@pytest.mark.parametrize('pad,goes', [(0, True), (1, False)])
def test_constants_through_a_depthwise_convolution(pad, goes):
    m = made(4, nn.Conv2d(2, 4, 1), nn.LeakyReLU(), nn.Conv2d(4, 4, 3, padding=pad, groups=4), nn.LeakyReLU(),
             nn.Conv2d(4, 2, 1)).requires_grad_(False)
    assert (widths(check(m, rows(m, **{'0': [1, 2]}), IMG, smaller=goes))
            == ([(2, 2), (2, 1), (2, 2)] if goes else [(4, 2), (4, 1), (2, 4)]))

def test_an_empty_depthwise_row_frees_the_channel_before_it():
    m = made(4, nn.Conv2d(2, 4, 1), nn.LeakyReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.LeakyReLU(),
             nn.Conv2d(4, 2, 1)).requires_grad_(False)
    assert widths(check(m, rows(m, **{'2': [1, 2]}), IMG)) == [(2, 2), (2, 1), (2, 2)]

@pytest.mark.parametrize('flat', [True, False])
def test_a_constant_that_differs_from_place_to_place(flat):
    """A pool that averages zeros in at the border: each column of a linear layer still sees a constant,
    a convolution does not."""
    m = made(7, nn.Conv2d(2, 4, 1), nn.LeakyReLU(), nn.AvgPool2d(2, 1, padding=1),
             *([nn.Flatten(), L(4*36, 3)] if flat else [nn.Conv2d(4, 3, 1)])).requires_grad_(False)
    small = check(m, rows(m, **{'0': [1, 2]}), IMG, smaller=flat)
    assert widths(small) == ([(2, 2), (3, 72)] if flat else [(4, 2), (3, 4)])

def test_reading_a_unit_that_happens_to_be_silent_makes_no_constant():
    m = made(8, L(3, 4), nn.ReLU(), L(4, 4), nn.ReLU(), L(4, 2)).requires_grad_(False); m[0].bias[0] = -100
    x = torch.rand(6, 3)
    mask = rows(m, **{'2': [3]}); mask['2'][1, 1:] = False
    assert widths(shrink(m, mask, x)) == [(4, 3), (3, 4), (2, 3)]

def test_a_dead_row_does_not_count_as_a_reader():
    "Two readers: one takes the constant over, of the other (zero-padded) only a row reads it that nobody reads."
    with torch.random.fork_rng():
        torch.manual_seed(9)
        m = Net(lambda s, x: s.e1(F.leaky_relu(s.p1(h := F.leaky_relu(s.a(x))))).mean((2, 3))
                + s.e2(F.leaky_relu(s.p2(h))).mean((2, 3)),
                a=nn.Conv2d(2, 4, 1), p1=nn.Conv2d(4, 3, 3, padding=1), p2=nn.Conv2d(4, 3, 3), e1=nn.Conv2d(3, 2, 1),
                e2=nn.Conv2d(3, 2, 1)).requires_grad_(False)
    mask = rows(m, a=[0], p1=[], e1=[]); mask['p1'][:2, 0] = False; mask['e1'][:, 2] = False
    small = check(m, mask, IMG)
    assert ([tuple(getattr(small, k).weight.shape[:2]) for k in ('a', 'p1', 'p2', 'e1')]
            == [(3, 2), (2, 3), (3, 3), (2, 2)])
    mask['e1'][:, 2] = True; assert shrink(m, mask, IMG).a.weight.shape[0] == 4

def test_a_grouped_convolution_with_more_inputs_than_groups():
    m = made(5, nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
             nn.Conv2d(4, 2, 1)).requires_grad_(False)
    assert widths(check(m, rows(m, **{'4': [0]}), IMG)) == [(8, 2), (4, 2), (3, 4), (2, 3)]

def test_the_plan_is_the_one_that_shrink_follows():
    with torch.no_grad(): m = chain(nn.Conv2d(4, 3, 3))
    mask = rows(m, **{'0': [0, 1]}); assert plan(m, mask, IMG)['0'][0].tolist() == [2, 3]
    small = shrink(m, mask, IMG)
    assert all(len(layers(small)[k].weight) == len(o) for k,(o,_) in plan(m, mask, IMG).items() if o is not None
               and k in layers(small))

def test_the_last_channel_of_a_layer_stays_though_it_is_constant():
    m = made(6, L(3, 3), nn.LeakyReLU(), L(3, 2)).requires_grad_(False); x = torch.randn(5, 3)
    small = check(m, rows(m, **{'0': [0, 1, 2]}), x, smaller=False); assert widths(small) == [(1, 3), (2, 1)]

# ---- apply

@settings(max_examples=40)
@given(nets(), st.sampled_from(['channel', ':in', 'weight', 'group']), st.booleans(), st.integers(0, 99))
def test_apply_zeroes_exactly_what_expand_names(model, unit, tied, seed):
    g = trace(model, X); mask = quiet(random_scores(model, g, unit, seed), .5, tied=tied); e = mask.expand(model)
    old = copy.deepcopy(model.state_dict())
    assert apply(model, mask) is model
    for k,v in model.state_dict().items():
        assert torch.equal(v, old[k] if k not in e else torch.where(e[k], old[k], torch.zeros_like(old[k])))
    if unit in ('channel', 'weight'):
        for k,v in mask.items():
            k, v = (f'{k}.weight', v) if not k.endswith(':in') else (k[:-3]+'.weight', None)
            if v is not None: assert torch.equal(e[k] if unit == 'weight' else e[k].flatten(1).any(1), v)

@pytest.mark.parametrize('unit', ['channel', ':in', 'weight', 'group'])
def test_scale_is_multiplied_in_once(unit):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)); x = torch.randn(5, 3); g = trace(model, x)
    sc = random_scores(model, g, unit, names=['0']); keep = quiet(sc, .4)
    scale = {k:torch.rand(v.shape)+.5 for k,v in keep.items()}
    plain = apply(copy.deepcopy(model), Mask(keep.units, keep.unit, graph=g, labels=keep.labels))
    mask = Mask(keep.units, keep.unit, graph=g, labels=keep.labels, scale=scale)
    scaled = apply(copy.deepcopy(model), mask)
    for k,m in layers(scaled).items():
        want = layers(plain)[k].weight.clone()
        if unit == 'group' and k in scale: want *= scale[k][mask.labels[k][0]][:, mask.labels[k][1]]
        elif unit == 'weight': want *= scale[k]
        elif k in scale: want *= scale[k][:, None]; assert torch.allclose(m.bias, layers(plain)[k].bias*scale[k])
        elif f'{k}:in' in scale: want *= scale[f'{k}:in']
        assert torch.allclose(m.weight, want)
    assert difference(scaled, shrink(model, mask, x), x) <= 1e-5

# ---- what goes wrong

L = nn.Linear
def mask_of(m, x, **keep): return Mask({k:torch.tensor(v) for k,v in keep.items()}, 'channel', graph=trace(m, x))

def test_errors():
    x = torch.rand(3, 1, 4, 4)
    old = Net(lambda s, x: s.fc(s.conv(x).relu().view(-1, 16)), conv=nn.Conv2d(1, 4, 3), fc=L(16, 2))
    m = mask_of(old, x, conv=[True, False, True, True])
    assert 'a cut network' in m.graph.fixed['conv'] and shrink(old, m, x).conv.weight.shape == (4, 1, 3, 3)
    with pytest.raises(ValueError, match='cannot digest a batch of shape'): shrink(old, m, x[..., :3])
    m.graph.fixed.pop('conv')
    with pytest.raises(SurgeryError, match='cannot run.*hard-coded view'): shrink(old, m, x)
    with pytest.raises(ValueError, match='batch is empty'): shrink(old, m, x[:0])
    with pytest.raises(ValueError, match='NaN'): shrink(old, m, x*float('nan'))
    w = Mask({'conv': torch.ones(4, 1, 3, 3).bool()}, 'weight')
    with pytest.raises(ValueError, match='expected xb'): plan(old, w)
    with pytest.raises(ValueError, match="layer 'head' is not in the model"):
        shrink(old, Mask({'head': torch.ones(4).bool()}, 'channel', graph=m.graph), x)

def test_a_difference_is_an_error_that_says_how_much(monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0); model = nn.Sequential(L(3, 4), nn.LeakyReLU(), L(4, 2)); x = torch.randn(5, 3)
    m, cut = mask_of(model, x, **{'0': [True, False, True, True]}), surgery._cut_all
    monkeypatch.setattr(surgery, '_cut_all', lambda mod, cuts, widths, tables: cut(
        mod, {n:(torch.tensor([0, 1, 2]) if n == '0' else o, i) for n,(o,i) in cuts.items()}, widths))
    with pytest.raises(SurgeryError, match=r'differ by .* allowed are tol=1e-05'): shrink(model, m, x)
    shrink(model, m, x, tol=float('inf'))

def test_the_output_and_other_fixed_layers_keep_their_width():
    with torch.random.fork_rng():
        torch.manual_seed(0); model = nn.Sequential(L(3, 4), nn.Sigmoid(), L(4, 4), nn.LeakyReLU(), L(4, 3))
        x = torch.randn(5, 3)
    keep = [True, False, True, True]
    small = check(model, mask_of(model, x, **{'0': keep, '2': keep, '4': [True, True, False]}), x)
    assert ([tuple(m.weight.shape) for m in layers(small).values()] == [(4, 3), (3, 4), (3, 3)]
            and (small(x)[:, 2] == 0).all())

def test_nan_weights_do_not_pass():
    model = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2)); x = torch.rand(5, 3)
    m = mask_of(model, x, **{'0': [True, False, True, True]})
    model[2].weight.data[0, 0] = float('nan')
    with pytest.raises((SurgeryError, ValueError)): shrink(model, m, x)

def test_what_nobody_reads_goes_all_the_way_back():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*[o for _ in range(3) for o in (L(3, 3), nn.LeakyReLU())], L(3, 2)); x = torch.randn(5, 3)
    eye = torch.eye(3).bool()
    w = {'0': torch.ones(3, 3).bool(), '2': eye, '4': eye, '6': torch.tensor([[True, True, False]]*2)}
    assert ([tuple(m.weight.shape) for m in layers(check(model, Mask(w, 'weight'), x)).values()]
            == [(2, 3), (2, 2), (2, 2), (2, 2)])

def test_a_layer_never_disappears():
    model = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 4), nn.ReLU(), L(4, 2)); x = torch.rand(5, 3)
    none = Mask({'2': torch.zeros(4, 4).bool()}, 'weight'); small = shrink(model, none, x)
    assert small[2].weight.shape[1] >= 1 and small(x).shape == (5, 2)

@pytest.mark.parametrize('norm', [lambda: nn.BatchNorm2d(4, track_running_stats=False), lambda: nn.BatchNorm2d(4),
                                  lambda: nn.BatchNorm2d(4, affine=False),
                                  lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
                                  lambda: nn.PReLU(4)],
                         ids=['batch statistics', 'plain', 'without parameters', 'without anything', 'prelu'])
def test_every_norm_that_the_graph_knows(norm):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 1), norm(), nn.LeakyReLU(), nn.Conv2d(4, 2, 1)).eval()
        for p in model[1].parameters(): p.normal_()
        for b in model[1].buffers(): b.copy_(torch.rand(4)+.5) if b.is_floating_point() else None
    check(model, mask_of(model, X, **{'0': [True, False, True, True]}), X)

def shared():
    "A removable layer on either side of two layers with one weight."
    m = made(5, L(3, 6), nn.Tanh(), L(6, 6), nn.Tanh(), L(6, 6), nn.Tanh(), L(6, 5), nn.Tanh(), L(5, 2))
    m[4].weight = m[2].weight; return m, torch.randn(7, 3, generator=generator(1))

@pytest.mark.parametrize('unit', ['channel', ':in'])
def test_layers_beside_a_shared_weight_shrink(unit):
    m, x = shared(); g = trace(m, x); assert g.removable == ['6']
    ins = {'8:in': torch.arange(5) > 1}; outs = {k:torch.arange(g.layers[k]['n_out']) > 1 for k in g.removable}
    m[0].weight.requires_grad_(False); m[4].bias.requires_grad_(False)
    small = check(m, Mask(outs if unit == 'channel' else ins, 'channel', graph=g), x)
    assert widths(small) == ([(6, 3), (6, 6), (6, 6), (3, 6), (2, 3)]
                             if unit == 'channel' else [(6, 3), (6, 6), (6, 6), (3, 6), (2, 3)])
    assert ([n for n,p in small.named_parameters(remove_duplicate=False) if not p.requires_grad]
            == ['0.weight', '4.bias'])

def test_both_names_of_a_shared_weight_can_be_masked():
    m, x = shared(); a, b = torch.rand(2, 6, 6, generator=generator(2)) < .6
    mask = Mask({'2': a, '4': b, '6': torch.arange(30).view(5, 6) > 11}, 'weight')
    masked = apply(copy.deepcopy(m), mask); want = m[2].weight*(a & b)
    assert torch.equal(masked[2].weight, want) and masked[4].weight is masked[2].weight; check(m, mask, x)
    only = apply(copy.deepcopy(m), Mask({'4': b}, 'weight')); assert torch.equal(only[2].weight, m[2].weight*b)

@pytest.mark.parametrize('k', '24')
def test_ranks_of_a_shared_weight_are_refused(k):
    m, x = shared(); mask = Mask({k: torch.arange(6) < 1}, 'rank')
    for f in (lambda: apply(m, mask), lambda: shrink(m, mask, x), lambda: factorise(m, mask)):
        with pytest.raises(UnsupportedLayerError, match=f"'{k}' shares its weight with"): f()

def test_a_live_norm_slot_is_not_masked():
    m = Net(lambda s, x: s.c(s.bn(s.ln(s.a(x)) + s.b(x))), a=L(3, 4), b=L(3, 4), ln=nn.LayerNorm(4),
            bn=nn.BatchNorm1d(4), c=L(4, 2)).eval()
    x = torch.randn(8, 3)
    check(m, mask_of(m, x, b=[True, False, True, True]), x, smaller=False)

def test_a_trace_of_zeros_and_a_check_on_zeros_do_not_pass_a_wrong_model():
    m = Net(lambda s, x: s.c(s.a(x) + x), a=L(3, 3), c=L(3, 2)); z, x = torch.zeros(1, 3), torch.randn(8, 3)
    mask = mask_of(m, z, a=[True, False, True])
    try: small = shrink(m, mask, z)
    except SurgeryError: return
    assert difference(apply(copy.deepcopy(m), mask), small, x) < 1e-5

# ---- ranks

def thin(model, share=.25, k=1, labels=False, seed=0):
    """A mask that keeps a random share of the components of every plain layer, of `k` groups where the inputs divide;
    with random directions if `labels`."""
    units, lab, gen = {}, {}, generator(seed)
    for n,m in layers(model).items():
        w = m.weight; g = k if w.shape[1] % k == 0 else 1; r = min(len(w), w[0].numel()//g)
        if getattr(m, 'groups', 1) > 1: continue
        keep = torch.rand(g, r, generator=gen) < share; keep[:, 0] = True; units[n] = keep if g > 1 else keep[0]
        if labels:
            lab[n] = (torch.linalg.qr(torch.randn(len(w), r, generator=gen))[0],
                      torch.randn(len(w), generator=gen)*(m.bias is not None))
    return Mask(units, 'rank', labels=lab)

def products(w, keep):
    "The truncated product by numpy, one group of input columns after the other."
    import numpy as np
    parts = np.split(w.detach().double().flatten(1).numpy(), len(keep), axis=1)
    usv = [np.linalg.svd(p, full_matrices=False) for p in parts]
    return torch.tensor(np.concatenate([(u*(s*b.numpy())) @ v for (u,s,v),b in zip(usv, keep)], 1)).view(w.shape)

@pytest.mark.parametrize('k', [1, 2, 4])
@pytest.mark.parametrize('name', ['mlp', 'lenet5', 'resnet20', 'densenet22', 'mobilenet_v3_small'])
def test_ranks_masked_is_shrunk_on_the_zoo(zoo, name, k):
    model, xb, g = zoo(name); mask = thin(model, k=k); small = check(model, mask, xb)
    masked = apply(copy.deepcopy(model), mask); a, b = layers(model), layers(masked)
    for n,v in mask.items():
        assert torch.allclose(products(a[n].weight, v.view(-1, v.shape[-1])).float(), b[n].weight, atol=1e-5)
    for n,v in mask.items():
        m, w = small.get_submodule(n), a[n].weight
        groups, j = (len(v), int(v.sum(1).max())) if v.ndim == 2 else (1, int(v.sum()))
        cost = j*(w[0].numel()+groups*len(w))
        assert (isinstance(m, Factored) == (cost < w.numel())
                and (not isinstance(m, Factored) or sum(o.weight.numel() for o in m) == cost))
    assert all(torch.equal(p, q) for (n,p),(_,q) in zip(model.named_parameters(), masked.named_parameters())
               if n.rpartition('.')[0] not in mask)

@pytest.mark.parametrize('name', ['lenet5', 'resnet20'])
def test_measured_directions(zoo, name):
    "Outputs of the layer are projected on the directions, around the centre; applied twice, nothing more happens."
    model, xb, g = zoo(name); mask = thin(model, labels=True); small = check(model, mask, xb)
    masked = apply(copy.deepcopy(model), mask); a, b = layers(model), layers(masked)
    n = next(iter(mask)); u, m = mask.labels[n]; u = u[:, mask[n]]
    with torch.no_grad():
        x = xb if a[n].weight.ndim == 4 else xb.flatten(1); y, z = (o[n](x).movedim(1, -1) for o in (a, b))
    if a[n].bias is None: m = torch.zeros_like(m)
    assert torch.allclose(z, m + (y-m) @ u @ u.T, atol=1e-4)
    assert all(torch.allclose(p, q, atol=1e-5)
               for p,q in zip(masked.parameters(), apply(copy.deepcopy(masked), mask).parameters()))

GEOMETRIES = [nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode='circular'),
              nn.Conv2d(4, 6, (3, 1), dilation=2, padding='same'), nn.Conv2d(4, 6, 2, padding='valid', bias=False),
              nn.Conv1d(4, 6, 3, padding=2), nn.Conv3d(4, 6, 2, stride=(1, 2, 1))]
@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('m', GEOMETRIES, ids=str)
def test_geometry_goes_to_the_first_factor(m, k):
    x = torch.randn(3, 4, *[7]*(m.weight.ndim-2), generator=generator(1))
    model = nn.Sequential(copy.deepcopy(m), nn.Flatten(1)); before = torch.get_rng_state()
    keep = torch.arange(min(6, m.weight[0].numel()//k)) < 1
    mask = Mask({'0': keep if k == 1 else keep.expand(2, -1).clone()}, 'rank'); small = check(model, mask, x)
    want = copy.deepcopy(m); want.weight.data = products(m.weight, keep.expand(k, -1)).float()
    assert (torch.allclose(small[0](x), want(x), atol=1e-5) and small[0][1].kernel_size == (1,)*(m.weight.ndim-2)
            and torch.equal(before, torch.get_rng_state()))
    back = merge(small)
    assert (type(back[0]) is type(m) and str(back[0]) == str(m)
            and torch.allclose(back[0].weight, want.weight, atol=1e-6))

def test_linear_layers_on_sequences_and_in_groups():
    m = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)); x = torch.randn(2, 5, 4, 6)
    keep = (torch.arange(3) < 1).expand(2, -1).clone(); small = check(m, Mask({'0': keep}, 'rank'), x)
    first = small[0][0]
    assert (isinstance(first, GroupedLinear) and first.groups == 2 and small(x).shape == (2, 5, 4, 3)
            and small(x[0, 0, 0]).shape == (3,))
    blocks = torch.block_diag(*first.weight[..., 0].chunk(2)); assert torch.allclose(first(x), x @ blocks.T, atol=1e-6)
    uneven = torch.tensor([[True, True, False], [False, False, True]]); both = shrink(m, Mask({'0': uneven}, 'rank'), x)
    assert torch.allclose(merge(both)[0].weight, products(m[0].weight, uneven).float(), atol=1e-6)

def test_everything_kept_is_the_same_to_the_bit(zoo):
    model, xb, g = zoo('lenet5'); mask = Mask.ones_like(thin(model))
    a, b = apply(copy.deepcopy(model), mask), shrink(model, mask, xb)
    assert all(torch.equal(p, q) and torch.equal(p, r) for p,q,r in zip(
        model.parameters(), a.parameters(), b.parameters())) and not any(isinstance(m, Factored) for m in b.modules())

def test_nothing_kept_is_zero():
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)); mask = Mask({'0': torch.zeros(4).bool()}, 'rank')
    assert not apply(copy.deepcopy(m), mask)[0].weight.any()
    small = shrink(m, mask, torch.rand(3, 4)); assert isinstance(small[0], nn.Linear) and not small[0].weight.any()

def test_flags_mode_and_dtype_go_to_the_factors():
    m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)).double().eval()
    m[0].weight.requires_grad_(False); m[1].bias.requires_grad_(False); m[1].train()
    two = torch.arange(8) < 2; small = shrink(m, Mask({'0': two, '1': two}, 'rank'), torch.rand(4, 8).double())
    assert ({n for n,p in small.named_parameters() if p.requires_grad}
            == {'0.1.bias', '1.0.weight', '1.1.weight', '2.weight', '2.bias'})
    assert (all(p.dtype == torch.float64 for p in small.parameters()) and [o.training for o in small]
            == [False, True, False] and small[1][0].training and not small[0][1].training)

@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
@pytest.mark.parametrize('name', ['lenet5', 'resnet20'])
def test_half_precision_shrinks(zoo, name, dtype):
    model, xb, g = zoo(name); low, x = copy.deepcopy(model).to(dtype), xb.to(dtype); eps = torch.finfo(dtype).eps
    for mask in (thin(model), thin(model, k=2), quiet(random_scores(model, g, 'channel'), .5)):
        small = shrink(low, mask, x)
        assert all(p.dtype == dtype for p in small.parameters()) and size_of(small) < size_of(low)
        assert (difference(apply(copy.deepcopy(low), mask), small, x) <= 8*eps
                and difference(apply(copy.deepcopy(model), mask), small.float(), xb) < .2)
    with pytest.raises(SurgeryError, match='allowed are tol=1e-09'): shrink(low, thin(model), x, tol=1e-9)

def test_a_silent_model_in_half_precision_shrinks():
    m = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2)).half(); x = torch.rand(5, 3).half()
    for p in m.parameters(): p.data.zero_()
    assert widths(shrink(m, mask_of(m, x, **{'0': [True, False, True, True]}), x)) == [(3, 3), (2, 3)]

@pytest.mark.parametrize('dtype,big,eps',
                         [(torch.half, 1e5, 1e-3), (torch.bfloat16, 1e39, 1e-2), (torch.float32, 1e5, 1e-6)])
@pytest.mark.parametrize('unit', ['weight', 'channel', ':in', 'group'])
def test_factors_too_large_for_the_dtype(dtype, big, eps, unit):
    "The factor does not fit into the weights' dtype (or only just), the product does."
    big, tiny = min(big, 3e38), 3/min(big, 3e38)
    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).to(dtype).requires_grad_(False)
    m[1].weight.copy_(torch.full((1, 2), tiny)); m[1].bias.copy_(torch.full((1,), tiny))
    key, shape = ('1:in', (2,)) if unit == ':in' else ('1', dict(weight=(1, 2), channel=(1,), group=(1, 1))[unit])
    lab = {'1': (torch.zeros(1).long(), torch.zeros(2).long())} if unit == 'group' else None
    mask = Mask({key: torch.ones(shape).bool()}, 'channel' if unit == ':in' else unit,
                graph=trace(m, torch.rand(2, 2).to(dtype)), labels=lab, scale={key: torch.full(shape, big)})
    before = m[1].bias.item(); want = m[1].weight.double()*big; apply(m, mask)
    assert torch.allclose(m[1].weight.double(), want, rtol=eps) and m[1].weight.dtype == dtype
    assert math.isclose(m[1].bias.item(), before*(big if unit == 'channel' else 1), rel_tol=max(eps, 1e-6))

def test_a_layer_that_is_the_model_is_refused():
    m, keep = nn.Linear(4, 4), torch.ones(4).bool()
    for f in (lambda: apply(m, Mask({'': keep}, 'rank')), lambda: apply(m, Mask({'': torch.eye(4).bool()}, 'weight')),
              lambda: shrink(m, Mask({'': keep}, 'rank'), torch.rand(2, 4)), lambda: trace(m, torch.rand(2, 4))):
        with pytest.raises(ValueError, match=r'a bare Linear has no name .* nn.Sequential\(layer\)'): f()

def test_a_module_with_two_names_stays_one():
    m = Net(lambda s, x: s.b(torch.tanh(s.a(torch.tanh(s.b(x))))), a=L(6, 6), b=L(6, 6)); m.c = m.a
    x = torch.randn(5, 6)
    small = check(m, Mask({'a': torch.arange(6) < 1, 'b': torch.arange(6) < 2}, 'rank'), x)
    assert small.c is small.a and isinstance(small.a, Factored)

def test_merged_factors_can_be_cut_again(zoo):
    model, xb, g = zoo('resnet20'); mask = thin(model, .2); small = shrink(model, mask, xb); whole = merge(small)
    assert list(whole.state_dict()) == list(model.state_dict()) and difference(whole, small, xb) < 1e-5 and not any(
        isinstance(m, Factored) for m in whole.modules()) and any(isinstance(m, Factored) for m in small.modules())
    assert (difference(check(whole, thin(whole, .1), xb, smaller=False), small, xb) > 1e-3
            and trace(whole, xb).to_dict() == g.to_dict())

def test_the_factored_model_is_a_model(zoo):
    "It can be traced, pruned in other units, and trained."
    model, xb, _ = zoo('lenet5'); small = shrink(model, thin(model), xb); g = trace(small, xb)
    check(small, quiet(random_scores(small, g, 'weight'), .5), xb, smaller=False)
    check(small, quiet(random_scores(small, g, 'channel'), .4), xb)
    F.cross_entropy(small(xb), torch.arange(len(xb))).backward()
    assert all(p.grad is not None for p in small.parameters())

def test_grouped_factors_on_sequences_are_wired():
    "The neighbours of a factored layer know each other as well as on vectors."
    m = made(6, L(6, 8), nn.Tanh(), L(8, 8), nn.Tanh(), L(8, 6), nn.Tanh(), L(6, 2))
    mask = Mask({'2': (torch.arange(4) < 1).expand(2, -1).clone()}, 'rank')
    graphs = [trace(shrink(m, mask, x), x)
              for x in (torch.randn(4, 6, generator=generator(0)), torch.randn(4, 5, 6, generator=generator(0)))]
    flat, seq = ({k:v for k,v in g.to_dict().items() if k != 'layers'} for g in graphs)
    x = torch.randn(4, 5, 6, generator=generator(1))
    assert (isinstance(shrink(m, mask, x)[2][0], GroupedLinear) and flat == seq and graphs[1].removable == ['0', '2.0',
        '2.1', '4']
            and len(graphs[1].out_slots['0'].unique()) == 2)
    small = shrink(m, mask, x); check(small, quiet(random_scores(small, graphs[1], 'channel'), .5), x)

R = lambda v, **kw: Mask(v, 'rank', **kw)
@pytest.mark.parametrize('mask,err,said', [
    (R({'0': torch.ones(5).bool()}), ValueError, "needs (4,)"),
    (R({'9': torch.ones(4).bool()}), ValueError, "layer '9' is not in the model"),
    (R({'0': torch.ones(3, 4).bool()}), ValueError, 'divisor'),
    (R({'0': torch.ones(2, 4).bool()}), ValueError, 'needs (2, 2)'),
    (R({'1': torch.ones(2).bool()}), ValueError, 'grouped convolution'),
    (R({'0': torch.ones(4).bool()}, scale={'0': torch.ones(4)}), ValueError, 'no scale')])
def test_rank_errors(mask, err, said):
    m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    for f in (lambda: apply(m, mask), lambda: shrink(m, mask, torch.rand(2, 4, 3, 3)), lambda: factorise(m, mask)):
        with pytest.raises(err) as e: f()
        assert said in str(e.value)

def test_ranks_have_no_pattern():
    m = nn.Sequential(L(8, 8), L(8, 2)); mask = thin(m); x = torch.rand(3, 8)
    for f in (lambda: mask.expand(m), lambda: plan(m, mask, x), lambda: mask.to_torch_prune(m),
              lambda: keep_tensors(m, mask)):
        with pytest.raises(ValueError, match='trained as they are'): f()
    small = shrink(m, mask, x)
    with pytest.raises(ValueError, match='is a factor already'):
        apply(small, R({'0.1': torch.ones(len(small[0][0].weight)).bool()}))
    with pytest.raises(ValueError, match="unit 'rank'"): factorise(m, rows(m, **{'0': [1]}))
    with pytest.raises(TypeError): factorise(m, None)
    class Peek(nn.Module):
        def __init__(self): super().__init__(); self.fc = L(8, 8)
        def forward(self, x): return F.linear(x, self.fc.weight)
    with pytest.raises(SurgeryError, match='cannot run'): shrink(Peek(), R({'fc': torch.arange(8) < 1}), x)

def test_rounding_is_no_difference():
    "A network that makes much of a rounding."
    class Steep(nn.Module):
        def __init__(self): super().__init__(); self.a, self.c = L(3, 257), L(257, 2)
        def forward(self, x): return torch.sin(1e5*self.c(self.a(x)))
    model = made(3, Steep())[0]; x = torch.randn(5, 3, generator=generator(0))
    m = mask_of(model, x, a=[i % 2 == 0 for i in range(257)])
    with pytest.raises(SurgeryError, match='differ by'): shrink(model, m, x, tol=1e-5)
    assert shrink(model, m, x).a.weight.shape == (129, 3)
