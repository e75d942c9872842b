"Greedy scoring: gradients stay in their block, the programs are the blocks, scores belong to the network's layers."
import copy
from collections import OrderedDict
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from neuronprune.core import UnsupportedLayerError
from neuronprune.data import get_dls
from neuronprune.mip import score
from neuronprune.mip_program import interval, chain, reduce, run
from neuronprune.mip_greedy import (Greedy, auxiliary_head, block_problems, blocks, build_heads, fit_greedy, fit_heads,
                                    greedy_loss, run_block, solve_blocks)
from neuronprune.mip_relax import complete
from neuronprune.mip_solve import solve
from neuronprune.models import build
from neuronprune.pipeline import prune

def shake(model, seed=0):
    "Random biases, batch norm parameters and statistics: on fresh ones mistakes do not show."
    g = torch.Generator().manual_seed(seed)
    rand = lambda t, a, b: t.data.copy_(a + (b-a)*torch.rand(t.shape, generator=g))
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            rand(m.running_mean, -.3, .3); rand(m.running_var, .5, 2)
            if m.affine: rand(m.weight, .5, 1.5); rand(m.bias, -.3, .3)
        elif getattr(m, 'bias', None) is not None: rand(m.bias, -.3, .3)
    return model

def net(seed=0, bn=True, pool=nn.AvgPool2d, c_in=1, n_out=4):
    torch.manual_seed(seed)
    norm = lambda i, w: {f'bn{i}': nn.BatchNorm2d(w)} if bn else {}
    return shake(nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(c_in, 5, 3, padding=1), **norm(1, 5), relu1=nn.ReLU(), pool1=pool(2), drop1=nn.Dropout(.3),
        conv2=nn.Conv2d(5, 6, 3, padding=1, stride=2), **norm(2, 6), relu2=nn.ReLU(),
        conv3=nn.Conv2d(6, 7, 3, padding=1), **norm(3, 7), relu3=nn.ReLU(), pool3=pool(2),
        flatten=nn.Flatten(), fc1=nn.Linear(7, 9), relu_fc1=nn.ReLU(), fc2=nn.Linear(9, n_out)))).eval()

def case(seed=0, n=4, **kw):
    m = net(seed, **kw); torch.manual_seed(seed+100); xb = torch.rand(n, 1, 8, 8)
    return m, shake(build_heads(m, xb, seed=seed), seed+1).eval(), xb, torch.arange(n)

def solved(p): r = solve(reduce(p)); return r, dict(status=r.status, gap=r.gap, n_solved=r.n_solved)

def run_blocks(m, heads, xb, yb, score_aux=True, **kw):
    return solve_blocks(m, heads, xb, yb, dict(loss='margin', **kw), solved, score_aux)

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64, valid_pct=.2)

# Blocks and heads

def test_blocks_cover_the_chain():
    for m in (net(), net(bn=False, pool=nn.MaxPool2d), build('vgg16_dgl', 3, 10, 32), build('vgg7', 3, 10, 32),
              build('lenet5')):
        bs = blocks(m)
        assert [p for b in bs for p,_ in b.before+b.body] == [p for p,_ in m.named_children()]
        assert [b.layer for b in bs] == [k for k,o in m.named_modules() if isinstance(o, nn.Conv2d)]
        assert all(isinstance(b.body[0][1], nn.Conv2d) for b in bs)

@pytest.mark.parametrize('tail,n', [((nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU(), nn.Dropout()), 4),
                                    ((nn.ReLU(), nn.BatchNorm2d(3)), 2),
                                    ((nn.Dropout(), nn.AvgPool2d(2)), 1),
                                    ((nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.ReLU()), 2)])
def test_where_a_block_ends(tail, n):
    m = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), *tail, nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(),
                      nn.LazyLinear(2))
    m.eval()(torch.rand(1, 1, 8, 8)); a, b = blocks(m)
    assert len(a.body) == n and len(b.before) == len(tail)+1-n
    x = torch.rand(2, 1, 8, 8); assert torch.equal(run_block(b, run_block(a, x)), m(x))

def test_functional_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.c = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3), nn.Linear(64, 3)
        def forward(self, x): return self.c(torch.flatten(F.relu(self.b(F.relu(self.a(x)))), 1))
    m, xb = shake(Net()).eval(), torch.rand(3, 1, 8, 8)
    units, *_ = run_blocks(m, build_heads(m, xb), xb, torch.arange(3))
    assert {k:len(v) for k,v in units.items()} == dict(a=3, b=4)

def test_head_of_the_paper():
    h = auxiliary_head(6, (9, 5), 3)
    assert h.pool1.output_size == (3, 2) and h.conv.bias is None and h.bn1.affine is h.bn2.affine is False
    assert h.eval()(torch.rand(2, 6, 9, 5)).shape == (2, 3) and not hasattr(auxiliary_head(6, 9, 3, bn=False), 'bn1')
    m, xb, rng = net(), torch.rand(1, 1, 8, 8), torch.get_rng_state()
    a, b = (build_heads(m, xb, seed=3) for _ in range(2))
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    assert torch.equal(rng, torch.get_rng_state())
    assert len(a) == 2 and len(build_heads(m, xb, n_out=7)[0].fc2.bias) == 7

# Training

@pytest.mark.parametrize('bn', [True, False])
def test_gradients_stay_in_their_block(bn):
    m, heads, xb, yb = case(bn=bn); g, bs = Greedy(m, heads).train(), blocks(m)
    for i in range(len(bs)):
        g.zero_grad(set_to_none=True); F.cross_entropy(g(xb)[:,i], yb).backward()
        for k,b in enumerate(bs):
            ps = [p for _,o in b.before+b.body for p in o.parameters()]
            if k < len(heads): ps += heads[k].parameters()
            if k == i: assert all(p.grad is not None for p in ps) and any(p.grad.abs().max() > 0 for p in ps)
            else: assert all(p.grad is None or not p.grad.any() for p in ps)

def test_one_sgd_on_the_sum_is_one_sgd_per_loss():
    (m, heads, xb, yb), kw = case(bn=False), dict(lr=.1, momentum=.9, nesterov=True, weight_decay=5e-4)
    a, b = (Greedy(*copy.deepcopy((m, heads))) for _ in range(2))
    one = torch.optim.SGD(a.parameters(), **kw)
    heads = [*map(list, (o.parameters() for o in b.heads)), []] # the last block has none
    many = [torch.optim.SGD([p for _,o in k.before+k.body for p in o.parameters()] + h, **kw)
            for k,h in zip(b.parts, heads)]
    for _ in range(4):
        one.zero_grad(); greedy_loss(a.eval()(xb), yb).backward(); one.step()
        b.zero_grad(); out = b.eval()(xb)
        for i,o in enumerate(many): F.cross_entropy(out[:,i], yb).backward(retain_graph=True)
        for o in many: o.step()
    for p,q in zip(a.parameters(), b.parameters()): assert torch.allclose(p, q, atol=1e-6)

def test_fit_greedy_and_prune(dls):
    make = lambda: fit_greedy(build_small(), dls, 6, lr=.05)
    learn, heads = make(); again, _ = make()
    assert all(torch.equal(p, q) for p,q in zip(learn.model.parameters(), again.model.parameters()))
    assert learn.history[-1]['accuracy'] > .8 and set(learn.history[-1]) >= {'c1', 'accuracy'} and learn.rewind.init
    res = prune(learn, 'mip', threshold=.3, variant='greedy', heads=heads, fine_tune_epochs=1, lr=.01, shrink=True)
    assert list(res.scores) == ['c1', 'c2', 'f1'] and res.report is not None

def build_small():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(c1=nn.Conv2d(1, 6, 3, padding=1), b1=nn.BatchNorm2d(6), r1=nn.ReLU(),
                                     p1=nn.AvgPool2d(2), c2=nn.Conv2d(6, 8, 3, padding=1),
                                     b2=nn.BatchNorm2d(8), r2=nn.ReLU(), p2=nn.AvgPool2d(2), flat=nn.Flatten(),
                                     f1=nn.Linear(32, 16), r3=nn.ReLU(), f2=nn.Linear(16, 10)))

def test_fit_heads_leaves_the_network(dls):
    m = shake(build_small()).train(); m.c1.weight.requires_grad_(False)
    before, flags = copy.deepcopy(m.state_dict()), [p.requires_grad for p in m.parameters()]
    heads = fit_heads(m, dls, 1, lr=.05)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and m.training
    assert [p.requires_grad for p in m.parameters()] == flags and all(p.grad is None for p in m.parameters())
    fresh = build_heads(m, torch.rand(1, 1, 8, 8))
    assert len(heads) == 1 and not torch.equal(heads[0].fc2.weight, fresh[0].fc2.weight)

# Programs

@pytest.mark.parametrize('bn,pool', [(True, nn.AvgPool2d), (False, nn.MaxPool2d)])
@pytest.mark.parametrize('score_aux', [True, False])
def test_program_is_block_and_head(bn, pool, score_aux):
    m, heads, xb, yb = case(3, bn=bn, pool=pool)
    with torch.no_grad(): want = Greedy(copy.deepcopy(m).double(), copy.deepcopy(heads).double()).eval()(xb.double())
    out = list(block_problems(m, heads, xb, yb, score_aux=score_aux))
    assert [k for _,k,_ in out] == [['conv1'], ['conv2'], ['conv3', 'fc1']]
    for i,(p,keep,t) in enumerate(out):
        q = reduce(p); z = q.Z@complete(q, np.ones(q.n_s)) + q.z0
        assert np.abs(z - want[:,i].numpy()).max() < 1e-9
        assert set(keep) <= set(p.layers) and (len(p.layers) == (3 if score_aux and i < 2 else len(keep)))

def test_bounds_start_from_the_network():
    m, heads, xb, yb = case(1); steps = chain(m)
    with torch.no_grad(): full = interval(steps, xb.double()-1e-5, xb.double()+1e-5)
    at = [i for i,o in enumerate(steps) if o.kind == 'conv']
    for i,(p,_,t) in zip(at, block_problems(m, heads, xb, yb, max_gates=None)):
        assert t == 1 and all(torch.allclose(a, b, atol=1e-12, rtol=0) for a,b in zip(p.bounds[0], full[i]))
    for p,_,t in block_problems(m, heads, xb, yb, eps=.1, max_gates=2):
        x = p.x
        assert t < 1
        assert sum(int(((l < 0) & (u > 0)).sum()) for o,(l,u) in zip(p.steps, p.bounds) if o.kind == 'relu') <= 2
        for k,o in enumerate(p.steps):
            assert (p.bounds[k][0] <= x+1e-12).all() and (x <= p.bounds[k][1]+1e-12).all(); x = run([o], x)

@pytest.mark.parametrize('score_aux', [True, False])
def test_only_the_networks_layers(score_aux):
    m, heads, xb, yb = case(2); units, meta, ps = run_blocks(m, heads, xb, yb, score_aux)
    assert {k:len(v) for k,v in units.items()} == dict(conv1=5, conv2=6, conv3=7, fc1=9)
    assert list(units) == ['conv1', 'conv2', 'conv3', 'fc1']
    assert all((0 <= v.min()) and (v.max() <= 1) for v in units.values())
    assert len(ps) == 3 and [o['layer'] for o in meta['parts']] == ['conv1', 'conv2', 'conv3']
    assert meta['status'] == 'optimal'

def test_chosen_layers():
    m, heads, xb, yb = case(2); units, _, ps = run_blocks(m, heads, xb, yb, layers=['conv2', 'fc1'])
    assert list(units) == ['conv2', 'fc1'] and len(ps) == 2
    with pytest.raises(ValueError, match="layers="): run_blocks(m, heads, xb, yb, start='conv2')

@pytest.mark.parametrize('score_aux', [True, False])
def test_permuted_filters(score_aux):
    m, heads, xb, yb = case(5); g = torch.Generator().manual_seed(0); i = torch.randperm(6, generator=g)
    a, *_ = run_blocks(m, heads, xb, yb, score_aux)
    n, hs = copy.deepcopy((m, heads))
    for o in (n.conv2, n.bn2):
        for k in ('weight', 'bias', 'running_mean', 'running_var'):
            if getattr(o, k, None) is not None: getattr(o, k).data = getattr(o, k).data[i]
    n.conv3.weight.data = n.conv3.weight.data[:,i]; hs[1].conv.weight.data = hs[1].conv.weight.data[:,i]
    b, *_ = run_blocks(n, hs, xb, yb, score_aux)
    assert torch.allclose(a['conv2'][i], b['conv2'], atol=2e-3)
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a if k != 'conv2')

def test_dead_filters_are_free():
    m, heads, xb, yb = case(6); m.bn2.bias.data[2] = -50
    units, *_ = run_blocks(m, heads, xb, yb)
    assert units['conv2'][2] < 1e-3

def test_left_as_found(dls):
    m, heads, xb, yb = case(7); m.train(); heads.train(); m.conv1.weight.requires_grad_(False)
    state, hooks = copy.deepcopy((m.state_dict(), heads.state_dict())), [len(o._forward_hooks) for o in m.modules()]
    rng = torch.get_rng_state()
    s = score(m, batch=(xb, yb), variant='greedy', heads=heads, allow_imbalance=True, progress=False)
    assert m.training and heads.training and all(o.training for o in m.modules())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[0][k]) for k,v in m.state_dict().items())
    assert all(torch.equal(v, state[1][k]) for k,v in heads.state_dict().items())
    assert not m.conv1.weight.requires_grad and [len(o._forward_hooks) for o in m.modules()] == hooks
    assert s.meta['programs'] == 3

def test_whole_flow_by_name():
    m, heads, xb, yb = case(8); s = score(m, batch=(xb, yb), variant='greedy', heads=heads, score_aux=False)
    assert list(s) == ['conv1', 'conv2', 'conv3', 'fc1'] and s['conv1'].dtype == torch.float32 and 'fc2' in s.skipped
    one = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)).eval()
    assert list(score(one, batch=(xb, yb), variant='greedy', heads=build_heads(one, xb))) == ['0']

# Slips

def test_wrong_heads():
    m, heads, xb, yb = case(); go = lambda h, n=m: list(block_problems(n, h, xb, yb))
    with pytest.raises(ValueError, match='fit_greedy.*fit_heads'): go(None)
    with pytest.raises(ValueError, match='1 for 3 blocks; expected 2'): go(heads[:1])
    with pytest.raises(TypeError, match='heads'): go(7)
    with pytest.raises(ValueError, match=r"heads\[0\]: cannot read what 'conv1' gives, 5 channels"):
        go(nn.ModuleList([heads[1], heads[1]]))
    with pytest.raises(ValueError, match=r"heads\[0\]: outputs of shape \(9,\) for 4 classes"):
        go(build_heads(m, xb, n_out=9))
    with pytest.raises(ValueError, match='heads=None'): score(m, batch=(xb, yb), variant='greedy')

def test_wrong_networks():
    with pytest.raises(ValueError, match='no nn.Conv2d'): blocks(build('fc3'))
    with pytest.raises(UnsupportedLayerError, match='branches and sums'): blocks(build('resnet18', 1, 10, 32))
    with pytest.raises(UnsupportedLayerError, match='GELU'): blocks(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU()))
    with pytest.raises(TypeError, match='n_out'): build_heads(net(), torch.rand(1, 1, 8, 8), n_out=2.5)
