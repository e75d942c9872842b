"""Cut norms against the whole norm on the masked tensor; known by what they do; in trace, masks, surgery and files."""
import copy, pickle, random
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.core import generator
from neuronprune.files import load_tensors, save_tensors
from neuronprune.graph import Graph, trace
from neuronprune.kinds import channel_dim, is_norm, is_opaque, norm_width, wide
from neuronprune.latency import in_turns
from neuronprune.masks import Mask, Scores
from neuronprune.norms import CutNorm, cut_norm, grouped, narrow_norm, thinned
from neuronprune.allocate import allocate
from neuronprune.surgery import apply, difference, load, plan, save, shrink

class First(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)

class Root(nn.Module):
    def __init__(self, n, eps=1e-6):
        super().__init__(); self.weight, self.variance_epsilon = nn.Parameter(torch.ones(n)), eps
    def forward(self, x):
        y = x.float(); y = y*torch.rsqrt(y.pow(2).mean(-1, keepdim=True)+self.variance_epsilon)
        return self.weight*y.to(x.dtype)
class PlusOne(Root):
    def forward(self, x):
        return (1+self.weight)*(x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True)+self.variance_epsilon))
class Half(Root):
    def forward(self, x): return .5*super().forward(x)
class Std(Root):
    def forward(self, x):
        return self.weight*(x-x.mean(-1, keepdim=True))/(x.std(-1, keepdim=True)+self.variance_epsilon)
class Twin(nn.GroupNorm):
    def forward(self, x): return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
class Bent(nn.GroupNorm):
    def forward(self, x): return super().forward(x).relu()

NORMS = dict(layer=lambda n: nn.LayerNorm(n), no_bias=lambda n: nn.LayerNorm(n, bias=False), first=First, root=Root,
             plus=PlusOne, rms=lambda n: nn.RMSNorm(n), rms_eps=lambda n: nn.RMSNorm(n, eps=1e-3),
             bare_rms=lambda n: nn.RMSNorm(n, elementwise_affine=False), group=lambda n: nn.GroupNorm(n//4, n),
             one=lambda n: nn.GroupNorm(1, n), each=lambda n: nn.GroupNorm(n, n), twin=lambda n: Twin(2, n))

def randomised(m, seed=0):
    for i,p in enumerate(m.parameters()): p.data.copy_(torch.randn(p.shape, generator=generator(seed+i))+.5)
    return m.eval()

def silenced(m, keep):
    "What a mask makes of the norm."
    m = copy.deepcopy(m)
    for p in m.parameters(): p.data[~keep] = 0
    return m

def inputs(m, n, keep, seed, shift=0., size=(3, 2)):
    x = torch.randn(4, *size, n, generator=generator(seed))*2+shift; x[..., ~keep] = 0
    return x if channel_dim(m) == -1 else x.movedim(-1, 1)

def at(m, y, keep): return y[..., keep] if channel_dim(m) == -1 else y[:, keep]

def test_a_cut_norm_is_nearly_as_fast_as_a_whole_one():
    ln, keep, x = nn.LayerNorm(96), torch.arange(0, 96, 2), torch.randn(32, 16, 96, generator=generator(0))
    few = torch.nn.Sequential(nn.Identity(), cut_norm(ln, keep))
    times = [in_turns([m], y, 31, clock='thread')[0] for m,y in ((ln, x), (few, x[..., keep].contiguous()))]
    assert times[1] < 4*times[0]

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(NORMS)), st.integers(0, 2**31), st.sampled_from([0., 30.]))
def test_a_cut_norm_is_the_masked_norm(name, seed, shift):
    m, n = randomised(NORMS[name](8), seed % 97), 8; gen = generator(seed)
    keep = torch.rand(n, generator=gen) < .6; keep[seed % n] = True
    x, small = inputs(m, n, keep, seed, shift), cut_norm(m, keep.nonzero()[:, 0])
    want, got = silenced(m, keep).double()(x.double()), small.double()(at(m, x, keep).double())
    assert at(m, want, ~keep).abs().max() == 0 if not keep.all() else True
    tol = 1e-9 if name not in ('root', 'rms') else 1e-4 # these stay in single precision, or ask the type for their eps
    assert torch.allclose(at(m, want, keep), got, tol, tol)
    again = torch.rand(int(keep.sum()), generator=gen) < .5; again[0] = True
    both = keep.clone(); both[keep] = again # a second cut
    x = inputs(m, n, both, seed+1, shift)
    want = silenced(m, both).double()(x.double())
    got = cut_norm(small, again.nonzero()[:, 0])(at(m, x, both).double())
    assert torch.allclose(at(m, want, both), got, tol, tol)

def test_sums_by_brute_force_and_no_cancellation():
    x = torch.tensor([1e4, 1e4+1, 1e4-1]) # with five zeros beside them
    whole = torch.cat([x, torch.zeros(5)]).double(); want = (whole-whole.mean())/(whole.var(correction=0)+1e-5).sqrt()
    assert torch.allclose(thinned(x, -1, 3/8, 1e-5).double(), want[:3], rtol=1e-6)
    same = torch.full((3,), 1e4); same[0] += 1 # nothing was cut: a spread far below the mean
    assert torch.allclose(thinned(same, -1, 1., 1e-5), F.layer_norm(same, (3,)), rtol=1e-3)

def test_uneven_and_empty_groups():
    m = randomised(nn.GroupNorm(3, 9)); keep = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 0]).bool()
    for size in ((), (5,), (3, 3), (2, 2, 2)):
        x = torch.randn(4, 9, *size)*3+1; x[:, ~keep] = 0; small = cut_norm(m, keep.nonzero()[:, 0])
        assert small.sizes == [3, 1, 0] and torch.allclose(small(x[:, keep]), m(x)[:, keep], atol=1e-5)

def test_known_by_what_they_do():
    said = {k:wide(f(8)) for k,f in NORMS.items()}
    assert {k:(w.kind, w.dim, w.plus) for k,w in said.items()} == dict(
        layer=('layer', -1, 0), no_bias=('layer', -1, 0), first=('layer', 1, 0), root=('rms', -1, 0),
        plus=('rms', -1, 1), rms=('rms', -1, 0), rms_eps=('rms', -1, 0), bare_rms=('rms', -1, 0),
        group=('group', 1, 0), one=('group', 1, 0),
        each=('group', 1, 0), twin=('group', 1, 0))
    assert wide(Root(8, 1e-5)).eps == 1e-5 and wide(nn.RMSNorm(8)).eps is None
    none = [Half(8), Std(8), nn.LayerNorm((2, 8)), nn.LayerNorm(8, elementwise_affine=False), Bent(2, 8),
            nn.BatchNorm2d(8), nn.GroupNorm(2, 8, affine=False),
            nn.PReLU(8), nn.Linear(8, 8), nn.Bilinear(8, 8, 8), nn.Embedding(8, 8)]
    assert not any(map(wide, none)) and [is_opaque(m) for m in none[:5]] == [False, False, True, True, True]
    assert all(is_norm(f(8)) and norm_width(f(8)) == 8 and not is_opaque(f(8)) for f in NORMS.values())

def test_modules_stay_as_they_were():
    m, keep = randomised(nn.LayerNorm(6)), torch.tensor([0, 2, 5]); m.weight.requires_grad_(False); m.train()
    small = cut_norm(m, keep)
    assert list(small.state_dict()) == ['weight', 'bias'] and small.training and small.eps == m.eps
    assert not small.weight.requires_grad and small.bias.requires_grad and len(m.weight) == 6
    assert wide(small) == wide(m)
    assert norm_width(small) == 3 and channel_dim(small) == -1 and '3 of 6' in repr(small)
    group = cut_norm(nn.GroupNorm(2, 6), keep); assert list(group.state_dict()) == ['weight', 'bias']
    for o,x in ((small, torch.randn(2, 3)), (group, torch.randn(2, 3, 4))):
        for c in (copy.deepcopy(o), pickle.loads(pickle.dumps(o))): assert torch.equal(c(x), o(x))
    with pytest.raises(ValueError, match='2 groups'): narrow_norm(nn.GroupNorm(2, 6), [1])

@pytest.mark.parametrize('name', NORMS)
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_half_precision_is_as_good_as_the_whole_norm(name, dtype):
    m = randomised(NORMS[name](8)); keep = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0]).bool(); x = inputs(m, 8, keep, 3)
    want = at(m, silenced(m, keep)(x), keep); m, x = m.to(dtype), x.to(dtype)
    whole, got = at(m, silenced(m, keep)(x), keep), cut_norm(m, keep.nonzero()[:, 0])(at(m, x, keep))
    assert got.dtype == whole.dtype == dtype
    assert (got-want).abs().max() <= 1.5*(whole-want).abs().max() + 2*torch.finfo(dtype).eps*want.abs().max()

def test_autocast_and_gradients():
    m, keep = randomised(nn.LayerNorm(8)), torch.arange(0, 8, 2); small = cut_norm(m, keep)
    x = torch.zeros(3, 8); x[:, keep] = torch.randn(3, 4, generator=generator(0))
    with torch.autocast('cpu', torch.bfloat16):
        for o in (x, x.bfloat16()): assert small(o[:, keep]).dtype == m(o).dtype
    a, b = x.clone().requires_grad_(), x[:, keep].requires_grad_()
    m(a)[:, keep].square().sum().backward(); small(b).square().sum().backward()
    assert torch.allclose(a.grad[:, keep], b.grad, atol=1e-5) and torch.allclose(m.weight.grad[keep], small.weight.grad)

# ---- in networks

class Net(nn.Module):
    "A residual trunk of width `d` under norms of one kind, on vectors or on images."
    def __init__(self, norm, d=8, image=False):
        super().__init__(); lay = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if image else nn.Linear
        self.stem, self.a, self.b = lay(3, d), lay(d, 12), lay(12, d)
        self.n1, self.n2, self.head = norm(d), norm(d), nn.Linear(d, 3)
    def forward(self, x):
        x = self.stem(x); x = self.n2(x+self.b(F.gelu(self.a(self.n1(x)))))
        return self.head(x.flatten(2).mean(2) if x.ndim > 3 else x)

def net(name):
    image = channel_dim(NORMS[name](8)) == 1; m = randomised(Net(NORMS[name], image=image))
    return m, torch.randn(5, 3, 4, 4, generator=generator(1)) if image else torch.randn(5, 3, generator=generator(1))

def masked_by(m, x, seed=0, share=.5):
    g = trace(m, x)
    s = Scores({n:torch.rand(len(g.out_slots[n]), generator=generator(seed+i)) for i,n in enumerate(g.removable)},
               'channel', graph=g)
    return allocate(s, share)

@pytest.mark.parametrize('name', NORMS)
def test_masked_is_shrunk_twice_and_saved(name, tmp_path):
    m, x = net(name); mask = masked_by(m, x)
    assert mask.graph.removable == ['stem', 'a', 'b'] and mask.graph.wide == ['n1', 'n2']
    small, masked = shrink(m, mask, x), apply(copy.deepcopy(m), mask); fresh = torch.randn_like(x)*3
    assert difference(masked, small, fresh) < 1e-5 < 1e-2 < difference(m, small, fresh)
    assert isinstance(small.n1, CutNorm) and norm_width(small.n1) == len(small.stem.weight) < 8
    assert list(small.state_dict()) == list(m.state_dict())
    again = masked_by(small, x, seed=7, share=.4); tiny = shrink(small, again, x)
    assert difference(apply(copy.deepcopy(small), again), tiny, fresh) < 1e-5
    assert len(tiny.stem.weight) < norm_width(small.n1)
    for o in (small, tiny):
        save(o, tmp_path/'m.safetensors'); back = load(tmp_path/'m.safetensors', net(name)[0])
        with torch.no_grad(): assert torch.equal(back.eval()(x), o(x))

def test_a_norm_counts_what_no_layer_reads():
    "Columns that are cut leave a channel that the norm still reads."
    m, x = net('layer'); g = trace(m, x); keep = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool()
    assert g.unread({'a': ~keep, 'head': ~keep}) == {}
    mask = Mask({'a:in': keep, 'head:in': keep}, 'channel', graph=g)
    small = shrink(m, mask, x); assert difference(apply(copy.deepcopy(m), mask), small, x) < 1e-5
    w = {n:torch.ones_like(m.get_submodule(n).weight, dtype=torch.bool) for n in ('a', 'head', 'stem', 'b')}
    for n in ('a', 'head'): w[n][:, ~keep] = False
    for n in ('stem', 'b'): w[n][~keep] = False # rows gone, biases there: constants that the norms count
    small = shrink(m, Mask(w, 'weight', graph=g), x)
    assert difference(apply(copy.deepcopy(m), Mask(w, 'weight')), small, x) < 1e-5 and len(small.stem.weight) == 8

@pytest.mark.parametrize('norm', [lambda n: nn.LayerNorm(n, elementwise_affine=False), lambda n: Bent(2, n)])
def test_what_cannot_be_silenced_holds_the_trunk(norm):
    image = isinstance(norm(8), nn.GroupNorm)
    g = trace(Net(norm, image=image), torch.randn(2, 3, 4, 4) if image else torch.randn(2, 3))
    assert g.removable == ['a'] and 'mixed by' in g.fixed['stem'] and g.wide == []

def test_four_slices_under_one_norm():
    "Swin's patch merging: a trunk's channels come four times."
    class Merge(nn.Module):
        def __init__(self):
            super().__init__(); self.stem, self.norm, self.out = nn.Linear(2, 6), nn.LayerNorm(24), nn.Linear(24, 5)
            self.last, self.head = nn.LayerNorm(5), nn.Linear(5, 2)
        def forward(self, x):
            x = self.stem(x); x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
            return self.head(self.last(self.out(self.norm(x))).mean((1, 2)))
    m, x = randomised(Merge()), torch.randn(3, 4, 4, 2); mask = masked_by(m, x)
    assert mask.graph.removable == ['stem', 'out']
    small = shrink(m, mask, x); assert difference(apply(copy.deepcopy(m), mask), small, torch.randn_like(x)) < 1e-5
    assert norm_width(small.norm) == 4*len(small.stem.weight) == small.norm.normalized_shape[0]

def test_files_of_before_and_damaged_groups(tmp_path):
    m, x = net('group'); g = trace(m, x); d = g.to_dict()
    for k in ('tables', 'feeds', 'wide'): d.pop(k)
    old = Graph.from_dict(d); assert (old.tables, old.feeds, old.wide) == ({}, {}, [])
    mask = masked_by(m, x); small = shrink(m, mask, x); save(small, tmp_path/'m.safetensors')
    t, h = load_tensors(tmp_path/'m.safetensors', 'model')
    assert h['norms'] == {n:getattr(small, n).sizes for n in ('n1', 'n2')}
    for bad in ({}, {'n1': [1], 'n2': [1]}, {'n1': 3, 'n2': 3}, {'n1': [1, 1.5], 'n2': [2, 2]}, {'stem': 2}, [1]):
        save_tensors(tmp_path/'b.safetensors', t, {**h, 'norms': bad})
        with pytest.raises(ValueError, match='b.safetensors'): load(tmp_path/'b.safetensors', net('group')[0])

@pytest.mark.parametrize('name', ['layer', 'root', 'group'])
def test_export(name):
    m, x = net(name); small = shrink(m, masked_by(m, x), x)
    got = torch.export.export(small, (x,)).module()(x)
    with torch.no_grad(): assert torch.allclose(got, small(x), atol=1e-5)

@pytest.mark.parametrize('name', ['layer', 'root', 'group'])
def test_onnx(name, tmp_path):
    for o in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(o)
    import onnxruntime
    m, x = net(name); small = shrink(m, masked_by(m, x), x)
    torch.onnx.export(small, (x,), str(tmp_path/'m.onnx'), dynamo=True, verbose=False)
    run = onnxruntime.InferenceSession(str(tmp_path/'m.onnx'))
    y = run.run(None, {run.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad(): assert abs(y-small(x).numpy()).max() < 1e-4
