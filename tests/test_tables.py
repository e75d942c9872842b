"""Tables beside the trunk: what the probe finds against what is known, masked = shrunk, attributes, files, energies."""
import copy, json
from types import SimpleNamespace
import pytest, torch, torch.nn.functional as F
from torch import nn
from neuronprune.allocate import allocate, weights_left
from neuronprune.core import generator
from neuronprune.energy_backends import Scorer
from neuronprune.energy_sliced import _vectors
from neuronprune.energy_units import bits_of
from neuronprune.graph import Graph, trace
from neuronprune.masks import Mask, Scores
from neuronprune.probe import Probe, Table
from neuronprune.rehearsal import _chosen, thin
from neuronprune.retrain import _slice
from neuronprune.surgery import apply, difference, load, plan, save, shrink
from neuronprune.tables import axis, candidates, followed

class Net(nn.Module):
    "A pre-norm trunk of width `d`; `kind` says what stands beside it."
    def __init__(self, kind, d=8, words=11, t=6):
        super().__init__(); self.kind, self.d = kind, d
        p = lambda *s: nn.Parameter(torch.empty(*s))
        self.emb = nn.Embedding(words, d, padding_idx=0) if kind != 'vectors' else nn.Linear(3, d)
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.a, self.b, self.head = nn.Linear(d, 10), nn.Linear(10, d), nn.Linear(d, 3)
        if kind in ('pos', 'vectors', 'buffer', 'unsaved'): self.pos = p(1, t, d)
        if kind == 'flat': self.pos = p(1, t*d)
        if kind == 'turned': self.pos = p(d, t)
        if kind == 'emb_pos': self.pos = nn.Embedding(t, d)
        if kind in ('cls', 'mask'): self.tok = p(1, 1, d) if kind == 'cls' else p(d)
        if kind == 'scale': self.gamma = p(d)
        if kind == 'film': self.film = p(2*d)
        if kind in ('mixing', 'gate'): self.m = p(d, d) if kind == 'mixing' else p(1)
        if kind == 'rolled': self.m = p(d)
        if kind in ('buffer', 'unsaved'):
            pos = self.pos.data; del self.pos; self.register_buffer('pos', pos, persistent=kind == 'buffer')
        if kind == 'tied': self.lm = nn.Linear(d, words, bias=False); self.lm.weight = self.emb.weight
        for i,o in enumerate([*self.parameters(), *self.buffers()]):
            o.data.copy_(torch.randn(o.shape, generator=generator(i))/max(1, o.shape[-1]-1)**(.5*(o.ndim == 2)))
    def forward(self, x):
        k, t = self.kind, x.shape[1]; x = self.emb(x)
        if k in ('pos', 'vectors', 'buffer', 'unsaved'): x = x+self.pos[:, :t]
        if k == 'flat': x = x+self.pos.view(1, -1, self.d)[:, :t]
        if k == 'turned': x = x+self.pos.T[:t]
        if k == 'emb_pos': x = x+self.pos(torch.arange(t, device=x.device))
        if k == 'cls': x = torch.cat([self.tok.expand(len(x), -1, -1), x], 1)
        if k == 'mask': x = torch.where((torch.arange(t) % 2 == 0)[:, None], self.tok, x)
        if k == 'mixing': x = x+x@self.m
        if k == 'rolled': x = x+self.m; x = x+self.m.roll(1)
        h = self.b(F.gelu(self.a(self.n1(x))))
        if k == 'scale': h = h*self.gamma
        if k == 'gate': h = h*self.m
        if k == 'film': s, b = self.film.chunk(2); h = h*s+b
        x = self.n2(x+h)
        return self.lm(x) if k == 'tied' else self.head(x.mean(1))

def net(kind):
    m = Net(kind).eval()
    return m, torch.randn(4, 5, 3, generator=generator(0)) if kind == 'vectors' else torch.randint(
        0, 11, (4, 5), generator=generator(0))

def fresh(x): return torch.randn(6, 5, 3) if x.is_floating_point() else torch.randint(0, 11, (6, 4))

def mask_of(m, x, share=.5, seed=0, **kw):
    g = trace(m, x)
    units = {n:torch.rand(len(v), generator=generator(seed)) for n,v in g.out_slots.items() if n in g.removable}
    return allocate(Scores(units, 'channel', graph=g), share, **kw)

E8 = {'emb.weight': (1, 8)}
KNOWN = dict(pos={**E8, 'pos': (2, 8)}, vectors={'pos': (2, 8)}, buffer={**E8, 'pos': (2, 8)},
             turned={**E8, 'pos': (0, 8)}, emb_pos={**E8, 'pos.weight': (1, 8)},
             cls={**E8, 'tok': (2, 8)}, mask={**E8, 'tok': (0, 8)},
             scale={**E8, 'gamma': (0, 8)}, film={**E8, 'film': (0, 16)}, tied=E8, gate=E8)

@pytest.mark.parametrize('kind', KNOWN)
def test_tables_are_found_masked_and_cut(kind, tmp_path):
    m, x = net(kind); before = {k:v.clone() for k,v in m.state_dict().items()}; mask = mask_of(m, x); g = mask.graph
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    assert {t:(d, len(v)) for t,(d,v) in g.tables.items()} == KNOWN[kind] and {'a', 'b'} <= set(g.removable)
    ids = g.out_slots['b']
    for t,(d,v) in g.tables.items(): assert torch.equal(v, torch.cat([ids]*(len(v)//8)))
    assert torch.equal(g.norm_slots['n1'], ids) and torch.equal(g.in_slots['a'], ids)
    assert Graph.from_dict(json.loads(json.dumps(g.to_dict()))).to_dict() == g.to_dict()
    small, masked = shrink(m, mask, x), apply(copy.deepcopy(m), mask); keep = mask['b']
    for i in range(3): assert difference(masked, small, fresh(x)) < 1e-5
    assert difference(m, small, x) > 1e-3
    for t,(d,v) in KNOWN[kind].items():
        full, mine = masked.state_dict()[t], small.state_dict()[t]; all_ = torch.cat([keep]*(v//8))
        assert not full.index_select(d, (~all_).nonzero()[:, 0]).any()
        assert torch.equal(mine, before[t].index_select(d, all_.nonzero()[:, 0]))
        assert plan(m, mask)[t][d].tolist() == all_.nonzero()[:, 0].tolist()
    if kind != 'vectors': assert small.emb.embedding_dim == int(keep.sum()) == small.emb.weight.shape[1]
    if kind == 'tied': assert small.lm.weight is small.emb.weight and small.lm.in_features == int(keep.sum())
    for k,p in small.named_parameters(): assert p.requires_grad == m.get_parameter(k).requires_grad
    save(small, tmp_path/'m.safetensors'); back = load(tmp_path/'m.safetensors', Net(kind)).eval()
    with torch.no_grad(): assert torch.equal(back(x), small(x))
    if kind == 'tied': assert back.lm.weight is back.emb.weight and back.emb.embedding_dim == int(keep.sum())
    again = mask_of(small, x, .4, seed=3); tiny = shrink(small, again, x)
    assert difference(apply(copy.deepcopy(small), again), tiny, x) < 1e-5 and len(tiny.b.weight) < len(small.b.weight)

@pytest.mark.parametrize('kind,said', [('flat', 'cut network'), ('mixing', 'not be zero'), ('rolled', 'not be zero'),
                                       ('unsaved', 'not be zero')])
def test_what_cannot_be_cut_holds_the_trunk(kind, said):
    m, x = net(kind); g = trace(m, x)
    assert g.removable == ['a'] and said in g.fixed['b']
    mask = mask_of(m, x); small = shrink(m, mask, x); assert difference(apply(copy.deepcopy(m), mask), small, x) < 1e-5

def test_a_table_stays_while_one_layer_of_its_bundle_does():
    m, x = net('cls'); m.stem = nn.Linear(8, 8)
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.net = m
        def forward(self, x):
            n = self.net; h = n.stem(torch.sin(n.emb(x).detach()*7))
            h = torch.cat([n.tok.expand(len(h), -1, -1), h], 1)
            return n.head(n.n2(h+n.b(F.gelu(n.a(n.n1(h))))).mean(1))
    two = Two().eval(); g = trace(two, x); keep = torch.arange(8) < 5
    assert torch.equal(g.out_slots['net.stem'], g.out_slots['net.b'])
    one = Mask({'net.b': keep}, 'channel', graph=g, meta=dict(tied=False)).expand(two)
    both = Mask({'net.b': keep, 'net.stem': keep}, 'channel', graph=g).expand(two)
    assert one['net.tok'].all() if 'net.tok' in one else True
    assert torch.equal(both['net.tok'][0, 0], keep) and torch.equal(both['net.n1.bias'], keep)
    assert 'net.n1.bias' not in one
    for mask in (Mask({'net.b': keep}, 'channel', graph=g, meta=dict(tied=False)),
                 Mask({'net.b': keep, 'net.stem': keep}, 'channel', graph=g)):
        assert difference(apply(copy.deepcopy(two), mask), shrink(two, mask, x), x) < 1e-5

def test_slots_against_the_jacobian():
    "`followed` and `axis` on random linear maps against their definition."
    gen = generator(0)
    for trial in range(50):
        n, (r, c) = 5, (3, 4); to = torch.randint(0, n, (c,), generator=gen)
        used = torch.rand(r, c, generator=gen) < .7
        J = torch.zeros(r, c, n, dtype=torch.float64)
        J[torch.arange(r)[:, None], torch.arange(c)[None], to[None].expand(r, c)] = torch.randn(
            r, c, generator=gen, dtype=torch.float64)
        J[~used] = 0; want = torch.where(used, to[None].expand(r, c), -1)
        s = (torch.arange(n, dtype=torch.float64)+1)/n
        got = followed([J@s**k for k in range(3)], n); assert torch.equal(got, want)
        if used.any():
            d, chan = axis(got) if len(set(to.tolist())) > 1 and used.any(0).sum() > 1 else (1, None)
            if chan is not None and d == 1: assert torch.equal(chan, torch.where(used.any(0), to, -1))
        J[0, 0, to[0]-1] = 1.; J[0, 0, to[0]] = 1.; got = followed([J@s**k for k in range(3)], n)
        assert got[0, 0] == -2 and axis(got) is None

@pytest.mark.parametrize('shape', ((4,), (1, 4), (3, 4), (2, 4, 5), (2, 3, 4), (0, 4), (2, 4, 3, 1)))
@pytest.mark.parametrize('kept', ([1, 0, 1, 1], [0, 0, 0, 0]))
def test_thin_takes_what_indices_take(shape, kept):
    "In every order of memory."
    t, keep, d = torch.rand(shape, generator=generator(0)), torch.tensor(kept).bool(), shape.index(4)
    for o in (t, t.transpose(0, -1).contiguous().transpose(0, -1), t[:1].expand(len(t), *shape[1:]) if d else t):
        cut, zero = thin(o, d, keep, True), thin(o, d, keep, False)
        assert torch.equal(cut, o.index_select(d, keep.nonzero()[:, 0]))
        assert torch.equal(zero.index_select(d, keep.nonzero()[:, 0]), cut)
        assert not zero.index_select(d, (~keep).nonzero()[:, 0]).any()

def test_slots_are_chosen_in_either_layout():
    keep = torch.tensor([1, 0, 1, 1, 0]).bool()
    for v in (torch.rand(2, 5, 7), torch.rand(2, 7, 5).movedim(1, 2), torch.rand(2, 5, 1), torch.rand(2, 1, 5).mT):
        assert torch.equal(_chosen(v, keep), v[:, keep])

def test_candidates():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__(); self.p, self.one = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))
            self.register_parameter('none', None)
            self.register_buffer('ids', torch.arange(3)); self.register_buffer('kept', torch.ones(2))
            self.register_buffer('not_kept', torch.ones(2), persistent=False); self.again = self.p
            self.fc, self.ln, self.rnn, self.emb = nn.Linear(3, 3), nn.LayerNorm(3), nn.LSTM(3, 3), nn.Embedding(2, 3)
    assert list(candidates(Odd())) == ['p', 'kept', 'emb.weight']

def test_counts_and_energies():
    m, x = net('scale'); g = trace(m, x); mask = mask_of(m, x); small = shrink(m, mask, x)
    weights = sum(o.weight.numel() for o in (small.a, small.b, small.head))
    assert weights_left(g, {k:mask[k] for k in mask}) == weights
    for tied in (True, False):
        b = bits_of(m, g, tied=tied); states = torch.rand(4, b.D, generator=generator(1)) < .6; states[0] = True
        ys = Scorer(m, b).run('loop', _vectors(b, states), x)
        for s,y in zip(states, ys):
            with torch.no_grad(): assert torch.equal(apply(copy.deepcopy(m), b.mask(s))(x), y)
            n = sum(p.numel() for p in shrink(m, b.mask(s), x).parameters())
            assert b.retained(s)['params'] == n or not tied

def test_the_state_of_an_optimiser_can_follow():
    "`plan` says how the state of an optimiser is cut with the tables."
    m, x = net('pos'); mask = mask_of(m, x); small, cuts = shrink(m, mask, x), plan(m, mask)
    masked = apply(copy.deepcopy(m), mask).state_dict()
    for k,v in small.state_dict().items(): assert torch.equal(_slice(masked[k], k, cuts), v), k

def test_sums_that_cancel_are_asked_again():
    "The weights of the first question all but cancel at a few entries of two slots each, as they may by chance."
    n = 20; leaf = torch.zeros(n, 20, requires_grad=True); block = torch.arange(n).repeat_interleave(2)
    x = (leaf[block]*(1+torch.arange(20)/7)).unsqueeze(0) # [rows, slots, rest]
    w = {k:Table(torch.float32, 'cpu')((1, 2*n, 20), k).clone() for k in ('k', 'k again')}
    w['k'][0, 25, :9] = -w['k'][0, 24, :9]*(1-2e-6)
    asked = SimpleNamespace(rows_of=lambda k: x, table=lambda shape, key: w[key])
    want = (torch.arange(n)*2)[:, None].expand(-1, 20)
    assert torch.equal(Probe.slopes(asked, dict(t=leaf), 'k', block)['t'], want)
    w['k again'] = w['k']
    assert (Probe.slopes(asked, dict(t=leaf), 'k', block)['t'] == -2).any() # so much for one question
