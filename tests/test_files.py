"""Files that were damaged, cut short, swapped or written by somebody else:
one error with the file's name, never a wrong result."""
import json, os
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from neuronprune import surgery
from neuronprune.allocate import allocate
from neuronprune.files import DamagedFileError, load_json, load_tensors, save_json, save_tensors
from neuronprune.masks import Mask, Scores
from neuronprune.data import get_dls
from neuronprune.graph import trace
from neuronprune.models import ZOO, build
from neuronprune.sources import dense
from neuronprune.report import Report
from neuronprune.evaluation import Evaluation

hurt = settings(max_examples=80, suppress_health_check=list(HealthCheck))

def damages(data, whole):
    "The bytes of a file with some of them changed, its end lost, or something added."
    how, b = data.draw(st.sampled_from(['flip', 'flip', 'cut', 'more', 'zero', 'swap'])), bytearray(whole)
    if how == 'cut': return bytes(b[:data.draw(st.integers(0, len(b)-1))])
    if how == 'more': return bytes(b) + data.draw(st.binary(min_size=1, max_size=9))
    at = data.draw(st.lists(st.integers(0, len(b)-1), min_size=1, max_size=3))
    for i in at:
        if how == 'flip': b[i] ^= 1 << data.draw(st.integers(0, 7))
        elif how == 'zero': b[i:i+16] = bytes(len(b[i:i+16]))
        else: b[i], b[at[0]] = b[at[0]], b[i]
    return bytes(b)

def survives(path, whole, data, load, same):
    "Load the damaged file: either what was saved comes back, or one error that names the file."
    Path(path).write_bytes(damages(data, whole))
    try: got = load(path)
    except DamagedFileError as e: assert f'path={os.fspath(path)!r}' in str(e) and 'delete it' in str(e)
    else: assert same(got), 'a wrong result without a word'

def net(): return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

def graph_scores():
    g = trace(net(), torch.rand(2, 3))
    return Scores({'0': torch.rand(4)}, 'channel', graph=g, cost={'0': 3*torch.ones(4)}, meta=dict(gap=.5),
                  skipped={'1': 'no weights'}, method='mip')

def equal_units(a, b):
    return (list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a) and a.unit == b.unit and a.meta == b.meta
            and a.graph.to_dict() == b.graph.to_dict()
            and [getattr(a, k, None) for k in ('method', 'skipped')]
            == [getattr(b, k, None) for k in ('method', 'skipped')])

@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    "Scores, a mask and JSON on disk: name -> (path, bytes, load, is it what was saved?)."
    d, s = tmp_path_factory.mktemp('kept'), graph_scores()
    m, j = (Mask({'0': torch.tensor([True, False, True, True])}, 'channel', graph=s.graph, scale={'0': torch.rand(4)}),
            dict(a=[1.5, None, 'é'], b={'c': True}))
    s.save(d/'scores'); m.save(d/'mask'); save_json(d/'json', j)
    loads = dict(scores=(Scores.load, lambda o: equal_units(o, s)),
                 mask=(Mask.load, lambda o: equal_units(o, m) and torch.equal(o.scale['0'], m.scale['0'])),
                 json=(lambda p: load_json(p, ['a', 'b']), lambda o: o == j))
    return {k:(d/k, (d/k).read_bytes(), *v) for k,v in loads.items()}

@pytest.mark.parametrize('kind', ['scores', 'mask', 'json'])
@hurt
@given(data=st.data())
def test_damage_is_found(kept, kind, data):
    path, whole, load, same = kept[kind]
    path.write_bytes(whole); assert same(load(path))
    survives(path, whole, data, load, same)

def test_every_single_byte_counts(kept):
    for path, whole, load, same in kept.values():
        for i in range(0, len(whole), 7):
            b = bytearray(whole); b[i] ^= 4; path.write_bytes(b)
            try: assert same(load(path))
            except DamagedFileError: pass

def old(path, tensors, header):
    save_file(tensors, path, {'neuronprune': header if isinstance(header, str) else json.dumps(header)})

GOOD = dict(kind='Mask', unit='channel', keys=['a'], meta={}, own={}, graph=None)

def test_files_without_a_checksum_are_read(tmp_path):
    old(tmp_path/'m', {'unit/a': torch.tensor([True, False])}, GOOD)
    assert Mask.load(tmp_path/'m')['a'].tolist() == [True, False]
    (tmp_path/'j').write_text('{"a": 3}'); assert load_json(tmp_path/'j', ['a']) == dict(a=3)

@pytest.mark.parametrize('header',
                         ['{', '[]', '[1, 2]', '"Mask"', '3', 'null', '{"kind": ["Mask"]}',
                          {k:v for k,v in GOOD.items() if k != 'graph'}, {k:v for k,v in GOOD.items() if k != 'meta'},
                          {**GOOD, 'keys': ['a', 'zz']}, {**GOOD, 'keys': ['a', 'a']}, {**GOOD, 'keys': []},
                          {**GOOD, 'keys': 5},
                          {**GOOD, 'own': dict(colour='red')}, {**GOOD, 'own': [1]}, {**GOOD, 'unit': 'filter'},
                          {**GOOD, 'graph': {}}, {**GOOD, 'graph': 'x'}, {**GOOD, 'graph': [1]}, {**GOOD, 'meta': 5},
                          {**GOOD, 'own': dict(graph=None)}, {**GOOD, 'kind': 'Scores'}])
def test_headers_that_make_no_sense(tmp_path, header):
    old(tmp_path/'bad', {'unit/a': torch.tensor([True, False])}, header)
    with pytest.raises(DamagedFileError, match=f"path='{tmp_path}/bad'"): Mask.load(tmp_path/'bad')

def test_tensors_that_make_no_sense(tmp_path):
    for t in ({}, {'unit/a': torch.rand(2)}, {'unit/a': torch.ones(2, 2).bool()}, {'unit/b': torch.ones(2).bool()},
              {'unit/a': torch.ones(0).bool()}, {'unit/a': torch.ones(2).bool(), 'unit/b': torch.ones(2).bool()},
              {'unit/a': torch.ones(2).bool(), 'scale/a': torch.ones(3)}):
        old(tmp_path/'bad', t, GOOD)
        with pytest.raises(DamagedFileError, match='bad'): Mask.load(tmp_path/'bad')

def test_folders_missing_files_and_foreign_ones(tmp_path):
    for load in (Mask.load, Scores.load, load_tensors, lambda p: load_json(p, [])):
        with pytest.raises(FileNotFoundError): load(tmp_path/'none')
        with pytest.raises(DamagedFileError, match='path='): load(tmp_path)
        for content in (b'', b'\0', b'<!DOCTYPE html>', b'\xff'*100, b'['*100_000):
            (tmp_path/'f').write_bytes(content)
            with pytest.raises(DamagedFileError, match="f'"): load(tmp_path/'f')

def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match='meta: key'):
        Mask({'a': torch.ones(2).bool()}, 'weight', meta={(1, 2): 3}).save(tmp_path/'m')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64, torch.half, torch.bfloat16, torch.float64])
def test_tensors_of_all_kinds_have_a_checksum(tmp_path, dtype):
    own = dict(a=torch.rand(2, 3).to(dtype), scalar=torch.tensor(1).to(dtype), none=torch.zeros(0, 4).to(dtype),
               t=torch.rand(3, 2).t().to(dtype))
    save_tensors(tmp_path/'f', own, dict(kind='x')); back, h = load_tensors(tmp_path/'f', 'x')
    assert all(torch.equal(back[k], own[k]) and back[k].dtype == dtype for k in own) and h == dict(kind='x')
    with pytest.raises(DamagedFileError, match="holds 'x', expected 'y'"): load_tensors(tmp_path/'f', 'y')

# ---- models: the recipe in the header is not believed

def small_lenet():
    net, xb = build('lenet5', 1, 10, 28, seed=0), torch.rand(4, 1, 28, 28)
    g = trace(net, xb)
    return surgery.shrink(
        net, allocate(Scores({k:torch.rand(g.layers[k]['n_out']) for k in g.removable}, 'channel', graph=g), .5), xb)

@pytest.fixture(scope='module')
def lenet(): return small_lenet()

def equal_models(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)

@hurt
@given(data=st.data())
def test_damaged_models(lenet, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp()/'lenet.safetensors'
    surgery.save(lenet, path); assert equal_models(surgery.load(path), lenet)
    survives(path, path.read_bytes(), data, surgery.load, lambda o: equal_models(o, lenet))

HUGE = 10**7
SPECS = [[], 'lenet5', 5, {}, dict(name='lenet5'), dict(name='lenet', c_in=1, n_out=10, size=28),
         dict(name=['lenet5'], c_in=1, n_out=10, size=28), dict(name={}, c_in=1, n_out=10, size=28),
         *(dict(dict(name='lenet5', c_in=1, n_out=10, size=28), **o) for o in (
             dict(size=HUGE), dict(size=32), dict(size=20), dict(size=0), dict(size=-28), dict(size='28'), dict(
    size=28.), dict(size=None), dict(size=[28]), dict(size=True), dict(n_out=9), dict(n_out=11), dict(n_out=HUGE**3),
             dict(c_in=3), dict(c_in=HUGE), dict(weights='IMAGENET1K_V1'), dict(seed=3), dict(init='kaiming'), dict(
    ks=3), dict(ks=HUGE), dict(ks='a'), dict(pool='max'), dict(colour='red'), dict(dropout=.5), dict(name='mlp'),
             dict(name='resnet18', weights='DEFAULT'), dict(name='resnet18'), dict(name='vgg16', head=[HUGE]*9),
             dict(name='densenet22', depth=6*HUGE+4), dict(name='densenet22', growth=HUGE**2)))]

@pytest.mark.parametrize('spec', SPECS, ids=lambda o: str(o)[:60])
def test_specs_that_lie(lenet, tmp_path, monkeypatch, spec):
    monkeypatch.setattr('torch.hub.load_state_dict_from_url', lambda *a, **k: pytest.fail('a download'))
    old(tmp_path/'m', lenet.state_dict(), dict(kind='model', spec=spec, factored={}))
    before = torch.get_rng_state()
    with pytest.raises(DamagedFileError, match='path=.*/m.*delete the file'): surgery.load(tmp_path/'m')
    assert torch.equal(before, torch.get_rng_state())

@pytest.mark.parametrize(
    'factored', [[], 'fc1', 5, {'fc9': 1}, {'fc1': 1}, {'fc1': 'a'}, {'fc1': HUGE}, {'': 1}, {'relu1': 1}, {'fc1': 0}])
def test_factored_layers_that_are_none(lenet, tmp_path, factored):
    old(tmp_path/'m', lenet.state_dict(), dict(kind='model', spec=lenet.spec, factored=factored))
    try: assert equal_models(surgery.load(tmp_path/'m'), lenet)
    except DamagedFileError as e: assert '/m' in str(e)

def test_tensors_that_do_not_fit_the_network(lenet, tmp_path):
    own = lenet.state_dict()
    for bad in ({k:v for k,v in own.items() if k != 'fc2.bias'}, {**own, 'fc4.weight': torch.zeros(3)},
                {**own, 'fc2.weight': torch.zeros(9, len(own['fc2.weight'][0]))},
                {**own, 'fc3.weight': torch.zeros(500, 500)},
                {**own, 'conv1.weight': own['conv1.weight'].flatten()}, {**own, 'fc2.bias': torch.zeros(0)}, {}):
        old(tmp_path/'m', bad, dict(kind='model', spec=lenet.spec, factored={}))
        with pytest.raises(DamagedFileError, match='/m'): surgery.load(tmp_path/'m')
        with pytest.raises(DamagedFileError, match='/m'): surgery.load(tmp_path/'m', build('lenet5', 1, 10, 28))
    with pytest.raises(DamagedFileError, match='unpruned network'):
        surgery.save(lenet, tmp_path/'m'); surgery.load(tmp_path/'m', build('mlp', 1, 10, 28))

def test_models_without_a_checksum_are_read(lenet, tmp_path):
    old(tmp_path/'m', lenet.state_dict(), dict(kind='model', spec=lenet.spec, factored={}))
    for back in (surgery.load(tmp_path/'m'), surgery.load(tmp_path/'m', build('lenet5', 1, 10, 28))):
        assert (equal_models(back, lenet) and back.training
                and all(p.requires_grad and p.device.type == 'cpu' for p in back.parameters()))
    x = torch.rand(3, 1, 28, 28); assert torch.equal(back.eval()(x), lenet.eval()(x))

@pytest.mark.parametrize('name',
                         [k for k in ZOO
                          if k not in ('resnet101', 'resnet110', 'densenet121', 'wrn16_8', 'vgg19', 'vgg19_bn',
                                       'resnet34', 'resnet50', 'alexnet', 'vgg16_dgl', 'vgg16_mint', 'vgg16')])
def test_every_network_comes_back(name, tmp_path):
    net = build(name, 3, 5, 64 if name.startswith(('resnet18', 'mobile', 'squeeze')) else 32, seed=0)
    surgery.save(net, tmp_path/'m'); back = surgery.load(tmp_path/'m')
    assert equal_models(back, net) and back.spec == net.spec

# ---- records

def record():
    return Report(method='mint', method_args=dict(n=3), model='mlp', seed=0, sparsity=.5, params_before=9,
                  before=Evaluation(9, 10, .5), tuned=Evaluation(8, 10), extra=dict(rounds=1))

@hurt
@given(data=st.data())
def test_damaged_records(tmp_path_factory, data):
    path, r = tmp_path_factory.getbasetemp()/'record.json', record()
    r.save(path); assert Report.load(path) == r
    survives(path, path.read_bytes(), data, Report.load, lambda o: o == r)

def test_records_without_a_checksum_are_read(tmp_path):
    record().save(tmp_path/'r.json'); d = json.loads((tmp_path/'r.json').read_text()); del d['sha256']
    (tmp_path/'r.json').write_text(json.dumps(d)); assert Report.load(tmp_path/'r.json') == record()
    del d['bounds'], d['macs_nonzero']; (tmp_path/'r.json').write_text(json.dumps(d))
    assert Report.load(tmp_path/'r.json') == record(), 'a field that was added later'

@pytest.mark.parametrize('change', [dict(method=None, versions=None), dict(before=5), dict(before=[9, 10]), dict(
    before=dict(k=9)), dict(before=dict(k=9, n=10, z=1)), dict(before=dict(k=11, n=10)), dict(before=dict(k=0, n=0)),
    dict(before=dict(k=.5, n=10)), dict(before=dict(k=-1, n=10)), dict(method=5), dict(extra=[]), dict(seed='a'),
                                    dict(sparsity='much'), dict(colour='red'), dict(data='digits'), dict(size='big')])
def test_records_that_make_no_sense(tmp_path, change):
    record().save(tmp_path/'r.json'); d = json.loads((tmp_path/'r.json').read_text()); del d['sha256']; d.update(change)
    (tmp_path/'r.json').write_text(json.dumps({k:v for k,v in d.items() if v is not None}))
    with pytest.raises(DamagedFileError, match='path=.*r.json.*the run is repeated'): Report.load(tmp_path/'r.json')

@pytest.mark.parametrize(
    'text', ['', '{}', '[]', 'null', '3', '"mint"', '{"a": 1}', '{"method": "mint"', '[[[', '<html></html>'])
def test_files_that_are_no_records(tmp_path, text):
    (tmp_path/'r.json').write_text(text)
    with pytest.raises(DamagedFileError, match='path=.*r.json'): Report.load(tmp_path/'r.json')

# ---- the cache of dense networks

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', n_train=64)

def tiny(dls, out, model='fc_baseline', epochs=1, **kw): return dense(dls, model, epochs, out=out, **kw)

@pytest.fixture(scope='module')
def cached(dls, tmp_path_factory):
    "(folder, file, its bytes, the learner) of a cached network."
    d = tmp_path_factory.mktemp('dense'); learn = tiny(dls, d); f, = (d/'dense').iterdir()
    return d, f, f.read_bytes(), learn

@settings(hurt, max_examples=40)
@given(data=st.data())
def test_damaged_dense_networks(cached, dls, data):
    d, f, whole, learn = cached
    same = lambda o: equal_models(o.model, learn.model) and all(
        torch.equal(v, o.rewind.init[k]) for k,v in learn.rewind.init.items()) and o.history == learn.history
    f.write_bytes(whole); assert same(tiny(dls, d))
    survives(f, whole, data, lambda p: tiny(dls, d), same)

def test_dense_networks_of_another_request(cached, dls, tmp_path):
    d, f, whole, learn = cached; f.write_bytes(whole)
    for kw in (dict(epochs=2), dict(seed=1), dict(lr=.01), dict(model='fc2'), dict(stop=0)):
        other = tiny(dls, tmp_path, **kw); g, = (tmp_path/'dense').iterdir(); g.write_bytes(whole)
        with pytest.raises(DamagedFileError, match=f'path=.*{g.name}.*trained anew'): tiny(dls, tmp_path, **kw)
        g.unlink(); assert equal_models(tiny(dls, tmp_path, **kw).model, other.model); g.unlink()

def test_dense_networks_without_a_checksum(cached, dls, tmp_path):
    d, f, whole, learn = cached; f.write_bytes(whole); t, h = load_tensors(f); (tmp_path/'dense').mkdir()
    g = tmp_path/'dense'/f.name; del h['key']
    old(g, t, h); assert equal_models(tiny(dls, tmp_path).model, learn.model)
    k = 'trained/fc1.weight'
    for tensors, head in [({**t, k: t[k][:3]}, h), ({**t, k: t[k].half()}, h), ({**t, k: torch.zeros(())}, h),
                          ({o:v for o,v in t.items() if o != k}, h), ({**t, 'more': t[k].clone()}, h),
                          (t, {**h, 'kind': 'model'}),
                          (t, {**h, 'history': 3}), (t, {**h, 'history': [{}]*9}), (t, {**h, 'n_fits': 'a'}),
                          (t, {o:v for o,v in h.items() if o != 'history'}), (t, {**h, 'key': 'other'}), (t, [])]:
        old(g, tensors, head)
        with pytest.raises(DamagedFileError, match=g.name): tiny(dls, tmp_path)
