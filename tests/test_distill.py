"""Learning from a teacher: the loss against torch's own, who is asked when, and through `fine_tune` and `prune`."""
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.losses import CrossEntropyLossFlat
from neuronprune.core import generator
from neuronprune.distill import DistillCallback, matched, soft_loss
from neuronprune.job import job
from neuronprune.pipeline import prune
from neuronprune.report import Report
from neuronprune.retrain import fine_tune, held
from neuronprune.train import as_learner, fit
from test_while_training import Bf16, conv, loaders, net, start

@pytest.mark.parametrize('shape', [(7, 5), (3, 5, 4, 4)])
@pytest.mark.parametrize('t', [1., 4.])
def test_soft_loss(shape, t):
    "torch's KL over all that is classified, and at T=1 the cross-entropy of soft labels up to a constant."
    z, v = torch.randn(2, *shape, generator=generator(0)).unbind(0); z.requires_grad_()
    flat = lambda o: o.movedim(1, -1).flatten(0, -2)
    want = t*t*F.kl_div(F.log_softmax(flat(z)/t, 1), F.softmax(flat(v)/t, 1), reduction='batchmean')
    assert torch.allclose(soft_loss(z, v, t), want, atol=1e-6)
    if t == 1:
        a, = torch.autograd.grad(soft_loss(z, v, 1.), z); b, = torch.autograd.grad(F.cross_entropy(z, v.softmax(1)), z)
        assert torch.allclose(a, b, atol=1e-6)

class Teacher(nn.Module):
    "Counts its calls, and in which state it was asked."
    def __init__(self, out=10): super().__init__(); self.fc, self.seen = nn.Linear(64, out), []
    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled(), len(x))); return self.fc(x.flatten(1))

def test_the_teacher_is_asked_once_a_batch():
    teacher = Teacher().train(); learn = start(); before = {k:v.clone() for k,v in teacher.state_dict().items()}
    fit(learn, 2, cbs=DistillCallback(teacher))
    assert teacher.seen == [(False, False, 32)]*8 and teacher.training
    assert all(torch.equal(v, before[k]) for k,v in teacher.state_dict().items()) and teacher.fc.weight.grad is None
    teacher.seen.clear(); fit(start(), 1, cbs=DistillCallback(teacher, alpha=0)); assert teacher.seen == []

def test_shares():
    "alpha = 0 is the plain training, bit for bit; alpha = 1 looks at no label."
    plain, none, all_, other = (start() for _ in range(4)); teacher = fit(start(), 4)
    fit(plain, 1); fit(none, 1, cbs=DistillCallback(teacher, alpha=0))
    same = lambda a, b: all(map(torch.equal, a.model.parameters(), b.model.parameters()))
    assert same(plain, none)
    other.loss_func = lambda z, y: F.cross_entropy(z, (y+1)%10)
    for l in (all_, other): fit(l, 1, cbs=DistillCallback(teacher, alpha=1))
    assert same(all_, other) and not same(plain, all_)

def test_the_loss_is_the_mixture():
    teacher, seen = Teacher(), []
    class See(Callback):
        order = 20
        def after_loss(self):
            if self.training:
                t = soft_loss(self.pred.detach(), teacher(*self.xb).detach(), 2.)
                seen.append((float(self.loss.detach()), float(.7*F.cross_entropy(self.pred.detach(), *self.yb) + .3*t)))
    fit(start(), 1, cbs=[DistillCallback(teacher, 2., .3), See()])
    assert len(seen) == 4 and all(a == pytest.approx(b, rel=1e-5) for a,b in seen)

def test_regression():
    "Numbers: the squared distance of the outputs."
    x, y = torch.rand(64, 1, 8, 8, generator=generator(0)), torch.rand(64, 1, generator=generator(1))
    dl = torch.utils.data.DataLoader(list(zip(x, y)), batch_size=32)
    flat = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    teacher, learn = flat(), as_learner(flat(), dl, dl, opt='sgd', lr=.05)
    gap = lambda: float((teacher(x)-learn.model(x)).detach().square().mean())
    start_ = gap(); fit(learn, 30, cbs=DistillCallback(teacher, alpha=1.)); assert gap() < start_/20
    assert float(matched(torch.ones(2, 1), torch.zeros(2, 1), (y[:2],), 4.)) == 1.

@pytest.mark.parametrize('out', [9, 1])
def test_other_outputs_are_refused_before_anything_is_trained(out):
    learn = start(); before = learn.model[0].weight.clone()
    with pytest.raises(ValueError, match='teacher: outputs'): fit(learn, 1, cbs=DistillCallback(Teacher(out)))
    assert torch.equal(before, learn.model[0].weight)
    with pytest.raises(ValueError, match='is the network that is trained'): fit(learn, 1, cbs=DistillCallback(learn))

@pytest.mark.filterwarnings('ignore:CUDA is not available')
@pytest.mark.parametrize('cb', [lambda: Bf16('bf16'), lambda: MixUp(1.)])
def test_beside_other_callbacks(cb):
    learn, teacher = start(), Teacher(); learn.loss_func = CrossEntropyLossFlat()
    fit(learn, 1, cbs=[cb(), DistillCallback(teacher)])
    assert len(teacher.seen) == 4 and not torch.is_autocast_enabled('cpu')

def test_through_fine_tune():
    from neuronprune.allocate import allocate
    from neuronprune.core import methods
    learn, teacher = start(), fit(start(), 3); mask = allocate(methods()['magnitude'](learn.model, None), .8)
    plain = fine_tune(start(), mask, 2); taught = fine_tune(learn, mask, 2, teacher=teacher, temperature=2., alpha=.9)
    assert held(taught) and not taught.model[0].weight[~mask['0']].any()
    assert not torch.equal(plain.model[0].weight, taught.model[0].weight)
    assert not [o for o in learn.cbs if isinstance(o, DistillCallback)], 'for this training only'

def test_through_prune_and_records(tmp_path):
    "The teacher is in the record by name; a folder knows another teacher from this one."
    learn = fit(start(), 2)
    args = dict(fine_tune_epochs=1, latency=False, folder=tmp_path/'a')
    res = prune(learn, 'magnitude', .8, tune_args=dict(teacher='dense', alpha=.9), **args)
    res.report.save(tmp_path/'r.json'); said = Report.load(tmp_path/'r.json').extra['teacher']
    assert said.startswith('Sequential ') and said in (tmp_path/'a'/'rows.json').read_text()
    again = prune(fit(start(), 2), 'magnitude', .8, tune_args=dict(teacher='dense', alpha=.9), **args)
    assert again.report.tuned == res.report.tuned
    with pytest.raises(ValueError, match='another folder'):
        prune(fit(start(), 2), 'magnitude', .8, tune_args=dict(teacher=Teacher(), alpha=.9), **args)

def test_in_a_job(tmp_path):
    "A file of parameters can say it, too."
    p = dict(model='lenet300', sparsity=.9, epochs=1, fine_tune_epochs=1, n_train=128)
    a, b = (job('magnitude', tune_args=dict(teacher='dense', alpha=1.), **p), job('magnitude', **p))
    assert a.id != b.id
    res = a.run(tmp_path); assert 'teacher' in res.report.extra
