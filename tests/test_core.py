"""The types and small rules: exact rounding, checks that speak, files that come back, state that is restored."""
import json, math, os, random, subprocess, sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune import core, files
from neuronprune.core import (as_found, check_batch, check_choice, check_finite, check_fraction, check_int,
                              check_type, digesting, generator, kappa, layers, method, methods, seed_everything,
                              twins)
from neuronprune.shown import colours
from neuronprune.files import load_tensors, save_tensors
from neuronprune.masks import Mask, Scores, Units
from neuronprune.graph import trace


nan, inf = float('nan'), float('inf')
net = lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

@settings(max_examples=200)
@given(n=st.one_of(st.integers(0, 50), st.integers(10**8-1000, 10**8+1000)), num=st.integers(0, 10**7-1),
       digits=st.integers(1, 7))
def test_kappa_is_exact(n, num, digits):
    num %= 10**digits
    s = f'{num/10**digits:.{digits}f}'
    want = n - (n*int(s.split('.')[1]))//10**digits
    assert kappa(n, float(s)) == want == kappa(n, Fraction(s))
    assert 0 < want <= n or n == 0

@settings(max_examples=100)
@given(n=st.integers(1, 10**8), s=st.floats(0, 1, exclude_max=True))
def test_kappa_of_any_float(n, s):
    k = kappa(n, s)
    assert 1 <= k <= n and n-k <= n*Fraction(repr(s)) < n-k+1

def test_kappa_where_floats_fail():
    assert kappa(266_200, .9) == 26_620 and kappa(100, .29) == 71 and kappa(100_000_000, .57) == 43_000_000
    assert 100-math.floor(100*.29) != 71 and kappa(10, np.float32(.9)) == 1 and kappa(np.int64(3), .5) == 2
    with pytest.raises(ValueError, match='at least 0'): kappa(-1, .5)

@pytest.mark.parametrize('call,err,said', [
    (lambda: check_fraction('sparsity', 90), ValueError,
     'sparsity=90: expected a fraction in [0, 1); did you mean 0.9?'),
    (lambda: check_fraction('sparsity', 1.), ValueError, 'expected a fraction in [0, 1)'),
    (lambda: check_fraction('sparsity', -.1), ValueError, '[0, 1)'),
    (lambda: check_fraction('sparsity', nan), ValueError, 'sparsity=nan'),
    (lambda: check_fraction('sparsity', inf), ValueError, '[0, 1)'),
    (lambda: check_fraction('sparsity', 200), ValueError, '[0, 1)'),
    (lambda: check_fraction('sparsity', '0.5'), TypeError, 'got str'),
    (lambda: check_fraction('sparsity', True), TypeError, 'got bool'),
    (lambda: check_fraction('sparsity', None), TypeError, 'got NoneType'),
    (lambda: check_fraction('c', 1.5, open_hi=False), ValueError, '[0, 1]'),
    (lambda: check_int('rounds', 2.), TypeError, 'rounds=2.0: expected a whole number, got float'),
    (lambda: check_int('rounds', True), TypeError, 'got bool'),
    (lambda: check_int('rounds', 0, 1), ValueError, 'rounds=0: expected a whole number of at least 1'),
    (lambda: check_int('n', '3'), TypeError, 'got str'),
    (lambda: check_choice('method', 'mimt', ['mint', 'snip']), ValueError,
     "method='mimt': expected one of 'mint', 'snip'; did you mean 'mint'?"),
    (lambda: check_choice('unit', 'zzz', ['weight']), ValueError, "expected one of 'weight'"),
    (lambda: check_finite('w', torch.tensor([1, nan, inf, -inf])), ValueError, 'w: 3 of 4 entries are NaN or infinite'),
    (lambda: check_batch(torch.rand(0, 3)), ValueError, 'batch is empty'),
    (lambda: check_batch(torch.full((2, 1), nan)), ValueError, 'xb: 2 of 2'),
    (lambda: check_batch(torch.rand(2, 1), torch.tensor([0])), ValueError, '1 labels for 2 inputs'),
    (lambda: check_batch(torch.rand(2, 1), torch.tensor([0., 1.])), ValueError, 'expected integer class labels'),
    (lambda: check_batch(torch.rand(2, 1), torch.tensor([True, False])), ValueError, 'expected integer class labels'),
    (lambda: check_batch(torch.rand(2, 1), torch.tensor([0, 3]), 3), ValueError, 'labels from 0 to 3; expected 0 to 2'),
    (lambda: check_batch(torch.rand(2, 1), torch.tensor([-1, 0])), ValueError, 'labels from -1'),
    (lambda: layers(nn.Flatten()), ValueError, 'no Linear or Conv layer'),
    (lambda: layers('net'), TypeError, 'expected an nn.Module, got str'),
    (lambda: generator(1.5), TypeError, 'seed=1.5'), (lambda: methods()['mimt'], ValueError, "did you mean 'mint'?"),
    (lambda: method('x', unit='filter'), ValueError, "unit='filter'"),
    (lambda: method('x', unit='weight', needs=('labels', 'gpu')), ValueError, "needs='gpu'")])
def test_checks_say_what_to_do(call, err, said):
    with pytest.raises(err) as e: call()
    assert said in str(e.value)

@settings(max_examples=50)
@given(st.floats(0, 1, exclude_max=True))
def test_fractions_pass_unchanged(s): assert check_fraction('s', s) == s and check_fraction('s', 1, open_hi=False) == 1

def test_good_batches_pass():
    for y in (torch.tensor([0, 1]), torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([1, 1], dtype=torch.int32),
              None):
        check_batch(torch.rand(2, 3), y, 2)
    check_batch(torch.tensor([[1, 2]]))

def test_twins_name_the_first_owner():
    a, b, c, d = (nn.Linear(2, 2) for _ in range(4)); c.weight = a.weight; d.weight = a.weight
    m = nn.Sequential(a, nn.Sequential(b, c), d)
    assert (twins(m) == {'1.1': '0', '2': '0'} and twins(nn.Sequential(a, b)) == {} and twins(nn.Sequential(a, a)) == {}
            and twins(nn.Sequential(c, a)) == {'1': '0'})
    for o in (a, b): nn.utils.parametrizations.weight_norm(o)
    assert twins(nn.Sequential(a, b)) == {}, 'weights that are computed anew are never the same'

def test_digesting_says_the_shapes():
    x, y = torch.rand(2, 3), torch.rand(4)
    for err in (RuntimeError('no'), IndexError('no'), TypeError('no')):
        with pytest.raises(ValueError,
                           match=r'dls: the model cannot digest a batch of shape \(2, 3\), \(4,\): no') as e:
            with digesting(x, y, name='dls'): raise err
        assert e.value.__cause__ is err
    for err in (torch.cuda.OutOfMemoryError('x'), RuntimeError('CUDA out of memory'),
                RuntimeError("DefaultCPUAllocator: can't allocate memory"), ValueError('mine')):
        with pytest.raises(type(err)) as e:
            with digesting(x): raise err
        assert e.value is err
    with digesting(x): pass

def test_check_type_takes_several_classes():
    assert check_type('a', [1], (tuple, list)) == [1]
    for cls,said in (((tuple, list), 'a: expected a tuple or a list, got int'),
                     (Iterable, 'a: expected an Iterable, got int'), (nn.Module, 'a: expected an nn.Module, got int')):
        with pytest.raises(TypeError) as e: check_type('a', 3, cls)
        assert str(e.value) == said

@pytest.mark.parametrize('kw,err,said', [
    (dict(labels=3), TypeError, 'labels: expected a'),
    (dict(labels={'a': 3}), TypeError, "labels['a']: expected a tuple or a list, got int"),
    (dict(labels={'a': (torch.zeros(2),)}), ValueError, "labels['a']: 1 tensors; expected two"),
    (dict(labels={'a': ('x', torch.zeros(2))}), TypeError, "labels['a']: expected a tensor, got str"),
    (dict(cost={'a': 'x'}), TypeError, "cost['a']: expected a tensor, got str"),
    (dict(tiebreak=[1]), TypeError, 'tiebreak: expected a'),
    (dict(units={'a': object()}), TypeError, "units['a']: expected a tensor, got object")])
def test_entries_of_another_type_are_named(kw, err, said):
    with pytest.raises(err) as e: Scores(**{'units': {'a': torch.rand(2, 2)}, 'unit': 'weight', **kw})
    assert said in str(e.value)

def test_layers_in_order_with_every_kind():
    m = nn.ModuleDict(dict(a=nn.Conv1d(1, 1, 1), b=nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Conv3d(1, 1, 1)), c=nn.Linear(1, 1), d=nn.ConvTranspose2d(1, 1, 1)))
    assert list(layers(m)) == ['a', 'b.0', 'b.2', 'c']

# ---- scores and masks

@pytest.mark.parametrize('call,err,said', [
    (lambda: Scores({}, 'weight'), ValueError, 'units: empty'),
    (lambda: Scores({'a': torch.rand(0)}, 'weight'), ValueError, "units['a']: empty tensor"),
    (lambda: Scores({'a': torch.rand(2)}, 'chanel'), ValueError, "did you mean 'channel'?"),
    (lambda: Scores({'a': torch.rand(2, 2)}, 'channel'), ValueError, 'one entry per channel'),
    (lambda: Scores({'a': torch.tensor([1, nan])}, 'channel'), ValueError, "scores['a']: 1 of 2"),
    (lambda: Scores({'a': torch.tensor([1, inf])}, 'channel'), ValueError, "scores['a']: 1 of 2"),
    (lambda: Scores({'a': torch.rand(2, 2)}, 'group'), ValueError, "labels: no entry for 'a'"),
    (lambda: Scores({'a': torch.rand(2)}, 'group', labels={'a': ([0, 1], [0])}), ValueError, 'expected [K, G]'),
    (lambda: Scores({'a': torch.rand(2, 2, 2)}, 'rank'), ValueError, "expected [r] or [k, r]"),
    (lambda: Scores({'a': torch.rand(2)}, 'rank', labels={'a': (torch.rand(4, 3), torch.rand(4))}), ValueError,
     'expected [out, 2] and [out]'),
    (lambda: Scores({'a': torch.rand(2)}, 'rank', labels={'a': (torch.rand(4, 2), torch.rand(3))}), ValueError,
     'expected [out, 2] and [out]'),
    (lambda: Scores({'a': torch.rand(1, 2)}, 'rank', labels={'a': (torch.rand(4, 2), torch.rand(4))}), ValueError,
     'directions (4, 2)'),
    (lambda: Scores({'a': torch.rand(2)}, 'rank', labels={'a': (torch.rand(4, 2)/0, torch.rand(4))}), ValueError,
     "labels['a']"),
    (lambda: Scores({'a': torch.rand(2)}, 'rank').to_channels(), ValueError, 'a rank belongs to no channel'),
    (lambda: Scores({'a': torch.rand(2, 1)}, 'group', labels={'a': ([0, 2], [0])}), ValueError,
     "labels['a']: child group 2 out of range; expected 0 to 1"),
    (lambda: Scores({'a': torch.rand(2, 1)}, 'group', labels={'a': ([0, 1], [0, 1])}), ValueError,
     "labels['a']: parent group 1 out of range; expected 0 to 0"),
    (lambda: Scores({'a': torch.rand(2, 1)}, 'group', labels={'a': ([0, 1], [-1, 0])}), ValueError,
     'out of range; expected 0 to 0'),
    (lambda: Mask({'a': torch.ones(2)}, 'channel'), TypeError, 'expected torch.bool'),
    (lambda: Mask({'a': torch.ones(2).int()}, 'channel'), TypeError, 'True = kept'),
    (lambda: Mask({'a': torch.ones(2).bool()}, 'channel', scale={'a': torch.ones(3)}), ValueError,
     'expected factors of shape (2,)'),
    (lambda: Mask({'a': torch.ones(2).bool()}, 'channel', scale={'a': torch.tensor([1., nan])}), ValueError,
     "scale['a']: 1 of 2")])
def test_bad_units_are_refused(call, err, said):
    with pytest.raises(err) as e: call()
    assert said in str(e.value)

def test_message_of_a_negative_label_names_it():
    with pytest.raises(ValueError, match='group -1 out of range'):
        Scores({'a': torch.rand(2, 1)}, 'group', labels={'a': ([0, 1], [-1, 0])})

def test_units_are_detached_cpu_records():
    w = torch.rand(3, requires_grad=True); s = Scores({'a': w, 'b': torch.arange(3)}, 'channel', secs=1.)
    assert not s['a'].requires_grad and s['b'].dtype == torch.float32 and dict(s).keys() == {'a', 'b'} and len(s) == 2
    assert s.frame().layer.tolist() == ['a', 'b'] and '6 channel units' in repr(s) and '<table' in s._repr_html_()

def filled(draw, shape, kind):
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return (torch.rand(shape, generator=gen) < .5 if kind == 'bool'
            else torch.randn(shape, generator=gen).to(getattr(torch, kind)))

@st.composite
def units(draw, mask, unit=None, scaled=None):
    unit = unit or draw(st.sampled_from(core.UNITS)); kw, vals = dict(labels={}), {}
    keys = draw(st.lists(st.sampled_from(['0', 'fc1', 'layer1.0.conv', 'fc1:in', 'a/b']), min_size=1, max_size=3,
                         unique=True))
    for k in keys:
        shape = draw(st.tuples(*[st.integers(1, 5)]*{'weight': draw(st.sampled_from([2, 4])), 'channel': 1, 'group': 2,
                                                     'rank': draw(st.sampled_from([1, 2]))}[unit]))
        vals[k] = filled(draw, shape, 'bool' if mask else draw(st.sampled_from(['float32', 'float64', 'float16'])))
        if unit == 'group': kw['labels'][k] = tuple(torch.randint(0, n, (draw(st.integers(1, 7)),)) for n in shape)
        if unit == 'rank' and len(shape) == 1 and draw(st.booleans()):
            kw['labels'][k] = (filled(draw, (n := draw(st.integers(1, 6)), *shape), 'float64'),
                               filled(draw, (n,), 'float64'))
    if not mask:
        kw.update(cost={keys[0]: draw(st.sampled_from([3, 2.5]))}
                  | {k:filled(draw, vals[k].shape, 'float32').abs() for k in keys[1:]}, secs=draw(st.floats(0, 9)),
                  method=draw(st.sampled_from(['', 'mint'])), skipped={'out': 'the output'})
    elif draw(st.booleans()) if scaled is None else scaled:
        kw['scale'] = {k:filled(draw, v.shape, 'float32').abs() for k,v in vals.items()}
    kw['meta'] = draw(st.dictionaries(st.sampled_from(['gap', 'status', 'tied']), st.one_of(
        st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.floats(-1, 1)), max_size=2))
    return (Mask if mask else Scores)(vals, unit, **kw)

def same_tensors(a, b):
    return (list(a) == list(b)
            and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) and a[k].dtype == b[k].dtype for k in a))

def assert_same(a, b):
    assert type(a) is type(b) and a.unit == b.unit and same_tensors(a, b) and a.meta == b.meta
    assert (set(a.labels) == set(b.labels)
            and all(torch.equal(x, y) for k in a.labels for x,y in zip(a.labels[k], b.labels[k])))
    for o in ('cost', 'scale'):
        assert (set(getattr(a, o, {})) == set(getattr(b, o, {}))
                and all(torch.equal(v, getattr(b, o)[k]) for k,v in getattr(a, o, {}).items()))
    for o in ('method', 'secs', 'skipped'):
        assert getattr(a, o, None) == getattr(b, o, None) or getattr(a, o) != getattr(a, o)
    assert (a.graph is None) == (b.graph is None) and (a.graph is None or a.graph.to_dict() == b.graph.to_dict())

@settings(max_examples=60)
@given(data=st.data())
def test_save_load_round_trip(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp()/'units.safetensors'
    for mask in (False, True): a = data.draw(units(mask)); a.save(path); assert_same(a, type(a).load(path))

def test_round_trip_with_graph_in_a_process_that_cannot_unpickle(tmp_path):
    g = trace(net(), torch.rand(1, 3))
    s = Scores({'0': torch.rand(4)}, 'channel', graph=g, meta=dict(gap=.5, at=torch.tensor([1, 2]), n=np.int64(3)),
               method='mip')
    s.save(tmp_path/'new folder'/'s.st')
    m = Mask({'0': torch.rand(4) < .5, '2:in': torch.ones(4).bool()}, 'channel', graph=g, scale={'0': torch.rand(4)})
    m.save(tmp_path/'m.st')
    code = f"""
import sys, pickle, json, torch
from neuronprune.masks import Mask, Scores
def no(*a, **k): raise AssertionError('unpickled')
pickle.load = pickle.loads = pickle._load = pickle._loads = torch.load = no; pickle.Unpickler = pickle._Unpickler = no
sys.addaudithook(lambda e, a: no() if e == 'pickle.find_class' else None)
s, m = Scores.load({str(tmp_path/'new folder'/'s.st')!r}), Mask.load({str(tmp_path/'m.st')!r})
print(json.dumps(dict(s=s['0'].tolist(), m=[v.tolist() for v in m.values()], scale=m.scale['0'].tolist(),
                      graph=[s.graph.to_dict(), m.graph.to_dict()], meta=s.meta, method=s.method)))"""
    d = json.loads(run(code))
    assert (d['s'] == s['0'].tolist() and d['m'] == [v.tolist() for v in m.values()]
            and d['scale'] == m.scale['0'].tolist())
    assert (d['graph'] == [json.loads(json.dumps(g.to_dict()))]*2 and d['meta'] == dict(gap=.5, at=[1, 2], n=3)
            and d['method'] == 'mip')

def run(code):
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(core.__file__).parents[1])
    assert r.returncode == 0, r.stderr
    return r.stdout

def test_shared_tensors_can_be_saved(tmp_path):
    t, idx = torch.rand(2, 2), torch.tensor([0, 1])
    s = Scores({'a': t, 'b': t, 'c': t.t()}, 'group', labels=dict.fromkeys('abc', (idx, idx)))
    s.save(tmp_path/'s'); assert_same(s, Scores.load(tmp_path/'s'))

def test_files_of_another_kind_are_refused(tmp_path):
    Scores({'a': torch.rand(2)}, 'channel').save(tmp_path/'s')
    with pytest.raises(ValueError, match="holds 'Scores', expected 'Mask'"): Mask.load(tmp_path/'s')
    from safetensors.torch import save_file
    save_file({'a': torch.rand(2)}, tmp_path/'foreign')
    with pytest.raises(ValueError, match='without neuronprune'): Scores.load(tmp_path/'foreign')
    with pytest.raises(FileNotFoundError): Scores.load(tmp_path/'none')

def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path/'junk').write_bytes(b'not ours at all')
    with pytest.raises(ValueError, match='junk'): Scores.load(tmp_path/'junk')

@pytest.mark.parametrize('err', [KeyboardInterrupt, OSError])
def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, err):
    old = Scores({'a': torch.rand(2)}, 'channel'); old.save(tmp_path/'s')
    def half(tensors, path, meta): Path(path).write_bytes(b'half'); raise err
    monkeypatch.setattr(files, 'save_file', half)
    for name in ('s', 'new'):
        with pytest.raises(err): Scores({'a': torch.rand(2)}, 'channel').save(tmp_path/name)
    assert os.listdir(tmp_path) == ['s']; assert_same(old, Scores.load(tmp_path/'s'))

@settings(max_examples=40)
@given(data=st.data())
def test_laws_of_and_or(data):
    a = data.draw(units(True, scaled=False))
    other = lambda: Mask({k:torch.rand(v.shape) < .5 for k,v in a.items()}, a.unit, labels=a.labels)
    b, c, ones = other(), other(), Mask.ones_like(a); eq = same_tensors
    assert (eq(a&a, a) and eq(a|a, a) and eq(a&b, b&a) and eq(a|b, b|a) and eq(a&(b|c), (a&b)|(a&c)) and eq(a|(a&b), a)
            and eq(a&ones, a) and eq(a|ones, ones))
    assert all(((a&b)[k] == (a[k] & b[k])).all() for k in a) and (a&b).unit == a.unit
    assert (a&b).counts()[0] + (a|b).counts()[0] == a.counts()[0] + b.counts()[0]
    assert ones.density == 1 and ones.sparsity == 0 and a.sparsity == (a.counts()[1]-a.counts()[0])/a.counts()[1]

M = lambda v, **kw: Mask({'a': torch.tensor(v)}, 'channel', **kw)
def test_masks_that_do_not_fit_do_not_combine():
    with pytest.raises(ValueError, match='scale'): M([True]) & M([True], scale={'a': torch.ones(1)})
    with pytest.raises(ValueError, match='same unit'): M([True]) & Mask({'b': torch.tensor([True])}, 'channel')
    with pytest.raises(ValueError, match='same unit'): M([True]) | Mask({'a': torch.tensor([True])}, 'weight')

@pytest.mark.parametrize('a,b', [([True, False, True], [True]), ([True, False, True], [True, False])])
def test_masks_of_other_shapes_do_not_combine(a, b):
    with pytest.raises(ValueError): M(a) & M(b)

def test_group_masks_of_other_groups_do_not_combine():
    t = torch.tensor([[True], [False]])
    a, b = (Mask({'a': t}, 'group', labels={'a': (torch.tensor(i), torch.zeros(2).long())}) for i in ([0, 1], [1, 0]))
    with pytest.raises(ValueError): a & b

def test_an_untied_mask_stays_untied():
    g = trace(Tied(), torch.rand(1, 3)); T = lambda *v: torch.tensor(v)
    a = Mask({'a': T(True, True), 'b': T(True, True)}, 'channel', graph=g)
    b = Mask({'a': T(True, False), 'b': T(True, True)}, 'channel', graph=g, meta=dict(tied=False))
    assert (a&b).counts() == (b&a).counts() == (3, 4)

class Tied(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 2)
    def forward(self, x): return self.c(self.a(x) + self.b(x))

def test_tied_channels_count_once():
    g = trace(Tied(), torch.rand(1, 3))
    m = Mask({'a': torch.tensor([True, False]), 'b': torch.tensor([True, False])}, 'channel', graph=g)
    assert m.counts() == (1, 2) and m.sparsity == .5 and '1 of 2' in repr(m)
    assert Mask(m.units, 'channel', graph=g, meta=dict(tied=False)).counts() == (2, 4)

@pytest.mark.parametrize('reduce,f', [('mean', np.mean), ('sum', np.sum), ('max', np.max), ('min', np.min)])
def test_to_channels(reduce, f):
    w = torch.randn(4, 3); g = trace(net(), torch.rand(1, 3))
    s = Scores({'0': w, '2': torch.rand(2, 4)}, 'weight', graph=g).to_channels(reduce)
    assert list(s) == ['0'] and '2' in s.skipped and np.allclose(s['0'], f(w.numpy(), 1), atol=1e-6)
    blocks = torch.tensor([[1., 5.], [2., 8.]])
    s = Scores({'0': blocks}, 'group', labels={'0': ([1, 0, 1, 1], [0, 0, 1])}).to_channels(reduce)
    assert np.allclose(s['0'], f(blocks.numpy(), 1)[[1, 0, 1, 1]])

def test_to_channels_refuses_unknown_reductions():
    with pytest.raises(ValueError, match="reduce='median'"):
        Scores({'0': torch.rand(2, 2)}, 'weight').to_channels('median')

def test_plots_are_figures():
    from matplotlib.figure import Figure
    s = [Scores({'a': torch.rand(5)}, 'channel'),
         Scores({'a': torch.rand(2, 2)}, 'group', labels={'a': ([0, 1], [0, 1])})]
    assert (all(isinstance(o.plot(), Figure) for o in [*s, M([True, False])])
            and M([True, False]).frame().kept.tolist() == [1])

def test_a_mask_is_drawn_and_tabled_in_percent():
    m = M([True, False, False, False]); ax = m.plot().axes[0]
    assert ax.get_xlim() == (0, 100) and max(ax.get_xticks()) == 100 and ax.get_xlabel() == 'units kept, %'
    assert [p.get_width() for p in ax.patches] == [100, 25] and m.frame()['removed, %'].tolist() == [75]
    ax = Scores({'a': torch.rand(5)}, 'channel').plot().axes[0]
    assert ax.lines[0].get_xdata().max() == 100 and ax.get_xlabel().endswith(', %')

def test_a_method_has_its_own_colour():
    names = list(methods()); own = colours([*names, 'dense', 'mine'])
    assert len(set(own.values())) == len(names)+2 and colours(['mine', 'mint'])['mint'] == own['mint'] == colours(
        ['mint'])['mint']
    assert not {*colours(['dense', 'mine']).values()} & set(colours(names).values()) and len(
        colours([f'x{i}' for i in range(99)])) == 99
    many = ['random', *(f'x{i}' for i in range(20))] # more labels than places behind the register
    assert len(set(colours(many).values())) == len(many)

# ---- state

def global_state():
    return (torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2:],
            random.getstate())

@pytest.mark.parametrize('fail', [False, True])
def test_seed_everything_restores_the_global_state(fail):
    before, got = global_state(), []
    for seed in (7, 7, 8):
        try:
            with seed_everything(seed):
                got.append((torch.rand(3).tolist(), np.random.rand(), random.random())); assert not fail
        except AssertionError: assert fail
    assert global_state() == before and got[0] == got[1] != got[2]
    with pytest.raises(TypeError, match='seed='):
        with seed_everything('3'): pass

def test_generators_are_fresh():
    before = global_state(); a, b = generator(1), generator(1)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b)) and global_state() == before

@pytest.mark.parametrize('fail', [False, True])
def test_as_found_restores(fail):
    m = net(); m[1].eval(); m[0].weight.requires_grad_(False); before = facts(m)
    try:
        with as_found(m, train=False, requires_grad=True) as same:
            assert (same is m and not any(o.training for o in m.modules())
                    and all(p.requires_grad for p in m.parameters()))
            m(torch.rand(2, 3)).sum().backward(); assert m[0].weight.grad is not None and not fail
    except AssertionError: assert fail
    assert facts(m) == before
    with as_found(m, train=True): assert all(o.training for o in m.modules())
    with as_found(m): assert facts(m) == before
    assert facts(m) == before

def test_as_found_restores_gradients_that_were_there():
    m = net(); m(torch.ones(1, 3)).sum().backward(); before = facts(m)
    with as_found(m): m(torch.ones(1, 3)).sum().backward()
    assert facts(m) == before

def facts(m):
    return ([o.training for o in m.modules()],
            [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in m.parameters()])

# ---- the register

def test_methods_are_listed_without_importing():
    out = run("""
import sys, neuronprune.core as c
table = set(c._modules.values()); loaded = lambda: sorted(m for m in table if f'neuronprune.{m}' in sys.modules)
names = sorted(c.methods()); 'mint' in c.methods(); repr(c.methods()); len(c.methods()); assert loaded() == [], loaded()
assert 'neuronprune.graph' not in sys.modules and 'matplotlib.pyplot' not in sys.modules and 'fastai' not in sys.modules
m = c.methods()['mint']; assert loaded() == ['mint'], loaded()
assert m.name == 'mint' and m.unit in c.UNITS and callable(m)
print(names)""")
    assert eval(out) == sorted(methods())

def test_methods_can_be_registered(monkeypatch):
    monkeypatch.setattr(core, '_registry', {**core._registry})
    @method('mine', unit='weight', needs=('data',))
    def f(model, k=1): return k
    assert (f(net()) == 1 and methods()['mine'](net(), k=3) == 3 and 'mine' in methods()
            and methods()['mine'].needs == ('data',))
    with pytest.raises(TypeError, match='k: f has no such|j: f has no such'): methods()['mine'](net(), j=3)
    with pytest.raises(TypeError, match='model: expected an nn.Module'): f(None)
    assert methods()['mine'].allocate == {} and len(list(methods())) == len(methods())

def test_headers_travel(tmp_path):
    save_tensors(tmp_path/'t', {'x': torch.eye(3).t()[:2]}, dict(a=[1, Path('p')], b=torch.tensor(2.)))
    t, h = load_tensors(tmp_path/'t')
    assert torch.equal(t['x'], torch.eye(3)[:2]) and h == dict(a=[1, 'p'], b=2.)

def test_second_keys_are_kept_and_checked(tmp_path):
    lab = {'a': (torch.arange(2), torch.arange(3))}; tb = torch.tensor([[2, 0, 1], [5, 4, 3]])
    sc = Scores({'a': torch.zeros(2, 3)}, 'group', labels=lab, tiebreak={'a': tb.clone().requires_grad_(False)})
    sc.save(tmp_path/'s'); back = Scores.load(tmp_path/'s')
    assert (torch.equal(back.tiebreak['a'], tb) and back.tiebreak['a'].dtype == tb.dtype
            and Scores({'a': torch.zeros(2)}, 'channel').tiebreak == {})
    w = torch.rand(2, 3, requires_grad=True)
    assert not Scores({'a': torch.zeros(2, 3)}, 'group', labels=lab, tiebreak={'a': w}).tiebreak['a'].requires_grad
    for bad,said in (({'b': tb}, 'layers b; expected those of the scores, a'),
                     ({'a': tb[:1]}, r"tiebreak\['a'\]: shape \(1, 3\); expected \(2, 3\)"),
                     ({'a': tb/0}, "tiebreak.*NaN or infinite"), ({'a': tb, 'c': tb}, 'layers a, c')):
        with pytest.raises(ValueError, match=said): Scores({'a': torch.zeros(2, 3)}, 'group', labels=lab, tiebreak=bad)
