"""Pruned networks in the formats of others: exported, compiled, in ONNX, in torch's pruning, in Torch-Pruning."""
import copy, sys
import pytest, torch, torch_pruning as tp
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from neuronprune import handover
from neuronprune.allocate import allocate
from neuronprune.core import as_found, generator, layers, mapped, tensors
from neuronprune.forms import unpacked
from neuronprune.graph import trace
from neuronprune.handover import from_history, importance_scores, pruning_history, to_onnx
from neuronprune.masks import Mask, Scores
from neuronprune.models import build
from neuronprune.surgery import Factored, GroupedLinear, apply, difference, plan, shrink
from test_graph import C, KINDS, Net, X, found, nets
from test_knapsack import Patches
from test_surgery import ZOO, quiet, random_scores, randomise, thin, zoo

def halved(model, xb, s=.5): return quiet(random_scores(model, trace(model, xb), 'channel'), s)

class Attention(nn.Module):
    "A small transformer on sequences."
    def __init__(self):
        super().__init__(); self.inp, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    def forward(self, x): return self.out(self.enc(self.inp(x)).mean(1))

def attention(): torch.manual_seed(0); return Attention().eval(), torch.randn(4, 5, 8, generator=generator(0))

def grouped():
    "A network on sequences with block-diagonal factors."
    torch.manual_seed(0); m = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    x = torch.randn(4, 5, 8, generator=generator(0)); small = shrink(m, thin(m, k=2), x)
    assert any(isinstance(o, GroupedLinear) for o in small.modules())
    return small, x

def pruned(zoo, name, how):
    "A network of the zoo, pruned one way or another, and inputs."
    if name == 'attention': m, xb = attention(); return (shrink(m, halved(m, xb), xb), xb)
    if name == 'grouped': return grouped()
    if name == 'heads':
        m, xb = unpacked(Patches()).eval(), torch.rand(3, 1, 4, 4, generator=generator(0))
        return shrink(m, halved(m, xb), xb), xb
    m, xb, _ = zoo(name)
    if how == 'masked': return apply(copy.deepcopy(m), halved(m, xb)), xb
    small = shrink(m, halved(m, xb), xb)
    return (shrink(small, thin(small), xb), xb) if how == 'factored' else (small, xb)

MADE = [('lenet5', 'masked'), ('resnet20', 'shrunk'), ('densenet22', 'factored'), ('attention', ''), ('grouped', ''),
        ('heads', '')]
made = pytest.mark.parametrize('name,how', MADE)

@made
def test_torch_exports_them_with_any_number_of_examples(zoo, name, how):
    m, xb = pruned(zoo, name, how); m = m.eval()
    with as_found(m, train=False), torch.no_grad():
        out = torch.export.export(m, (xb,), dynamic_shapes=[{0: torch.export.Dim('batch')}]).module()
        for x in (xb[:1], torch.randn(9, *xb.shape[1:], generator=generator(3))):
            assert torch.allclose(out(x), m(x), atol=1e-5)

@pytest.mark.parametrize('name,how', [MADE[0], MADE[1], MADE[4]])
def test_torch_compiles_them(zoo, name, how):
    m, xb = pruned(zoo, name, how); m = m.eval(); torch._dynamo.reset()
    with torch.no_grad(): assert torch.allclose(torch.compile(m, backend='aot_eager')(xb), m(xb), atol=1e-5)

# ---- ONNX

@pytest.fixture
def ort():
    for k in ('onnx', 'onnxscript'): pytest.importorskip(k)
    return pytest.importorskip('onnxruntime')

def answers(ort, path, *xs):
    s = ort.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    named = {i.name:x.numpy() for i,x in zip(s.get_inputs(), xs, strict=True)}
    return [torch.from_numpy(o) for o in s.run(None, named)]

@made
def test_onnx_computes_the_same(ort, zoo, tmp_path, name, how):
    m, xb = pruned(zoo, name, how); before = found(m)
    got = to_onnx(m, xb, tmp_path/'sub'/'m.onnx')
    assert found(m) == before and [o.name for o in (tmp_path/'sub').iterdir()] == ['m.onnx']
    assert got.path.endswith('m.onnx') and 0 < got.difference <= 1e-4 and got.opset >= 18
    assert got.mib == (tmp_path/'sub'/'m.onnx').stat().st_size/2**20
    assert [*got.inputs.values()] == [['batch', *xb.shape[1:]]] and [o[0] for o in got.outputs.values()] == ['batch']
    x = torch.randn(7, *xb.shape[1:], generator=generator(5))
    with as_found(m, train=False), torch.no_grad(): want = m(x)
    y, = answers(ort, tmp_path/'sub'/'m.onnx', x)
    assert y.shape == want.shape and (y-want).abs().max() <= 1e-4*want.abs().max()

class Forms(nn.Module):
    "Called with two inputs, by place or by name; answers with a dictionary."
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Embedding(9, 4)
    def forward(self, words, x, scale=None):
        s = self.a(x)+self.b(words).sum(1); return dict(s=s, t=[s.relu(), s.argmax(1)])

class OneDict(Forms):
    def forward(self, batch): return super().forward(**batch)

W, F = torch.arange(8).view(2, 4), torch.randn(2, 3, generator=generator(0))
@pytest.mark.parametrize('model,xb', [(Forms, (W, F)), (Forms, [W, F]), (Forms, dict(x=F, words=W)),
                                      (Forms, dict(words=W[:1], x=F[:1])), (OneDict, dict(words=W, x=F))])
def test_onnx_of_inputs_of_any_form(ort, tmp_path, model, xb):
    torch.manual_seed(0); m = model()
    got = to_onnx(m, xb, tmp_path/'m')
    assert m.training and sorted(map(tuple, got.inputs.values())) == [('batch', 3), ('batch', 4)]
    x, w = torch.randn(5, 3), torch.randint(9, (5, 4))
    named = {tuple(v)[1]:k for k,v in got.inputs.items()}; s = ort.InferenceSession(str(tmp_path/'m'))
    ys = s.run(None, {named[3]: x.numpy(), named[4]: w.numpy()}); want = Forms.forward(m, w, x)
    for y,z in zip(ys, tensors(want), strict=True): assert torch.allclose(torch.from_numpy(y), z, atol=1e-5)

def test_onnx_of_a_hugging_face_network(ort, tmp_path):
    hf = pytest.importorskip('transformers')
    c = hf.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0); m = hf.BertForSequenceClassification(c).eval()
    xb = dict(input_ids=torch.randint(30, (2, 7)), attention_mask=torch.ones(2, 7, dtype=torch.long))
    small = shrink(m, halved(m, xb), xb); got = to_onnx(small, xb, tmp_path/'m')
    x = mapped(lambda o: o.repeat(3, 1), xb); y, = answers(ort, tmp_path/'m', *(x[k] for k in got.inputs))
    with torch.no_grad(): assert torch.allclose(y, small.eval()(**x).logits, atol=1e-5)

def test_the_version_of_the_operators_can_be_asked_for(ort, tmp_path):
    assert to_onnx(nn.Sequential(nn.Linear(3, 2)), torch.rand(2, 3), tmp_path/'m', opset=19).opset == 19

class Fixed(nn.Module):
    "Its code takes two examples for a rule."
    def __init__(self): super().__init__(); self.fc = nn.Linear(4, 3)
    def forward(self, x): return self.fc(x.view(2, 4)) if len(x) == 2 else self.fc(x)

class Endless(nn.Linear):
    def forward(self, x): return super().forward(x)/0*0

def test_what_cannot_be_written_leaves_what_was_there(ort, tmp_path, monkeypatch):
    f = tmp_path/'m.onnx'; f.write_bytes(b'before'); m, x = nn.Sequential(nn.Linear(4, 3)), torch.rand(2, 4)
    with pytest.raises(ValueError, match='^model: cannot be written with a free number'): to_onnx(Fixed(), x, f)
    with pytest.raises(ValueError, match='^model: torch and onnxruntime differ by nan'): to_onnx(Endless(4, 3), x, f)
    with pytest.raises(ValueError, match='^xb: the model cannot digest'): to_onnx(m, torch.rand(2, 5), f)
    with pytest.raises(ValueError, match='allowed are tol=0$'): to_onnx(attention()[0], attention()[1], f, tol=0.)
    with pytest.raises(ValueError, match=r'^model: .*try model.float\(\)'):
        to_onnx(copy.deepcopy(m).bfloat16(), x.bfloat16(), f)
    real = handover._program # the weights of the file are others than those of the network
    def other(model, *args): o = copy.deepcopy(model); o[0].bias.data[1] += .01; return real(o, *args)
    monkeypatch.setattr(handover, '_program', other)
    with pytest.raises(ValueError, match='^model: torch and onnxruntime differ by'): to_onnx(m, x, f)
    assert f.read_bytes() == b'before' and len(list(tmp_path.iterdir())) == 1

@pytest.mark.parametrize('missing', ['onnx', 'onnxscript', 'onnxruntime'])
def test_a_missing_extra_is_named(missing, tmp_path, monkeypatch):
    for k in ('onnx', 'onnxscript', 'onnxruntime'): monkeypatch.setitem(sys.modules, k, None if k == missing else sys)
    with pytest.raises(ImportError, match=rf'{missing} is not installed.*neuronprune\[onnx\]'):
        to_onnx(nn.Linear(2, 2), torch.rand(1, 2), tmp_path/'m')

# ---- torch.nn.utils.prune

@pytest.mark.parametrize('unit', ['channel', 'weight', 'group'])
@pytest.mark.parametrize('name', ['lenet5', 'vgg16_dgl', 'resnet20', 'mobilenet_v3_small'])
def test_torchs_pruning_computes_what_the_masked_network_does(zoo, name, unit):
    m, xb, g = zoo(name); mask = quiet(random_scores(m, g, unit), .5)
    theirs = mask.to_torch_prune(copy.deepcopy(m))
    assert difference(apply(copy.deepcopy(m), mask), theirs, xb) == 0 and torch_prune.is_pruned(theirs)
    back = Mask.from_torch_prune(theirs); keep = mask.expand(m)
    for k,v in back.items(): assert torch.equal(v, keep[f'{k}.weight'])
    assert {f'{k}.weight' for k in back} == {k for k in keep if k.removesuffix('.weight') in layers(m)
                                             and k.endswith('.weight')}

def test_factors_of_a_mask_are_no_matter_for_torchs_pruning():
    m, all_ = nn.Sequential(nn.Linear(3, 2)), torch.ones(2, 3)
    mask = Mask({'0': all_.bool()}, 'weight', scale={'0': .5*all_})
    with pytest.raises(ValueError, match='^mask: has a scale'): mask.to_torch_prune(m)
    assert not torch_prune.is_pruned(m)

@pytest.mark.parametrize('how', ['structured', 'unstructured', 'global', 'both'])
def test_what_torch_has_pruned_can_be_cut(zoo, how):
    m, xb, _ = zoo('lenet5'); m = copy.deepcopy(m); lay = [o for k,o in layers(m).items() if k != 'fc3']
    for o in lay:
        if how in ('structured', 'both'): torch_prune.ln_structured(o, 'weight', .5, 2, dim=0)
        if how in ('unstructured', 'both'): torch_prune.l1_unstructured(o, 'weight', .3)
    if how == 'global':
        torch_prune.global_unstructured([(o, 'weight') for o in lay], torch_prune.L1Unstructured, amount=.6)
    with torch.no_grad(): want = m(xb)
    mask = Mask.from_torch_prune(m)
    for o in lay: torch_prune.remove(o, 'weight')
    small = shrink(m, mask, xb).eval()
    with torch.no_grad(): assert torch.allclose(small(xb), want, atol=1e-5*float(want.abs().max()))
    if how in ('structured', 'both'): assert small.conv1.out_channels == 3 and small.fc1.out_features == 60

# ---- Torch-Pruning

TP = ['lenet5', 'vgg7_bn', 'mobilenet_v3_small', 'densenet22', 'resnet50', 'basiccnn']

def dependencies(m, xb): return tp.DependencyGraph().build_dependency(m, xb, verbose=False)

@pytest.mark.parametrize('imp', [tp.importance.GroupMagnitudeImportance(),
                                 tp.importance.MagnitudeImportance(1, 'first'),
                                 tp.importance.BNScaleImportance(), lambda group: torch.arange(len(group[0].idxs))])
def test_scores_are_what_the_importance_says(zoo, imp):
    m, xb, g = zoo('vgg7_bn'); before = found(m); sc = importance_scores(m, imp, xb, graph=g)
    assert found(m) == before and set(sc) | set(sc.skipped) == set(g.layers) and not set(sc) & set(sc.skipped)
    other = copy.deepcopy(m).requires_grad_(True); dg = dependencies(other, xb)
    for k,v in sc.items():
        o = other.get_submodule(k); f = dg.get_pruner_of_module(o).prune_out_channels
        assert torch.allclose(v, imp(dg.get_pruning_group(o, f, list(range(len(v))))).float())
    assert shrink(m, quiet(sc, .5), xb) is not m

@pytest.mark.parametrize('name', TP[2:4])
def test_every_layer_gets_scores_of_a_frozen_network_too(zoo, name):
    m, xb, g = zoo(name); m = copy.deepcopy(m).requires_grad_(False)
    sc = importance_scores(m, tp.importance.GroupMagnitudeImportance(), xb, graph=g)
    assert set(sc) == set(g.removable) and not any(p.requires_grad for p in m.parameters())
    shrink(m, quiet(sc, .5), xb)

def test_importances_find_the_gradients(zoo):
    m, xb, g = zoo('lenet5'); m = copy.deepcopy(m); imp = tp.importance.GroupTaylorImportance()
    with pytest.raises(ValueError, match='^importance: it scores no layer'): importance_scores(m, imp, xb, graph=g)
    m(xb).square().sum().backward(); grad = m.conv1.weight.grad.clone()
    assert set(importance_scores(m, imp, xb, graph=g)) == set(g.removable) and torch.equal(m.conv1.weight.grad, grad)

def test_what_is_no_importance_is_refused(zoo, monkeypatch):
    m, xb, g = zoo('lenet5')
    with pytest.raises(TypeError, match='^importance: expected'): importance_scores(m, 'magnitude', xb, graph=g)
    for bad in (lambda group: None, lambda group: torch.ones(1), tp.importance.GroupMagnitudeImportance):
        with pytest.raises(ValueError, match='^importance: it scores no layer'): importance_scores(m, bad, xb, graph=g)
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(ImportError, match='pip install torch-pruning'): importance_scores(m, max, xb, graph=g)

@pytest.mark.parametrize('name', TP)
def test_torch_pruning_replays_what_shrink_took_out(zoo, name):
    m, xb, g = zoo(name); mask = quiet(random_scores(m, g, 'channel'), .4); history = pruning_history(m, mask)
    small, replay = shrink(m, mask, xb), apply(copy.deepcopy(m), mask).requires_grad_(True)
    dependencies(replay, xb).load_pruning_history(history)
    a, b = small.state_dict(), replay.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and difference(small, replay, xb) == 0
    assert all(type(i) is int for *_,idx in history for i in idx)

@pytest.mark.parametrize('name', TP)
def test_a_history_of_theirs_is_a_mask_of_ours(zoo, name):
    m, xb, g = zoo(name); theirs = copy.deepcopy(m).requires_grad_(True); dg = dependencies(theirs, xb)
    for i,k in enumerate([*g.removable, *g.removable[:3]]):
        o = theirs.get_submodule(k); n = len(o.weight); f = dg.get_pruner_of_module(o).prune_out_channels
        if n > 4: dg.get_pruning_group(o, f, [1+i % 2, n-1]).prune()
    small = shrink(m, from_history(dg.pruning_history(), g), xb)
    a, b = small.state_dict(), theirs.state_dict()
    assert [v.shape for v in a.values()] == [v.shape for v in b.values()] and difference(theirs, small, xb) < 1e-5

@settings(max_examples=30)
@given(nets(KINDS), st.sampled_from(['channel', 'weight']), st.floats(.1, .9), st.integers(0, 99))
def test_a_history_is_the_plan_on_random_networks(model, unit, s, seed):
    g = trace(model, X)
    if not g.removable: return
    mask = quiet(random_scores(model, g, unit, seed), s); kept = plan(model, mask, X)
    back = from_history(pruning_history(model, mask, X), g)
    for k,v in back.items():
        out = kept.get(k, (None, None))[0]
        assert v.nonzero()[:,0].tolist() == (list(range(len(v))) if out is None else out.tolist())

def test_channels_are_counted_after_those_that_have_gone():
    "The first two channels of `b` are tied to `a`, whose entry takes one of them along; the others to `d`."
    both = lambda a, b, d: torch.cat([a, d], 1)+b
    m = Net(lambda s, x: s.c(both(s.a(x), s.b(x), s.d(x))), a=C(2, 2, 1), b=C(2, 4, 1), d=C(2, 2, 1), c=C(4, 2, 1))
    g = trace(m, X); keep = {k:torch.tensor(v).bool() for k,v in dict(a=[0, 1], b=[0, 1, 1, 0], d=[1, 0]).items()}
    history = pruning_history(m, Mask(keep, 'channel', graph=g), X)
    assert history == [['a', True, [0]], ['b', True, [2]]]
    assert all(torch.equal(from_history(history, g)[k], v) for k,v in keep.items())

@pytest.mark.parametrize('history,said', [
    ([['conv9', True, [0]]], 'layer'), ([['conv1', True, [6]]], r"history\['conv1'\]=6"),
    ([['conv1', True, [5]], ['conv1', True, [5]]], r"history\['conv1'\]=5"),
    ([['fc3', True, [0]]], "'fc3', which cannot"), ([['conv1', False, [0]]], 'inputs of the network itself')])
def test_histories_of_other_networks(zoo, history, said):
    with pytest.raises(ValueError, match=said): from_history(history, zoo('lenet5')[2])
