"""The zoo: every network runs at its smallest side, is rebuilt from its spec, and refuses what it cannot do."""
import copy, pytest, torch
from torch import nn
from torchvision import models as tvm
from neuronprune.core import layers
from neuronprune.models import ZOO, build, min_size, models, resnet_cifar, vgg, wide_resnet

BIG = ('resnet101', 'resnet110', 'densenet121', 'wrn16_8', 'vgg19', 'vgg19_bn', 'resnet34', 'resnet50', 'vgg16_dgl',
       'vgg16_mint', 'vgg16', 'alexnet')
SMALL = [k for k in ZOO if k not in BIG]

@pytest.mark.parametrize('name', SMALL)
def test_runs_at_its_smallest_side_and_trains(name):
    s = min_size(name)
    model = build(name, 1, 7, s, seed=0)
    out = model(torch.randn(2, 1, s, s))
    assert out.shape == (2, 7) and torch.isfinite(out).all()
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if s > 1:
        with pytest.raises(ValueError, match=f'at least {s} pixels'): build(name, 1, 7, s-1)

@pytest.mark.parametrize('name', BIG)
def test_big_ones_run_at_their_smallest_side(name):
    s = min_size(name)
    with torch.device('meta'): model = build(name, 3, 5, s)
    assert model(torch.empty(2, 3, s, s, device='meta')).shape == (2, 5)

@pytest.mark.parametrize('name', SMALL)
def test_spec_rebuilds(name):
    a = build(name, 3, 4, 32, seed=1)
    b = build(**a.spec); b.load_state_dict(a.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(a.eval()(x), b.eval()(x))
    assert copy.deepcopy(a).spec == a.spec and 'spec' not in a.state_dict()

def test_seed_is_reproducible_and_local():
    before = torch.get_rng_state()
    a,b,c = (build('resnet20', 3, 10, 32, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.conv1.weight, c.conv1.weight)

def test_stems():
    for name in ('resnet18', 'squeezenet1_1', 'alexnet'):
        with torch.device('meta'):
            small,full = (build(name, 3, 10, 32),
                          build(name, 3, 10, 32, stem='full') if name != 'alexnet' else build(name, 3, 10, 65))
        first = lambda m: layers(m)[next(iter(layers(m)))]
        assert first(small).stride == (1, 1) and first(full).stride != (1, 1)
    with pytest.raises(ValueError, match='stem'): build('resnet18', stem='tiny')

def test_option_a_still_fits_after_channels_are_gone():
    model = build('resnet20', 3, 10, 8, seed=0).eval()
    x = torch.randn(2, 3, 8, 8)
    drop = torch.tensor([20, 31])
    keep = torch.tensor([i for i in range(32) if i not in drop])
    masked,small = copy.deepcopy(model),copy.deepcopy(model)
    for m in masked.layer2:
        for p in (m.bn2.weight, m.bn2.bias): p.data[drop] = 0
    for p in (masked.layer3[0].conv1.weight,): p.data[:, drop] = 0
    for m in masked.layer3: m.bn2.weight.data[drop] = 0; m.bn2.bias.data[drop] = 0
    masked.fc.weight.data[:, drop] = 0
    def cut(o, name, dim, idx): setattr(o, name, nn.Parameter(getattr(o, name).data.index_select(dim, idx)))
    def cut_bn(o, idx):
        for n in ('weight', 'bias'): cut(o, n, 0, idx)
        o.running_mean,o.running_var = o.running_mean[idx],o.running_var[idx]
    keep3 = torch.tensor([i for i in range(64) if i not in drop])
    for j,(stage,idx) in enumerate(((small.layer2, keep), (small.layer3, keep3))):
        for i,m in enumerate(stage):
            if i: cut(m.conv1, 'weight', 1, idx)
            elif j: cut(m.conv1, 'weight', 1, keep)
            cut(m.conv2, 'weight', 0, idx); cut_bn(m.bn2, idx)
    cut(small.fc, 'weight', 1, keep3)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(masked(x), model(x))

@pytest.mark.parametrize('call,said', [(lambda: build('resnet-18'), "did you mean 'resnet18'"),
                                       (lambda: build('lenet5', size=8), 'up-sample'),
    (lambda: build('mlp', size=0), 'size=0'), (lambda: build('mlp', c_in=True), 'c_in'),
                                       (lambda: build('mlp', n_out=2.), 'n_out'),
    (lambda: build('mlp', init='zeros'), 'kaiming'),
                                       (lambda: build('vgg16', size=32, weights='IMAGENET1K_V1'), 'none for vgg16'),
    (lambda: build('resnet18', weights='IMAGENET1K_V9', size=224), 'IMAGENET1K_V1'),
                                       (lambda: min_size('vgg61'), 'vgg16'),
    (lambda: build('mlp', n_out=10**12), 'n_out=1000000000000: expected'), (lambda: build(
    'mlp', n_out=10**20), 'n_out=1'), (lambda: build('mlp', size=10**9), 'size=1000000000'),
    (lambda: build('mlp', c_in=10**13), 'c_in=1'), (lambda: build('densenet22', 3, growth=10**9, size=32), 'growth=1'),
                                       (lambda: build('vgg16', 3, 10, 32, head=(10**9,)), 'GiB'),
    (lambda: build('vgg16', 3, 10, 32, head=5), 'head=5'),
                                       (lambda: build('vgg16', 3, 10, 32, head=[5]), 'head=5: expected a tuple'),
                                       (lambda: build('vgg16', 3, 10, 32, head=(.5,)), 'head=0.5'),
    (lambda: build('vgg16', 3, 10, 32, head='ab'), "head='ab'"),
                                       (lambda: build('vgg16', 3, 10, 32, hed=(5,)), "did you mean 'head'"),
                                       (lambda: build('resnet20', 3, head=(5,), size=32), 'head: resnet20 takes no'),
    (lambda: build('mlp', dropout=50), 'did you mean 0.5'), (lambda: build('mlp', dropout='a'), 'dropout'),
                                       (lambda: build('mlp', bias=1), 'bias'),
                                       (lambda: build('mlp', widths=(3,)), "mlp: argument='widths'"),
    (lambda: build('lenet5', size=32, pool=3), 'pool=3'), (lambda: build('lenet5', ks=400), 'ks=400'), (lambda: build(
    'lenet5', ks=0), 'ks=0'), (lambda: build('basiccnn', widths=(3, 4), size=32), 'four numbers'),
    (lambda: build('densenet22', depth=23, size=32), 'depth=23'),
                                       (lambda: build('vgg16', bn='yes', size=32), "bn='yes'"), (lambda: build(
    'vgg7', out_side=0, size=32), 'out_side=0'), (lambda: build([]), 'name: expected a name'),
    (lambda: min_size('vgg16', head=[5]), 'head'), (lambda: min_size({}), 'name: expected a name'),
                                       (lambda: resnet_cifar(21), 'depth=21'), (lambda: wide_resnet(17, 1), 'depth=17'),
                                       (lambda: models()['vgg61'], 'vgg16')])
def test_errors(call, said):
    with pytest.raises((ValueError, TypeError), match=said): call()

def test_pretrained_weights_without_a_download(monkeypatch):
    donor = build('squeezenet1_1', 3, 1000, 224, seed=0)
    class Fake:
        __members__ = dict(DEFAULT=None)
        def __getitem__(self, k): return self
        def get_state_dict(self, **kw): return copy.deepcopy(donor.state_dict())
    monkeypatch.setattr(tvm, 'get_model_weights', lambda name: Fake())
    same,grey = (build('squeezenet1_1', 3, 1000, 224, weights='DEFAULT'),
                 build('squeezenet1_1', 1, 5, 224, weights='DEFAULT'))
    assert all(torch.equal(p, q) for p,q in zip(same.state_dict().values(), donor.state_dict().values()))
    x = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(grey.features(x), same.features(x.expand(-1, 3, -1, -1)))
    assert grey.classifier[1].out_channels == 5 and 'weights' not in grey.spec

def test_frame_has_a_row_per_network():
    f = models().frame()
    assert list(f.index) == list(ZOO) == list(models()) and (f[['params', 'macs', 'min_size']] > 0).all().all()
    assert '<table' in models()._repr_html_()
    assert f.loc['resnet50', 'macs']//10**6 == 4089 and f.loc['wrn16_8', 'params'] == 10_961_370
