"""A pruned network as a file, and back: the same tensors, the same widths, nothing believed and nothing unpickled."""
import json, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from neuronprune import surgery
from neuronprune.core import layers
from neuronprune.masks import Scores
from neuronprune.models import build
from neuronprune.surgery import Factored, difference, load, save, shrink
from test_surgery import L, check, mask_of, quiet, random_scores, randomise, rows, thin, widths, zoo

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
