"""The graph against brute force: push one channel of one real layer, freeze the rest, and look at who notices."""
import copy, json, random, pytest, torch, torch.nn.functional as F
import numpy as np
from hypothesis import Phase, given, settings, strategies as st
from torch import nn
from neuronprune.core import UnsupportedLayerError, generator, layers
from neuronprune.allocate import allocate
from neuronprune.masks import Mask, Scores
from neuronprune.graph import Graph, trace
from neuronprune.surgery import apply, difference, shrink


# ---- random small networks

KINDS = ('seq', 'add', 'proj', 'cat', 'gate', 'dw', 'glu', 'prelu', 'shuffle', 'pad')

class Block(nn.Module):
    "One pattern of wiring; `c` channels come in, `self.c` go out."
    def __init__(self, kind, c, w, bn, bias):
        super().__init__(); self.kind = kind
        conv = lambda i, o, k=1, **kw: nn.Conv2d(i, o, k, padding=k//2, bias=bias, **kw)
        self.c = dict(seq=w, proj=w, cat=c+w, gate=w, glu=w, pad=c+2).get(kind, c)
        if kind in ('seq', 'gate', 'proj', 'cat'): self.a = conv(c, w, 3)
        if kind in ('gate', 'proj'): self.b = conv(c, w)
        if kind == 'add': self.a = conv(c, c)
        if kind == 'glu': self.a = conv(c, 2*w)
        if kind == 'dw': self.a = conv(c, c, 3, groups=c)
        if kind == 'pad': self.a = conv(c, c+2)
        if kind == 'prelu': self.act = nn.PReLU(c)
        if bn: self.bn = nn.BatchNorm2d(self.c, affine=bn != 'fixed')

    def forward(self, x):
        k = self.kind
        if k in ('seq', 'dw'): x = self.a(x)
        elif k == 'add': x = x + self.a(x)
        elif k == 'proj': x = self.a(x) + self.b(x)
        elif k == 'cat': x = torch.cat([x, self.a(x)], 1)
        elif k == 'gate': x = self.a(x) * torch.sigmoid(self.b(x))
        elif k == 'glu': a, b = self.a(x).chunk(2, 1); x = a*b.sigmoid()
        elif k == 'prelu': x = self.act(x)
        elif k == 'pad': x = self.a(x) + F.pad(x, (0,0,0,0,1,1))
        elif k == 'shuffle' and x.shape[1]%2 == 0:
            n, c, h, w = x.shape; x = x.view(n, 2, c//2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if hasattr(self, 'bn'): x = self.bn(x)
        return F.leaky_relu(x, .2)

class RandomNet(nn.Module):
    def __init__(self, recipe, head, bias):
        super().__init__(); c, blocks = 2, []
        for kind,w,bn in recipe: blocks.append(Block(kind, c, w, bn, bias)); c = blocks[-1].c
        self.body, self.head = nn.Sequential(*blocks), head
        self.hidden, self.fc = nn.Linear(c*4 if head == 'flatten' else c, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.body(x)
        return self.fc(F.relu(self.hidden(x.flatten(1) if self.head == 'flatten' else x.mean((2, 3)))))

@st.composite
def nets(draw, kinds=KINDS, max_blocks=5):
    "A random network in evaluation mode with random batch-norm parameters and running statistics."
    one = st.tuples(st.sampled_from(kinds), st.integers(1, 5), st.sampled_from([False, True, 'fixed']))
    recipe = [('seq', draw(st.integers(2, 6)), draw(st.sampled_from([False, True, 'fixed'])))] + draw(
        st.lists(one, max_size=max_blocks))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 2**16)))
        m = RandomNet(recipe, draw(st.sampled_from(['flatten', 'mean'])), draw(st.booleans()))
        for o in m.modules():
            if isinstance(o, nn.BatchNorm2d):
                o.running_mean.normal_(0, .5); o.running_var.uniform_(.5, 2)
                if o.affine: nn.init.uniform_(o.weight, .5, 1.5); nn.init.normal_(o.bias)
    return m.eval()

X = torch.randn(3, 2, 2, 2, generator=generator(0))

# ---- the oracle

def slots(m, x):
    return (x.movedim(-1, 1).flatten(2) if isinstance(m, nn.Linear) and x.ndim > 2 else x.flatten(2) if x.ndim > 2
            else x[..., None])

@torch.no_grad()
def brute(model, x):
    """{(place, producer, channel): slots that notice}: each channel's weights and bias are changed in turn,
    while all other layers keep saying the same random things."""
    model, x = copy.deepcopy(model).eval().double(), x.double(); lay = layers(model)
    places = lay | {n:m for n,m in model.named_modules() if isinstance(m, nn.BatchNorm2d) or isinstance(m, nn.PReLU)
                    and m.num_parameters > 1}
    said, heard, free, gen, res = {}, {}, None, generator(3), {}
    for n,m in places.items(): m.register_forward_pre_hook(lambda m, i, n=n: heard.__setitem__(n, slots(m, i[0])))
    def speak(o, n): return o if n == free else said.setdefault(n, torch.randn(o.shape, generator=gen, dtype=o.dtype))
    for n,m in lay.items(): m.register_forward_hook(lambda m, i, o, n=n: speak(o, n))
    def listen(): heard[''] = model(x).flatten(1)[..., None]; return dict(heard)
    for free,m in lay.items():
        base = listen()
        for c in range(len(m.weight)):
            saved = copy.deepcopy(m.state_dict())
            for f in (-30., 30.):
                m.weight[c] = f*saved['weight'][c] + f/10
                if m.bias is not None: m.bias[c] += f
                for k,v in listen().items():
                    d = ((v-base[k]).abs() > 1e-9).any(0).any(-1)
                    if d.any(): res.setdefault((k, free, c), set()).update(d.nonzero()[:,0].tolist())
                m.load_state_dict(saved)
    return res

def partition(groups):
    "Connected components of overlapping sets, as a set of frozensets."
    res = []
    for g in map(set, groups):
        for o in [o for o in res if o & g]: g |= o; res.remove(o)
        res.append(g)
    return set(map(frozenset, res))

def wiring(g):
    "The graph's own {(place, producer, channel): slots}."
    res = {}
    for k,src in g.sources.items():
        for p,(s,c) in src.items():
            for i,j in zip(s.tolist(), c.tolist()): res.setdefault((k, p, j), set()).add(i)
    return res

def bundles_of(g):
    res = {}
    for p,ids in g.out_slots.items():
        for c,b in enumerate(ids.tolist()): res.setdefault(b, set()).add((p, c))
    return res

def meetings(g, truth):
    "({(place, slot): channels that meet there}, sets of channels that can only go together), from the oracle."
    at, meet = {}, [{(p, c)} for p,l in g.layers.items() for c in range(l['n_out'])]
    for (k,p,c),s in truth.items():
        for i in s: at.setdefault((k, i), set()).add((p, c))
        if k in g.layers and 1 < g.layers[k]['groups'] == g.layers[k]['n_out']: meet += [{(p, c), (k, i)} for i in s]
    return at, meet + list(at.values())

def check_against_oracle(g, truth, hard=False):
    truth, said = {k:v for k,v in truth.items() if k[0]}, [v for k,v in g.fixed.items() if k != 'fc']
    assert wiring(g) == truth and 'fc' in g.fixed and all('a cut network' in v for v in said) and (hard or not said)
    (at, meet), bundles = meetings(g, truth), bundles_of(g)
    want = partition(meet)
    assert set(map(frozenset, bundles.values())) == want
    number = {o:b for b,v in bundles.items() for o in v}
    for k,ids in {**g.in_slots, **g.norm_slots}.items():
        assert ids.tolist() == [number[next(iter(at[k, i]))] if (k, i) in at else -1 for i in range(len(ids))]
    assert set(map(frozenset, g.ties)) == {t for t in partition([{p for p,_ in b} for b in want]) if len(t) > 1}

@settings(max_examples=40)
@given(nets([k for k in KINDS if k != 'glu']))
def test_wiring_is_what_brute_force_finds(model):
    g, truth = trace(model, X), brute(model, X)
    assert set(g.outputs) == {p for k,p,_ in truth if k == ''} == {'fc'}
    check_against_oracle(g, truth, hard=any(b.kind in ('pad', 'shuffle') for b in model.body))

@settings(max_examples=40, derandomize=True, phases=[Phase.generate])
@given(nets(['glu', 'seq', 'add', 'proj', 'dw']))
def test_channels_of_one_layer_that_meet_each_other_are_one_bundle(model):
    g, truth = trace(model, X), {k:v for k,v in brute(model, X).items() if k[0]}
    want = partition(meetings(g, truth)[1])
    lone = {p for b in want for p,l in g.layers.items() if l['n_out'] > 1 and {(p, c) for c in range(l['n_out'])} <= b}
    held = {p for b in want if lone & {p for p,_ in b} for p,_ in b}
    free = lambda bundles: {o for b in bundles if (o := frozenset(t for t in b if t[0] in g.removable))}
    assert free(bundles_of(g).values()) == free(want) and set(g.fixed) == {'fc'} | held

def test_what_is_added_to_a_mixed_layer_stays():
    bare = nn.LayerNorm(4, elementwise_affine=False)
    m = Net(lambda s, x: s.c(s.bn(s.ln(s.a(x)) + s.b(x))), a=L(3, 4), b=L(3, 4), ln=bare,
            bn=nn.BatchNorm1d(4), c=L(4, 2))
    g = trace(m, x3); assert {'a', 'b'} <= set(g.fixed)

@settings(max_examples=10)
@given(nets())
def test_json_frozen_and_repeated(model):
    g = trace(model, X); d = g.to_dict()
    assert Graph.from_dict(json.loads(json.dumps(d))).to_dict() == d and trace(model, X*3+1).to_dict() == d
    assert (trace(copy.deepcopy(model).requires_grad_(False), X[:1]).to_dict() == d
            and trace(copy.deepcopy(model).train(), X).to_dict() == d)
    with torch.no_grad(): assert trace(model, X).to_dict() == d
    assert ({(p, n) for p,n in g.pairs} == {(p, n) for n,o in g.producers.items() for p in o}
            == {(p, n) for p,o in g.consumers.items() for n in o})
    assert len(g.frame()) == len(g.layers) and 'removable' in repr(g) and '<table' in g._repr_html_()

def found(m):
    return ([(k, v.numpy().tobytes()) for k,v in m.state_dict().items()], [o.training for o in m.modules()],
            [p.requires_grad for p in m.parameters()],
            [p.grad is None for p in m.parameters()], [(len(o._forward_hooks), len(o._forward_pre_hooks), len(
        o._backward_hooks), 'forward' in vars(o)) for o in m.modules()], sorted(vars(m)))

def test_model_is_left_as_found():
    m = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Dropout(.5), nn.ReLU(), nn.Conv2d(4, 2, 1)); m[1].eval()
    m[0].weight.requires_grad_(False)
    m[3].register_forward_hook(lambda *a: None)
    before, rng = found(m), (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    trace(m, X)
    assert found(m) == before and rng == (torch.get_rng_state().tolist(), random.getstate(),
                                          np.random.get_state()[1].tolist())
    with pytest.raises(ValueError): trace(m, torch.rand(1, 3, 2, 2))
    assert found(m) == before

# ---- what cannot go, and why

class Net(nn.Module):
    "Layers by name, a forward by function."
    def __init__(self, forward, **mods):
        super().__init__(); self.f = forward; [setattr(self, k, v) for k,v in mods.items()]
    def forward(self, x): return self.f(self, x)

L, C = nn.Linear, nn.Conv2d
mid = lambda m=None: nn.Sequential(L(3, 4), m or nn.ReLU(), L(4, 2))
cmid = lambda *m, **kw: nn.Sequential(C(2, 4, 1), *m, C(4, 2, 1, **kw))
x3 = torch.rand(2, 3, generator=generator(1))
two = dict(a=L(3, 4), c=L(4, 2))

@pytest.mark.parametrize('make,x,layer,said', [
    (lambda: mid(nn.LayerNorm(4, elementwise_affine=False)), x3, '0', "mixed by '1' (LayerNorm)"),
    (lambda: cmid(nn.GroupNorm(2, 4, affine=False)), X, '0', "mixed by '1' (GroupNorm)"),
    (lambda: mid(nn.Softmax(-1)), x3, '0', "mixed on the way to '2'"),
    (lambda: mid(nn.Sigmoid()), x3, '0', "not be zero at '2'"),
    (lambda: mid(nn.Softplus()), x3, '0', "not be zero at '2'"),
    (lambda: cmid(nn.LocalResponseNorm(3, alpha=1.)), X, '0', 'mixed'),
    (lambda: cmid(nn.ConvTranspose2d(4, 4, 2)), X, '0', "mixed by '1' (ConvTranspose2d)"),
    (lambda: nn.Sequential(C(2, 4, 1, groups=2), C(4, 2, 1)), X, '0', 'group by group, what cannot be cut'),
    (lambda: Net(lambda s, x: s.c(s.b(torch.cat([s.a(x), x], 1))), a=C(2, 2, 1), b=C(4, 4, 1, groups=2),
                 c=C(4, 2, 1)), X, 'a', "'b', which reads it in groups, also reads what cannot be cut"),
    (lambda: nn.Sequential(L(3, 4), s := L(4, 4), nn.ReLU(), s, L(4, 2)), x3, '1', 'used 2 times'),
    (lambda: nn.Sequential(L(3, 4), s := L(4, 4), nn.ReLU(), s, L(4, 2)), x3, '0', 'mixed'),
    (lambda: Net(lambda s, x: s.c(s.a(x)), **two, u=L(3, 3)), x3, 'u', 'used 0 times'),
    (lambda: mid(), x3, '2', "the network's output"),
    (lambda: Net(lambda s, x: s.c(s.a(x) + x), a=L(3, 3), c=L(3, 2)), x3, 'a', "not be zero at 'c'"),
    (lambda: Net(lambda s, x: (s.c(s.a(x)), s.b(s.a(x)))[0], **two, b=L(4, 4)), x3, 'b', 'no layer reads'),
    (lambda: Net(lambda s, x: s.c(s.a(x).relu()) + s.b(s.d(x)), **two, b=L(4, 2), d=L(3, 4)), x3, 'b',
     "the network's output"),
    (lambda: Net(lambda s, x: s.c(s.a(x).sigmoid() + s.b(x)), **two, b=L(3, 4)), x3, 'b', "not be zero at 'c'"),
    (lambda: Net(lambda s, x: s.c(s.a(x)) + s.d(s.b(x)[:, :4] + s.a(x).sigmoid()), **two, b=L(3, 5), d=L(4, 2)), x3,
     'b', "zero at 'd'"),
    (lambda: Net(lambda s, x: s.c(s.m(*[s.a(x)]*3)[0][:, 0]), a=L(3, 4),
                 m=nn.MultiheadAttention(4, 2, batch_first=True), c=L(4, 2)), torch.rand(2, 5, 3), 'a', 'mixed'),
    (lambda: Net(lambda s, x: s.c(s.m(*[s.a(x)]*3)[0][:, 0]), a=L(3, 4), m=nn.MultiheadAttention(
    4, 2, batch_first=True), c=L(4, 2)), torch.rand(2, 5, 3), 'm.out_proj', 'used 0 times')])
def test_reasons(make, x, layer, said):
    g = trace(make(), x)
    assert said in g.fixed[layer] and layer not in g.removable

def test_a_tie_to_a_fixed_layer_is_fixed():
    g = trace(Net(lambda s, x: s.c((h := s.a(x)) + (k := s.b(x))) + s.d(k.sigmoid()), **two, b=L(3, 4), d=L(4, 2)), x3)
    assert g.ties == [['a', 'b'], ['c', 'd']] or g.ties == [['a', 'b']]
    assert 'zero at' in g.fixed['b'] and g.fixed['a'].startswith("tied to 'b'")

@pytest.mark.parametrize('act', [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Hardswish(), nn.Dropout(.5), nn.BatchNorm1d(4),
                                 nn.BatchNorm1d(4, affine=False), nn.PReLU(4), nn.PReLU(), nn.Identity()])
def test_what_does_not_hinder(act): assert trace(mid(act), x3).removable == ['0']

def test_token_and_embedding_inputs():
    seq = trace(mid(nn.ReLU()), torch.rand(2, 7, 3))
    assert seq.removable == ['0'] and seq.in_slots['2'].tolist() == seq.out_slots['0'].tolist()
    assert (trace(nn.Sequential(nn.Embedding(5, 3), L(3, 4), nn.ReLU(), L(4, 2)), torch.tensor([[1, 2]])).removable
            == ['1'])
    patch = Net(lambda s, x: s.c(s.a(x).flatten(2).transpose(1, 2)).mean(1), a=C(2, 4, 1), c=L(4, 2))
    assert trace(patch, X).in_slots['c'].tolist() == trace(patch, X).out_slots['a'].tolist()

def test_positions_and_shapes():
    g = trace(nn.Sequential(C(2, 4, 3, padding=1, stride=2, bias=False), nn.Flatten(), L(4, 3)), X)
    assert (g.layers['0'] == dict(kind='Conv2d', n_out=4, n_in=2, taps=9, groups=1, positions=1, weights=72, bias=False)
            and g.layers['2']['bias'])
    assert trace(cmid(), torch.rand(1, 2, 5, 3)).layers['0']['positions'] == 15

# ---- inputs and errors

@pytest.mark.parametrize('make,x,err,said', [
    (lambda: mid(), torch.rand(2, 5), ValueError, 'cannot digest a batch of shape (2, 5)'),
    (lambda: mid(), torch.rand(0, 3), ValueError, 'batch is empty'),
    (lambda: mid(), torch.full((1, 3), float('nan')), ValueError, 'NaN'),
    (lambda: nn.Sequential(nn.BatchNorm1d(3)), x3, ValueError, 'no Linear or Conv layer')])
def test_errors(make, x, err, said):
    with pytest.raises(err) as e: trace(make(), x)
    assert said in str(e.value)

def test_a_model_without_any_parameter_is_refused():
    with pytest.raises(ValueError, match='no Linear or Conv layer'): trace(nn.Sequential(nn.Flatten()), x3)
def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match='expected an nn.Module'): trace('resnet18', x3)

def test_a_batch_of_zeros_is_as_good_as_any():
    m = Net(lambda s, x: s.c(s.a(x) + x), a=L(3, 3), c=L(3, 2))
    assert trace(m, torch.zeros(1, 3)).to_dict() == trace(m, x3).to_dict()

@pytest.mark.parametrize('op', [lambda a, b: (a-b).relu(), lambda a, b: torch.max(a, b),
    lambda a, b: (a+b).clamp(max=1.)], ids=['relu(a-b)', 'max(a,b)', 'clamp(a+b)'])
def test_one_sided_operations_hide_nothing(op):
    m = Net(lambda s, x: s.c(op(s.a(x), s.b(x))), a=L(3, 16), b=L(3, 16), c=L(16, 2))
    g = trace(m, x3)
    assert g.out_slots['a'].tolist() == g.out_slots['b'].tolist() == g.in_slots['c'].tolist()

@pytest.mark.parametrize('mixed', [False, True])
def test_double_precision_models(mixed):
    m = Net(lambda s, x: s.c(F.linear(s.a(x), s.e) if mixed else s.a(x)), a=L(3, 4), e=nn.Parameter(torch.randn(4, 4)),
            c=L(4, 2))
    assert trace(copy.deepcopy(m).double(), x3.double()).to_dict() == trace(m, x3).to_dict()

def test_tied_parameters_are_not_removable():
    m = nn.Sequential(L(4, 4), nn.ReLU(), L(4, 4), nn.ReLU(), L(4, 2)); m[2].weight = m[0].weight
    g = trace(m, torch.rand(1, 4)); assert '0' in g.fixed and '2' in g.fixed and g.twins == {'0': '2', '2': '0'}

def test_twins_are_a_fact_of_their_own():
    m = nn.Sequential(*[L(4, 4) for _ in range(5)]); m[3].weight = m[2].weight = m[1].weight
    g = trace(m, torch.rand(1, 4))
    assert (g.twins == {'1': '2', '2': '1', '3': '1'} and g.removable == []
            and "'1', which reads it, shares its weight" in g.fixed['0'])
    m = nn.Sequential(L(4, 4), nn.ReLU(), L(4, 4)); m[2].weight = m[0].weight; g = trace(m, torch.rand(1, 4))
    assert (g.twins == {'0': '2', '2': '0'} and 'output' in g.fixed['2']
            and Graph.from_dict(json.loads(json.dumps(g.to_dict()))).twins == g.twins)
    old = g.to_dict(); del old['twins']; assert Graph.from_dict(old).twins == {} and trace(mid(), x3).twins == {}

def test_a_layer_without_a_name_is_refused():
    with pytest.raises(ValueError, match='a bare Linear has no name'): trace(L(3, 4), x3)

def test_lack_of_memory_is_not_the_batch():
    def full(s, x): raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate')
    with pytest.raises(torch.cuda.OutOfMemoryError): trace(Net(full, **two), x3)

def test_a_norm_used_twice_fixes_its_feeders():
    m = Net(lambda s, x: s.c(s.n(s.a(x))) + s.d(s.n(s.b(x))), **two, b=L(3, 4), d=L(4, 2), n=nn.BatchNorm1d(4))
    g = trace(m, x3); assert {'a', 'b'} <= set(g.fixed) or g.out_slots['a'].tolist() == g.out_slots['b'].tolist()

def test_a_norm_on_batch_statistics():
    assert trace(mid(nn.BatchNorm1d(4, track_running_stats=False)), x3).removable == ['0']

# ---- who is unread

def slow_unread(g, cut):
    """One channel at a time until nothing changes: unread when each of its readers cuts it,
    or is a depthwise layer whose own channel is unread."""
    deep = lambda n: (l := g.layers[n])['groups'] == l['n_out'] == l['n_in'] > 1
    gone, readers = set(), {(p, c):[] for p in g.removable for c in range(g.layers[p]['n_out'])}
    for n in g.layers:
        for p,(s,c) in g.sources.get(n, {}).items():
            for i,j in zip(s.tolist(), c.tolist()):
                if (p, j) in readers: readers[p, j].append((n, i))
    while True:
        more = {o for o,r in readers.items() if o not in gone
                and all(n in cut and cut[n][i] or deep(n) and (n, i) in gone for n,i in r)}
        if not more: return gone
        gone |= more

@settings(max_examples=60)
@given(nets([k for k in KINDS if k not in ('shuffle', 'glu')]), st.floats(.1, .9), st.integers(0, 99))
def test_unread_against_one_at_a_time(model, p, seed):
    g, gen = trace(model, X), generator(seed)
    cut = {n:torch.rand(l['n_in'], generator=gen) < p for n,l in g.layers.items() if l['groups'] == 1}
    before = {k:v.clone() for k,v in cut.items()}
    assert ({(n, i) for n,v in g.unread(cut).items() for i in v.nonzero()[:,0].tolist()} == slow_unread(g, cut)
            and all(torch.equal(v, cut[k]) for k,v in before.items()))

def test_two_depthwise_layers_in_a_row():
    m = nn.Sequential(C(2, 4, 1), C(4, 4, 1, groups=4), nn.ReLU(), C(4, 4, 1, groups=4), C(4, 2, 1)); g = trace(m, X)
    cut = torch.tensor([True, False, True, False])
    assert ({k:v.tolist() for k,v in g.unread({'4': cut}).items()} == dict.fromkeys(['0', '1', '3'], cut.tolist())
            and g.unread({}) == {})
    e = Mask({'4:in': ~cut}, 'channel', graph=g).expand(m)
    assert all(e[f'{k}.bias'].tolist() == (~cut).tolist() for k in '013')

# ---- expand

def test_expand_hand_case():
    m = cmid(nn.BatchNorm2d(4), nn.PReLU(4)); g = trace(m, X); keep = torch.tensor([True, False, True, True])
    e = Mask({'0': keep}, 'channel', graph=g).expand(m)
    assert (set(e) == {'0.weight', '0.bias', '1.weight', '1.bias'}
            and all((v.flatten(1).all(1) if v.ndim > 1 else v).tolist() == keep.tolist() for v in e.values()))
    m = cmid(nn.BatchNorm2d(4, affine=False)); e = Mask({'0': keep}, 'channel', graph=trace(m, X)).expand(m)
    assert e['1.running_mean'].tolist() == keep.tolist() and set(e) == {'0.weight', '0.bias', '1.running_mean'}

@pytest.mark.parametrize('units,unit,said', [({'9': torch.ones(4).bool()}, 'channel', "layer '9' is not in the model"),
                                             ({'0': torch.ones(3).bool()}, 'channel', 'needs (4,)'),
    ({'2:in': torch.ones(2).bool()}, 'channel', 'needs (4,)'),
                                             ({'0': torch.ones(4, 4).bool()}, 'weight', 'needs (4, 3)')])
def test_masks_that_do_not_fit(units, unit, said):
    m = mid()
    with pytest.raises(ValueError) as e: Mask(units, unit, graph=trace(m, x3)).expand(m)
    assert said in str(e.value)
    with pytest.raises(ValueError, match='needs graph'): Mask({'0': torch.ones(4).bool()}, 'channel').expand(m)

def test_group_labels_that_do_not_fit():
    m = mid()
    with pytest.raises(ValueError):
        Mask({'0': torch.ones(1, 1).bool()}, 'group',
             labels={'0': (torch.zeros(4).long(), torch.zeros(2).long())}).expand(m)

def test_to_torch_prune_and_back():
    m = mid(nn.ReLU()); w = {'0': torch.rand(4, 3) < .5, '2': torch.rand(2, 4) < .5}
    back = Mask.from_torch_prune(Mask(w, 'weight').to_torch_prune(m))
    assert all(torch.equal(back[k], v) for k,v in w.items()) and (m[0].weight[~w['0']] == 0).all()
    with pytest.raises(ValueError, match='no layer carries a weight_mask'): Mask.from_torch_prune(mid())

# ---- numbers of the moment, forms of inputs and outputs

@pytest.mark.parametrize('a', [0., 1e-6, .3])
def test_a_factor_ties_whatever_it_is_now(a):
    m = Net(lambda s, x: s.c((x := s.a(x).relu()) + s.alpha*s.b(x)), a=L(3, 4), b=L(4, 4), c=L(4, 2),
            alpha=nn.Parameter(torch.tensor(a)))
    assert trace(m, x3).ties == [['a', 'b']] and trace(m, x3).removable == ['a', 'b']

def test_a_shift_that_is_zero_now_is_a_shift():
    m = Net(lambda s, x: s.c(s.a(x)+s.shift), **two, shift=nn.Parameter(torch.zeros(1)))
    assert 'not be zero' in trace(m, x3).fixed['a']

def test_means_over_positions_hide_nothing():
    m = Net(lambda s, x: s.c((y := s.a(x))-y.mean((2, 3), keepdim=True)), a=C(2, 4, 1), c=C(4, 2, 1)); g = trace(m, X)
    assert g.removable == ['a'] and g.in_slots['c'].tolist() == g.out_slots['a'].tolist()
    assert trace(cmid(nn.InstanceNorm2d(4)), X).removable == ['0']

@pytest.mark.parametrize('out', [lambda y: (y, y.sum()), lambda y: dict(logits=y, loss=None), lambda y: [y]],
                         ids=['tuple', 'dict', 'list'])
def test_outputs_in_any_form(out):
    g = trace(Net(lambda s, x: out(s.c(s.a(x).relu())), **two), x3); assert g.outputs == ['c'] and g.removable == ['a']

@pytest.mark.parametrize('named', [False, True])
def test_several_inputs(named):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = L(3, 4), L(5, 4), L(4, 2)
        def forward(self, x, z): return self.c(self.a(x)*self.b(z))
    x, z = x3, torch.rand(2, 5); g = trace(Two(), dict(z=z, x=x) if named else (x, z)); assert g.ties == [['a', 'b']]

@pytest.mark.parametrize('shape', ['written', 'attribute', 'layer', 'half'])
def test_widths_in_the_code(shape):
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.a, self.c, self.n = C(2, 6, 1), L(24, 3), 24
        def forward(self, x):
            x = self.a(x).relu(); n = dict(written=24, attribute=self.n, layer=self.c.in_features, half=self.n)[shape]
            return self.c(x.reshape(len(x), n) if shape != 'half' else x.reshape(len(x), 2, n//2).flatten(1))
    g = trace(Flat(), X)
    if shape == 'written': assert 'a cut network cannot run (RuntimeError' in g.fixed['a'] and g.widths == {}
    else:
        assert (g.removable == ['a'] and g.widths == ({} if shape == 'layer' else {'n': 'c'})
                and Graph.from_dict(json.loads(json.dumps(g.to_dict()))).widths == g.widths)

def test_one_odd_operation_costs_its_own_layers():
    m = Net(lambda s, x: s.e(s.d(s.b(s.a(x).relu()).view(-1, 2, 2, 2, 2).transpose(1, 2).reshape(-1, 4, 2, 2)).relu()),
            a=C(2, 4, 1), b=C(4, 4, 1), d=C(4, 6, 1), e=C(6, 2, 1))
    g = trace(m, X); assert g.removable == ['a', 'd'] and 'a cut network' in g.fixed['b']

@pytest.mark.parametrize('n', [1, 2, 5])
def test_a_batch_is_taken_as_it_is(n):
    def squeeze(s, x): assert x.min() >= 0; return s.c(s.a(x).relu()).log_softmax(-1)
    assert trace(Net(squeeze, **two), torch.rand(n, 3)).removable == ['a']

def test_the_probe_is_small_and_the_positions_are_large():
    m = nn.Sequential(C(2, 4, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(4, 2))
    seen = []
    m[1].register_forward_hook(lambda mod, i, o: seen.append(o.shape[2])) # hooks travel with the copy
    assert trace(m, torch.rand(1, 2, 512, 256)).layers['0']['positions'] == 256*128 and max(seen[3:]) <= 8

def test_sequence_first_and_windows():
    seq = Net(lambda s, x: s.c(s.a(x.transpose(0, 1)).relu()).mean(0), **two)
    assert trace(seq, torch.rand(2, 7, 3)).removable == ['a']
    win = Net(lambda s, x: s.c(s.a(x.reshape(-1, 4, 3)).relu()).reshape(len(x), -1), **two)
    assert trace(win, torch.rand(2, 8, 3)).removable == ['a']

def test_layers_behind_mixed_channels_are_fixed_before_anything_is_cut():
    m = Net(lambda s, x: s.e(s.d(s.a(x).softmax(1)).relu()), a=C(2, 4, 1), d=C(4, 4, 3, padding=1, groups=4),
            e=C(4, 2, 1))
    g = trace(m, X)
    assert g.removable == [] and 'what cannot be cut' in g.fixed['d'] and 'mixed' in g.fixed['a']

def test_attention_in_evaluation_is_heard():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.).eval()
    assert (trace(nn.Sequential(layer, L(4, 2)), torch.rand(2, 5, 4)).removable == ['0.linear1']
            and torch.backends.mha.get_fastpath_enabled())

def test_an_embedding_that_shares_its_tensor_is_cut_with_its_sharer():
    m = nn.Sequential(nn.Embedding(7, 4), L(4, 6), nn.ReLU(), L(6, 4), nn.ReLU(), L(4, 7, bias=False))
    m[5].weight = m[0].weight
    g = trace(m, torch.tensor([[1, 2, 3]]))
    assert g.removable == ['1', '3'] and torch.equal(g.in_slots['1'], g.out_slots['3'])
    assert torch.equal(g.tables['0.weight'][1], g.out_slots['3']) and g.tables['0.weight'][0] == 1

class Standardised(nn.Conv2d):
    "Weights of mean zero in every row."
    def __init__(self, *a, **k):
        super().__init__(*a, **k); self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))
    def forward(self, x):
        return F.conv2d(x, (self.weight-self.weight.mean((1, 2, 3), keepdim=True))*self.gain, self.bias, self.stride,
                        self.padding)

class Padded(nn.Conv2d):
    "Pads by itself."
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.weight, self.bias, self.stride, self.padding, self.dilation,
                        self.groups)

def test_a_layer_with_a_forward_of_its_own_is_tried():
    x = torch.rand(2, 2, 5, 5)
    g = trace(nn.Sequential(Padded(2, 4, 2), nn.ReLU(), Padded(4, 4, 2, groups=4), Padded(4, 6, 2), nn.ReLU(),
                            C(6, 2, 1)), x)
    assert g.removable == ['0', '2', '3']
    g = trace(nn.Sequential(C(2, 4, 1), nn.ReLU(), Standardised(4, 6, 2), nn.ReLU(), C(6, 6, 1), nn.ReLU(), C(6, 2, 1)),
              x)
    assert (g.removable == ['4'] and 'no input can be cut' in g.fixed['0']
            and 'not that of a plain layer' in g.fixed['2'])

def test_places_that_insist_on_single_precision_are_heard():
    m = Net(lambda s, x: s.c(s.a(x).float().relu()), **two); g = trace(m, x3)
    assert g.removable == ['a'] and g.in_slots['c'].tolist() == g.out_slots['a'].tolist()

def test_what_an_opaque_module_feeds_is_mixed_and_not_the_networks_own():
    g = trace(nn.Sequential(L(3, 4), nn.LayerNorm(4, elementwise_affine=False), L(4, 5), nn.ReLU(), L(5, 2)), x3)
    assert g.mixed['2'].tolist() == [0, 1, 2, 3] and set(g.mixed) == {'2'} and g.in_slots['2'].tolist() == [-1]*4
    shared = L(4, 4); g = trace(nn.Sequential(L(3, 4), shared, nn.ReLU(), shared, L(4, 2)), x3)
    assert g.mixed['4'].tolist() == [0, 1, 2, 3]

def test_token_mixing_keeps_the_trunk_and_cuts_its_neurons():
    "Its biases come out of a silent channel, which the next norm would count: only without them could it go."
    class Mixer(nn.Module):
        def __init__(self, d=6, t=5, w=7):
            super().__init__(); self.stem, self.n1, self.n2 = nn.Linear(3, d), nn.LayerNorm(d), nn.LayerNorm(d)
            self.t0, self.t1, self.c0, self.c1 = nn.Linear(t, w), nn.Linear(w, t), nn.Linear(d, w), nn.Linear(w, d)
            self.head = nn.Linear(d, 2)
        def forward(self, x):
            x = self.stem(x); x = x+self.t1(self.t0(self.n1(x).mT).relu()).mT
            return self.head((x+self.c1(self.c0(self.n2(x)).relu())).mean(1))
    with torch.random.fork_rng(): torch.manual_seed(0); m, x = Mixer().eval(), torch.randn(2, 5, 3)
    g = trace(m, x); assert g.removable == ['t0', 'c0']
    assert 'mixed on the way' in g.fixed['stem'] and 'mixed on the way' in g.fixed['t1']
    mask = allocate(Scores({n:torch.rand(7) for n in g.removable}, 'channel', graph=g), .5, scope='layer')
    assert difference(apply(copy.deepcopy(m), mask), shrink(m, mask, x), torch.randn(3, 5, 3)) < 1e-5
    seen = []; m.n2.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        for p in (m.stem.weight, m.stem.bias, m.n1.weight, m.n1.bias): p[0] = 0 # channel 0, as a mask would
        m(x)
    assert seen[0][..., 0].abs().min() > 0
