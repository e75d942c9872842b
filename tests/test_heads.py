"Heads of attention as units: found by experiment, cut as by hand, in modules that nobody has told the package about."
import copy, json, pytest, torch, torch.nn.functional as F, torchvision
from torch import nn
from neuronprune.allocate import allocate
from neuronprune.costs import count_macs
from neuronprune.core import UnsupportedLayerError, generator, seed_everything
from neuronprune.forms import Attention, TransposedConv2d, Turned, load_packed, packed_state, unpacked
from neuronprune.graph import Graph, probing, trace
from neuronprune.masks import Mask, Scores
from neuronprune.provable import sensitivity
from neuronprune.sensitivity import facts
from neuronprune.surgery import apply, difference, load, save, shrink

def split(x, n): return x.unflatten(-1, (n, -1)).transpose(1, 2)
def joined(x): return x.transpose(1, 2).flatten(2)

class Fused(nn.Module):
    "One layer for query, key and value; `layout` says how its outputs are ordered."
    def __init__(self, layout='qkv first', d=8, n=4, w=12):
        super().__init__(); self.layout, self.num_heads, self.head_dim = layout, n, w//n
        self.qkv, self.proj = nn.Linear(d, 3*w), nn.Linear(w, d)
    def forward(self, x):
        y = self.qkv(x)
        if self.layout == 'qkv first': q, k, v = y.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else: q, k, v = y.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.proj(joined((q @ k.mT/self.head_dim**.5).softmax(-1) @ v))

class Separate(nn.Module):
    "Query, key and value apart; `kv` heads of keys and values, each shared by several of the queries."
    def __init__(self, d=8, n=4, kv=4, size=3):
        super().__init__(); self.n_heads, self.num_kv_heads, self.all_head_size, self.per_head = n, kv, n*size, size
        self.q, self.k, self.v = nn.Linear(d, n*size), nn.Linear(d, kv*size), nn.Linear(d, kv*size)
        self.o = nn.Linear(n*size, d)
    def forward(self, x):
        q, k, v = split(self.q(x), self.n_heads), split(self.k(x), self.num_kv_heads), split(self.v(x),
            self.num_kv_heads)
        k, v = (o.repeat_interleave(self.n_heads//self.num_kv_heads, 1) for o in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(len(x), -1, self.all_head_size))

def net(m, seed=0):
    with seed_everything(seed):
        res = nn.Sequential(nn.Linear(5, 8), m, nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
        for p in res.parameters(): nn.init.normal_(p, std=.5)
    return res
def x(seed=1, n=2, t=6): return torch.randn(n, t, 5, generator=generator(seed))

def scored(m, g, seed=0):
    gen = generator(seed)
    return Scores({n:torch.rand(len(g.out_slots[n]), generator=gen) for n in g.removable}, 'channel', graph=g)
def halved(m, s=.5, **kw):
    g = trace(m, x(), **kw); mask = allocate(scored(m, g), s, scope='layer')
    return g, mask, shrink(m, mask, x())
def same(m, mask, small, seed=9): assert difference(apply(copy.deepcopy(m), mask), small, x(seed, 4)) < 1e-5

MAKERS = dict(fused=Fused, interleaved=lambda: Fused('heads first'), separate=Separate, shared=lambda: Separate(kv=2),
              one_key=lambda: Separate(kv=4, n=8, size=2))

@pytest.mark.parametrize('name', MAKERS)
def test_a_head_is_a_bundle(name):
    m = net(MAKERS[name]()); g = trace(m, x()); a = m[1]
    n = getattr(a, 'num_kv_heads', None) or a.num_heads
    q, o = ('1.qkv', '1.proj') if isinstance(a, Fused) else ('1.q', '1.o')
    assert q in g.removable and len(g.out_slots[q].unique()) == n
    ids = g.in_slots[o]; assert torch.equal(ids-ids[0], torch.arange(n).repeat_interleave(len(ids)//n))
    want = {n:v.tolist() for n,v in g.out_slots.items()}
    if isinstance(a, Fused):
        ids = torch.arange(n)[:, None, None].expand(n, 3, 3) if a.layout != 'qkv first' else (
            torch.arange(n)[None, :, None].expand(3, n, 3))
        assert want[q] == (ids.flatten()+want[q][0]).tolist()
    else: assert set(want['1.q']) == set(want['1.k']) == set(want['1.v'])

@pytest.mark.parametrize('name', MAKERS)
def test_macs_fall_with_the_heads(name):
    "Layers by their sizes, and each head's two products; what a budget is told of a head is what goes with it."
    m = net(MAKERS[name]()); g, mask, small = halved(m); a = m[1]
    q = '1.qkv' if isinstance(a, Fused) else '1.q'
    def products(o):
        l = o.get_submodule(q); rows = l.out_features//(3 if isinstance(a, Fused) else 1)
        return 2*6*6*rows # of the queries, all heads together
    own = lambda o: 6*sum(p.numel() for p in o.parameters() if p.ndim == 2)
    for o in (m, small): assert count_macs(o, x()) == own(o)+products(o)
    f = facts(m, x(), g); (n, per), = f['heads'].items()
    gone = int((~mask[n]).sum())
    assert gone and per*gone == products(m)-products(small)

@pytest.mark.parametrize('name', MAKERS)
def test_masked_is_shrunk(name, tmp_path):
    m = net(MAKERS[name]()); g, mask, small = halved(m); same(m, mask, small)
    a, b = m[1], small[1]
    for k in ('num_heads', 'n_heads', 'num_kv_heads', 'all_head_size'):
        if hasattr(a, k): assert getattr(b, k)*2 == getattr(a, k)
    for k in ('head_dim', 'per_head'): assert getattr(a, k, 0) == getattr(b, k, 0)
    save(small, tmp_path/'m'); again = load(tmp_path/'m', net(MAKERS[name]()))
    assert torch.equal(again(x(5)), small(x(5)))
    _, mask2, tiny = halved(small); same(small, mask2, tiny) # a second cut
    assert (tiny[1].num_heads if isinstance(a, Fused) else tiny[1].num_kv_heads) == 1

def test_the_cut_is_the_one_by_hand():
    m = net(Separate()); a = m[1]; g = trace(m, x())
    keep = torch.tensor([1, 0, 1, 1]).bool().repeat_interleave(3)
    small = shrink(m, Mask({f'1.{n}':keep for n in 'qkv'}, 'channel', graph=g), x())
    hand = net(Separate(n=3, kv=3)); hand.load_state_dict({**m.state_dict(), **{
        f'1.{n}.{k}':getattr(getattr(a, n), k)[keep] for n in 'qkv' for k in ('weight', 'bias')},
        '1.o.weight': a.o.weight[:, keep]})
    assert {k:v.tolist() for k,v in small.state_dict().items()} == {k:v.tolist() for k,v in hand.state_dict().items()}
    assert torch.equal(small(x(3)), hand(x(3)))

@pytest.mark.parametrize('name', MAKERS)
def test_the_blocks_are_those_of_brute_force(name):
    "Each channel is moved alone in the network itself; what hangs together is one block."
    m = net(MAKERS[name]()); probe = probing(m, x()); found, _, lost = probe.follow()
    place = next(k for k in probe.width if k.endswith(('proj', '.o')))
    slots, chans = probe.blocks(found, lost)[place]
    layer, seen = m.get_submodule(place), []
    h = layer.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach()))
    m(x())
    for n,ids in chans.items():
        for c in range(len(ids)):
            row = m.get_submodule(n); old = row.bias.data.clone(); row.bias.data[c] += .3; m(x()); row.bias.data = old
            moved = (seen[-1]-seen[0]).abs().amax((0, 1)) > 1e-6
            if n in ('1.q', '1.v'): assert moved.any() # a shift of all keys moves nothing
            assert set(slots[moved].tolist()) <= {int(ids[c])}
    h.remove()

@pytest.mark.parametrize('sign', (None, 1))
def test_layers_that_are_not_asked_change_no_answer(sign):
    probe = probing(net(Separate()), x()); asked = {'1.o': torch.eye(12, dtype=torch.bool)}
    whole = probe.depends(asked, 12, sign); some = probe.depends(asked, 12, sign, ['1.v', '1.q'])
    assert {*some} == {'1.v', '1.q'} < {*whole} and all(torch.equal(v, whole[n]) for n,v in some.items())
    assert not whole.get('0', torch.zeros(1)).any() # the layers between stand for it
    assert torch.equal(some['1.v'], torch.eye(12, dtype=torch.bool))

def test_one_row_of_a_head_that_dies_takes_nothing_with_it():
    m = net(Separate()); g = trace(m, x()); gen = generator(0)
    units = {n:torch.rand(l.weight.shape, generator=gen) for n,l in ((n, m.get_submodule(n)) for n in g.layers)}
    for n in '1.q', '1.k': units[n][:2] = 0
    mask = allocate(Scores(units, 'weight', graph=g), .1); same(m, mask, small := shrink(m, mask, x()))
    assert small[1].n_heads == 4
    untied = allocate(scored(m, g), .4, tied=False); same(m, untied, shrink(m, untied, x()))

def test_columns_that_nobody_reads_take_the_whole_head():
    m = net(Separate()); g = trace(m, x())
    cut = torch.ones(12, dtype=torch.bool); cut[3:6] = False
    assert {p:v.nonzero()[:,0].tolist() for p,v in g.unread({'1.o': ~cut}).items()} == {f'1.{n}':[3, 4,
        5] for n in 'qkv'}
    cut[5] = True; assert g.unread({'1.o': ~cut}) == {}
    dropped = {f'1.{n}':torch.arange(12) < 3 for n in 'qkv'}
    assert g.silent(dropped, '1.o').nonzero()[:,0].tolist() == [0, 1, 2]
    dropped['1.v'][0] = False; assert not g.silent(dropped, '1.o').any()

def test_the_graph_goes_through_json():
    g = trace(net(Fused()), x()); again = Graph.from_dict(json.loads(json.dumps(g.to_dict())))
    assert again.to_dict() == json.loads(json.dumps(g.to_dict())) and list(again.blocks) == ['1.proj']
    old = {k:v for k,v in g.to_dict().items() if k != 'blocks'}; assert Graph.from_dict(old).blocks == {}

def test_a_single_head_stays():
    g = trace(net(Fused(n=1)), x()); assert '1.qkv' in g.fixed and 'mixed' in g.fixed['1.qkv']

def test_heads_that_something_mixes_stay():
    class Talking(Fused):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            w = (q @ k.mT).softmax(-1); return self.proj(joined((w+w.mean(1, keepdim=True)) @ v))
    assert '1.qkv' in trace(net(Talking()), x()).fixed

@pytest.mark.parametrize('act', [lambda a, b: a*torch.sigmoid(b), lambda a, b: torch.relu(b)*a])
@pytest.mark.parametrize('parts', ['chunk', 'split', 'strided'])
def test_gated_units(act, parts):
    class Gated(nn.Module):
        def __init__(self): super().__init__(); self.a, self.w, self.b = nn.Linear(8, 12), 6, nn.Linear(6, 8)
        def forward(self, x):
            y = self.a(x)
            a, b = (y.chunk(2, -1) if parts == 'chunk' else y.split(self.w, -1) if parts == 'split' else
                    (y[..., ::2], y[..., 1::2]))
            return self.b(act(a, b))
    m = net(Gated()); g, mask, small = halved(m); same(m, mask, small)
    assert '1.a' in g.removable and len(g.out_slots['1.a'].unique()) == 6 and small[1].b.in_features == 3

# ---- modules in other forms

class Turn(nn.Module):
    "Sequences first for the module inside."
    def __init__(self, m): super().__init__(); self.m, self.layers = m, m.layers
    def forward(self, x): return self.m(x.transpose(0, 1)).transpose(0, 1)

def encoder(**kw):
    with seed_everything(0):
        layer = nn.TransformerEncoderLayer(8, 4, 12, **{**dict(batch_first=True, dropout=0.), **kw})
        enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        m = nn.Sequential(enc if layer.self_attn.batch_first else Turn(enc), nn.Linear(8, 3)).eval()
        for p in m.parameters(): nn.init.normal_(p, std=.4)
    return m

@pytest.mark.parametrize('kw', [{}, dict(norm_first=True), dict(bias=False), dict(batch_first=False),
    dict(activation='gelu')])
def test_torchs_encoder(kw, tmp_path):
    m, xb = encoder(**kw), torch.randn(4, 6, 8, generator=generator(2)); p = unpacked(m)
    assert torch.allclose(m(xb), p(xb), atol=1e-6)
    g = trace(p, xb); mask = allocate(scored(p, g), .5, scope='layer'); small = shrink(p, mask, xb)
    assert [l.self_attn.num_heads for l in small[0].layers] == [2, 2]
    assert difference(apply(copy.deepcopy(p), mask), small, torch.randn(3, 5, 8)) < 1e-5
    save(small, tmp_path/'m'); again = load(tmp_path/'m', encoder(**kw)).eval()
    assert torch.equal(again(xb), small(xb))
    state = packed_state(small)
    assert next(v for k,v in state.items() if k.endswith('layers.0.self_attn.in_proj_weight')).shape == (12, 8)
    back = load_packed(copy.deepcopy(small), state); assert torch.equal(back(xb), small(xb))

def test_padding_is_hidden_in_the_encoder_too():
    m, xb = encoder(), torch.randn(4, 6, 8, generator=generator(2)); late = torch.arange(6).expand(4, -1) > 3
    assert torch.allclose(m[0](xb, src_key_padding_mask=late)[:, :4], unpacked(m)[0](xb, src_key_padding_mask=late)[:,
        :4], atol=1e-6)

MHA = [dict(), dict(batch_first=True), dict(bias=False), dict(kdim=5, vdim=7), dict(dropout=.3)]
@pytest.mark.parametrize('kw', MHA)
@pytest.mark.parametrize('call', [{}, dict(need_weights=False), dict(average_attn_weights=False),
    dict(attn_mask='bool'),
                                  dict(attn_mask='float'), dict(attn_mask='heads'), dict(key_padding_mask='bool'),
                                  dict(key_padding_mask='float', attn_mask='float')])
def test_attention_is_torchs(kw, call):
    with seed_everything(0): m = nn.MultiheadAttention(8, 2, **kw).eval(); [nn.init.normal_(p) for p in m.parameters()]
    gen = generator(3)
    q, k, v = (torch.randn(3, 3, d, generator=gen) for d in (8, kw.get('kdim', 8), kw.get('vdim', 8)))
    masks = dict(attn_mask=dict(bool=torch.ones(3, 3).triu(1).bool(), float=torch.randn(3, 3, generator=gen),
                                heads=torch.randn(6, 3, 3, generator=gen)),
                 key_padding_mask=dict(bool=torch.tensor([[0, 0, 1]]*3).bool(), float=torch.randn(3, 3, generator=gen)))
    call = {n:masks[n][o] if n in masks else o for n,o in call.items()}
    for a,b in zip(m(q, k, v, **call), Attention(m)(q, k, v, **call)):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))

def test_attention_without_a_batch_and_across_two_sequences():
    with seed_everything(0): m = nn.MultiheadAttention(8, 2).eval(); q, k = torch.randn(4, 8), torch.randn(6, 8)
    for a,b in zip(m(q, k, k), Attention(m)(q, k, k)): assert a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
    late = torch.arange(6) > 2
    for a,b in zip(m(q, k, k, key_padding_mask=late), Attention(m)(q, k, k, key_padding_mask=late)):
        assert torch.allclose(a, b, atol=1e-6)

def test_what_has_no_plain_form_stays_and_flags_are_kept():
    class Two(nn.Module):
        def __init__(self):
            super().__init__(); self.a = self.b = nn.MultiheadAttention(4, 2)
            self.c = nn.MultiheadAttention(4, 2, add_bias_kv=True)
            self.d = nn.ConvTranspose2d(4, 4, 2, groups=2); self.a.in_proj_weight.requires_grad_(False)
    m = Two().train(); m.a.eval(); p = unpacked(m)
    assert p.a is p.b and isinstance(p.a, Attention) and not p.a.training and p.training
    assert type(p.c) is nn.MultiheadAttention and type(p.d) is nn.ConvTranspose2d and type(m.a) is nn.MultiheadAttention
    assert [o.requires_grad for o in (p.a.q_proj.weight, p.a.q_proj.bias, p.a.out_proj.weight)] == [False, True, True]

class Conv1D(nn.Module):
    "GPT-2's layer, as written in many places."
    def __init__(self, nf, nx):
        super().__init__(); self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))
    def forward(self, x): return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1],
            self.nf)

class Gpt(nn.Module):
    "Attention with a written split."
    def __init__(self, d=8, n=4):
        super().__init__(); self.split_size, self.num_heads, self.head_dim = d, n, d//n
        self.c_attn, self.c_proj = Conv1D(3*d, d), Conv1D(d, d)
    def forward(self, x):
        q, k, v = (split(o, self.num_heads) for o in self.c_attn(x).split(self.split_size, dim=2))
        return self.c_proj(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))

def test_turned_weights(tmp_path):
    m = net(Gpt()); p = unpacked(m)
    assert isinstance(p[1].c_attn, Turned) and torch.allclose(m(x()), p(x()), atol=1e-5)
    g, mask, small = halved(p); same(p, mask, small)
    assert (small[1].num_heads, small[1].split_size, small[1].head_dim, small[1].c_attn.weight.shape) == (2, 4, 2, (12,
        4))
    assert packed_state(small)['1.c_attn.weight'].shape == (4, 12)
    assert torch.equal(load_packed(unpacked(net(Gpt(), 1)), m.state_dict())(x()), p(x()))
    save(small, tmp_path/'m'); assert torch.equal(load(tmp_path/'m', net(Gpt()))(x()), small(x()))

@pytest.mark.parametrize('kw', [{}, dict(stride=2), dict(stride=2, padding=1, output_padding=1), dict(dilation=2,
    bias=False)])
def test_transposed_convolutions(kw):
    with seed_everything(0):
        m = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 8, 3, **kw), nn.ReLU(), nn.Conv2d(8, 3,
            1)).eval()
        xb, fresh = torch.randn(2, 2, 6, 6), torch.randn(3, 2, 7, 7)
    p = unpacked(m); assert isinstance(p[2], TransposedConv2d) and torch.allclose(m(xb), p(xb), atol=1e-5)
    g = trace(p, xb); assert g.removable == ['0', '2']
    mask = allocate(scored(p, g), .5, scope='layer'); small = shrink(p, mask, xb)
    assert small[2].weight.shape == (4, 3, 3, 3) and difference(apply(copy.deepcopy(p), mask), small, fresh) < 1e-5
    assert "forms.unpacked(model)" in trace(m, xb).fixed['0']
    with pytest.raises(UnsupportedLayerError): sensitivity(p[2], torch.rand(1, 6, 4, 4)) # its inputs are no windows
    # a channel with a bias alone is a constant, which a transposed convolution weighs by its place
    w = Scores({n:torch.rand(p.get_submodule(n).weight.shape, generator=generator(1)) for n in ('0', '2')}, 'weight',
        graph=g)
    w.units['0'][:2] = -1; one = allocate(w, .2)
    assert difference(apply(copy.deepcopy(p), one), shrink(p, one, xb), fresh) < 1e-5

class Relative(nn.Module):
    "Attention with a number per head and pair of places; `scale` has one per head."
    def __init__(self, d=8, n=4, t=6):
        super().__init__(); self.num_heads = n
        self.qkv, self.proj = nn.Linear(d, 3*d), nn.Linear(d, d)
        self.bias, self.scale = nn.Parameter(torch.zeros(2*t-1, n)), nn.Parameter(torch.ones(n, 1, 1))
        self.register_buffer('at', torch.arange(t)[:, None]-torch.arange(t)+t-1)
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(joined((self.scale*(q @ k.mT) + self.bias[self.at].permute(2, 0, 1)).softmax(-1) @ v))

def test_a_table_with_a_number_per_head_goes_with_its_heads(tmp_path):
    m = net(Relative()); g, mask, small = halved(m); same(m, mask, small)
    assert {'1.bias', '1.scale'} <= set(g.tables)
    assert g.tables['1.bias'][0] == 1 and torch.equal(g.tables['1.bias'][1], g.in_slots['1.proj'][::2])
    assert small[1].num_heads == 2 and small[1].bias.shape == (11, 2) and small[1].scale.shape == (2, 1, 1)
    save(small, tmp_path/'m'); again = load(tmp_path/'m', net(Relative()))
    assert torch.equal(again(x(5)), small(x(5)))
    _, mask2, tiny = halved(small); same(small, mask2, tiny)

def test_a_number_that_all_heads_feel_is_no_table():
    class One(Relative):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(joined(((q @ k.mT) + self.bias.sum(1)[self.at]).softmax(-1) @ v))
    m = net(One()); g, mask, small = halved(m); same(m, mask, small)
    assert '1.bias' not in g.tables and small[1].bias.shape == (11, 4)

def swin(): return torchvision.models.swin_transformer.SwinTransformer(
    [2, 2], 8, [2, 2], [2, 4], [2, 2], stochastic_depth_prob=0., num_classes=3)
def maxvit(): return torchvision.models.maxvit.MaxVit(
    (16, 16), 8, 2, [8, 16], [1, 1], 4, stochastic_depth_prob=0., num_classes=3)

@pytest.mark.parametrize('make', (swin, maxvit))
def test_attention_in_windows(make, tmp_path):
    def fresh():
        with seed_everything(0): m = make().eval()
        for i,p in enumerate(m.parameters()): nn.init.normal_(p, std=.3, generator=generator(i))
        return m
    m, images = fresh(), torch.randn(2, 3, 16, 16, generator=generator(1)); plain = unpacked(m)
    assert difference(m, plain, images) < 1e-5 and list(plain.state_dict()) == list(m.state_dict())
    g = trace(plain, images)
    assert all(n in g.outputs for n in g.fixed) # all but the classifier
    mask = allocate(scored(plain, g), .5, scope='layer'); small = shrink(plain, mask, images)
    a, b = apply(copy.deepcopy(plain), mask).double(), copy.deepcopy(small).double()
    assert difference(a, b, torch.randn(3, 3, 16, 16, generator=generator(2)).double()) < 1e-8
    heads = lambda m: [p.shape[1] for n,p in m.named_parameters() if 'relative_position_bias_table' in n]
    assert [2*h for h in heads(small)] == heads(m)
    save(small, tmp_path/'m'); again = load(tmp_path/'m', fresh())
    assert torch.equal(again(images), small(images))
