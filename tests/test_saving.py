"""A pruned network as a file, and back: the same tensors, the same widths, nothing believed and nothing unpickled."""
import importlib, json, math, re, subprocess, sys
from pathlib import Path
import pytest, torch, yaml
from torch import nn
from neuronprune import saving, surgery
from neuronprune.card import model_card, write_card
from neuronprune.core import generator, layers
from neuronprune.data import get_dls
from neuronprune.evaluation import Evaluation
from neuronprune.files import DamagedFileError
from neuronprune.graph import trace
from neuronprune.masks import Mask, Scores
from neuronprune.models import build
from neuronprune.pipeline import prune
from neuronprune.report import Report
from neuronprune.surgery import Factored, difference, load, save, shrink
from neuronprune.train import learner
from test_knapsack import Words
from test_surgery import L, check, mask_of, quiet, random_scores, randomise, rows, size_of, thin, widths, zoo

@pytest.mark.parametrize('name', ['lenet5', 'vgg16_dgl', 'resnet20', 'densenet22', 'mobilenet_v3_small'])
def test_save_load(zoo, name, tmp_path):
    model, xb, g = zoo(name); small = shrink(model, quiet(random_scores(model, g, 'channel'), .5), xb)
    save(small, tmp_path/'m'); back = load(tmp_path/'m')
    a, b = small.state_dict(), back.state_dict()
    assert (a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and difference(small, back, xb) == 0
            and back.spec == model.spec)
    for m in back.modules(): assert not isinstance(m, nn.BatchNorm2d) or m.num_features == len(m.running_mean)

def test_load_in_a_process_that_cannot_unpickle(zoo, tmp_path):
    model, xb, g = zoo('resnet20'); small = shrink(model, quiet(random_scores(model, g, 'channel'), .5), xb)
    save(small, tmp_path/'zoo')
    own = nn.Sequential(L(3, 4), nn.ReLU(), L(4, 2)); x = torch.rand(5, 3)
    tiny = shrink(own, mask_of(own, x, **{'0': [True, False, True, True]}), x); save(tiny, tmp_path/'own')
    with torch.no_grad(): want = small(xb).tolist(), tiny(x).tolist()
    code = f"""
import sys, pickle, json, torch; from torch import nn; from neuronprune.surgery import load; import neuronprune.models
def no(*a, **k): raise AssertionError('unpickled')
class No(pickle.Unpickler): __init__ = no # a class: torch imports modules at its first use, and some inherit from it
pickle.load = pickle.loads = torch.load = no; pickle.Unpickler = No
sys.addaudithook(lambda e, a: no() if e == 'pickle.find_class' else None)
a, b = load({str(tmp_path/'zoo')!r}).eval(), load({str(tmp_path/'own')!r},
    nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
with torch.no_grad():
    print(json.dumps([a(torch.tensor({xb.tolist()!r})).tolist(), b(torch.tensor({x.tolist()!r})).tolist()]))"""
    r = subprocess.run([sys.executable, '-'], input=code, capture_output=True, text=True,
                       cwd=Path(surgery.__file__).parents[1])
    assert r.returncode == 0, r.stderr
    for a, b in zip(json.loads(r.stdout), want): assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-6)
    with pytest.raises(ValueError, match='expected model='): load(tmp_path/'own')

def test_load_errors(tmp_path):
    Scores({'a': torch.rand(2)}, 'channel').save(tmp_path/'s')
    with pytest.raises(ValueError, match="holds 'Scores', expected .model."): load(tmp_path/'s')
    with pytest.raises(FileNotFoundError): load(tmp_path/'none')

def test_specs_with_arguments_come_back(tmp_path):
    m = build('basiccnn', 1, 10, 19, seed=0, widths=(4, 4, 8, 8)); save(m, tmp_path/'a')
    assert [o.weight.shape for o in layers(load(tmp_path/'a')).values()] == [o.weight.shape for o in layers(m).values()]

def test_specs_with_classes_need_a_model(tmp_path):
    m = build('lenet5', 1, 10, 16, seed=0, pool=nn.MaxPool2d); save(m, tmp_path/'b')
    with pytest.raises(ValueError, match='expected model='): load(tmp_path/'b')
    assert difference(m, load(tmp_path/'b', build('lenet5', 1, 10, 16, pool=nn.MaxPool2d)),
                      torch.rand(2, 1, 16, 16)) == 0

@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('name', ['lenet5', 'resnet20', 'densenet22', 'mobilenet_v3_small'])
def test_factored_models_come_back(zoo, name, k, tmp_path):
    model, xb, g = zoo(name); both = shrink(model, quiet(random_scores(model, g, 'channel'), .3), xb)
    small = shrink(both, thin(both, k=k), xb); save(small, tmp_path/'m'); back = load(tmp_path/'m').eval()
    a, b = small.state_dict(), back.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[o], b[o]) for o in a) and difference(small, back, xb) == 0
    assert ([str(m) for m in small.modules() if isinstance(m, Factored)]
            == [str(m) for m in back.modules() if isinstance(m, Factored)])
    assert (sum(isinstance(m, Factored) for m in back.modules())
            == sum(isinstance(m, Factored) for m in small.modules()) > 2)

def test_factored_models_of_ones_own_come_back(tmp_path):
    m = nn.Sequential(L(8, 8), nn.ReLU(), L(8, 3)); x = torch.rand(4, 8); small = shrink(m, thin(m), x)
    save(small, tmp_path/'m')
    assert difference(small, load(tmp_path/'m', nn.Sequential(L(8, 8), nn.ReLU(), L(8, 3))), x) == 0

def test_a_width_that_the_code_keeps_comes_back(tmp_path):
    """`reshape(-1, self.n)` needs the new width: `shrink` sets it, the file says it,
    `load` sets it in a network as it was built."""
    class Own(nn.Module):
        def __init__(self):
            super().__init__(); self.n = 8*4; self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(self.n, 3)
        def forward(self, x): return self.fc(self.conv(x).relu().reshape(-1, self.n))
    m, x = randomise(Own(), torch.randn(6, 1, 4, 4)), torch.randn(5, 1, 4, 4)
    small = check(m, rows(m, conv=[0, 3, 5]), x)
    assert small.n == 5*4 and m.n == 8*4 and widths(small) == [(5, 1), (3, 20)]
    save(small, tmp_path/'own'); back = load(tmp_path/'own', Own()).eval()
    assert back.n == 5*4 and torch.equal(back(x), small.eval()(x))
    save(back, tmp_path/'again'); again = load(tmp_path/'again', Own())
    assert again.n == 5*4, 'of a loaded network too'
    other = Own(); del other.n
    with pytest.raises(ValueError, match="own.*widths.*'n'"): load(tmp_path/'own', other)

# ---- names of libraries

def cut(model, xb, s=.4, seed=0):
    "A random share of all channels taken out, with random numbers everywhere that could hide a mistake."
    model = randomise(model, xb, seed); g = trace(model, xb)
    return shrink(model, quiet(random_scores(model, g, 'channel', seed), s), xb)

def same(a, b, xb):
    a, b = a.eval(), b.eval(); x, y = a.state_dict(), b.state_dict()
    return (list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x) and difference(a, b, xb) == 0
            and not any(t.is_meta for t in [*b.parameters(), *b.buffers()]))

def no_downloads(monkeypatch):
    monkeypatch.setattr('torch.hub.load_state_dict_from_url', lambda *a, **k: pytest.fail('a download'))
    monkeypatch.setattr('socket.socket.connect', lambda *a, **k: pytest.fail('a connection'))

TORCHVISION = dict(resnet18=16, mobilenet_v3_small=16, regnet_x_400mf=32, squeezenet1_1=32)

@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvision_names_come_back(name, tmp_path, monkeypatch):
    no_downloads(monkeypatch); size = TORCHVISION[name]
    dense, xb = build(f'torchvision/{name}', 3, 7, size, seed=0), torch.randn(6, 3, size, size)
    small = cut(cut(dense, xb), xb, seed=1); save(small, tmp_path/'m')
    before = torch.get_rng_state(); back = load(tmp_path/'m')
    assert torch.equal(before, torch.get_rng_state()) and same(small, back, xb) and back.spec == dense.spec
    assert list(back.state_dict()) == list(dense.state_dict()) and size_of(back) < .6*size_of(dense)

@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_vit', 'test_convnext', 'test_coatnet'])
def test_timm_names_come_back(name, tmp_path, monkeypatch):
    pytest.importorskip('timm'); no_downloads(monkeypatch)
    dense, xb = build(f'timm/{name}', 3, 7, 160, seed=0), torch.randn(2, 3, 160, 160)
    small = cut(dense, xb); save(small, tmp_path/'m'); back = load(tmp_path/'m')
    assert same(small, back, xb) and back.spec == dense.spec and list(back.state_dict()) == list(dense.state_dict())

def test_a_library_that_is_missing_is_no_damaged_file(tmp_path, monkeypatch):
    m = nn.Linear(2, 2); m.spec = dict(name='timm/resnet10t', c_in=3, n_out=7, size=32); save(m, tmp_path/'m')
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match='pip install timm'): load(tmp_path/'m')

@pytest.mark.parametrize('more', [dict(weights='DEFAULT'), dict(stem='full'), dict(pretrained=True), dict(n_out=10**18),
                                  dict(n_out=8), dict(c_in=1), dict(size=10**9), dict(name='torchvision/resnet34'),
                                  dict(name='torchvision/vit_h_14'), dict(name='torchvision/resnet'),
                                  dict(name='torchvision/'), dict(name='/etc/passwd'), dict(name='os/system')])
def test_recipes_of_libraries_that_lie(more, tmp_path, monkeypatch):
    no_downloads(monkeypatch); m = build('torchvision/resnet18', 3, 7, 32, seed=0)
    m.spec = {**m.spec, **more}; save(m, tmp_path/'m'); before = torch.get_rng_state()
    with pytest.raises(DamagedFileError, match='path=.*/m'): load(tmp_path/'m')
    assert torch.equal(before, torch.get_rng_state())
    assert nn.Linear(2, 2).weight.device.type == 'cpu', 'modules are made as usual again'

def test_a_network_of_a_library_is_made_without_memory():
    made = saving._rebuild(dict(name='torchvision/regnet_x_400mf', c_in=3, n_out=7, size=32), {'w': torch.zeros(9)})
    assert all(p.is_meta for p in made.parameters()) and not any(b.is_meta for b in made.buffers())

# ---- in a fresh process, with the card

TIMM = ['timm/test_resnet'] if importlib.util.find_spec('timm') else []
SOURCES = ['lenet5', 'torchvision/mobilenet_v3_small', *TIMM]

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Networks pruned twice by the pipeline and written to folders: [(folder, result, inputs, outputs)]."
    res, dls = [], get_dls('digits', size=16, bs=64, n_train=128)
    for name in SOURCES:
        learn = learner(build(name, dls.c_in, dls.n_out, dls.size, seed=0), dls, seed=0)
        args, d = dict(unit='channel', fine_tune_epochs=0, shrink=True, latency=False), tmp_path_factory.mktemp('run')
        prune(learn, 'magnitude', .2, **args); r = prune(learn, 'magnitude', .4, **args); r.save(d)
        xb = torch.randn(4, dls.c_in, dls.size, dls.size, generator=generator(0))
        with torch.no_grad(): res.append((d, r, xb, r.model.eval()(xb)))
    return res

def test_saved_results_load_in_a_fresh_process(runs):
    names = [(str(d/'model.safetensors'), list(xb.shape)) for d,_,xb,_ in runs]
    code = f"""
import json, torch; from neuronprune.surgery import load; from neuronprune.core import generator
with torch.no_grad():
    print(json.dumps([load(p).eval()(torch.randn(s, generator=generator(0))).tolist() for p,s in {names!r}]))"""
    r = subprocess.run([sys.executable, '-W', 'ignore', '-'], input=code, capture_output=True, text=True,
                       cwd=Path(surgery.__file__).parents[1])
    assert r.returncode == 0, r.stderr
    for got, (*_, want) in zip(json.loads(r.stdout), runs, strict=True): assert torch.equal(torch.tensor(got), want)

def front(text):
    "(what the YAML front matter holds, the rest)."
    rule, head, rest = text.split('---\n', 2); assert rule == ''
    return yaml.safe_load(head), rest

def test_a_saved_result_has_its_card(runs):
    for d,r,*_ in runs:
        head, text = front((d/'README.md').read_text(encoding='utf-8')); last = r.report.final
        score = head['model-index'][0]['results'][0]
        assert head['library_name'] == 'neuronprune' and head['tags'] == ['pruning', 'magnitude', 'channel']
        assert score['dataset']['name'] == 'digits' and score['metrics'] == [dict(type='accuracy', value=last.accuracy)]
        assert f'# {r.report.model} on digits, pruned' in text and "load('model.safetensors').eval()" in text
        for v in r.report.to_frame()['value']: assert f'| {v} |' in text
        for k,n in r.report.layers.items(): assert f'| {k} | {r.report.dense_layers[k]:,} | {n:,} |' in text

def test_the_code_on_the_card_runs(runs, monkeypatch):
    d, r, xb, want = runs[0]; monkeypatch.chdir(d); own = {}
    exec((d/'README.md').read_text(encoding='utf-8').split('```python\n')[1].split('```')[0], own)
    assert torch.equal(own['model'](xb), want)

@pytest.mark.parametrize('report', [Report(), Report(method='a: b', model='{"x": [1]}\n---\n# no', dataset='no'),
    Report(method='yes', tuned=Evaluation(None, None, loss=.5, metrics=dict(dice=.25, nan=math.nan))),
    Report(model='<script>|', method_args={'f': 'x|y\nz'}, tuned=Evaluation(3, 9), data=dict(c_in=3), dataset='1e3')])
def test_cards_of_any_record(report):
    head, text = front(model_card(report))
    assert head['library_name'] == 'neuronprune' and head['tags'] == ['pruning', *filter(None, [report.method])]
    assert head.get('datasets', ['']) == [report.dataset] and ('model-index' in head) == (report.dataset == '1e3')
    assert '<script>' not in text and text.count('\n# ') == 1
    rows = [l for l in text.splitlines() if l.startswith('|')]
    assert rows and all(len(re.findall(r'(?<!\\)\|', l)) == 4 for l in rows)

def test_a_readme_of_ones_own_stays(tmp_path):
    (tmp_path/'README.md').write_text('---\ntitle: mine\n---\n')
    with pytest.warns(UserWarning, match='is left as it is'): write_card(Report(method='x'), tmp_path)
    assert (tmp_path/'README.md').read_text() == '---\ntitle: mine\n---\n'
    (tmp_path/'README.md').unlink(); write_card(Report(method='x'), tmp_path); write_card(Report(method='y'), tmp_path)
    assert '`y` removed' in (tmp_path/'README.md').read_text() and len(list(tmp_path.iterdir())) == 1

def test_layers_that_share_a_weight_share_it_when_cut_and_when_read(tmp_path):
    net, x = Words(), torch.randint(7, (2, 5), generator=generator(0))
    mask = Mask({'b': torch.arange(10) > 2}, 'channel', graph=trace(net, x))
    small = shrink(net, mask, x); save(small, tmp_path/'m'); back = load(tmp_path/'m', Words())
    for m in (small, back):
        assert m.a.weight is m.c.weight and m.a.weight.shape == (12, 7) and m.out.weight is m.emb.weight
    assert torch.equal(small(x), back(x))
